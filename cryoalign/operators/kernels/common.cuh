// Shared by the CUDA sources of this folder: the packed layout of ring spectra, helpers for tensor
// cores and shared memory, and the calls into PyTorch's stable ABI.
//
// THE PACKED LAYOUT
//
// A kernel reads ring spectra as fp16 tensor-core fragments, stored in the order of reading.
//
//   rings        R of them, taken from the OUTSIDE IN: index i = 0 .. R-1 is spectra ring R-1-i.
//                Sixteen make a step: step t holds i = 16 t .. 16 t + 15 (zero where i >= R).
//   frequencies  m = 2 m' + par, parity par = 0, 1. Eight m' make a group: m' = 8 q + mm,
//                mm = 0 .. 7; group q holds m = 16 q .. 16 q + 15, both parities.
//                Q groups are kept: frequencies m < 16 Q. Frequencies above a/2 are zero.
//   steps        T(q) = 1 .. 7 ring steps are kept in group q: ring r (pixels) carries only
//                m <= pi r, so the high groups need the outer rings alone. `steps` below.
//   fragment     the 16 rings of one step at one frequency; 32 lanes x 16 bytes = 512 bytes.
//                Number   f = par P + base(q) + 8 t + mm,   base(q) = 8 (T(0) + ... + T(q-1)),
//                P = base(Q) fragments a parity, F = 2 P fragments a tile.
//   lane         l = 4 g + c holds rings i = 16 t + {2c, 2c+1, 2c+8, 2c+9} of member g = 0 .. 7,
//                as 8 halfs in this order:
//     particles    Re(2c), Re(2c+1), Im(2c), Im(2c+1), Re(2c+8), Re(2c+9), Im(2c+8), Im(2c+9)
//     references   Re(2c), Re(2c+1), Re(2c+8), Re(2c+9), Im(2c), Im(2c+1), Im(2c+8), Im(2c+9)
//
//   particles    half (ceil(n/8), s, F, 32, 8): a tile is 8 particles x one shift; particle p is
//                member p % 8 of block p / 8. Members past n are zero.
//                `scale`, float (8 ceil(n/8), s), >= 0, is the factor that turns packed
//                spectra back into true ones; 0 for a constant image. Keep the packed
//                spectra's sum of |X|^2 over rings and frequencies 0 .. a/2 at or below a: then
//                nothing overflows. `pack_particles` makes it a.
//   references   half (ceil(k/8), F, 32, 8), with `scale` float (8 ceil(k/8),). Packed references
//                are turned by half an angle step, Y_m exp(-i pi m / a), and their sum of |Y|^2 is
//                2048^2 / a, so that |sum_r conj(X) Y| <= 2048 for every m.
//                The scale also holds irfft's 1/a.
//
// Why the half step: the inverse transform is evaluated at (j + 1/2) 2 pi / a, where cosine and
// sine of even and odd frequencies fold four angles into one product (phi, -phi, phi + pi,
// pi - phi). With references turned by half a step these become the angles j 2 pi / a of the
// PyTorch implementation, for both hands.

#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace cryoalign {

// ------------------------------------------------------------------ layout, on either side

constexpr int MAX_GROUPS = 40;  // frequencies below 640: up to 1278 angles
constexpr int MAX_STEPS = 7;    // 112 rings
constexpr int FRAGMENT = 32;    // uint4 of one fragment
constexpr int MEMBERS = 8;      // particles or references of a tile

struct Layout {
  int groups;                     // Q
  int parity;                     // P, fragments of one parity
  uint8_t steps[MAX_GROUPS];      // T(q)
  uint16_t base[MAX_GROUPS + 1];  // base(q), in fragments

  __host__ __device__ int fragments() const { return 2 * parity; }  // F
};

inline Layout make_layout(const std::vector<int64_t>& steps) {
  if (steps.empty() || steps.size() > MAX_GROUPS)
    throw std::runtime_error("steps must have 1 to " + std::to_string(MAX_GROUPS) + " entries");
  Layout layout{};
  layout.groups = static_cast<int>(steps.size());
  for (int q = 0; q < layout.groups; ++q) {
    if (steps[q] < 1 || steps[q] > MAX_STEPS)
      throw std::runtime_error("every entry of steps must be 1 to " + std::to_string(MAX_STEPS));
    layout.steps[q] = static_cast<uint8_t>(steps[q]);
    layout.base[q + 1] = static_cast<uint16_t>(layout.base[q] + 8 * steps[q]);
  }
  layout.parity = layout.base[layout.groups];
  return layout;
}

// ------------------------------------------------------------------ the stable ABI

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The data of a contiguous CUDA tensor of one type, or an error that names it.
template <typename T>
T* data(const Tensor& tensor, torch::headeronly::ScalarType type, const char* name) {
  if (!tensor.is_cuda() || !tensor.is_contiguous() || tensor.scalar_type() != type)
    throw std::runtime_error(std::string(name) + ": wrong dtype, not contiguous or not on a GPU");
  return static_cast<T*>(tensor.data_ptr());
}
inline float* floats(const Tensor& t, const char* name) {
  return data<float>(t, torch::headeronly::ScalarType::Float, name);
}
inline uint4* halfs(const Tensor& t, const char* name) {
  return data<uint4>(t, torch::headeronly::ScalarType::Half, name);
}
inline int32_t* ints(const Tensor& t, const char* name) {
  return data<int32_t>(t, torch::headeronly::ScalarType::Int, name);
}
inline int64_t* longs(const Tensor& t, const char* name) {
  return data<int64_t>(t, torch::headeronly::ScalarType::Long, name);
}
inline float2* complexes(const Tensor& t, const char* name) {
  return data<float2>(t, torch::headeronly::ScalarType::ComplexFloat, name);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of shared memory that a block can have on the current card (defined in search.cu).
int shared_limit();

// Lets a kernel use this many bytes of dynamic shared memory.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
}

// Grids are one-dimensional; x can reach 2^31 - 1.
inline unsigned grid_size(int64_t blocks) {
  require(blocks > 0 && blocks < (int64_t{1} << 31), "too many blocks for one launch");
  return static_cast<unsigned>(blocks);
}

// ------------------------------------------------------------------ on the device

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t pack2(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

// D (16 x 8, fp32) += A (16 x 16, fp16) B (16 x 8, fp16).
__device__ __forceinline__ void mma(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(address));
  return v;
}

// For data that is read only once: it is kept out of the L1 cache.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

#endif  // __CUDACC__

}  // namespace cryoalign
