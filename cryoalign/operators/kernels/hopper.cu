// The fused search for Hopper (sm_90a): up to 256 angles and 48 rings, any number of particles,
// references and shifts. The arithmetic is that of search.cu; the work is split by role.
//
// A block keeps 8 references in shared memory for its whole life and walks over (particle block,
// shift) tiles. Eight producer warps do the ring product with mma.sync, streaming the particles'
// fragments from L2 into registers one job (8 frequencies of one parity) ahead; one consumer
// warpgroup does the inverse transform with wgmma, its matrix in registers. Between them one or
// two fp16 tiles in shared memory, with an mbarrier each way.
//
// What bounds it, measured on an H100 at 36 rings and 256 angles: the consumer. A tile of 64 pairs
// takes about 3700 clocks, of which 64 wgmma of 32 columns take 37 each (half the rate of wider
// ones, which its registers cannot hold: 64 for the matrix, 64 for sums, 32 for the best values)
// and the reduction 1100. The stream of particle fragments, 5 to 6 TB/s from L2, comes next: with
// 112 fragments a tile instead of 192 the time falls by less than a tenth. So keeping fewer
// frequencies saves time mostly in the transform (K_STEPS), and less in the stream.

#include <algorithm>

#include "search.cuh"
#include "wgmma.cuh"

namespace cryoalign {
namespace {

constexpr int GROUPS = 8;              // 64 m' of a parity: 128 bytes a row, one swizzle atom
constexpr int CONSUMERS = 128;         // threads
constexpr int PRODUCER_WARPS = 8;
constexpr int THREADS = CONSUMERS + 32 * PRODUCER_WARPS;
constexpr int PLANE = 128 * 128;       // bytes of one type (re / im, parity): 128 columns x 64 m'
constexpr int TILE = 4 * PLANE;        // type 2 im + parity
constexpr int REDUCTION = 4 * 64 * 8;  // bytes: a Two per consumer warp and column of one hand
constexpr int BARRIERS = 64;
// Registers a thread after setmaxnreg: 128 x 184 + 256 x 160 = all that 384 x 168 started with.
[[maybe_unused]] constexpr int CONSUMER_REGISTERS = 184, PRODUCER_REGISTERS = 160;

// One lane arrives at a barrier for its whole warp. The racecheck tool of compute-sanitizer does
// not understand this; with -DCRYOALIGN_RACECHECK every lane arrives.
#ifdef CRYOALIGN_RACECHECK
[[maybe_unused]] constexpr int ARRIVALS = 32;
#else
[[maybe_unused]] constexpr int ARRIVALS = 1;
#endif

constexpr int shared_bytes(int stages, int fragments) {
  return stages * TILE + fragments * FRAGMENT * 16 + REDUCTION + BARRIERS;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(at), "r"(count));
}
__device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra FINISHED;\nbra AGAIN;\nFINISHED:\n}\n" ::"r"(at),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n" ::"r"(at) : "memory");
}

// One job: the ring products of 8 consecutive m' of one parity with the 8 resident references.
// `x` holds the first two steps' fragments of this job; `prefetch(half)` refills the half of it
// that has just been used with the next job's. The third step, where there is one, is loaded here.
template <int STEPS, class Prefetch>
__device__ __forceinline__ void ring_product(uint32_t (&rows)[8][4], uint4 (&x)[16],
                                             const uint4* from, uint32_t y, Prefetch prefetch) {
  uint4 third[4];
  if constexpr (STEPS > 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) third[i] = load_stream(from + (16 + i) * FRAGMENT);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float re[4][4] = {}, im[4][4] = {};
#pragma unroll
    for (int t = 0; t < (STEPS < 2 ? STEPS : 2); ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int f = 8 * t + 4 * half + i;
        const uint4 b = load_shared(y + f * 512);
        mma(re[i], x[f], b.x, b.y);
        mma(im[i], x[f], b.z, b.w);
      }
    }
    prefetch(half);
    if constexpr (STEPS > 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 b = load_shared(y + (16 + 4 * half + i) * 512);
        mma(re[i], third[i], b.x, b.y);
        mma(im[i], third[i], b.z, b.w);
      }
      if (half == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) third[i] = load_stream(from + (20 + i) * FRAGMENT);
      }
    }
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {  // row: (2 hand + kk) 2 + im
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float p0 = re[i][kk], v0 = re[i][2 + kk], u0 = im[i][kk], q0 = im[i][2 + kk];
        const float p1 = re[i + 1][kk], v1 = re[i + 1][2 + kk];
        const float u1 = im[i + 1][kk], q1 = im[i + 1][2 + kk];
        const int pair = 2 * half + i / 2;
        rows[2 * kk][pair] = pack2(p0 + q0, p1 + q1);
        rows[2 * kk + 1][pair] = pack2(u0 - v0, u1 - v1);
        rows[4 + 2 * kk][pair] = pack2(p0 - q0, p1 - q1);
        rows[4 + 2 * kk + 1][pair] = pack2(u0 + v0, u1 + v1);
      }
    }
  }
}

template <int STAGES>
__device__ __forceinline__ void produce(const Task& task, const uint4* tiles, int n_tiles,
                                        uint32_t base, uint32_t references, uint32_t barriers) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(PRODUCER_REGISTERS));
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0) - CONSUMERS / 32;
  const int jobs = 2 * task.layout.groups;  // job 2 q + parity
  const int tile_u4 = task.layout.fragments() * FRAGMENT;
  const auto fragment = [&](int job) {
    return (job & 1) * task.layout.parity + task.layout.base[job >> 1];
  };
  uint4 x[16];
  const auto fetch = [&](const uint4* from, bool two, int half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * half + i] = load_stream(from + (4 * half + i) * FRAGMENT);
    if (two) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[8 + 4 * half + i] = load_stream(from + (8 + 4 * half + i) * FRAGMENT);
    }
  };
  int left = n_tiles * jobs - warp;
  int job = warp % jobs;
  uint32_t it = warp / jobs;
  const uint4* from = tiles + it * tile_u4 + fragment(job) * FRAGMENT + lane;  // of this job
  if (left > 0) {
    const bool two = task.layout.steps[job >> 1] > 1;
    fetch(from, two, 0);
    fetch(from, two, 1);
  }
#pragma unroll 1
  while (left > 0) {
    const int q = job >> 1, steps = task.layout.steps[q], first = fragment(job);
    const uint32_t stage = it % STAGES, phase = (it / STAGES) & 1;
    // Rows of 128 bytes in the 128-byte swizzle that wgmma reads.
    const uint32_t to =
        base + stage * TILE + (job & 1) * PLANE + lane * 128 + ((q ^ (lane & 7)) << 4);
    const uint32_t y = references + lane * 16 + first * 512;
    const uint32_t full = barriers + 8 * stage;
    // On to the next job; after the last one the prefetch reads the same one again.
    left -= PRODUCER_WARPS;
    int ahead = 0;
    if (left > 0) {
      job += PRODUCER_WARPS;
      while (job >= jobs) {
        job -= jobs;
        ++it;
        ahead += tile_u4;
      }
    }
    const uint4* next = from + (ahead + (fragment(job) - first) * FRAGMENT);
    const bool two = task.layout.steps[job >> 1] > 1;
    const auto prefetch = [&](int half) { fetch(next, two, half); };
    uint32_t rows[8][4];
    if (steps == 1)
      ring_product<1>(rows, x, from, y, prefetch);
    else if (steps == 2)
      ring_product<2>(rows, x, from, y, prefetch);
    else
      ring_product<3>(rows, x, from, y, prefetch);
    barrier_wait(full + 8 * STAGES, phase ^ 1);
#pragma unroll
    for (int set = 0; set < 4; ++set) {
#pragma unroll
      for (int im = 0; im < 2; ++im) {
        const auto& r = rows[2 * set + im];
        store_shared(to + im * 2 * PLANE + set * 32 * 128, make_uint4(r[0], r[1], r[2], r[3]));
      }
    }
    __syncwarp();
    if (lane < ARRIVALS) barrier_arrive(full);
    from = next;
  }
}

// K_STEPS: steps of 16 m' that are kept; the others would multiply zeros.
template <int STAGES, int K_STEPS>
__device__ __forceinline__ void consume(const Task& task, int64_t first_particle_block,
                                        int particle_blocks, int64_t reference_block,
                                        uint32_t base, uint32_t barriers, Two* reduction) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(CONSUMER_REGISTERS));
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  uint4 w[4][K_STEPS];  // this warp's 16 angles of the quarter turn: type, 16 m'
#pragma unroll
  for (int type = 0; type < 4; ++type) {
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step)
      w[type][step] = __ldg(task.weights + ((warp * 4 + type) * 4 + step) * 32 + lane);
  }
  float best[4][8];  // set of 32 columns, this lane's 8 of them
#pragma unroll
  for (auto& row : best) {
#pragma unroll
    for (auto& v : row) v = -FLT_MAX;
  }
  int s = 0;
  int64_t block = first_particle_block;
  const float* scales = task.scale + (block * MEMBERS + ((lane & 3) >> 1)) * task.shifts;
  const int n_tiles = particle_blocks * task.shifts;
#pragma unroll 1
  for (int it = 0; it < n_tiles; ++it) {
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scale[i] = __ldg(scales + static_cast<int64_t>(2 * i) * task.shifts + s);
    const uint32_t tag = 63u - (s & 63);
    const int stage = it % STAGES;
    const uint32_t full = barriers + 8 * stage;
    barrier_wait(full, (it / STAGES) & 1);
    // The producers' ordinary stores, made visible to wgmma: one fence here costs less than one in
    // each producer.
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#pragma unroll
    for (int set = 0; set < 4; ++set) {
      float sums[4][16];
      // Descriptor: 128-byte swizzle, 1024 bytes between groups of 8 columns. Through a shuffle the
      // compiler knows it to be the same for the whole warp.
      const uint32_t low = __shfl_sync(
          ~0u, (((base + stage * TILE + set * 32 * 128) & 0x3FFFF) >> 4) | 0x10000u, 0);
      asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#pragma unroll
      for (int type = 0; type < 4; ++type) {
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step)
          wgmma(sums[type], w[type][step],
                (uint64_t{0x40000040u} << 32) | (low + (type * PLANE + step * 32) / 16), step > 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
      if (set == 3 && lane < ARRIVALS) barrier_arrive(full + 8 * STAGES);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int a = 4 * i + e, b = a + 2;
          const float v =
              fmaxf(four_angles_max(sums[0][a], sums[1][a], sums[2][a], sums[3][a]),
                    four_angles_max(sums[0][b], sums[1][b], sums[2][b], sums[3][b]));
          best[set][2 * i + e] = fmaxf(best[set][2 * i + e], tagged(v * scale[i], tag));
        }
      }
    }
    const bool last = s == task.shifts - 1;
    if (last || tag == 0) {
#pragma unroll
      for (int hand = 0; hand < 2; ++hand) {
#pragma unroll
        for (int kk = 0; kk < 2; ++kk) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& mine = best[2 * hand + kk][j];
            const Two two = two_over_rows(mine);
            if (lane < 4)
              reduction[warp * 64 + kk * 32 + (j >> 1) * 8 + lane * 2 + (j & 1)] = two;
            mine = -FLT_MAX;
          }
        }
        asm volatile("bar.sync 1, 128;\n" ::: "memory");
        const int column = threadIdx.x;
        if (column < 64) {
          Two two = reduction[column];
          for (int i = 1; i < 4; ++i) merge_two(two, reduction[64 * i + column]);
          write_two(task, two, block, reference_block, column, hand, s);
        }
        asm volatile("bar.sync 1, 128;\n" ::: "memory");
      }
    }
    ++s;
    if (last) {
      s = 0;
      ++block;
      scales += static_cast<int64_t>(MEMBERS) * task.shifts;
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// blocks_each: particle blocks that one thread block walks over.
template <int STAGES, int K_STEPS>
__global__ void __launch_bounds__(THREADS, 1) hopper_kernel(const Task task, int blocks_each) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int fragments = task.layout.fragments();
  const uint32_t references = base + STAGES * TILE;
  const uint32_t reduction = references + fragments * FRAGMENT * 16;
  const uint32_t barriers = reduction + REDUCTION;  // full[STAGES], empty[STAGES]
  const int64_t reference_block = blockIdx.x % task.reference_blocks;
  const int64_t first = blockIdx.x / task.reference_blocks * blocks_each;
  const int particle_blocks =
      static_cast<int>(min(static_cast<int64_t>(blocks_each), task.particle_blocks - first));

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(barriers + 8 * i, ARRIVALS * 2 * task.layout.groups);
      barrier_init(barriers + 8 * (STAGES + i), ARRIVALS * CONSUMERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  // Groups of frequencies that are not kept stay zero.
  for (int i = threadIdx.x; i < STAGES * TILE / 16; i += THREADS)
    store_shared(base + 16 * i, make_uint4(0, 0, 0, 0));
  const int resident = fragments * FRAGMENT;
  for (int i = threadIdx.x; i < resident; i += THREADS)
    store_shared(references + 16 * i, __ldg(task.references + reference_block * resident + i));
  asm volatile("fence.proxy.async;\n" ::: "memory");
  __syncthreads();

  if (threadIdx.x >= CONSUMERS) {
    const uint4* tiles = task.particles + first * task.shifts * resident;
    produce<STAGES>(task, tiles, particle_blocks * task.shifts, base, references, barriers);
  } else {
    consume<STAGES, K_STEPS>(task, first, particle_blocks, reference_block, base, barriers,
                    reinterpret_cast<Two*>(shared + (reduction - base)));
  }
#endif
}

// How many particle blocks a thread block walks over: long walks share the cost of starting (about
// a third of a particle block's work), short ones fill the last wave.
int choose_walk(const Task& task, int processors) {
  int best = 1;
  double least = 1e300;
  for (int each = 1; each <= 16; ++each) {
    const double blocks =
        static_cast<double>(divide_up(task.particle_blocks, each) * task.reference_blocks);
    const double waves = std::max(1.0, static_cast<double>(static_cast<int64_t>(
                                           (blocks + processors - 1) / processors)));
    const double cost = waves * (each + 0.35);
    if (cost < least) {
      least = cost;
      best = each;
    }
  }
  return best;
}

template <int STAGES, int K_STEPS>
void launch(const Task& task, int processors, cudaStream_t stream) {
  auto* kernel = hopper_kernel<STAGES, K_STEPS>;
  const int bytes = shared_bytes(STAGES, task.layout.fragments());
  allow_shared(kernel, bytes);
  const int each = choose_walk(task, processors);
  require(static_cast<int64_t>(each) * task.shifts < (int64_t{1} << 26), "too many shifts");
  const unsigned blocks =
      grid_size(divide_up(task.particle_blocks, each) * task.reference_blocks);
  kernel<<<blocks, THREADS, bytes, stream>>>(task, each);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int STAGES>
void launch_stages(const Task& task, int processors, cudaStream_t stream) {
  if (task.layout.groups <= 4)
    launch<STAGES, 2>(task, processors, stream);
  else if (task.layout.groups <= 6)
    launch<STAGES, 3>(task, processors, stream);
  else
    launch<STAGES, 4>(task, processors, stream);
}

// Whether the machine code at hand is the one with wgmma in it.
bool hopper_code() {
  int device = 0, major = 0, minor = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  cudaFuncAttributes attributes{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, hopper_kernel<1, 4>));
  return attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
}

}  // namespace

bool search_hopper(const Task& task, cudaStream_t stream) {
  if (!hopper_code() || task.row_blocks != 4 || task.k_steps != 4) return false;
  if (task.angles <= 128 || task.layout.groups > GROUPS) return false;
  for (int q = 0; q < task.layout.groups; ++q)
    if (task.layout.steps[q] > 3) return false;
  const int limit = shared_limit(), fragments = task.layout.fragments();
  int device = 0, processors = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (shared_bytes(2, fragments) <= limit)
    launch_stages<2>(task, processors, stream);
  else if (shared_bytes(1, fragments) <= limit)
    launch_stages<1>(task, processors, stream);
  else
    return false;
  return true;
}

}  // namespace cryoalign
