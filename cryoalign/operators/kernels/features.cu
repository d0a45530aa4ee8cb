// Images into packed ring spectra at any trial shifts: polar sampling, angular Fourier transform on
// the tensor cores and normalisation in one kernel; what reaches memory is the packed layout of
// common.cuh. For 256 angles.
//
// A block makes one particle's spectra, 16 rings of one shift at a time. It samples at the angles
// (j + 1/2) 2 pi / a, where cosines and sines of even and odd frequencies fold four samples (theta,
// -theta, pi - theta, pi + theta) into one entry of four products with a 64 x 64 matrix. In the
// sampling, a lane has two angles and a warp two rings; in the product, a warp has 16 frequencies of
// one parity, whose matrix stays in its registers. Samples go to two buffers in turn: one barrier
// for 16 rings.
#include "common.cuh"

namespace cryoalign {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ANGLES = 256;
constexpr int STEP = 16;        // rings
constexpr int PITCH = 36;       // half2 of a ring's 64 folded samples: 8 rings meet every bank once
constexpr int MOST_STEPS = 4;   // 64 rings
constexpr int MOST_GROUPS = 8;  // 16 frequencies each
// Samples are scaled to this deviation, far from the limits of fp16.
constexpr float DEVIATION = 0.25f;

struct Task {
  const float* images;     // (n, h, w)
  const float2* shifts;    // (s,)
  const uint4* transform;  // fragments of the four matrices, see images._forward_transform
  const float* gain;       // (r,) sqrt of the rings' weights over the largest, outside in
  uint4* packed;           // (blocks, s, F, 32)
  float* scale;            // (8 blocks, s)
  int64_t n;
  int shift_count, height, width, rings, first_ring, ring_step, reach, pitch;
  float largest_weight;
  Layout layout;
};

struct Memory {
  __half2 folded[2][4][STEP][PITCH];  // cosines of even, of odd frequencies; sines likewise
  float constant[MOST_STEPS * STEP];  // what frequency 0 has
  float gain[MOST_STEPS * STEP];      // 0 past the last ring
  float2 sums[WARPS];                 // of samples and of their squares, times the rings' weights
};

__device__ __forceinline__ float2 warp_sum(float2 v) {
  for (int offset = 16; offset > 0; offset /= 2) {
    v.x += __shfl_xor_sync(~0u, v.x, offset);
    v.y += __shfl_xor_sync(~0u, v.y, offset);
  }
  return v;
}

// The sum over the block, by one barrier.
__device__ float2 block_sum(float2 v, float2* shared) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float2 sum = {0.f, 0.f};
  for (int w = 0; w < WARPS; ++w) sum = {sum.x + shared[w].x, sum.y + shared[w].y};
  return sum;
}

// A coordinate in the window, positive: the pixel at or before it, and the rest, from 0 to 1. What is
// added to MAGIC is rounded to a whole number; conversions to int and back take four times as long.
constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23
struct Place {
  int whole;
  float rest;
  __device__ explicit Place(float x) {
    const float rounded = (x - 0.5f) + MAGIC;
    whole = __float_as_int(rounded) - __float_as_int(MAGIC);
    rest = x - (rounded - MAGIC);
  }
};

// A pixel of the window holds the image's pixel and the one to the right of it.
__device__ __forceinline__ float bilinear(const __half2* window, int pitch, Place x, Place y) {
  const __half2* from = window + y.whole * pitch + x.whole;
  const float2 upper = __half22float2(from[0]), lower = __half22float2(from[pitch]);
  const float above = fmaf(x.rest, upper.y - upper.x, upper.x);
  const float below = fmaf(x.rest, lower.y - lower.x, lower.x);
  return fmaf(y.rest, below - above, above);
}

__global__ void __launch_bounds__(THREADS, 3) features_kernel(const __grid_constant__ Task task) {
  extern __shared__ __half2 window[];  // the image about its centre, scaled; zero outside
  __shared__ Memory memory;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int64_t particle = blockIdx.x;
  const int side = 2 * task.reach + 2, pitch = task.pitch;
  const int top = task.height / 2 - task.reach, left = task.width / 2 - task.reach;
  const float* image = task.images + particle * task.height * task.width;
  const auto pixel = [&](int y, int x) {
    const int row = top + y, column = left + x;
    const bool there = particle < task.n && row >= 0 && column >= 0 && row < task.height &&
                       column < task.width;
    return there ? __ldg(image + static_cast<int64_t>(row) * task.width + column) : 0.f;
  };
  float2 squares = {0.f, 0.f};
  for (int y = warp; y < side; y += WARPS)
    for (int x = lane; x < side; x += 32) squares.y = fmaf(pixel(y, x), pixel(y, x), squares.y);
  squares = block_sum(squares, memory.sums);
  const float unit =
      squares.y > 0.f ? DEVIATION * rsqrtf(squares.y / static_cast<float>(side * side)) : 0.f;
  for (int y = warp; y < side; y += WARPS)
    for (int x = lane; x < side; x += 32)
      window[y * pitch + x] = __floats2half2_rn(unit * pixel(y, x), unit * pixel(y, x + 1));
  for (int i = threadIdx.x; i < MOST_STEPS * STEP; i += THREADS)
    memory.gain[i] = i < task.rings ? task.gain[i] : 0.f;

  // Sampling: angles j and j + 32 of a quarter turn, where j is the lane.
  float2 direction[2];
#pragma unroll
  for (int u = 0; u < 2; ++u)
    sincospif((lane + 32 * u + 0.5f) * (2.f / ANGLES), &direction[u].y, &direction[u].x);
  const int column = (lane >> 2 & 1) * 16 + (lane >> 3) * 4 + (lane & 3);
  // Product: 16 frequencies of one parity.
  const int parity = warp >> 2, block = warp & 3;
  uint4 matrix[2][4];  // for real and imaginary parts
#pragma unroll
  for (int part = 0; part < 2; ++part)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      matrix[part][k] =
          __ldg(task.transform + (((parity * 4 + block) * 2 + part) * 4 + k) * 32 + lane);
  const bool has_zero = parity == 0 && block == 0 && g == 0;
  const int steps = task.layout.steps[0], fragments = task.layout.fragments();
  int kept[2], base[2];  // steps that are kept of either group of eight m', and where they begin
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int q = 2 * block + high;
    kept[high] = q < task.layout.groups ? task.layout.steps[q] : 0;
    base[high] = q < task.layout.groups ? parity * task.layout.parity + task.layout.base[q] : 0;
  }
  uint4* out = task.packed +
               particle / MEMBERS * task.shift_count * static_cast<int64_t>(fragments) * FRAGMENT +
               particle % MEMBERS * 4;
  __syncthreads();

  int buffer = 0;
  for (int s = 0; s < task.shift_count; ++s, out += fragments * FRAGMENT) {
    const float2 shift = __ldg(task.shifts + s);
    const float centre_x = task.reach - shift.x, centre_y = task.reach - shift.y;
    float2 sums = {0.f, 0.f};
    for (int t = 0; t < steps; ++t, buffer ^= 1) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int ring = 2 * warp + which, i = STEP * t + ring;
        const float gain = memory.gain[i];
        const float radius = task.first_ring + task.ring_step * (task.rings - 1 - i);
        float folded[2][4] = {};
        if (i < task.rings) {
          float2 own = {0.f, 0.f};
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const float px = radius * direction[u].x, py = radius * direction[u].y;
            const Place right(centre_x + px), left_of(centre_x - px);
            const Place below(centre_y + py), above(centre_y - py);
            const float v0 = bilinear(window, pitch, right, below);
            const float v1 = bilinear(window, pitch, right, above);
            const float v2 = bilinear(window, pitch, left_of, below);
            const float v3 = bilinear(window, pitch, left_of, above);
            const float sum = v0 + v1, difference = v0 - v1, other_sum = v2 + v3, other = v3 - v2;
            folded[u][0] = gain * (sum + other_sum);
            folded[u][1] = gain * (sum - other_sum);
            folded[u][2] = gain * (difference + other);
            folded[u][3] = gain * (difference - other);
            own.x += sum + other_sum;
            own.y = fmaf(v0, v0, fmaf(v1, v1, fmaf(v2, v2, fmaf(v3, v3, own.y))));
          }
          sums.x = fmaf(gain * gain, own.x, sums.x);
          sums.y = fmaf(gain * gain, own.y, sums.y);
        }
#pragma unroll
        for (int type = 0; type < 4; ++type)
          memory.folded[buffer][type][ring][column] =
              __floats2half2_rn(folded[0][type], folded[1][type]);
      }
      __syncthreads();
      if (t >= kept[0] && t >= kept[1]) continue;  // the same for the whole warp
      float re[2][4] = {}, im[2][4] = {};          // of eight rings each
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const uint32_t* cosines = reinterpret_cast<const uint32_t*>(
              &memory.folded[buffer][parity][8 * eight + g][8 * k + c]);
          const uint32_t* sines = reinterpret_cast<const uint32_t*>(
              &memory.folded[buffer][2 + parity][8 * eight + g][8 * k + c]);
          mma(re[eight], matrix[0][k], cosines[0], cosines[4]);
          mma(im[eight], matrix[1][k], sines[0], sines[4]);
        }
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        if (t >= kept[high]) continue;
        const int e = 2 * high;
        if (has_zero && high == 0) {  // written last, without the mean
          memory.constant[STEP * t + 2 * c] = re[0][0];
          memory.constant[STEP * t + 2 * c + 1] = re[0][1];
          memory.constant[STEP * t + 2 * c + 8] = re[1][0];
          memory.constant[STEP * t + 2 * c + 9] = re[1][1];
          continue;
        }
        out[(base[high] + 8 * t + g) * FRAGMENT + c] =
            make_uint4(pack2(re[0][e], re[0][e + 1]), pack2(im[0][e], im[0][e + 1]),
                       pack2(re[1][e], re[1][e + 1]), pack2(im[1][e], im[1][e + 1]));
      }
    }
    sums = block_sum(sums, memory.sums);
    // In units of the packed spectra: weights w = largest_weight gain^2.
    const float per_angle = task.largest_weight / ANGLES;
    const float mean = per_angle * sums.x / DEVIATION;
    const float whole = per_angle * sums.y / (DEVIATION * DEVIATION);
    const float variance = whole - mean * mean, level = mean * sqrtf(ANGLES * task.largest_weight);
    if (threadIdx.x == 0)  // a smaller variance is rounding
      task.scale[particle * task.shift_count + s] =
          variance > 1e-5f * whole ? rsqrtf(variance) : 0.f;
    if (threadIdx.x < 4 * steps) {
      const int t = threadIdx.x >> 2;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = STEP * t + 2 * (threadIdx.x & 3) + (e & 1) + 8 * (e >> 1);
        v[e] = memory.constant[i] - memory.gain[i] * level;
      }
      out[8 * t * FRAGMENT + (threadIdx.x & 3)] =
          make_uint4(pack2(v[0], v[1]), 0, pack2(v[2], v[3]), 0);
    }
    __syncthreads();  // sums and constants are free again
  }
}

// reach: how far from the centre rings at any shift can reach, pixels.
void pack_images(Tensor images, Tensor shifts, Tensor transform, Tensor gain,
                 std::vector<int64_t> steps, int64_t first_ring, int64_t ring_step, int64_t reach,
                 double largest_weight, Tensor packed, Tensor scale) {
  require(images.dim() == 3 && scale.dim() == 2, "pack_images: images (n, h, w), scale (8 b, s)");
  Task task;
  task.images = floats(images, "images");
  task.shifts = reinterpret_cast<const float2*>(floats(shifts, "shifts"));
  task.transform = halfs(transform, "transform");
  task.gain = floats(gain, "gain");
  task.packed = halfs(packed, "packed");
  task.scale = floats(scale, "scale");
  task.n = images.size(0);
  task.shift_count = static_cast<int>(shifts.size(0));
  task.height = static_cast<int>(images.size(1));
  task.width = static_cast<int>(images.size(2));
  task.rings = static_cast<int>(gain.size(0));
  task.first_ring = static_cast<int>(first_ring);
  task.ring_step = static_cast<int>(ring_step);
  task.reach = static_cast<int>(reach);
  task.largest_weight = static_cast<float>(largest_weight);
  task.layout = make_layout(steps);
  const int64_t blocks = divide_up(task.n, MEMBERS) * MEMBERS;
  require(task.layout.groups <= MOST_GROUPS && task.layout.steps[0] <= MOST_STEPS &&
              task.rings <= STEP * task.layout.steps[0],
          "pack_images: more rings or frequencies than it is made for");
  require(scale.size(0) == blocks && scale.size(1) == task.shift_count, "scale: wrong size");
  require(packed.numel() == blocks * task.shift_count * task.layout.fragments() * FRAGMENT,
          "packed: wrong size");
  if (blocks == 0) return;
  const int side = 2 * task.reach + 2;
  task.pitch = side | 1;
  const size_t bytes = sizeof(__half2) * side * task.pitch;
  const DeviceGuard guard(images.get_device_index());
  allow_shared(features_kernel, bytes);
  features_kernel<<<grid_size(blocks), THREADS, bytes, current_stream(images)>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace cryoalign

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def(
      "pack_images(Tensor images, Tensor shifts, Tensor transform, Tensor gain, int[] steps, "
      "int first_ring, int ring_step, int reach, float largest_weight, Tensor(a!) packed, "
      "Tensor(b!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("pack_images", TORCH_BOX(&cryoalign::pack_images));
}
