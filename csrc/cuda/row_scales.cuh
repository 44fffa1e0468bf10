// Scales of W's rows, read where they are decoded into shared memory.
#pragma once
#include <type_traits>

#include "sm90.cuh"

#ifdef QLORA_SM90

namespace qlora_engine::cuda {

// The scales of kCount (4 or 2) neighbouring blocks of a row of W, as they are stored: one aligned word, or vector.
template <bool kNested, int kCount>
struct RowScales {
  float value[kNested ? 1 : kCount];  // nested_absmax, or absmax
  uint32_t codes;

  __device__ __forceinline__ void load(const Nf4Weight& weight, uint32_t block) {
    if constexpr (kNested) {
      using Word = std::conditional_t<kCount == 4, uint32_t, uint16_t>;
      codes = __ldg(reinterpret_cast<const Word*>(weight.absmax_codes + block));
      value[0] = __ldg(weight.nested_absmax + block / kNestedBlocksize);
    } else if constexpr (kCount == 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(weight.absmax + block));
      value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
    } else {
      const float2 two = __ldg(reinterpret_cast<const float2*>(weight.absmax + block));
      value[0] = two.x, value[1] = two.y;
    }
  }
  // `map`: the dynamic map in shared memory
  __device__ __forceinline__ float decode(int i, uint32_t map, float offset) const {
    if constexpr (kNested) {
      return decode_scale(sm90::load_shared_float(map + (codes >> (8 * i) & 255u) * 4), value[0], offset);
    } else {
      return value[i];
    }
  }
};

template <bool kNested>
__device__ __forceinline__ float one_scale(const Nf4Weight& weight, int64_t block, uint32_t map, float offset) {
  if constexpr (kNested) {
    const float level = sm90::load_shared_float(map + __ldg(weight.absmax_codes + block) * 4u);
    return decode_scale(level, __ldg(weight.nested_absmax + block / kNestedBlocksize), offset);
  }
  return __ldg(weight.absmax + block);
}

}  // namespace qlora_engine::cuda

#endif  // QLORA_SM90
