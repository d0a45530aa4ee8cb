// Class sums: images moved by their poses (Keys' bicubic, zero outside) and added by group.
//
// Members come sorted by group, in chunks of at most CHUNK of one group. A block moves and adds
// the members of one chunk, in order, on one tile of pixels; a second kernel adds the chunks of a
// group, in order. Sums are double precision throughout, so that chunks do not show in them.
#include "common.cuh"

namespace {

using namespace cryoalign;

constexpr int THREADS = 512;
constexpr int PIXELS = 16;  // of one thread: a tile is THREADS * PIXELS pixels
constexpr int MARGIN = 3;   // zeros about an image: what a bicubic tap can reach
constexpr float KEYS = -0.75f;

struct Task {
  const float* images;    // (n, h, w)
  const float* angle;     // (n,) degrees
  const float* shift;     // (n, 2)
  const uint8_t* mirror;  // (n,)
  const int64_t* order;   // (n,) members sorted by group
  const int64_t* first;   // (c,) where in `order` a chunk begins
  const int64_t* last;    // (c,) and ends
  double* partial;        // (c, h, w)
  int height, width, tiles, pitch, buffer;  // buffer: floats of one padded image in shared memory
};

// A pixel of an image, and the one THREADS further on, without a division.
struct Pixel {
  int row, column;

  __device__ Pixel(int index, int width) : row(index / width), column(index % width) {}

  __device__ void advance(int rows, int columns, int width) {
    row += rows;
    column += columns;
    if (column >= width) {
      column -= width;
      ++row;
    }
  }
};

__device__ void copy_async(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

__device__ void keys_weights(float t, float (&w)[4]) {
  const float s = 1.f - t;
  w[0] = KEYS * t * s * s;
  w[1] = ((KEYS + 2.f) * t - (KEYS + 3.f)) * t * t + 1.f;
  w[2] = ((KEYS + 2.f) * s - (KEYS + 3.f)) * s * s + 1.f;
  w[3] = KEYS * s * t * t;
}

// The image at (x, y), in pixels from its corner; `padded`: zeros lie about it in memory.
template <bool PADDED>
__device__ float bicubic(const float* image, const Task& task, float x, float y) {
  const float left = floorf(x), top = floorf(y);
  // NaN and numbers that an int cannot hold have no pixel nearby either.
  if (!(left >= -2.f && top >= -2.f && left <= task.width && top <= task.height)) return 0.f;
  float wx[4], wy[4];
  keys_weights(x - left, wx);
  keys_weights(y - top, wy);
  const int column = static_cast<int>(left) - 1, row = static_cast<int>(top) - 1;
  float value = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float line = 0.f;
    const float* from = image + (row + i) * task.pitch + column;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (PADDED)
        line = fmaf(wx[j], from[j], line);
      else if (row + i >= 0 && row + i < task.height && column + j >= 0 &&
               column + j < task.width)
        line = fmaf(wx[j], __ldg(from + j), line);
    }
    value = fmaf(wy[i], line, value);
  }
  return value;
}

template <bool PADDED>
__global__ void __launch_bounds__(THREADS, 2) chunk_kernel(const __grid_constant__ Task task) {
  extern __shared__ float buffers[];
  const int64_t chunk = blockIdx.x / task.tiles;
  const int tile = blockIdx.x % task.tiles;
  const int64_t first = task.first[chunk], last = task.last[chunk];
  const int area = task.height * task.width;
  const int rows = THREADS / task.width, columns = THREADS % task.width;
  double sum[PIXELS] = {};
  const auto fetch = [&](int64_t member, int into) {
    const float* image = task.images + task.order[member] * area;
    float* to = buffers + into * task.buffer + MARGIN * task.pitch + MARGIN;
    Pixel at(threadIdx.x, task.width);
    for (int i = threadIdx.x; i < area; i += THREADS) {
      copy_async(to + at.row * task.pitch + at.column, image + i);
      at.advance(rows, columns, task.width);
    }
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };
  if (PADDED) {
    for (int i = threadIdx.x; i < 2 * task.buffer; i += THREADS) buffers[i] = 0.f;
    __syncthreads();
    if (first < last) fetch(first, 0);
  }
  for (int64_t member = first; member < last; ++member) {
    const int64_t n = task.order[member];
    const int half = (member - first) & 1;
    const float* image = task.images + n * area;
    if (PADDED) {
      image = buffers + half * task.buffer + MARGIN * task.pitch + MARGIN;
      if (member + 1 < last) {
        fetch(member + 1, half ^ 1);
        asm volatile("cp.async.wait_group 1;\n" ::: "memory");
      } else {
        asm volatile("cp.async.wait_group 0;\n" ::: "memory");
      }
      __syncthreads();
    }
    float sine, cosine;
    sincosf(task.angle[n] * 0.017453292519943295f, &sine, &cosine);
    const float hand = task.mirror[n] ? -1.f : 1.f;
    const float a = hand * cosine, b = -hand * sine;
    // v = L^-1 v' - shift, from the corner.
    const float x0 = task.width / 2 - task.shift[2 * n];
    const float y0 = task.height / 2 - task.shift[2 * n + 1];
    Pixel at(tile * PIXELS * THREADS + threadIdx.x, task.width);
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      if (at.row < task.height) {
        const float x = at.column - task.width / 2, y = at.row - task.height / 2;
        sum[i] += bicubic<PADDED>(image, task, a * x + sine * y + x0, b * x + cosine * y + y0);
      }
      at.advance(rows, columns, task.width);
    }
    if (PADDED) __syncthreads();
  }
  double* out = task.partial + chunk * area;
#pragma unroll
  for (int i = 0; i < PIXELS; ++i) {
    const int pixel = (tile * PIXELS + i) * THREADS + threadIdx.x;
    if (pixel < area && first < last) out[pixel] = sum[i];
  }
}

// total[g] = sum of the chunks end[g - 1] ... end[g] - 1.
__global__ void group_kernel(const double* partial, const int64_t* end, double* total, int64_t area,
                             int64_t all) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= all) return;
  const int64_t g = i / area, pixel = i % area;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t c = g == 0 ? 0 : end[g - 1]; c < end[g]; ++c) sum += partial[c * area + pixel];
  total[i] = sum;
}

void sum_aligned(const Tensor& images, const Tensor& angle, const Tensor& shift,
                 const Tensor& mirror, const Tensor& order, const Tensor& first,
                 const Tensor& last, const Tensor& end, Tensor partial, Tensor total) {
  const DeviceGuard guard(images.get_device_index());
  const auto stream = current_stream(images);
  Task task;
  task.images = floats(images, "images");
  task.angle = floats(angle, "angle");
  task.shift = floats(shift, "shift");
  task.mirror = static_cast<const uint8_t*>(mirror.data_ptr());
  task.order = longs(order, "order");
  task.first = longs(first, "first");
  task.last = longs(last, "last");
  task.partial = data<double>(partial, torch::headeronly::ScalarType::Double, "partial");
  task.height = static_cast<int>(images.size(1));
  task.width = static_cast<int>(images.size(2));
  const int64_t area = images.size(1) * images.size(2);
  task.tiles = static_cast<int>(divide_up(area, THREADS * PIXELS));
  // Odd, so that neither rows nor columns of pixels lie in a single bank.
  task.pitch = (task.width + 2 * MARGIN) | 1;
  task.buffer = (task.height + 2 * MARGIN) * task.pitch;
  const size_t bytes = 2 * sizeof(float) * task.buffer;
  const int64_t chunks = first.size(0);
  if (chunks > 0 && bytes <= static_cast<size_t>(shared_limit())) {
    allow_shared(chunk_kernel<true>, bytes);
    chunk_kernel<true><<<grid_size(chunks * task.tiles), THREADS, bytes, stream>>>(task);
  } else if (chunks > 0) {
    task.pitch = task.width;
    chunk_kernel<false><<<grid_size(chunks * task.tiles), THREADS, 0, stream>>>(task);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t all = total.size(0) * area;
  if (all == 0) return;
  group_kernel<<<grid_size(divide_up(all, 256)), 256, 0, stream>>>(
      task.partial, longs(end, "end"),
      data<double>(total, torch::headeronly::ScalarType::Double, "total"), area, all);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def(
      "sum_aligned(Tensor images, Tensor angle, Tensor shift, Tensor mirror, Tensor order, "
      "Tensor first, Tensor last, Tensor end, Tensor(a!) partial, Tensor(b!) total) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("sum_aligned", TORCH_BOX(&sum_aligned));
}
