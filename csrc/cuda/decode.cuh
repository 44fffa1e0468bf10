// Device functions that more than one kernel uses: memory accesses, conversions, and the decoding of NF4.
//
// A decoded element is round(level[code] * absmax): one float32 product, one rounding. bitsandbytes' CUDA backend is
// compiled with --use_fast_math, so a subnormal product is zero there; products here flush likewise, to be equal to
// it bit for bit.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../dynamic_map.h"
#include "../nf4.h"
#include "kernels.h"

namespace qlora_engine::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

[[maybe_unused]] static __device__ const float kNf4Levels[16] = {QLORA_NF4_LEVELS};
[[maybe_unused]] static __device__ const float kDynamicMap[256] = {QLORA_DYNAMIC_MAP};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Streaming loads: read once, so they are kept out of the L1 cache.
__device__ __forceinline__ uint32_t load_streaming_32(const void* p) {
  uint32_t r;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}
__device__ __forceinline__ uint4 load_streaming_128(const void* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

__device__ __forceinline__ float multiply_ftz(float a, float b) {
  float r;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float reciprocal_ftz(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// absmax[b] of a double-quantized weight. Separate roundings, as in two launches of bitsandbytes and one of torch:
// no fused multiply-add.
__device__ __forceinline__ float decode_scale(float level, float nested_absmax, float nested_offset) {
  return __fadd_rn(multiply_ftz(level, nested_absmax), nested_offset);
}

// Calls fill(i) once for every i below kCount, from all threads of a block. The count of rounds is a constant: a plain
// `for (i = threadIdx.x; i < kCount; i += kThreads)` is unrolled for any number of rounds, which put up to 30 stores
// into a kernel that needs two: more code to fetch before the first result.
template <int kCount, int kThreads, typename Fill>
__device__ __forceinline__ void fill_by_block(Fill fill) {
#pragma unroll
  for (int round = 0; round < (kCount + kThreads - 1) / kThreads; ++round) {
    const int i = round * kThreads + int(threadIdx.x);
    if (kCount % kThreads == 0 || i < kCount) fill(i);
  }
}

// The 16 levels in shared memory, once a lane: lane l reads only bank l, so a warp's 32 look-ups never conflict
// whatever their codes. The table starts on a 2 KB boundary, so that the code can be put into the address by one
// logical operation. The boundary is found at run time: __align__ counts from the start of the block's own shared
// memory, which begins 1 KB into the address space on some architectures.
class LaneLevels {
 public:
  static constexpr int kStorageBytes = 4096;

  __device__ __forceinline__ LaneLevels(char* storage)
      : storage_(storage),
        base_((shared_address(storage) + 2047u) & ~2047u),
        lane_base_(base_ + threadIdx.x % 32 * 4) {}

  template <int kThreads>
  __device__ __forceinline__ void fill() const {
    float* table = reinterpret_cast<float*>(storage_ + (base_ - shared_address(storage_)));
    fill_by_block<512, kThreads>([&](int i) { table[i] = kNf4Levels[i / 32]; });
  }

  // Level of element `kElement` of a packed word: the first element of a byte is its high nibble.
  template <int kElement>
  __device__ __forceinline__ float level(uint32_t word) const {
    constexpr int kBit = kElement / 2 * 8 + (kElement % 2 ? 0 : 4);
    // the code at bits 7 to 10: 128 bytes a level
    const uint32_t shifted = kBit >= 7 ? word >> (kBit >= 7 ? kBit - 7 : 0) : word << (kBit >= 7 ? 0 : 7 - kBit);
    float r;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"((shifted & 0x780u) | lane_base_));
    return r;
  }

 private:
  char* storage_;
  uint32_t base_;
  uint32_t lane_base_;
};

}  // namespace qlora_engine::cuda
