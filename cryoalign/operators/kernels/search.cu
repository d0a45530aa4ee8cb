// The fused search for any card from sm_80 on and any size: ring product, inverse transform over
// angles and reduction over shifts and angles, on chip. Per (particle, reference, hand) only the
// result is written.
//
// A block holds one tile: 8 particles x 8 references, and walks over the shifts.
//   1. Ring product. Rows of the tensor-core product are Re X and Im X of the 8 particles, columns
//      Re Y and Im Y of the 8 references: four real sums P, Q, U, V, from which both hands follow:
//        conj(X) Y       = (P + Q) + i (U - V)
//        conj(X) conj(Y) = (P - Q) - i (U + V)
//      They go to shared memory as fp16, one row of m' for each (hand, particle, reference).
//   2. Inverse transform by a second product with a cosine / sine matrix (see `dft_matrix` in
//      peaks.py), split by parity of m so that four angles come out of one row:
//        A = even cos + odd cos, A' = even cos - odd cos, B, B' likewise from the sines;
//        scores at phi, -phi, phi + pi, pi - phi are A -+ B, A' -+ B'.
//      So signs of B do not matter, nor does the factor (-1)^m of the mirrored hand.
//   3. Reduction, in registers: the maximum A + |B|, A' + |B'|, or the sum of exponentials.
//
// A column of a tile is (hand, reference & 1, lane = 4 particle + reference / 2).

#include "search.cuh"

namespace cryoalign {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// Bytes between rows of m' in shared memory: an odd number of 16-byte units, so that neither
// stores nor ldmatrix have bank conflicts.
__host__ __device__ constexpr int row_bytes(int k_steps) { return 32 * k_steps + 16; }

__host__ __device__ constexpr int tile_bytes(int k_steps, int hands) {
  return 4 * 64 * hands * row_bytes(k_steps);
}

// Ring products of one group of one parity: 8 frequencies m', packed to fp16.
// rows[hand][reference & 1][re, im] holds this lane's 8 m'.
template <int HANDS>
__device__ __forceinline__ void ring_product(const uint4* __restrict__ x,
                                             const uint4* __restrict__ y, int steps, float sign,
                                             uint32_t (&rows)[HANDS][2][2][4]) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float re[2][4] = {}, im[2][4] = {};
    for (int t = 0; t < steps; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int fragment = (8 * t + 2 * pair + i) * FRAGMENT;
        const uint4 a = __ldg(x + fragment), b = __ldg(y + fragment);
        mma(re[i], a, b.x, b.y);
        mma(im[i], a, b.z, b.w);
      }
    }
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {
      const float p0 = re[0][kk], v0 = re[0][2 + kk], u0 = im[0][kk], q0 = im[0][2 + kk];
      const float p1 = re[1][kk], v1 = re[1][2 + kk], u1 = im[1][kk], q1 = im[1][2 + kk];
      if constexpr (HANDS == 2) {
        rows[0][kk][0][pair] = pack2(p0 + q0, p1 + q1);
        rows[0][kk][1][pair] = pack2(u0 - v0, u1 - v1);
        rows[1][kk][0][pair] = pack2(p0 - q0, p1 - q1);
        rows[1][kk][1][pair] = pack2(u0 + v0, u1 + v1);
      } else {
        rows[0][kk][0][pair] = pack2(fmaf(sign, q0, p0), fmaf(sign, q1, p1));
        rows[0][kk][1][pair] = pack2(fmaf(-sign, v0, u0), fmaf(-sign, v1, u1));
      }
    }
  }
}

// HANDS = 2: both at once. HANDS = 1: the hand `task.first_hand` alone, in half the memory.
template <int HANDS, class Reduction>
__global__ void __launch_bounds__(THREADS, 2) portable_kernel(const Task task) {
  constexpr int SETS = 2 * HANDS;          // of 32 columns
  constexpr int ROW_GROUPS = WARPS / SETS;  // warps that share a set's angles
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ typename Reduction::Partial partial[ROW_GROUPS][SETS * 32];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, c = lane & 3;
  const int set = warp % SETS, row_group = warp / SETS;
  const int64_t reference_block = blockIdx.x % task.reference_blocks;
  const int64_t particle_block = blockIdx.x / task.reference_blocks;
  const int stride = row_bytes(task.k_steps);
  const int type_bytes = SETS * 32 * stride;
  const uint32_t tile = shared_address(shared);
  const float sign = task.first_hand ? -1.f : 1.f;
  const int kept_steps = (task.layout.groups + 1) / 2;

  // Groups of frequencies that are not kept stay zero.
  for (int i = threadIdx.x; i < 4 * type_bytes / 16; i += THREADS)
    store_shared(tile + 16 * i, make_uint4(0, 0, 0, 0));
  __syncthreads();

  const int tile_u4 = task.layout.fragments() * FRAGMENT;
  const uint4* y = task.references + reference_block * tile_u4 + lane;
  const uint4* x = task.particles + particle_block * task.shifts * tile_u4 + lane;
  // ldmatrix: rows of two column groups, low and high half of 16 m'.
  const uint32_t matrices =
      tile + (set * 32 + (lane >> 4) * 8 + (lane & 7)) * stride + ((lane >> 3) & 1) * 16;

  Reduction reduction(task, particle_block, reference_block, set & 1, c);
  for (int s = 0; s < task.shifts; ++s, x += tile_u4) {
    for (int job = warp; job < 2 * task.layout.groups; job += WARPS) {
      const int q = job >> 1, parity = job & 1;
      const int from = (parity * task.layout.parity + task.layout.base[q]) * FRAGMENT;
      uint32_t rows[HANDS][2][2][4];
      ring_product<HANDS>(x + from, y + from, task.layout.steps[q], sign, rows);
#pragma unroll
      for (int hand = 0; hand < HANDS; ++hand) {
#pragma unroll
        for (int kk = 0; kk < 2; ++kk) {
          const uint32_t to =
              tile + parity * type_bytes + ((hand * 2 + kk) * 32 + lane) * stride + 16 * q;
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const auto& r = rows[hand][kk][part];
            store_shared(to + 2 * part * type_bytes, make_uint4(r[0], r[1], r[2], r[3]));
          }
        }
      }
    }
    __syncthreads();
    reduction.begin_shift(s);
    for (int row_block = row_group; row_block < task.row_blocks; row_block += ROW_GROUPS) {
      float sums[4][4][4] = {};  // type (2 im + parity), column group, accumulator
      const uint4* w =
          task.weights + static_cast<int64_t>(row_block) * 4 * task.k_steps * 32 + lane;
      for (int step = 0; step < kept_steps; ++step) {
#pragma unroll
        for (int type = 0; type < 4; ++type) {
          const uint4 a = __ldg(w + (type * task.k_steps + step) * 32);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t b[4];
            load_matrices(b, matrices + type * type_bytes + half * 16 * stride + step * 32);
            mma(sums[type][2 * half], a, b[0], b[1]);
            mma(sums[type][2 * half + 1], a, b[2], b[3]);
          }
        }
      }
      reduction.add(sums, 16 * row_block + g);
    }
    __syncthreads();
    if (reduction.wants_flush(s)) {
      reduction.collect(partial[row_group] + set * 32, g, c);
      __syncthreads();
      for (int column = threadIdx.x; column < SETS * 32; column += THREADS) {
        auto total = partial[0][column];
        for (int i = 1; i < ROW_GROUPS; ++i) Reduction::merge(total, partial[i][column]);
        const int hand = column / 64 + task.first_hand;
        Reduction::write(task, total, particle_block, reference_block, column & 63, hand, s);
      }
      __syncthreads();
      reduction.reset();
    }
  }
}

// ------------------------------------------------------------------ reductions

// The best value and its shift, and the runner-up of another shift. The shift of a run of 64 rides
// in the value's low six bits, counted down so that the first of equals wins.
struct Best {
  using Partial = Two;
  float best[4][2];
  float scale[4];
  const float* scales;
  int64_t shifts;
  uint32_t tag;
  int last;

  __device__ Best(const Task& task, int64_t particle_block, int64_t, int, int c)
      : scales(task.scale + (particle_block * MEMBERS + (c >> 1)) * task.shifts),
        shifts(task.shifts),
        last(task.shifts - 1) {
    reset();
  }
  __device__ void reset() {
    for (auto& row : best) row[0] = row[1] = -FLT_MAX;
  }
  __device__ void begin_shift(int s) {
    tag = 63u - (s & 63);
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[i] = __ldg(scales + 2 * i * shifts + s);
  }
  __device__ void add(const float (&sums)[4][4][4], int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v = fmaxf(four_angles_max(sums[0][i][e], sums[1][i][e], sums[2][i][e], sums[3][i][e]),
                        four_angles_max(sums[0][i][e + 2], sums[1][i][e + 2], sums[2][i][e + 2],
                                        sums[3][i][e + 2]));
        best[i][e] = fmaxf(best[i][e], tagged(v * scale[i], tag));
      }
    }
  }
  __device__ bool wants_flush(int s) const { return (s & 63) == 63 || s == last; }
  __device__ void collect(Two* to, int g, int c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Two two = two_over_rows(best[i][e]);
        if (g == 0) to[8 * i + 2 * c + e] = two;
      }
    }
  }
  static __device__ void merge(Two& total, const Two& other) { merge_two(total, other); }
  static __device__ void write(const Task& task, const Two& two, int64_t particle_block,
                               int64_t reference_block, int column, int hand, int s) {
    write_two(task, two, particle_block, reference_block, column, hand, s);
  }
};

// log2 of the sum of 2^z over shifts and angles, as a running maximum and a sum relative to it;
// z = score / (T ln 2).
struct SoftPartial {
  float top, sum;
};

__device__ __forceinline__ void merge_soft(SoftPartial& total, const SoftPartial& other) {
  const float top = fmaxf(total.top, other.top);
  total.sum = total.sum * exp2f(total.top - top) + other.sum * exp2f(other.top - top);
  total.top = top;
}

struct Soft {
  using Partial = SoftPartial;
  Partial all[4][2];
  float scale[4];
  float reference_scale[2];
  const float* scales;
  int64_t shifts;
  int last, quarter, angles;

  __device__ Soft(const Task& task, int64_t particle_block, int64_t reference_block, int kk, int c)
      : scales(task.scale + (particle_block * MEMBERS + (c >> 1)) * task.shifts),
        shifts(task.shifts),
        last(task.shifts - 1),
        quarter((task.angles + 3) / 4),
        angles(task.angles) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      reference_scale[e] = task.sharpness * task.reference_scale[reference_block * MEMBERS +
                                                                 2 * ((2 * c + e) & 3) + kk];
    reset();
  }
  __device__ void reset() {
    for (auto& row : all) row[0] = row[1] = Partial{-1e30f, 0.f};
  }
  __device__ void begin_shift(int s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[i] = __ldg(scales + 2 * i * shifts + s);
  }
  __device__ void add(const float (&sums)[4][4][4], int row) {
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int angle = row + 8 * high;
      if (angle >= quarter) continue;  // rows that fill up the last fragment
      // pi / 2 is its own partner when a = 2 mod 4: each value comes twice.
      const float weight = (angles & 2) && angle == quarter - 1 ? 0.5f : 1.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int x = e + 2 * high;
          const float f = scale[i] * reference_scale[e];
          const float a = f * (sums[0][i][x] + sums[1][i][x]);
          const float a2 = f * (sums[0][i][x] - sums[1][i][x]);
          const float b = f * (sums[2][i][x] + sums[3][i][x]);
          const float b2 = f * (sums[2][i][x] - sums[3][i][x]);
          const float top = fmaxf(all[i][e].top, fmaxf(a + fabsf(b), a2 + fabsf(b2)));
          const float four = exp2f(a + b - top) + exp2f(a - b - top) + exp2f(a2 + b2 - top) +
                             exp2f(a2 - b2 - top);
          all[i][e].sum = fmaf(weight, four, all[i][e].sum * exp2f(all[i][e].top - top));
          all[i][e].top = top;
        }
      }
    }
  }
  __device__ bool wants_flush(int s) const { return s == last; }
  __device__ void collect(Partial* to, int g, int c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Partial mine = all[i][e];
        for (int offset = 4; offset < 32; offset <<= 1) {
          const Partial other{__shfl_xor_sync(~0u, mine.top, offset),
                              __shfl_xor_sync(~0u, mine.sum, offset)};
          merge_soft(mine, other);
        }
        if (g == 0) to[8 * i + 2 * c + e] = mine;
      }
    }
  }
  static __device__ void merge(Partial& total, const Partial& other) { merge_soft(total, other); }
  static __device__ void write(const Task& task, const Partial& p, int64_t particle_block,
                               int64_t reference_block, int column, int hand, int) {
    const int64_t to = output_index(task, particle_block, reference_block, column, hand);
    if (to >= 0) task.score[to] = (p.top + log2f(p.sum)) / task.sharpness;
  }
};

// ------------------------------------------------------------------ launching

template <int HANDS, class Reduction>
void launch_portable(const Task& task, cudaStream_t stream) {
  const int bytes = tile_bytes(task.k_steps, HANDS);
  auto* kernel = portable_kernel<HANDS, Reduction>;
  allow_shared(kernel, bytes);
  const unsigned blocks = grid_size(task.particle_blocks * task.reference_blocks);
  kernel<<<blocks, THREADS, bytes, stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Reduction>
void search_portable(Task task, cudaStream_t stream) {
  const int limit = shared_limit() - 4096;  // the kernel's static arrays, and the system's own
  if (task.hands == 2 && tile_bytes(task.k_steps, 2) <= limit) {
    launch_portable<2, Reduction>(task, stream);
    return;
  }
  require(tile_bytes(task.k_steps, 1) <= limit, "so many angles do not fit this card's memory");
  for (task.first_hand = 0; task.first_hand < task.hands; ++task.first_hand)
    launch_portable<1, Reduction>(task, stream);
}

Task make_task(const Tensor& particles, const Tensor& scale, const Tensor& references,
               const Tensor& reference_scale, const Tensor& weights,
               const std::vector<int64_t>& steps, int64_t angles, const Tensor& score) {
  const int first = static_cast<int>(score.dim()) - 3;
  require(first >= 0, "the output must be (..., n, k, hands)");
  Task task{};
  task.layout = make_layout(steps);
  task.angles = static_cast<int>(angles);
  task.n = score.size(first);
  task.k = score.size(first + 1);
  task.hands = static_cast<int>(score.size(first + 2));
  task.particle_blocks = divide_up(task.n, MEMBERS);
  task.reference_blocks = divide_up(task.k, MEMBERS);
  require(task.hands == 1 || task.hands == 2, "one hand or two");
  require(angles >= 2 && angles % 2 == 0, "angles must be even");
  require(scale.dim() == 2 && scale.size(0) == task.particle_blocks * MEMBERS,
          "scale must be (8 blocks, s)");
  task.shifts = static_cast<int>(scale.size(1));
  require(task.shifts > 0, "no shift");
  const int64_t tile = static_cast<int64_t>(task.layout.fragments()) * FRAGMENT * 8;
  require(particles.numel() == task.particle_blocks * task.shifts * tile, "particles: wrong size");
  require(references.numel() == task.reference_blocks * tile, "references: wrong size");
  require(reference_scale.numel() == task.reference_blocks * MEMBERS,
          "reference_scale: wrong size");
  require(weights.dim() == 5 && weights.size(1) == 4 && weights.size(3) == 32 &&
              weights.size(4) == 8,
          "weights must be (row blocks, 4, steps, 32, 8)");
  task.row_blocks = static_cast<int>(weights.size(0));
  task.k_steps = static_cast<int>(weights.size(2));
  require(task.row_blocks * 64 >= angles, "weights: too few angles");
  require(task.k_steps * 2 >= task.layout.groups, "weights: too few frequencies");
  task.particles = halfs(particles, "particles");
  task.references = halfs(references, "references");
  task.weights = halfs(weights, "weights");
  task.scale = floats(scale, "scale");
  task.reference_scale = floats(reference_scale, "reference_scale");
  task.score = floats(score, "score");
  return task;
}

void fused_peaks(Tensor particles, Tensor scale, Tensor references, Tensor reference_scale,
                 Tensor weights, std::vector<int64_t> steps, int64_t angles, bool portable,
                 Tensor score, Tensor shift) {
  require(score.dim() == 4 && score.size(0) == 2, "score must be (2, n, k, hands)");
  if (score.numel() == 0) return;
  const DeviceGuard guard(score.get_device_index());
  Task task =
      make_task(particles, scale, references, reference_scale, weights, steps, angles, score);
  require(shift.numel() == score.numel(), "shift must have score's shape");
  task.shift = ints(shift, "shift");
  const cudaStream_t stream = current_stream(score);
  if (!portable && search_hopper(task, stream)) return;
  search_portable<Best>(task, stream);
}

void fused_logsumexp(Tensor particles, Tensor scale, Tensor references, Tensor reference_scale,
                     Tensor weights, std::vector<int64_t> steps, int64_t angles,
                     double temperature, Tensor out) {
  require(out.dim() == 3, "out must be (n, k, hands)");
  if (out.numel() == 0) return;
  require(temperature > 0, "temperature must be positive");
  const DeviceGuard guard(out.get_device_index());
  Task task = make_task(particles, scale, references, reference_scale, weights, steps, angles, out);
  task.sharpness = static_cast<float>(1.4426950408889634 / temperature);
  search_portable<Soft>(task, current_stream(out));
}

}  // namespace

int64_t shared_limit_of(int64_t device) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        static_cast<int>(device)));
  return bytes;
}

int shared_limit() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  return static_cast<int>(shared_limit_of(device));
}

}  // namespace cryoalign

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def(
      "fused_peaks(Tensor particles, Tensor scale, Tensor references, Tensor reference_scale, "
      "Tensor weights, int[] steps, int angles, bool portable, Tensor(a!) score, "
      "Tensor(b!) shift) -> ()");
  m.def("shared_limit(int device) -> int");
  m.def(
      "fused_logsumexp(Tensor particles, Tensor scale, Tensor references, Tensor reference_scale, "
      "Tensor weights, int[] steps, int angles, float temperature, Tensor(a!) out) -> ()");
}

// It has no tensor argument whose device could select an implementation.
STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CompositeExplicitAutograd, m) {
  m.impl("shared_limit", TORCH_BOX(&cryoalign::shared_limit_of));
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("fused_peaks", TORCH_BOX(&cryoalign::fused_peaks));
  m.impl("fused_logsumexp", TORCH_BOX(&cryoalign::fused_logsumexp));
}
