// Copies into shared memory that nobody waits for before `wait_for_copies`: a loop of them costs
// one memory latency.
#pragma once

#include "common.cuh"

namespace cryoalign {

// One float, or zero; `from` must be an address all the same.
__device__ __forceinline__ void copy_or_zero(float* to, const float* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(there ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void copy8(uint2* to, const uint2* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

// This thread's copies are there; a barrier tells of the others'.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

}  // namespace cryoalign
