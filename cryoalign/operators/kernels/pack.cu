// Ring spectra, complex64, into the packed layout of common.cuh, normalised on the way.

#include "common.cuh"

namespace cryoalign {
namespace {

// One block a multiprocessor: what its tile's norm has read is still in L2 when it is packed.
constexpr int PACK_THREADS = 1024;
constexpr int PARTS = PACK_THREADS / 32 / MEMBERS;  // warps that share a member's norm

// One warp's part of the sum of |X|^2 over a member's rings and frequencies; the same in all lanes.
__device__ float warp_power(const float2* __restrict__ spectrum, int count, int part) {
  float sum = 0.f;
  for (int i = 32 * part + (threadIdx.x & 31); i < count; i += 32 * PARTS) {
    const float2 v = spectrum[i];
    sum = fmaf(v.x, v.x, fmaf(v.y, v.y, sum));
  }
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// One block packs one tile: 8 members at one shift. Consecutive threads read consecutive
// frequencies; each writes the 16 bytes of one lane of one fragment.
template <bool REFERENCES>
__global__ void __launch_bounds__(PACK_THREADS, 1)
    pack_kernel(const float2* __restrict__ spectra,  // (members, shifts, rings, m)
                int64_t members, int shifts, int rings, int frequencies, Layout layout,
                uint4* __restrict__ packed,   // (blocks, shifts, F, 32)
                float* __restrict__ scale) {  // (8 blocks, shifts)
  __shared__ float gain[MEMBERS], powers[MEMBERS][PARTS];
  const int64_t block = blockIdx.x / shifts;
  const int shift = static_cast<int>(blockIdx.x % shifts);
  const int64_t first = block * MEMBERS;
  const int64_t per_member = static_cast<int64_t>(rings) * frequencies;
  const float angles = 2.f * (frequencies - 1);

  const int of = threadIdx.x >> 5 & 7, part = threadIdx.x >> 8;
  if (first + of < members) {
    const float power = warp_power(spectra + ((first + of) * shifts + shift) * per_member,
                                   static_cast<int>(per_member), part);
    if ((threadIdx.x & 31) == 0) powers[of][part] = power;
  }
  __syncthreads();
  if (threadIdx.x < MEMBERS) {
    const int64_t member = first + threadIdx.x;
    float power = 0.f;
    if (member < members)
      for (const float each : powers[threadIdx.x]) power += each;
    // Inputs of any size come out with the same power (see the layout).
    const float wanted = REFERENCES ? 2048.f * rsqrtf(angles) : sqrtf(angles);
    const float norm = sqrtf(power);
    gain[threadIdx.x] = norm == 0.f ? 0.f : wanted / norm;
    const float back = norm / wanted;
    scale[member * shifts + shift] = REFERENCES ? back / angles : back;
  }
  __syncthreads();

  uint4* tile = packed + static_cast<int64_t>(blockIdx.x) * layout.fragments() * FRAGMENT;
  const int items = layout.fragments() * FRAGMENT;
  for (int item = threadIdx.x; item < items; item += PACK_THREADS) {
    const int frequency16 = item & 15, lane = (item >> 4) & 31, step = item >> 9;
    int q = 0;  // which group this step is of
    while (layout.base[q + 1] <= 8 * step) ++q;
    const int t = step - layout.base[q] / 8;
    const int m = 16 * q + frequency16;
    const int g = lane >> 2, c = lane & 3;
    float2 v[4] = {};
    const int64_t member = first + g;
    if (member < members && m < frequencies) {
      const float2* from = spectra + (member * shifts + shift) * per_member + m;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 16 * t + 2 * c + (e & 1) + 8 * (e >> 1);
        if (i < rings) {
          const float2 z = from[static_cast<int64_t>(rings - 1 - i) * frequencies];
          v[e] = make_float2(z.x * gain[g], z.y * gain[g]);
        }
      }
    }
    const int fragment = (m & 1) * layout.parity + layout.base[q] + 8 * t + (frequency16 >> 1);
    uint4 out;
    if constexpr (REFERENCES) {
      float sine, cosine;  // half an angle step: exp(-i pi m / a)
      sincospif(-static_cast<float>(m) / angles, &sine, &cosine);
#pragma unroll
      for (auto& z : v)
        z = make_float2(z.x * cosine - z.y * sine, z.x * sine + z.y * cosine);
      out = make_uint4(pack2(v[0].x, v[1].x), pack2(v[2].x, v[3].x), pack2(v[0].y, v[1].y),
                       pack2(v[2].y, v[3].y));
    } else {
      out = make_uint4(pack2(v[0].x, v[1].x), pack2(v[0].y, v[1].y), pack2(v[2].x, v[3].x),
                       pack2(v[2].y, v[3].y));
    }
    tile[fragment * FRAGMENT + lane] = out;
  }
}

template <bool REFERENCES>
void pack(const Tensor& spectra, int64_t members, int64_t shifts, int64_t rings,
          int64_t frequencies, const std::vector<int64_t>& steps, const Tensor& packed,
          const Tensor& scale) {
  const Layout layout = make_layout(steps);
  const int64_t tiles = divide_up(members, MEMBERS) * shifts;
  require(packed.numel() == tiles * layout.fragments() * FRAGMENT * 8, "packed: wrong size");
  require(scale.numel() == tiles * MEMBERS, "scale: wrong size");
  require(rings * frequencies < (int64_t{1} << 31), "spectra too large");
  if (tiles == 0) return;
  const DeviceGuard guard(spectra.get_device_index());
  const int unused = shared_limit() / 2 + 1024;  // so that a second block has no room
  allow_shared(pack_kernel<REFERENCES>, unused);
  pack_kernel<REFERENCES><<<grid_size(tiles), PACK_THREADS, unused, current_stream(spectra)>>>(
      complexes(spectra, "spectra"), members, static_cast<int>(shifts), static_cast<int>(rings),
      static_cast<int>(frequencies), layout, halfs(packed, "packed"), floats(scale, "scale"));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// spectra (n, s, r, m) complex64
void pack_particles(Tensor spectra, std::vector<int64_t> steps, Tensor packed, Tensor scale) {
  require(spectra.dim() == 4, "spectra must be (n, s, r, m)");
  pack<false>(spectra, spectra.size(0), spectra.size(1), spectra.size(2), spectra.size(3), steps,
              packed, scale);
}

// spectra (k, r, m) complex64
void pack_references(Tensor spectra, std::vector<int64_t> steps, Tensor packed, Tensor scale) {
  require(spectra.dim() == 3, "spectra must be (k, r, m)");
  pack<true>(spectra, spectra.size(0), 1, spectra.size(1), spectra.size(2), steps, packed, scale);
}

}  // namespace
}  // namespace cryoalign

STABLE_TORCH_LIBRARY_FRAGMENT(cryoalign_cuda, m) {
  m.def("pack_particles(Tensor spectra, int[] steps, Tensor(a!) packed, Tensor(b!) scale) -> ()");
  m.def("pack_references(Tensor spectra, int[] steps, Tensor(a!) packed, Tensor(b!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cryoalign_cuda, CUDA, m) {
  m.impl("pack_particles", TORCH_BOX(&cryoalign::pack_particles));
  m.impl("pack_references", TORCH_BOX(&cryoalign::pack_references));
}
