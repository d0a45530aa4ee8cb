// Scores chosen (particle, reference) pairs again, in fp32 from the original spectra, at the shifts
// that the coarse search found: the exact score and angle of the search grid.

#include <cfloat>

#include "common.cuh"

namespace cryoalign {
namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
// The other hand is scored again if its coarse score is within this share of the better hand's
// score, which is many times the rounding of fp16. The share is larger for the second-best shift,
// whose coarse score may be that of an angle next to its best one.
constexpr float NEAR = 4e-3f, NEAR_SHIFT = 2e-2f;

struct Peak {
  float score;
  int64_t place;
};

// The better score; among equals the first place.
__device__ __forceinline__ void keep_better(Peak& a, const Peak& b) {
  if (b.score > a.score || (b.score == a.score && b.place < a.place)) a = b;
}

// Ring products of one pair at one shift, one hand, into `product` (m). All threads call.
__device__ void ring_products(const float2* __restrict__ x, const float2* __restrict__ y, int rings,
                              int frequencies, bool mirrored, float2* partial, float2* product) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int m = lane; m < frequencies; m += 32) {
    float rr = 0.f, ii = 0.f, ri = 0.f, ir = 0.f;
    for (int r = warp; r < rings; r += WARPS) {
      const float2 a = x[static_cast<int64_t>(r) * frequencies + m];
      const float2 b = y[static_cast<int64_t>(r) * frequencies + m];
      rr = fmaf(a.x, b.x, rr);
      ii = fmaf(a.y, b.y, ii);
      ri = fmaf(a.x, b.y, ri);
      ir = fmaf(a.y, b.x, ir);
    }
    const float sign = m & 1 ? -1.f : 1.f;
    partial[warp * frequencies + m] = mirrored ? make_float2(sign * (rr - ii), -sign * (ri + ir))
                                               : make_float2(rr + ii, ri - ir);
  }
  __syncthreads();
  const int angles = 2 * (frequencies - 1);
  for (int m = threadIdx.x; m < frequencies; m += THREADS) {
    float2 z = partial[m];
    for (int w = 1; w < WARPS; ++w) {
      z.x += partial[w * frequencies + m].x;
      z.y += partial[w * frequencies + m].y;
    }
    // irfft: twice the real part, except where a frequency is its own mirror.
    const bool own = m == 0 || m == frequencies - 1;
    const float weight = (own ? 1.f : 2.f) / angles;
    product[m] = make_float2(weight * z.x, own ? 0.f : weight * z.y);
  }
  __syncthreads();
}

// The best angle, over all threads' shares: angles j and j + a/2 from even and odd sums.
__device__ Peak best_angle(const float2* product, int frequencies, int64_t first_place) {
  const int half = frequencies - 1, angles = 2 * half;
  Peak best{-FLT_MAX, INT64_MAX};
  for (int j = threadIdx.x; j < half; j += THREADS) {
    float sum[2] = {0.f, 0.f};
    float2 step;
    sincospif(2.f * j / angles, &step.y, &step.x);
    float2 turn{1.f, 0.f};
    for (int m = 0; m < frequencies; ++m) {
      // exp(2 pi i m j / a), by products, afresh every 16 so that rounding cannot add up.
      if ((m & 15) == 0) {
        const int phase = m * j % angles;
        sincospif(2.f * static_cast<float>(phase) / angles, &turn.y, &turn.x);
      }
      const float2 z = product[m];
      const float term = z.x * turn.x - z.y * turn.y;
      if (m & 1)
        sum[1] += term;
      else
        sum[0] += term;
      turn = make_float2(turn.x * step.x - turn.y * step.y, turn.x * step.y + turn.y * step.x);
    }
    keep_better(best, Peak{sum[0] + sum[1], first_place + j});
    keep_better(best, Peak{sum[0] - sum[1], first_place + j + half});
  }
  return best;
}

__device__ Peak block_best(Peak mine, Peak* shared) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    const Peak other{__shfl_xor_sync(~0u, mine.score, offset),
                     __shfl_xor_sync(~0u, mine.place, offset)};
    keep_better(mine, other);
  }
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = mine;
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) keep_better(mine, shared[w]);
  __syncthreads();
  return mine;
}

// One block a chosen pair.
__global__ void __launch_bounds__(THREADS)
    rescore_kernel(const float2* __restrict__ particles,   // (n, s, r, m)
                   const float2* __restrict__ references,  // (k, r, m)
                   const float* __restrict__ coarse,       // (2, n, k, hands)
                   const int32_t* __restrict__ shift,      // (2, n, k, hands)
                   const int64_t* __restrict__ chosen,     // (n, c)
                   int64_t n, int64_t k, int candidates, int shifts, int rings, int frequencies,
                   int hands, float* __restrict__ score, int64_t* __restrict__ place) {
  extern __shared__ float2 memory[];
  __shared__ Peak peaks[WARPS];
  float2* partial = memory;
  float2* product = memory + WARPS * frequencies;
  const int64_t particle = blockIdx.x / candidates;
  const int64_t reference = chosen[blockIdx.x];
  const int64_t pair = particle * k + reference;
  const int64_t size = static_cast<int64_t>(rings) * frequencies;
  const int angles = 2 * (frequencies - 1);
  float top = coarse[pair * hands];
  if (hands == 2) top = fmaxf(top, coarse[pair * hands + 1]);
  Peak best{-FLT_MAX, INT64_MAX};
  for (int rank = 0; rank < 2; ++rank) {
    const float enough = top - (rank == 0 ? NEAR : NEAR_SHIFT) * fabsf(top);
    for (int hand = 0; hand < hands; ++hand) {
      const int64_t at = (rank * n * k + pair) * hands + hand;
      const int64_t s = shift[at];
      // The same for all threads. Not >=, so that a NaN is scored again and appears in the result.
      if (s < 0 || coarse[at] < enough) continue;
      ring_products(particles + (particle * shifts + s) * size, references + reference * size,
                    rings, frequencies, hand == 1, partial, product);
      const int64_t first = (s * hands + hand) * angles;
      keep_better(best, block_best(best_angle(product, frequencies, first), peaks));
    }
  }
  if (threadIdx.x == 0) {
    const bool none = best.place == INT64_MAX;  // spectra with NaN
    score[pair] = none ? __int_as_float(0x7fffffff) : best.score;
    place[pair] = none ? 0 : best.place;
  }
}

void rescore(Tensor particles, Tensor references, Tensor coarse, Tensor shift, Tensor chosen,
             Tensor score, Tensor place) {
  require(particles.dim() == 4 && references.dim() == 3 && coarse.dim() == 4 && chosen.dim() == 2,
          "rescore: particles (n, s, r, m), references (k, r, m), coarse (2, n, k, hands), chosen");
  const int64_t n = particles.size(0), k = references.size(0), frequencies = particles.size(3);
  require(references.size(1) == particles.size(2) && references.size(2) == frequencies,
          "rescore: particles and references of different rings");
  require(coarse.size(0) == 2 && coarse.size(1) == n && coarse.size(2) == k &&
              chosen.size(0) == n && shift.numel() == coarse.numel() && score.numel() == n * k &&
              place.numel() == n * k,
          "rescore: sizes do not fit");
  if (chosen.numel() == 0) return;
  const DeviceGuard guard(particles.get_device_index());
  const size_t bytes = (WARPS + 1) * frequencies * sizeof(float2);
  require(bytes <= 48 * 1024, "rescore: too many angles");
  rescore_kernel<<<grid_size(chosen.numel()), THREADS, bytes, current_stream(particles)>>>(
      complexes(particles, "particles"), complexes(references, "references"),
      floats(coarse, "coarse"), ints(shift, "shift"), longs(chosen, "chosen"), n, k,
      static_cast<int>(chosen.size(1)), static_cast<int>(particles.size(1)),
      static_cast<int>(particles.size(2)), static_cast<int>(frequencies),
      static_cast<int>(coarse.size(3)), floats(score, "score"), longs(place, "place"));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace cryoalign

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def(
      "rescore(Tensor particles, Tensor references, Tensor coarse, Tensor shift, Tensor chosen, "
      "Tensor(a!) score, Tensor(b!) place) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("rescore", TORCH_BOX(&cryoalign::rescore));
}
