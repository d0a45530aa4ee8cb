// Images into packed ring spectra at all shifts of a square grid: polar sampling, angular Fourier
// transform on the tensor cores and normalisation in one kernel; what reaches memory is the packed
// layout of common.cuh. For Hopper (wgmma), 256 angles and at most 64 rings.
//
// A block makes one particle's spectra. It samples at the angles (j + 1/2) 2 pi / a, where
// cosines and sines of even and odd frequencies fold four samples (theta, -theta, pi - theta,
// pi + theta) into one entry of four products with a 64 x 64 matrix. Shifts are whole pixels, so a
// point has the same weights at all of them: eight rings at a time walk along a row of shifts, a
// column of up to eight of them at once. A column's pixels, interpolated downwards, serve the
// shifts on both sides of it. Two samples, one pixel below the other, share a half2 all the way
// from the image to the product. Samples go to two buffers in turn: one barrier a column.
#include <algorithm>

#include "copy.cuh"
#include "wgmma.cuh"

namespace cryoalign {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ANGLES = 256;
constexpr int QUARTER = ANGLES / 4;
constexpr int MOST_HALF_STEPS = 8;  // eight rings each
constexpr int PASS_BYTES = 32 * QUARTER * 2;  // of one wgmma: 32 columns, two pairs of shifts
// Samples are scaled to this deviation: the square of a sum of them must fit fp16.
constexpr float DEVIATION = 0.25f;

struct Task {
  const float* images;     // (n, h, w)
  const uint4* transform;  // fragments of the four matrices, see images._forward_transform
  const float* gain;       // (r,) sqrt of the rings' weights over the largest, outside in
  uint4* packed;           // (blocks, s, F, 32)
  float* scale;            // (8 blocks, s)
  int64_t n;
  int height, width, rings, first_ring, ring_step, last_ring;
  int product_bytes;  // of shared memory: the products' right sides, before them the raw image
  float largest_weight;
  Layout layout;
};

// Of S shifts below each other: pairs, in one group or, past four of them, two.
template <int S>
constexpr int PAIRS = (S + 1) / 2;
template <int S>
constexpr int GROUPS = PAIRS<S> > 4 ? 2 : 1;
template <int S>
constexpr int GROUP = (PAIRS<S> + GROUPS<S> - 1) / GROUPS<S>;
template <int S>
constexpr int PASSES = (GROUP<S> + 1) / 2;
template <int S>
constexpr int TYPE_BYTES = PASSES<S> * PASS_BYTES;
template <int S>
constexpr int BUFFER_BYTES = 4 * TYPE_BYTES<S>;
constexpr int PAIR_BYTES = 16 * QUARTER * 2;

// What of the window of the image a sample may touch: rows and columns.
__host__ __device__ constexpr int window_side(int last_ring, int shifts) {
  return 2 * last_ring + shifts;
}

// The last pairs may reach below that: zeros lie there.
template <int S>
__host__ __device__ constexpr int window_rows(int last_ring) {
  return 2 * (last_ring + GROUPS<S> * GROUP<S>);
}

__device__ __forceinline__ __half2 both(float x) { return __float2half2_rn(x); }

__device__ float block_sum(float v, float* shared) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.f;
  for (int w = 0; w < WARPS; ++w) v += shared[w];
  return v;
}

// Of the right side of a wgmma: one column a row of 128 bytes, swizzled.
__device__ __forceinline__ uint32_t descriptor_of(uint32_t address) {
  return (address & 0x3FFFF) >> 4 | 1 << 16;
}

// D = A B if FIRST, else D += A B; see wgmma.cuh.
template <bool FIRST>
__device__ __forceinline__ void wgmma(float (&d)[16], const uint4& a, uint32_t descriptor) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  cryoalign::wgmma(d, a, 64ull << 32 | 1ull << 62 | descriptor, FIRST ? 0 : 1);
#endif
}

__device__ __forceinline__ void wgmma_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_finish() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" ::
                   : "memory");
#endif
}

// The lower row of `a` and the upper one of `b`.
__device__ __forceinline__ __half2 between(__half2 a, __half2 b) {
  return __halves2half2(__high2half(a), __low2half(b));
}

__device__ __forceinline__ uint32_t bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }

__device__ __forceinline__ __half2 load_half2(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(v) : "r"(address));
  return *reinterpret_cast<__half2*>(&v);
}

__device__ __forceinline__ void store_bits(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(v) : "memory");
}

// Volatile, so that the compiler does not move the load.
__device__ __forceinline__ uint4 load_matrix(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Two points of a ring, an eighth of a turn apart, each with its three mirror images, at P pairs
// of shifts below each other; from one column of shifts to the next. A row of the window has PITCH
// half2: the pixel, and the one below it.
template <int P, int PITCH>
struct Sampler {
  bool more;  // rows follow below the last pair's
  uint32_t at[2][4];
  __half2 right[2], below[2], above[2], last[2][4][P];

  // The points at `radius` in two directions about the middle, a pixel; then the first column.
  __device__ __forceinline__ void place(uint32_t middle, const float2 (&direction)[2],
                                        float radius, float gain) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const float px = radius * direction[u].x, py = radius * direction[u].y;  // both positive
      const int x = static_cast<int>(px), y = static_cast<int>(py);
      right[u] = both(px - x);
      // The two weights add up to the gain exactly: a flat image stays flat.
      below[u] = __hmul2(both(py - y), both(gain));
      above[u] = __hsub2(both(gain), below[u]);
#pragma unroll
      for (int mirror = 0; mirror < 4; ++mirror) {
        at[u][mirror] =
            middle + 4 * ((mirror & 1 ? -y - 1 : y) * PITCH + (mirror & 2 ? -x - 1 : x));
        __half2 here = load_half2(at[u][mirror]);
#pragma unroll
        for (int j = 0; j < P; ++j) last[u][mirror][j] = down(u, mirror, j, here);
        at[u][mirror] += 4;
      }
    }
  }

  // A point's column interpolated downwards at pair j, whose pixels are `here`, then the next's.
  __device__ __forceinline__ __half2 down(int u, int mirror, int j, __half2& here) const {
    // Past the last pair's first row nothing is wanted, and nothing may lie there.
    const __half2 next =
        j + 1 < P || more ? load_half2(at[u][mirror] + 8 * (j + 1) * PITCH) : here;
    const __half2 under = between(here, next);
    const __half2 value = mirror & 1 ? __hfma2(under, above[u], __hmul2(here, below[u]))
                                     : __hfma2(under, below[u], __hmul2(here, above[u]));
    here = next;
    return value;
  }

  // Samples of the next column of shifts, folded: cosines of even and of odd frequencies, sines of
  // even and of odd ones. They go to shared memory, `to` for the two rows of a pair.
  __device__ __forceinline__ void step(uint32_t type_bytes, const uint32_t (&to)[2],
                                       __half2 (&square)[P]) {
    __half2 here[2][4];
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int mirror = 0; mirror < 4; ++mirror) here[u][mirror] = load_half2(at[u][mirror]);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      __half2 folded[2][4];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        __half2 sample[4];
#pragma unroll
        for (int mirror = 0; mirror < 4; ++mirror) {
          const __half2 before = last[u][mirror][j];
          const __half2 next = down(u, mirror, j, here[u][mirror]);
          sample[mirror] = mirror & 2 ? __hfma2(right[u], __hsub2(before, next), next)
                                      : __hfma2(right[u], __hsub2(next, before), before);
          last[u][mirror][j] = next;
        }
        const __half2 sum = __hadd2(sample[0], sample[1]);
        const __half2 difference = __hsub2(sample[0], sample[1]);
        const __half2 other_sum = __hadd2(sample[2], sample[3]);
        const __half2 other = __hsub2(sample[3], sample[2]);
        folded[u][0] = __hadd2(sum, other_sum);
        folded[u][1] = __hsub2(sum, other_sum);
        folded[u][2] = __hadd2(difference, other);
        folded[u][3] = __hsub2(difference, other);
      }
      square[j] = __hmul2(folded[0][0], folded[0][0]);
#pragma unroll
      for (int type = 0; type < 4; ++type) {
        const __half2 first = folded[0][type], second = folded[1][type];
        if (type > 0) square[j] = __hfma2(first, first, square[j]);
        square[j] = __hfma2(second, second, square[j]);
        store_bits(to[0] + type * type_bytes + j * PAIR_BYTES,
                   bits(__lows2half2(first, second)));
        store_bits(to[1] + type * type_bytes + j * PAIR_BYTES,
                   bits(__highs2half2(first, second)));
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int mirror = 0; mirror < 4; ++mirror) at[u][mirror] += 4;
  }
};

// Sums over the warp of each row of P <= 4 pairs, in fp32 on the tensor cores: row g to the lanes
// 4 g to 4 g + 3.
template <int P>
__device__ __forceinline__ float sums_of_rows(const __half2 (&v)[P], int lane) {
  const int g = lane >> 2;
  // Ones in row g of the left side, where it meets its row of a pair.
  const uint32_t one = g & 1 ? 0x3C000000 : 0x3C00;
  float d[4] = {};
#pragma unroll
  for (int j = 0; j < P; j += 2)
    mma(d, make_uint4(g >> 1 == j ? one : 0, 0, g >> 1 == j + 1 ? one : 0, 0), bits(v[j]),
        j + 1 < P ? bits(v[j + 1]) : 0);
  float sum = d[0] + d[1];
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

template <int S, int PITCH>
__global__ void __launch_bounds__(THREADS, 2) features_kernel(const __grid_constant__ Task task) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // other cards are never sent here
  extern __shared__ __align__(1024) unsigned char memory[];
  constexpr int P = GROUP<S>;
  __shared__ float power[WARPS][S][2 * P];
  __shared__ float constant[MOST_HALF_STEPS][S][P * 16];  // what frequency 0 has
  __shared__ float level[S][2 * P];                       // the mean, as frequency 0 has it
  __shared__ float scratch[WARPS];
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // the compiler sees that it is uniform
  const int g = lane >> 2, c = lane & 3;
  const int64_t particle = blockIdx.x;
  const int member = particle % MEMBERS;
  const int steps = task.layout.steps[0];
  const int fragments = task.layout.fragments();
  uint4* const tile = task.packed + particle / MEMBERS * (S * S) * fragments * FRAGMENT;
  const int stride = S * fragments * FRAGMENT;  // from one column of shifts to the next
  const uint32_t product = shared_address(memory);
  __half2* const window = reinterpret_cast<__half2*>(memory + task.product_bytes);

  // The window of the image, first as it is, then scaled in pairs of rows; zero outside.
  const int side = window_side(task.last_ring, S), staged = side + 1;
  const int reach = task.last_ring + S / 2;
  float* const raw = reinterpret_cast<float*>(memory);
  const float* image = task.images + particle * task.height * task.width;
  const int top = task.height / 2 - reach, left = task.width / 2 - reach;
  for (int y = warp; y < staged; y += WARPS)
    for (int x = lane; x < staged; x += 32) {
      const int row = top + y, column = left + x;
      const bool there = particle < task.n && row >= 0 && column >= 0 && row < task.height &&
                         column < task.width;
      copy_or_zero(raw + y * staged + x,
                   there ? image + static_cast<int64_t>(row) * task.width + column : image, there);
    }
  wait_for_copies();
  __syncthreads();
  float squares = 0.f;
  for (int i = threadIdx.x; i < staged * staged; i += THREADS)
    squares = fmaf(raw[i], raw[i], squares);
  squares = block_sum(squares, scratch) / (staged * staged);
  const float unit = squares > 0.f ? rsqrtf(squares) : 0.f;
  for (int y = warp; y < window_rows<S>(task.last_ring); y += WARPS)
    for (int x = lane; x < side; x += 32) {
      const float* from = raw + min(y, side - 1) * staged + x;
      const float factor = y < side ? unit * DEVIATION : 0.f;
      window[y * PITCH + x] = __floats2half2_rn(from[0] * factor, from[staged] * factor);
    }
  __syncthreads();

  // A warp samples four neighbouring rings at 8 of 32 neighbouring angles (and at those an eighth
  // of a turn on): what its lanes read then lies in few rows of the window. Of the rings of a step
  // these are 4 h + lane / 8, from 0 or from 8 on.
  const int eight = warp >> 2, angle8 = warp & 3;
  const int ring4 = lane >> 3, angle = lane & 7;
  float2 direction[2];
#pragma unroll
  for (int u = 0; u < 2; ++u)
    sincospif((8 * angle8 + angle + 32 * u + 0.5f) * (2.f / ANGLES), &direction[u].y,
              &direction[u].x);
  // Column 16 k + 8 (i / 8 & 1) + 4 row + (i & 3), in chunks of 8 entries, swizzled. Two groups of
  // four angles lie four chunks apart, so that a warp's stores meet every bank once.
  uint32_t to[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int column = 8 * eight + 4 * row + ring4, chunk = 4 * (angle >> 2) + angle8;
    to[row] = product + column * 128 + ((chunk ^ (column & 7)) << 4) + (angle & 3) * 4;
  }
  const int parity = warp >> 2, quarter = warp & 3;  // a warpgroup a parity; 16 of 64 rows a warp
  const uint4* const matrix = task.transform + (parity * 4 + quarter) * 8 * 32 + lane;
  const uint32_t descriptor = descriptor_of(product + parity * TYPE_BYTES<S>);
  // Frequency 0 is written last, without the mean.
  const bool zero = parity == 0 && quarter == 0 && g == 0;
  const int two_rows = 2 * fragments * FRAGMENT;
  uint32_t turn = 0;  // where the buffer begins

  for (int group = 0; group < GROUPS<S>; ++group) {
    const int first_row = 2 * P * group;
    const uint32_t middle = shared_address(window) +
                            4 * ((task.last_ring + first_row) * PITCH + task.last_ring);
    Sampler<P, PITCH> sampler;
    sampler.more = group + 1 < GROUPS<S>;
    for (int half_step = 0; half_step < 2 * steps; ++half_step) {
      const int t = half_step >> 1, h = half_step & 1;
      // Where this lane's results for the first pair of shifts go, and how much further on those of
      // the second eight rows.
      bool kept[2];
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int q = 2 * quarter + high;
        kept[high] = q < task.layout.groups && t < task.layout.steps[q];
      }
      uint4* out = tile + ((S * S - 1 - first_row - (c >> 1)) * fragments +
                           parity * task.layout.parity + task.layout.base[2 * quarter] + 8 * t +
                           g) * FRAGMENT +
                   member * 4 + 2 * h + (c & 1);
      const int further =
          (task.layout.base[2 * quarter + 1] - task.layout.base[2 * quarter]) * FRAGMENT;
      float* keep = constant[half_step][0] + 2 * c;
      const auto wanted = [&](int j) { return first_row + 2 * j + (c >> 1) < S; };

      if (16 * t + 4 * h >= task.rings) {  // past the last ring
        for (int k = 0; k < S; ++k, out -= stride, keep += P * 16)
          for (int j = 0; j < P; ++j) {
            for (int high = 0; high < 2; ++high)
              if (kept[high] && wanted(j))
                out[high * further - j * two_rows] = make_uint4(0, 0, 0, 0);
            if (zero) keep[16 * j] = keep[16 * j + 1] = keep[16 * j + 8] = keep[16 * j + 9] = 0.f;
          }
        continue;
      }
      const int i = 16 * t + 4 * h + 8 * eight + ring4;
      const bool sampled = i - ring4 < task.rings;
      if (sampled) {
        // Of these a lane may still be past the last ring: its samples are zero.
        const int ring = max(task.rings - 1 - i, 0);
        sampler.place(middle, direction, task.first_ring + task.ring_step * ring,
                      i < task.rings ? __ldg(task.gain + i) : 0.f);
      }
#pragma unroll 1
      for (int k = 0; k < S; ++k) {
        uint4 a[8];  // they come while the samples are taken
#pragma unroll
        for (int e = 0; e < 8; ++e) a[e] = load_matrix(matrix + e * 32);
        const uint32_t there[2] = {to[0] + turn, to[1] + turn};
        __half2 square[P];
        if (sampled) {
          sampler.step(TYPE_BYTES<S>, there, square);
        } else {
#pragma unroll
          for (int j = 0; j < P; ++j) {
            square[j] = both(0.f);
#pragma unroll
            for (int e = 0; e < 8; ++e)
              store_bits(there[e & 1] + (e >> 1) * TYPE_BYTES<S> + j * PAIR_BYTES, 0);
          }
        }
        asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
        const float sum = sums_of_rows<P>(square, lane);
        if (c == 0 && g < 2 * P) {
          float* const own = &power[warp][k][g];
          *own = half_step == 0 ? sum : *own + sum;
        }
        __syncthreads();  // all samples are there, and the other buffer is free again
#pragma unroll
        for (int pass = 0; pass < PASSES<S>; ++pass) {
          float re[16], im[16];
          const uint32_t from = descriptor + (turn + pass * PASS_BYTES) / 16;
          wgmma_begin();
          wgmma<true>(re, a[0], from);
#pragma unroll
          for (int e = 1; e < 4; ++e) wgmma<false>(re, a[e], from + 2 * e);
          wgmma<true>(im, a[4], from + TYPE_BYTES<S> / 8);
#pragma unroll
          for (int e = 1; e < 4; ++e)
            wgmma<false>(im, a[4 + e], from + TYPE_BYTES<S> / 8 + 2 * e);
          wgmma_finish();
#pragma unroll
          for (int local = 0; local < 2; ++local) {
            const int j = 2 * pass + local, n = 8 * local;
            if (j >= P) continue;
            if (zero) {
              keep[16 * j] = re[n];
              keep[16 * j + 1] = re[n + 1];
              keep[16 * j + 8] = re[n + 4];
              keep[16 * j + 9] = re[n + 5];
            }
#pragma unroll
            for (int high = 0; high < 2; ++high) {
              const int m = n + 2 * high;
              if (kept[high] && wanted(j))
                out[high * further - j * two_rows] =
                    make_uint4(pack2(re[m], re[m + 1]), pack2(im[m], im[m + 1]),
                               pack2(re[m + 4], re[m + 5]), pack2(im[m + 4], im[m + 5]));
            }
          }
        }
        out -= stride;
        keep += P * 16;
        turn ^= BUFFER_BYTES<S>;
      }
    }
    // Mean and deviation of the shifts, then what frequency 0 has without the mean.
    __syncthreads();
    for (int item = threadIdx.x; item < S * 2 * P; item += THREADS) {
      const int k = item / (2 * P), row = item % (2 * P);
      if (first_row + row >= S) continue;
      float mean = 0.f, sum = 0.f;
      for (int i = 0; i < task.rings; ++i)
        mean = fmaf(task.gain[i], constant[i >> 4 << 1 | (i >> 2 & 1)][k]
                                          [16 * (row >> 1) + (i & 8) + 4 * (row & 1) + (i & 3)],
                    mean);
      for (int w = 0; w < WARPS; ++w) sum += power[w][k][row];
      // In units of the packed spectra: weights w = largest_weight gain^2.
      mean *= sqrtf(task.largest_weight / ANGLES);
      const float whole = sum * task.largest_weight / (4.f * DEVIATION * DEVIATION * ANGLES);
      const float variance = whole - mean * mean;
      level[k][row] = mean * sqrtf(ANGLES * task.largest_weight);
      const int shift = (S - 1 - k) * S + (S - 1 - first_row - row);
      // A smaller variance is rounding.
      task.scale[particle * S * S + shift] = variance > 1e-5f * whole ? rsqrtf(variance) : 0.f;
    }
    __syncthreads();
    for (int item = threadIdx.x; item < S * 2 * P * 4 * steps; item += THREADS) {
      const int quad = item % (4 * steps), k = item / (4 * steps) / (2 * P);
      const int row = item / (4 * steps) % (2 * P);
      if (first_row + row >= S) continue;
      const int t = quad >> 2, h = quad >> 1 & 1, low = quad & 1;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int within = 2 * low + (e & 1), i = 16 * t + 4 * h + within + 8 * (e >> 1);
        v[e] = i < task.rings
                   ? constant[2 * t + h][k][16 * (row >> 1) + 8 * (e >> 1) + 4 * (row & 1) +
                                            within] -
                         task.gain[i] * level[k][row]
                   : 0.f;
      }
      const int shift = (S - 1 - k) * S + (S - 1 - first_row - row);
      tile[(static_cast<int64_t>(shift) * fragments + 8 * t) * FRAGMENT + member * 4 +
           (quad & 3)] = make_uint4(pack2(v[0], v[1]), 0, pack2(v[2], v[3]), 0);
    }
  }
#endif
}

template <int S, int PITCH>
void launch(Task task, int64_t blocks, cudaStream_t stream) {
  const int side = window_side(task.last_ring, S);
  const int raw = (side + 1) * (side + 1) * static_cast<int>(sizeof(float));
  task.product_bytes = (std::max(2 * BUFFER_BYTES<S>, raw) + 15) / 16 * 16;
  const size_t bytes =
      task.product_bytes + sizeof(__half2) * window_rows<S>(task.last_ring) * PITCH;
  allow_shared(features_kernel<S, PITCH>, bytes);
  features_kernel<S, PITCH><<<grid_size(blocks), THREADS, bytes, stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// With these pitches the points along a ring lie in different banks.
template <int S>
void launch(const Task& task, int64_t blocks, cudaStream_t stream) {
  const int side = window_side(task.last_ring, S);
  require(side <= 151, "pack_images: larger rings than it is made for");
  if (side <= 87)
    launch<S, 87>(task, blocks, stream);
  else
    launch<S, 151>(task, blocks, stream);
}

// shifts: per side of their square grid of whole pixels, in the order of Search.shifts.
void pack_images(Tensor images, Tensor transform, Tensor gain, std::vector<int64_t> steps,
                 int64_t first_ring, int64_t ring_step, int64_t shifts, double largest_weight,
                 Tensor packed, Tensor scale) {
  require(images.dim() == 3 && scale.dim() == 2, "pack_images: images (n, h, w), scale (8 b, s)");
  Task task;
  task.images = floats(images, "images");
  task.transform = halfs(transform, "transform");
  task.gain = floats(gain, "gain");
  task.packed = halfs(packed, "packed");
  task.scale = floats(scale, "scale");
  task.n = images.size(0);
  task.height = static_cast<int>(images.size(1));
  task.width = static_cast<int>(images.size(2));
  task.rings = static_cast<int>(gain.size(0));
  task.first_ring = static_cast<int>(first_ring);
  task.ring_step = static_cast<int>(ring_step);
  task.last_ring = static_cast<int>(first_ring + ring_step * (task.rings - 1));
  task.largest_weight = static_cast<float>(largest_weight);
  task.layout = make_layout(steps);
  const int64_t blocks = divide_up(task.n, MEMBERS) * MEMBERS;
  require(task.layout.groups <= 8 && 2 * task.layout.steps[0] <= MOST_HALF_STEPS &&
              task.rings <= 16 * task.layout.steps[0],
          "pack_images: more rings or frequencies than it is made for");
  require(scale.size(0) == blocks && scale.size(1) == shifts * shifts, "scale: wrong size");
  require(packed.numel() == blocks * shifts * shifts * task.layout.fragments() * FRAGMENT,
          "packed: wrong size");
  if (blocks == 0) return;
  const DeviceGuard guard(images.get_device_index());
  const auto stream = current_stream(images);
  switch (shifts) {
    case 1: return launch<1>(task, blocks, stream);
    case 3: return launch<3>(task, blocks, stream);
    case 5: return launch<5>(task, blocks, stream);
    case 7: return launch<7>(task, blocks, stream);
    case 9: return launch<9>(task, blocks, stream);
    case 11: return launch<11>(task, blocks, stream);
    case 13: return launch<13>(task, blocks, stream);
    case 15: return launch<15>(task, blocks, stream);
    default: require(false, "pack_images: an odd number of shifts a side, at most 15");
  }
}

}  // namespace
}  // namespace cryoalign

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def(
      "pack_images_old(Tensor images, Tensor transform, Tensor gain, int[] steps, int first_ring, "
      "int ring_step, int shifts, float largest_weight, Tensor(a!) packed, Tensor(b!) scale) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("pack_images_old", TORCH_BOX(&cryoalign::pack_images));
}
