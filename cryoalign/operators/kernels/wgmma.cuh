// The matrix product of a warpgroup on the tensor cores of Hopper cards (sm_90a).
#pragma once

#include "common.cuh"

namespace cryoalign {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// D (64 x 32, fp32) = A B, or D += A B if `add` is not 0. A (64 x 16, fp16) is in registers and
// B (16 x 32, fp16) in shared memory, given by its descriptor.
__device__ __forceinline__ void wgmma(float (&d)[16], const uint4& a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"
      "{%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(add));
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace cryoalign
