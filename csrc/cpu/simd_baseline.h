// Vector primitives: the compiler's own 128-bit vectors, on any processor (SSE2 on x86-64, NEON on AArch64).
#pragma once
#include "../nf4.h"

namespace {
namespace simd {

constexpr int kWidth = 4;
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

constexpr float kLevels[16] = {QLORA_NF4_LEVELS};
constexpr float kMidpoints[15] = {QLORA_NF4_MIDPOINTS};

inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

inline F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline F broadcast(float x) { return F{x, x, x, x}; }
inline F fmadd(F a, F b, F c) { return a * b + c; }
inline float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }

inline I unpack_codes(const uint8_t* p) { return I{p[0] >> 4, p[0] & 15, p[1] >> 4, p[1] & 15}; }
inline F levels(I c) { return F{kLevels[c[0]], kLevels[c[1]], kLevels[c[2]], kLevels[c[3]]}; }

// IEEE 754 binary16. Rounding to it: nearest, ties to even, from the bits.
inline float from_fp16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {  // a subnormal: an integer count of 2^-24
    const float magnitude = (float)fraction * 0x1p-24f;
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t to_fp16(float f) {
  const uint32_t u = float_to_bits(f), magnitude = u & 0x7fffffff;
  const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00 | (uint16_t)(magnitude >> 13 & 0x3ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: adding 1/2 leaves the count of 2^-24 at the end
    return sign | (uint16_t)(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | (uint16_t)((rounded - 0x38000000) >> 13);
}

inline F load_bf16(const uint16_t* p) {
  return (F)(I{p[0], p[1], p[2], p[3]} << 16);
}
inline F load_fp16(const uint16_t* p) { return F{from_fp16(p[0]), from_fp16(p[1]), from_fp16(p[2]), from_fp16(p[3])}; }
inline void store_high_halves(uint16_t* p, I v) {
  for (int i = 0; i < kWidth; ++i) p[i] = (uint16_t)((uint32_t)v[i] >> 16);
}
inline void store_fp16(uint16_t* p, F v) {
  for (int i = 0; i < kWidth; ++i) p[i] = to_fp16(v[i]);
}
inline F round_fp16(F v) {
  return F{from_fp16(to_fp16(v[0])), from_fp16(to_fp16(v[1])), from_fp16(to_fp16(v[2])), from_fp16(to_fp16(v[3]))};
}

// There is no portable store around the caches; an ordinary one is right too.
inline void stream(float* p, F v) { store(p, v); }
inline void stream_pair(uint16_t* p, I first, I second) {
  for (int i = 0; i < kWidth; ++i) {
    p[i] = (uint16_t)first[i];
    p[i + kWidth] = (uint16_t)second[i];
  }
}
inline I fp16_bits(F v) { return I{to_fp16(v[0]), to_fp16(v[1]), to_fp16(v[2]), to_fp16(v[3])}; }
inline void stream_fence() {}

// Number of midpoints below x; 15 for NaN, as a sorted search gives.
inline I nearest_levels(F x) {
  I code = {0, 0, 0, 0};
  for (int i = 0; i < 15; ++i) code += (broadcast(kMidpoints[i]) >= x) + 1;  // a true comparison is -1
  return code;
}
inline void store_codes(uint8_t* p, I c) {
  p[0] = (uint8_t)(c[0] << 4 | c[1]);
  p[1] = (uint8_t)(c[2] << 4 | c[3]);
}

}  // namespace simd
}  // namespace
