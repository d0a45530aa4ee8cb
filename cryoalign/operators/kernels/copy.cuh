// Asynchronous copies into shared memory, which are complete after `wait_for_copies`. A loop of
// them takes the time of one memory latency.
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

// Waits for the copies of this thread. A barrier is needed for those of the other threads.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

}  // namespace cryoalign
