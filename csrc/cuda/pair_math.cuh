// Arithmetic on pairs of 16-bit numbers in one register, rounded once.
#pragma once
#include "decode.cuh"

namespace qlora_engine::cuda {

template <typename T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pair<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t multiply_pair<__half>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// a b + c
template <typename T>
__device__ __forceinline__ uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t multiply_add_pair<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <>
__device__ __forceinline__ uint32_t multiply_add_pair<__half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

template <typename T>
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t add_pair<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t add_pair<__half>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// A pair of float32 numbers as the sum of two 16-bit pairs, the second what the first lost.
struct SplitPair {
  uint32_t high, low;
};
template <typename T>
__device__ __forceinline__ SplitPair split_pair(float first, float second) {
  const T near = from_float<T>(first), far = from_float<T>(second);
  return {pack_pair<T>(first, second), pack_pair<T>(first - float(near), second - float(far))};
}

}  // namespace qlora_engine::cuda
