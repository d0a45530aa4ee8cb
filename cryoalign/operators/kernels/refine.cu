// Gauss-Newton refinement of poses, one block per pose: the CUDA body of refine_poses in
// pose_refinement.py. An image can have several poses, one after the other.
//
// A pass over the disc gathers 21 weighted moments of particle x, moved reference y and the three
// derivatives j of y (angle, shift x, shift y); score and step follow from the moments alone, so
// the disc is read once per pose. Means are removed from the moments, in double precision.
#include <cfloat>

#include "copy.cuh"

namespace {

using namespace cryoalign;

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr double MAX_TURN = 2.0;  // degrees, as pose_refinement.MAX_TURN
constexpr double MAX_MOVE = 0.7;  // pixels, as pose_refinement.MAX_MOVE
constexpr double DEGREE = 0.017453292519943295;

// Where each moment lies among the 32 that a warp reduces.
enum Moment { W, X, Y, XX, XY, YY, J, JX = J + 3, JY = JX + 3, JJ = JY + 3, MOMENTS = JJ + 6 };

struct Task {
  const float* images;     // (n, h, w)
  const uint2* templates;  // (k, side, side) half4: value, d/dx, d/dy, unused; over `scale`
  const float* scale;      // (k,)
  const int64_t* label;    // (n each,), -1: nothing to do
  const float* angle;      // (n each,) degrees
  const float* shift;      // (n each, 2)
  const uint8_t* mirror;   // (n each,)
  const int2* disc;        // (d,) half2 of (x, y), and y * w + x: pixels the disc can cover
  float* new_angle;
  float* new_shift;
  float* score;
  int each;  // poses of an image
  int height, width, points, side, pitch, first_ring, last_ring, steps;
};

struct Pixel {
  float x, y, value;  // the place about the disc's centre
};

struct Trial {
  float angle, x, y;
};

__device__ float square_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sum of every v[i] over the warp; lane l returns that of v[l]. 31 exchanges for 32 sums.
template <int HALF>
__device__ float sums_over_warp(float (&v)[32], int lane) {
  const bool upper = lane & HALF;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float keep = upper ? v[i + HALF] : v[i];
    const float send = upper ? v[i] : v[i + HALF];
    v[i] = keep + __shfl_xor_sync(~0u, send, HALF);
  }
  if constexpr (HALF > 1)
    return sums_over_warp<HALF / 2>(v, lane);
  else
    return v[0];
}

__device__ float2 low_high(uint32_t bits) {
  return __half22float2(*reinterpret_cast<__half2*>(&bits));
}

// Moments of this thread's share of the disc; the derivatives only if a step follows.
template <bool STEP>
__device__ void gather(const Task& task, const float* image, const uint2* reference, int pitch,
                       Trial pose, bool mirror, float (&sum)[32]) {
  float sine, cosine;
  sincosf(pose.angle * static_cast<float>(DEGREE), &sine, &cosine);
  const float hand = mirror ? -1.f : 1.f;
  const float a = hand * cosine, b = -hand * sine, c = sine, d = cosine;  // the linear part
  // The disc lies about -shift on the particle: about its nearest pixel, and a remainder.
  const float near_x = rintf(-pose.x), near_y = rintf(-pose.y);
  const float rest_x = near_x + pose.x, rest_y = near_y + pose.y;
  // So far away that no pixel is left; it also keeps the numbers within the range of int.
  const float limit = 4.f * (task.width + task.height + task.last_ring);
  const int row = task.height / 2 + static_cast<int>(fminf(fmaxf(near_y, -limit), limit));
  const int column = task.width / 2 + static_cast<int>(fminf(fmaxf(near_x, -limit), limit));
  const int reach = task.last_ring + 2;
  const bool inside = row >= reach && column >= reach && row + reach < task.height &&
                      column + reach < task.width;
  const float* centre = image + static_cast<int64_t>(row) * task.width + column;
  const float rim = task.last_ring + 1.f, hole = task.first_ring - 1.f;
  // Slightly less than the rim: rounding must not lead to a tap outside the reference's margin.
  const float rim_squared = rim * rim * (1.f - 2e-6f);
  const int middle = (task.last_ring + 1) * (pitch + 1);
  constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const int magic_bits = __float_as_int(MAGIC);
  // A pixel is loaded one round before it is needed.
  const auto fetch = [&](int i) {
    Pixel pixel{FLT_MAX, 0.f, 0.f};
    if (i >= task.points) return pixel;
    const int2 entry = __ldg(task.disc + i);
    const float2 at = low_high(static_cast<uint32_t>(entry.x));
    if (!inside) {
      const int x = column + static_cast<int>(at.x), y = row + static_cast<int>(at.y);
      if (x < 0 || y < 0 || x >= task.width || y >= task.height) return pixel;
    }
    pixel = {at.x + rest_x, at.y + rest_y, __ldg(centre + entry.y)};
    return pixel;
  };
  Pixel next = fetch(threadIdx.x);
#pragma unroll 1
  for (int i = threadIdx.x; i < task.points; i += THREADS) {
    const float ux = next.x, uy = next.y, x = next.value;
    next = fetch(i + THREADS);
    const float squared = ux * ux + uy * uy;
    if (!(squared < rim_squared)) continue;
    const float radius = square_root(squared);
    float weight = fminf(rim - radius, 1.f);
    if (hole > 0.f) weight *= fminf(fmaxf(radius - hole, 0.f), 1.f);
    const float px = a * ux + b * uy, py = c * ux + d * uy;  // the place on the reference
    const float round_x = (px - 0.5f) + MAGIC, round_y = (py - 0.5f) + MAGIC;
    const float fx = px - (round_x - MAGIC), fy = py - (round_y - MAGIC);
    const int tap = middle + (__float_as_int(round_y) - magic_bits) * pitch +
                    (__float_as_int(round_x) - magic_bits);
    const uint2 taps[4] = {reference[tap], reference[tap + 1], reference[tap + pitch],
                           reference[tap + pitch + 1]};
    const float w11 = fx * fy, w10 = fy - w11, w01 = fx - w11, w00 = 1.f - fx - w10;
    const float share[4] = {w00, w01, w10, w11};
    float y = 0.f, gx = 0.f, gy = 0.f;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float2 value = low_high(taps[t].x);
      y = fmaf(share[t], value.x, y);
      if (STEP) {
        gx = fmaf(share[t], value.y, gx);
        gy = fmaf(share[t], low_high(taps[t].y).x, gy);
      }
    }
    const float wx = weight * x, wy = weight * y;
    sum[W] += weight;
    sum[X] += wx;
    sum[Y] += wy;
    sum[XX] = fmaf(wx, x, sum[XX]);
    sum[XY] = fmaf(wx, y, sum[XY]);
    sum[YY] = fmaf(wy, y, sum[YY]);
    if (STEP) {
      // By angle (radian; its hand's sign comes with the moments), shift x, shift y.
      const float j[3] = {gy * px - gx * py, gx * a + gy * c, gx * b + gy * d};
      int pair = JJ;
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        const float wj = weight * j[p];
        sum[J + p] += wj;
        sum[JX + p] = fmaf(wj, x, sum[JX + p]);
        sum[JY + p] = fmaf(wj, y, sum[JY + p]);
#pragma unroll
        for (int q = p; q < 3; ++q, ++pair) sum[pair] = fmaf(wj, j[q], sum[pair]);
      }
    }
  }
}

// Central moments in the reference's own units, then score; one thread.
struct Fit {
  double xx, xy, yy, jx[3], jy[3], jj[3][3];

  __device__ Fit(const float* sum, double scale, bool mirror) {
    const double share = sum[W] > 0.f ? 1.0 / sum[W] : 0.0;
    const double unit[3] = {mirror ? -scale : scale, scale, scale};
    xx = sum[XX] - share * sum[X] * sum[X];
    xy = scale * (sum[XY] - share * sum[X] * sum[Y]);
    yy = scale * scale * (sum[YY] - share * sum[Y] * sum[Y]);
    int pair = JJ;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      jx[p] = unit[p] * (sum[JX + p] - share * sum[J + p] * sum[X]);
      jy[p] = unit[p] * scale * (sum[JY + p] - share * sum[J + p] * sum[Y]);
#pragma unroll
      for (int q = p; q < 3; ++q, ++pair) {
        jj[p][q] = unit[p] * unit[q] * (sum[pair] - share * sum[J + p] * sum[J + q]);
        jj[q][p] = jj[p][q];
      }
    }
  }

  __device__ float score() const {
    return static_cast<float>(xy * rsqrt(fmax(xx * yy, 1.2e-38)));
  }

  // The Gauss-Newton step with amplitude and constant projected out, as pose_refinement._step.
  __device__ Trial step() const {
    const double power = fmax(yy, 1.2e-38);
    const double amplitude = fmax(xy / power, 1e-3);
    double m[3][3], right[3], largest = 0.0;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      right[p] = (jx[p] - jy[p] * xy / power) / amplitude;
#pragma unroll
      for (int q = 0; q < 3; ++q) m[p][q] = jj[p][q] - jy[p] * jy[q] / power;
      largest = fmax(largest, m[p][p]);
    }
#pragma unroll
    for (int p = 0; p < 3; ++p) m[p][p] += 1e-4 * m[p][p] + 1e-6 * largest + 1e-12;
#pragma unroll
    for (int p = 0; p < 2; ++p) {  // elimination; positive definite, so no pivots
#pragma unroll
      for (int q = p + 1; q < 3; ++q) {
        const double factor = m[q][p] / m[p][p];
#pragma unroll
        for (int r = p; r < 3; ++r) m[q][r] -= factor * m[p][r];
        right[q] -= factor * right[p];
      }
    }
    const double z = right[2] / m[2][2];
    const double y = (right[1] - m[1][2] * z) / m[1][1];
    const double x = (right[0] - m[0][1] * y - m[0][2] * z) / m[0][0];
    return {static_cast<float>(fmin(fmax(x / DEGREE, -MAX_TURN), MAX_TURN)),
            static_cast<float>(fmin(fmax(y, -MAX_MOVE), MAX_MOVE)),
            static_cast<float>(fmin(fmax(z, -MAX_MOVE), MAX_MOVE))};
  }
};

template <bool SHARED>
__global__ void __launch_bounds__(THREADS, 4) refine_kernel(const __grid_constant__ Task task) {
  extern __shared__ uint2 tile[];
  __shared__ float partial[WARPS][32];
  __shared__ float total[32];
  __shared__ Trial trial;
  __shared__ bool going_on;
  const int64_t n = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k = task.label[n];
  if (k < 0) {  // the same for all threads
    if (threadIdx.x == 0) {
      task.new_angle[n] = task.angle[n];
      task.new_shift[2 * n] = task.shift[2 * n];
      task.new_shift[2 * n + 1] = task.shift[2 * n + 1];
      task.score[n] = -FLT_MAX;
    }
    return;
  }
  const uint2* reference = task.templates + k * task.side * task.side;
  if (SHARED) {
    for (int y = warp; y < task.side; y += WARPS)
      for (int x = lane; x < task.side; x += 32)
        copy8(tile + y * task.pitch + x, reference + y * task.side + x);
    wait_for_copies();
    reference = tile;
  }
  const int pitch = SHARED ? task.pitch : task.side;
  const float* image = task.images + n / task.each * task.height * task.width;
  const bool mirror = task.mirror[n];
  Trial now = {task.angle[n], task.shift[2 * n], task.shift[2 * n + 1]};
  float best = 0.f;
  if (threadIdx.x == 0) trial = now;
  __syncthreads();
  for (int step = 0; step <= task.steps; ++step) {
    const bool last = step == task.steps;
    float sum[32] = {};
    if (last)
      gather<false>(task, image, reference, pitch, trial, mirror, sum);
    else
      gather<true>(task, image, reference, pitch, trial, mirror, sum);
    partial[warp][lane] = sums_over_warp<16>(sum, lane);
    __syncthreads();
    if (warp == 0) {
      float all = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) all += partial[w][lane];
      total[lane] = all;
      __syncwarp();
      if (lane == 0) {
        const Fit fit(total, task.scale[k], mirror);
        const float score = fit.score();
        // A step that does not raise the score is not taken, and would be the same once more.
        going_on = (step == 0 || score > best) && !last;
        if (step == 0 || score > best) {
          now = trial;
          best = score;
        }
        if (going_on) {
          const Trial move = fit.step();
          trial = {now.angle + move.angle, now.x + move.x, now.y + move.y};
        }
      }
    }
    __syncthreads();
    if (!going_on) break;
  }
  if (threadIdx.x == 0) {
    const float turned = now.angle + 180.f;
    task.new_angle[n] = turned - 360.f * floorf(turned / 360.f) - 180.f;
    task.new_shift[2 * n] = now.x;
    task.new_shift[2 * n + 1] = now.y;
    task.score[n] = best;
  }
}

template <bool SHARED>
void launch(const Task& task, int64_t n, size_t bytes, cudaStream_t stream) {
  allow_shared(refine_kernel<SHARED>, bytes);
  refine_kernel<SHARED><<<grid_size(n), THREADS, bytes, stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void refine_poses(const Tensor& images, const Tensor& templates, const Tensor& scale,
                  const Tensor& label, const Tensor& angle, const Tensor& shift,
                  const Tensor& mirror, const Tensor& disc, int64_t first_ring, int64_t last_ring,
                  int64_t steps, Tensor new_angle, Tensor new_shift, Tensor score) {
  const int64_t n = label.numel();
  if (n == 0) return;
  require(n % images.size(0) == 0, "refine_poses: the same number of poses for every image");
  const DeviceGuard guard(images.get_device_index());
  Task task;
  task.each = static_cast<int>(n / images.size(0));
  task.images = floats(images, "images");
  task.templates = reinterpret_cast<const uint2*>(halfs(templates, "templates"));
  task.scale = floats(scale, "scale");
  task.label = longs(label, "label");
  task.angle = floats(angle, "angle");
  task.shift = floats(shift, "shift");
  task.mirror = static_cast<const uint8_t*>(mirror.data_ptr());
  task.disc = reinterpret_cast<const int2*>(ints(disc, "disc"));
  task.new_angle = floats(new_angle, "new_angle");
  task.new_shift = floats(new_shift, "new_shift");
  task.score = floats(score, "score");
  task.height = static_cast<int>(images.size(1));
  task.width = static_cast<int>(images.size(2));
  task.points = static_cast<int>(disc.size(0));
  task.side = static_cast<int>(templates.size(1));
  task.first_ring = static_cast<int>(first_ring);
  task.last_ring = static_cast<int>(last_ring);
  task.steps = static_cast<int>(steps);
  // 4 or 12 modulo the 16 banks of 8 bytes: a 4 x 4 patch of texels meets every bank once.
  task.pitch = task.side;
  while (task.pitch % 8 != 4) ++task.pitch;
  const size_t bytes = sizeof(uint2) * task.side * task.pitch;
  // With fewer than three blocks on a multiprocessor, reading the reference through the cache is
  // faster.
  if (3 * (bytes + 2048) <= static_cast<size_t>(shared_limit()))
    launch<true>(task, n, bytes, current_stream(images));
  else
    launch<false>(task, n, 0, current_stream(images));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def(
      "refine_poses(Tensor images, Tensor templates, Tensor scale, Tensor label, Tensor angle, "
      "Tensor shift, Tensor mirror, Tensor disc, int first_ring, int last_ring, int steps, "
      "Tensor(a!) new_angle, Tensor(b!) new_shift, Tensor(c!) score) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("refine_poses", TORCH_BOX(&refine_poses));
}
