// What the two search kernels share: their task, and how a peak is kept and written.

#pragma once

#include <cfloat>

#include "common.cuh"

namespace cryoalign {

struct Task {
  const uint4* particles;        // (particle blocks, shifts, F, 32), see common.cuh
  const uint4* references;       // (reference blocks, F, 32)
  const uint4* weights;          // (row blocks, 4, k_steps, 32): the inverse transform
  const float* scale;            // (8 particle blocks, shifts)
  const float* reference_scale;  // (8 reference blocks)
  float* score;                  // (2, n, k, hands): the best, and the best of another shift
  int32_t* shift;                // (2, n, k, hands); -1 where there is no other
  int64_t n, k, particle_blocks, reference_blocks;
  int shifts, hands, first_hand, angles;
  int row_blocks;   // of 16 angles, of a quarter turn
  int k_steps;      // of 16 m' of one parity
  float sharpness;  // log2(e) / T
  Layout layout;
};

// The Hopper kernel, if this card and these sizes suit it; else false and nothing done.
bool search_hopper(const Task& task, cudaStream_t stream);

#ifdef __CUDACC__

// The best of the four angles of one row: see search.cu.
__device__ __forceinline__ float four_angles_max(float even_cos, float odd_cos, float even_sin,
                                                 float odd_sin) {
  return fmaxf((even_cos + odd_cos) + fabsf(even_sin + odd_sin),
               (even_cos - odd_cos) + fabsf(even_sin - odd_sin));
}

__device__ __forceinline__ float tagged(float value, uint32_t tag) {
  return __uint_as_float((__float_as_uint(value) & ~63u) | tag);
}

// The best tagged value, and the best one that bears another tag (another shift). The second is
// what the rows (angles) that the first does not win still show: near its own maximum when the two
// are nearly equal, which is when it matters.
struct Two {
  float best, second;
};

__device__ __forceinline__ void merge_two(Two& a, const Two& b) {
  const bool mine = a.best >= b.best;
  const bool same = ((__float_as_uint(a.best) ^ __float_as_uint(b.best)) & 63u) == 0;
  const float loser = same ? (mine ? b.second : a.second) : fminf(a.best, b.best);
  a.second = fmaxf(mine ? a.second : b.second, loser);
  a.best = fmaxf(a.best, b.best);
}

// Over the lanes of a warp that hold other rows of the same column.
__device__ __forceinline__ Two two_over_rows(float best) {
  Two mine{best, -FLT_MAX};
#pragma unroll
  for (int offset = 4; offset < 32; offset <<= 1) {
    const Two other{__shfl_xor_sync(~0u, mine.best, offset),
                    __shfl_xor_sync(~0u, mine.second, offset)};
    merge_two(mine, other);
  }
  return mine;
}

// Where a column's result goes, or -1 for a member that only fills up its block.
// column: (reference & 1) * 32 + 4 particle + reference / 2.
__device__ __forceinline__ int64_t output_index(const Task& task, int64_t particle_block,
                                                int64_t reference_block, int column, int hand) {
  const int lane = column & 31;
  const int64_t particle = particle_block * MEMBERS + (lane >> 2);
  const int64_t reference = reference_block * MEMBERS + 2 * (lane & 3) + (column >> 5);
  if (particle >= task.n || reference >= task.k || hand >= task.hands) return -1;
  return (particle * task.k + reference) * task.hands + hand;
}

// A run of up to 64 shifts that ended with shift s. Later runs must be better, not equal. One
// thread sees all runs of a column.
__device__ __forceinline__ void write_two(const Task& task, const Two& two, int64_t particle_block,
                                          int64_t reference_block, int column, int hand, int s) {
  const int64_t to = output_index(task, particle_block, reference_block, column, hand);
  if (to < 0) return;
  const int64_t other = to + task.n * task.k * task.hands;
  const float factor =
      task.reference_scale[reference_block * MEMBERS + 2 * (column & 3) + (column >> 5)];
  const int run = s & ~63;
  const auto value = [&](float v) {
    return v == -FLT_MAX ? v : __uint_as_float(__float_as_uint(v) & ~63u) * factor;
  };
  const auto place = [&](float v) {
    return v == -FLT_MAX ? -1
                         : min(run + 63 - static_cast<int>(__float_as_uint(v) & 63u),
                               task.shifts - 1);
  };
  float best = value(two.best), second = value(two.second);
  int best_shift = max(place(two.best), 0), second_shift = place(two.second);
  if (run > 0) {
    const float old = task.score[to], old_second = task.score[other];
    if (best > old) {
      if (old >= second) {
        second = old;
        second_shift = task.shift[to];
      }
    } else {
      second = best > old_second ? best : old_second;
      second_shift = best > old_second ? best_shift : task.shift[other];
      best = old;
      best_shift = task.shift[to];
    }
  }
  task.score[to] = best;
  task.shift[to] = best_shift;
  task.score[other] = second;
  task.shift[other] = second_shift;
}

#endif  // __CUDACC__

}  // namespace cryoalign
