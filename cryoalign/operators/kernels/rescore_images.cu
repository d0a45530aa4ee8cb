// Scores chosen (particle, reference) pairs again, in fp32 from the images, at the shifts that the
// coarse search found: the exact score and angle of the search grid. For 256 angles.
//
// A block takes one particle and up to GROUP references: the best ones, which it picks itself, or
// all references in turn. Each different shift is sampled once. A warp computes the spectra of two
// rings with one complex transform of 256 points, 8 in each lane, and two rows of scores likewise.
#include <cfloat>

#include "copy.cuh"

namespace cryoalign {
namespace {

constexpr int WARPS = 9;  // 36 rings are 18 pairs
constexpr int THREADS = 32 * WARPS;
constexpr int ANGLES = 256;
constexpr int FREQUENCIES = ANGLES / 2 + 1;
constexpr int MOST_RINGS = 112;
constexpr int GROUP = 4;
constexpr int JOBS = 2 * GROUP;    // a reference and a hand each
constexpr int SLOT = 288;          // float2 of a transform: its exchange, then its 4 x 68 result
constexpr int PRODUCT = 264;       // float2 of a job's ring products, in two parts to be added
constexpr int PART = 132;
constexpr int PART_THREADS = 144;  // two parts of the rings side by side
// A hand is scored again if its coarse score is within this share of the better hand's score, which
// is many times the rounding of fp16.
constexpr float NEAR = 4e-3f;
// A reference is not scored again if it is this share of the score, for the rounding of fp16, and
// the task's margin below the best one.
constexpr float HOPELESS_SHARE = 1e-2f;

struct Task {
  const float* images;       // (n, h, w)
  const float2* references;  // (k, r, m)
  const float2* shifts;      // (s,)
  const float* weights;      // (r,) the rings' shares of the area
  const float* coarse;       // (n, k, hands)
  const int32_t* shift;      // (n, k, hands)
  float* score;              // (n, k)
  int64_t* place;            // (n, k)
  int64_t k;
  float margin;
  int height, width, candidates, groups, hands,  // candidates 0: every reference
      rings, first_ring, ring_step, reach, pitch;
};

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ __forceinline__ float2 times(float2 a, float2 b) {
  return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x};
}
__device__ __forceinline__ float2 times_minus_i(float2 a) { return {a.y, -a.x}; }

__device__ __forceinline__ void dft4(float2& a, float2& b, float2& c, float2& d) {
  const float2 p = a + c, q = a - c, r = b + d, s = times_minus_i(b - d);
  a = p + r;
  b = q + s;
  c = p - r;
  d = q - s;
}

__device__ __forceinline__ void dft8(float2 (&v)[8]) {
  constexpr float R = 0.70710678118654752f;
  float2 even[4], odd[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    even[i] = v[i] + v[i + 4];
    odd[i] = v[i] - v[i + 4];
  }
  odd[1] = {R * (odd[1].x + odd[1].y), R * (odd[1].y - odd[1].x)};
  odd[2] = times_minus_i(odd[2]);
  odd[3] = {R * (odd[3].y - odd[3].x), -R * (odd[3].x + odd[3].y)};
  dft4(even[0], even[1], even[2], even[3]);
  dft4(odd[0], odd[1], odd[2], odd[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = even[i];
    v[2 * i + 1] = odd[i];
  }
}

// exp(-2 pi i j / 256)
__device__ __forceinline__ float2 unit_root(int j) {
  float2 w;
  sincospif(-2.f / ANGLES * j, &w.y, &w.x);
  return w;
}

// A transform of 256 points by a warp: v[i] is point 32 i + lane, and on return frequency
// 8 i + (lane / 4) + 64 d(lane).  `slot`: SLOT float2 of shared memory.
struct Transform {
  float2 first, second;  // exp(-2 pi i lane / 256), exp(-2 pi i (lane & 3) / 32)

  __device__ explicit Transform(int lane)
      : first(unit_root(lane)), second(unit_root(8 * (lane & 3))) {}

  static __device__ __forceinline__ int last_digit(int lane) {
    return 2 * (lane & 1) + (lane >> 1 & 1);
  }

  static __device__ __forceinline__ void turn(float2 (&v)[8], float2 w) {
    const float2 w2 = times(w, w), w3 = times(w2, w), w4 = times(w2, w2);
    v[1] = times(v[1], w);
    v[2] = times(v[2], w2);
    v[3] = times(v[3], w3);
    v[4] = times(v[4], w4);
    v[5] = times(v[5], times(w4, w));
    v[6] = times(v[6], times(w4, w2));
    v[7] = times(v[7], times(w4, w3));
  }

  __device__ void operator()(float2 (&v)[8], float2* slot, int lane) const {
    dft8(v);
    turn(v, first);
#pragma unroll
    for (int i = 0; i < 8; ++i) slot[36 * i + lane] = v[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = slot[36 * (lane >> 2) + 4 * i + (lane & 3)];
    __syncwarp();
    dft8(v);
    turn(v, second);
    const bool high = lane & 2, odd = lane & 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // four lanes: two stages of a transform of four
      float2 other = {__shfl_xor_sync(~0u, v[i].x, 2), __shfl_xor_sync(~0u, v[i].y, 2)};
      v[i] = high ? other - v[i] : v[i] + other;
      if (high && odd) v[i] = times_minus_i(v[i]);
      other = {__shfl_xor_sync(~0u, v[i].x, 1), __shfl_xor_sync(~0u, v[i].y, 1)};
      v[i] = odd ? other - v[i] : v[i] + other;
    }
  }
};

__device__ __forceinline__ int slot_index(int frequency) {
  return frequency + 4 * (frequency >> 6);
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// Transforms that are in memory at a time: of two rings each, or of the scores of two jobs each.
__host__ __device__ constexpr int slots(int rings) {
  return (rings + 1) / 2 > GROUP ? (rings + 1) / 2 : GROUP;
}

struct Memory {
  float* window;     // the image about its centre
  float2* circle;    // (256,) the unit circle
  float2* spectra;   // (pairs of rings, SLOT)
  float2* products;  // (JOBS, PRODUCT)
  float* shares;     // (MOST_RINGS,) square roots of the rings' weights over the angles
};

struct Statistics {
  float mean[WARPS], power[WARPS];
};

// Spectra of all rings about centre - shift, two in each slot, and their mean and power.
__device__ void make_spectra(const Task& task, const Memory& memory, const Transform& transform,
                             float2 shift, Statistics& statistics) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float mean = 0.f, power = 0.f;
  for (int pair = warp; 2 * pair < task.rings; pair += WARPS) {
    float2 v[8];
    const float weight[2] = {memory.shares[2 * pair] * memory.shares[2 * pair],
                             memory.shares[2 * pair + 1] * memory.shares[2 * pair + 1]};
    float squares[2] = {0.f, 0.f}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 at = memory.circle[32 * i + lane];
      float value[2];
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const float radius = task.first_ring + task.ring_step * (2 * pair + which);
        const float x = fmaf(radius, at.x, task.reach - shift.x);
        const float y = fmaf(radius, at.y, task.reach - shift.y);
        const int column = static_cast<int>(x), row = static_cast<int>(y);  // both positive
        const float fx = x - column, fy = y - row;
        value[which] = 0.f;
        if (2 * pair + which < task.rings) {
          const float* from = memory.window + row * task.pitch + column;
          const float above = fmaf(fx, from[1] - from[0], from[0]);
          const float below = fmaf(fx, from[task.pitch + 1] - from[task.pitch], from[task.pitch]);
          value[which] = fmaf(fy, below - above, above);
        }
        sum[which] += value[which];
        squares[which] = fmaf(value[which], value[which], squares[which]);
      }
      v[i] = {value[0], value[1]};
    }
    mean = fmaf(weight[0], sum[0], fmaf(weight[1], sum[1], mean));
    power = fmaf(weight[0], squares[0], fmaf(weight[1], squares[1], power));
    float2* slot = memory.spectra + pair * SLOT;
    transform(v, slot, lane);
    const int first = (lane >> 2) + 64 * Transform::last_digit(lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) slot[slot_index(first + 8 * i)] = v[i];
  }
  mean = warp_sum(mean);
  power = warp_sum(power);
  if (lane == 0) {
    statistics.mean[warp] = mean;  // weights here are over the angles
    statistics.power[warp] = power;
  }
}

// A job's ring products, sum over rings of conj(X) Y for one hand, from the block's spectra.
__device__ void ring_products(const Task& task, const Memory& memory, const float2* reference,
                              bool mirrored, float mean, float scale, float2* products) {
  const int part = threadIdx.x / PART_THREADS, m = threadIdx.x % PART_THREADS;
  if (m >= FREQUENCIES) return;
  const int half = (task.rings + 1) / 2, middle = half / 2;  // pairs of rings
  const int first = part == 0 ? 0 : middle, last = part == 0 ? middle : half;
  const int low = slot_index(m), high = slot_index((ANGLES - m) % ANGLES);
  float2 total = {0.f, 0.f};
#pragma unroll 3
  for (int pair = first; pair < last; ++pair) {
    const float2* slot = memory.spectra + pair * SLOT;
    const float2 z = slot[low], other = slot[high];
    // The transforms of two real rows, from that of the first plus i times the second.
    float2 x[2] = {{0.5f * (z.x + other.x), 0.5f * (z.y - other.y)},
                   {0.5f * (z.y + other.y), 0.5f * (other.x - z.x)}};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int r = min(2 * pair + which, task.rings - 1);
      if (m == 0) x[which].x -= ANGLES * mean;
      const float share = memory.shares[2 * pair + which];  // 0 past the last ring
      float2 y = __ldg(reference + static_cast<int64_t>(r) * FREQUENCIES + m);
      if (mirrored) y.y = -y.y;
      total.x = fmaf(share, fmaf(x[which].x, y.x, x[which].y * y.y), total.x);
      total.y = fmaf(share, fmaf(x[which].x, y.y, -x[which].y * y.x), total.y);
    }
  }
  const float sign = mirrored && (m & 1) ? -scale : scale;
  const bool own = m == 0 || m == FREQUENCIES - 1;
  products[part * PART + m] = {sign * total.x, own ? 0.f : sign * total.y};
}

struct Peak {
  float score;
  int angle;
};

__device__ __forceinline__ void keep_better(Peak& a, Peak b) {
  if (b.score > a.score || (b.score == a.score && b.angle < a.angle)) a = b;
}

__device__ __forceinline__ Peak warp_best(Peak mine) {
  for (int offset = 16; offset > 0; offset /= 2)
    keep_better(mine, {__shfl_xor_sync(~0u, mine.score, offset),
                       __shfl_xor_sync(~0u, mine.angle, offset)});
  return mine;
}

// The peaks of two jobs by one warp: their scores are real and imaginary part of one transform.
__device__ void best_angles(const float2* a, const float2* b, const Transform& transform,
                            float2* slot, Peak* peaks) {
  const int lane = threadIdx.x & 31;
  float2 v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int m = 32 * i + lane, own = m < FREQUENCIES ? m : ANGLES - m;
    const float hand = m < FREQUENCIES ? 1.f : -1.f;
    const float2 p = a[own] + a[PART + own], q = b[own] + b[PART + own];
    v[i] = {p.x - hand * q.y, -(hand * p.y + q.x)};  // conj(p + i q)
  }
  transform(v, slot, lane);
  Peak best[2] = {{-FLT_MAX, ANGLES}, {-FLT_MAX, ANGLES}};
  const int first = (lane >> 2) + 64 * Transform::last_digit(lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    keep_better(best[0], {v[i].x, first + 8 * i});
    keep_better(best[1], {-v[i].y, first + 8 * i});
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const Peak found = warp_best(best[which]);
    if (lane == 0) peaks[which] = found;
  }
}

// The `count` best references of a particle by their better hand's coarse score, by one warp.
__device__ void pick_best(const Task& task, const float* coarse, int count, int64_t* chosen) {
  const int lane = threadIdx.x & 31;
  float before = FLT_MAX;
  int64_t last = -1;
  for (int i = 0; i < count; ++i) {  // the next in order of score, then of index
    float best = -FLT_MAX;
    int64_t at = INT64_MAX;
    for (int64_t k = lane; k < task.k; k += 32) {
      float v = coarse[k * task.hands];
      if (task.hands == 2) v = fmaxf(v, coarse[2 * k + 1]);
      v = v == v ? v : 0.f;
      const bool left = i == 0 || v < before || (v == before && k > last);
      if (left && (v > best || at == INT64_MAX)) {
        best = v;
        at = k;
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const float v = __shfl_xor_sync(~0u, best, offset);
      const int64_t k = __shfl_xor_sync(~0u, at, offset);
      if (k != INT64_MAX && (at == INT64_MAX || v > best || (v == best && k < at))) {
        best = v;
        at = k;
      }
    }
    if (lane == 0) chosen[i] = at;
    before = best;
    last = at;
  }
}

// Writes the coarse scores of the references that were not scored again.
__device__ void write_others(const Task& task, const float* coarse, int64_t particle, float limit,
                             const int64_t* chosen, const int* job_shift, int count) {
  for (int64_t k = threadIdx.x; k < task.k; k += THREADS) {
    bool done = false;
    for (int i = 0; i < count; ++i)
      done = done || (chosen[i] == k && (job_shift[2 * i] >= 0 || job_shift[2 * i + 1] >= 0));
    if (done) continue;
    float v = coarse[k * task.hands];
    if (task.hands == 2) v = fmaxf(v, coarse[2 * k + 1]);
    task.score[particle * task.k + k] = fminf(v, limit);
    task.place[particle * task.k + k] = -1;
  }
}

__global__ void __launch_bounds__(THREADS, 2)
    rescore_images_kernel(const __grid_constant__ Task task) {
  extern __shared__ float2 dynamic[];
  __shared__ Statistics statistics;
  __shared__ int job_shift[JOBS];  // -1: nothing to do
  __shared__ Peak peaks[JOBS];
  __shared__ int64_t chosen[GROUP];
  __shared__ float worst[GROUP];
  const int64_t particle = blockIdx.x / task.groups;
  const int first = blockIdx.x % task.groups * GROUP;
  const bool every = task.candidates == 0;
  const int count = every ? static_cast<int>(min(int64_t{GROUP}, task.k - first)) : task.candidates;
  const float* coarse = task.coarse + particle * task.k * task.hands;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Memory memory;
  memory.spectra = dynamic;
  memory.products = memory.spectra + slots(task.rings) * SLOT;
  memory.circle = memory.products + JOBS * PRODUCT;
  memory.shares = reinterpret_cast<float*>(memory.circle + ANGLES);
  memory.window = memory.shares + MOST_RINGS;
  const Transform transform(lane);

  const float* image = task.images + particle * task.height * task.width;
  const int side = 2 * task.reach + 2;
  for (int y = warp; y < side; y += WARPS)
    for (int x = lane; x < side; x += 32) {
      const int row = y + task.height / 2 - task.reach, column = x + task.width / 2 - task.reach;
      const bool there = row >= 0 && column >= 0 && row < task.height && column < task.width;
      copy_or_zero(memory.window + y * task.pitch + x,
                   there ? image + static_cast<int64_t>(row) * task.width + column : image, there);
    }
  for (int j = threadIdx.x; j < ANGLES; j += THREADS) {
    float2 at;
    sincospif(2.f / ANGLES * j, &at.y, &at.x);
    memory.circle[j] = at;
  }
  for (int i = threadIdx.x; i < JOBS * PRODUCT; i += THREADS) memory.products[i] = {0.f, 0.f};
  for (int r = threadIdx.x; r < MOST_RINGS; r += THREADS)
    memory.shares[r] = r < task.rings ? sqrtf(task.weights[r] * (1.f / ANGLES)) : 0.f;
  if (warp == 0) {
    if (every) {
      if (lane < count) chosen[lane] = first + lane;
    } else {
      pick_best(task, coarse, count, chosen);
    }
    __syncwarp();
    if (lane < JOBS) {
      const int local = lane >> 1, hand = lane & 1;
      int shift = -1;
      if (local < count && hand < task.hands) {
        const auto better = [&](int64_t k) {
          const float v = coarse[k * task.hands];
          return task.hands == 2 ? fmaxf(v, coarse[2 * k + 1]) : v;
        };
        const int64_t k = chosen[local];
        const float top = better(k), best = every ? top : better(chosen[0]);
        // Not >=, so that a NaN is scored again and appears in the result.
        if (!(coarse[k * task.hands + hand] < top - NEAR * fabsf(top)) &&
            !(top < best - HOPELESS_SHARE * fabsf(best) - task.margin))
          shift = task.shift[(particle * task.k + k) * task.hands + hand];
      }
      job_shift[lane] = shift;
      peaks[lane] = {-FLT_MAX, 0};
    }
  }
  wait_for_copies();
  __syncthreads();

  for (int lead = 0; lead < JOBS; ++lead) {  // each different shift once
    const int shift = job_shift[lead];
    bool done = shift < 0;
    for (int before = 0; before < lead; ++before) done = done || job_shift[before] == shift;
    if (done) continue;  // the same for all threads
    make_spectra(task, memory, transform, task.shifts[shift], statistics);
    __syncthreads();
    float mean = 0.f, power = 0.f;
    for (int w = 0; w < WARPS; ++w) {
      mean += statistics.mean[w];
      power += statistics.power[w];
    }
    const float variance = power - mean * mean;
    // As polar.normalised_spectra: a smaller variance is rounding.
    const float scale = variance <= 16.f * FLT_EPSILON * power ? 0.f : rsqrtf(variance) / ANGLES;
    for (int job = lead; job < JOBS; ++job) {
      if (job_shift[job] != shift) continue;
      ring_products(task, memory,
                    task.references + chosen[job >> 1] * task.rings * FREQUENCIES, job & 1, mean,
                    scale, memory.products + job * PRODUCT);
    }
    __syncthreads();
  }
  if (warp < GROUP)
    best_angles(memory.products + 2 * warp * PRODUCT, memory.products + (2 * warp + 1) * PRODUCT,
                transform, memory.spectra + warp * SLOT, peaks + 2 * warp);
  __syncthreads();
  if (threadIdx.x < count) {
    float best = -FLT_MAX;
    int64_t place = INT64_MAX;
    for (int hand = 0; hand < task.hands; ++hand) {
      const int job = 2 * threadIdx.x + hand;
      if (job_shift[job] < 0) continue;
      const int64_t at =
          (static_cast<int64_t>(job_shift[job]) * task.hands + hand) * ANGLES + peaks[job].angle;
      if (peaks[job].score > best || (peaks[job].score == best && at < place)) {
        best = peaks[job].score;
        place = at;
      }
    }
    const bool looked_at = job_shift[2 * threadIdx.x] >= 0 || job_shift[2 * threadIdx.x + 1] >= 0;
    worst[threadIdx.x] = looked_at ? best : FLT_MAX;
    if (looked_at) {
      const int64_t pair = particle * task.k + chosen[threadIdx.x];
      const bool none = place == INT64_MAX;  // an image with NaN or infinity
      task.score[pair] = none ? __int_as_float(0x7fffffff) : best;
      task.place[pair] = none ? 0 : place;
    }
  }
  if (every) return;
  __syncthreads();
  // Below all rescored references, so that the best one has a place.
  float limit = FLT_MAX;
  for (int i = 0; i < count; ++i) limit = fminf(limit, worst[i]);
  write_others(task, coarse, particle, nextafterf(limit, -FLT_MAX), chosen, job_shift, count);
}

// reach: how far from the centre rings at any shift can reach, pixels.
void rescore_images(Tensor images, Tensor references, Tensor shifts, Tensor weights, Tensor coarse,
                    Tensor shift, int64_t candidates, double margin, int64_t first_ring,
                    int64_t ring_step, int64_t reach, Tensor score, Tensor place) {
  require(images.dim() == 3 && references.dim() == 3 && coarse.dim() == 3,
          "rescore_images: images (n, h, w), references (k, r, m), coarse (n, k, hands)");
  const int64_t n = images.size(0), k = references.size(0);
  require(references.size(2) == FREQUENCIES && weights.numel() == references.size(1),
          "rescore_images: 256 angles, one weight a ring");
  require(coarse.size(0) == n && coarse.size(1) == k && shift.numel() == coarse.numel() &&
              score.numel() == n * k && place.numel() == n * k &&
              references.size(1) <= MOST_RINGS && candidates <= GROUP && candidates <= k,
          "rescore_images: sizes do not fit");
  if (n * k == 0) return;
  Task task;
  task.images = floats(images, "images");
  task.references = complexes(references, "references");
  task.shifts = reinterpret_cast<const float2*>(floats(shifts, "shifts"));
  task.weights = floats(weights, "weights");
  task.coarse = floats(coarse, "coarse");
  task.shift = ints(shift, "shift");
  task.score = floats(score, "score");
  task.place = longs(place, "place");
  task.k = k;
  task.margin = static_cast<float>(margin);
  task.height = static_cast<int>(images.size(1));
  task.width = static_cast<int>(images.size(2));
  task.candidates = static_cast<int>(candidates);
  task.groups = candidates == 0 ? static_cast<int>(divide_up(k, GROUP)) : 1;
  task.hands = static_cast<int>(coarse.size(2));
  task.rings = static_cast<int>(references.size(1));
  task.first_ring = static_cast<int>(first_ring);
  task.ring_step = static_cast<int>(ring_step);
  task.reach = static_cast<int>(reach);
  task.pitch = 2 * task.reach + 2;
  while (task.pitch % 16 != 7 && task.pitch % 16 != 9) ++task.pitch;
  const size_t bytes =
      sizeof(float2) * (slots(task.rings) * SLOT + JOBS * PRODUCT + ANGLES) +
      sizeof(float) * (MOST_RINGS + (2 * task.reach + 2) * task.pitch);
  const DeviceGuard guard(images.get_device_index());
  allow_shared(rescore_images_kernel, bytes);
  const auto stream = current_stream(images);
  rescore_images_kernel<<<grid_size(n * task.groups), THREADS, bytes, stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace cryoalign

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def(
      "rescore_images(Tensor images, Tensor references, Tensor shifts, Tensor weights, Tensor "
      "coarse, Tensor shift, int candidates, float margin, int first_ring, int ring_step, "
      "int reach, Tensor(a!) score, Tensor(b!) place) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("rescore_images", TORCH_BOX(&cryoalign::rescore_images));
}
