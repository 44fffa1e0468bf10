// Vector primitives: AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include "../nf4.h"

namespace {
namespace simd {

constexpr int kWidth = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 columns of B and a broadcast: 15 of 16 registers
constexpr int kTileVectors = 2;

typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));

inline __attribute__((always_inline)) F load(const float* p) { return (F)_mm256_loadu_ps(p); }
inline __attribute__((always_inline)) void store(float* p, F v) { _mm256_storeu_ps(p, (__m256)v); }
inline __attribute__((always_inline)) F broadcast(float x) { return (F)_mm256_set1_ps(x); }
inline __attribute__((always_inline)) F fmadd(F a, F b, F c) {
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline __attribute__((always_inline)) float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Codes of kWidth elements: 4 bytes, the first element in the high nibble. Only the low 4 bits of a lane count.
inline __attribute__((always_inline)) I unpack_codes(const uint8_t* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, 4);
  return (I)_mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}
inline __attribute__((always_inline)) F levels(I codes) {
  const float t[16] = {QLORA_NF4_LEVELS};
  const __m256 low = _mm256_setr_ps(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]);
  const __m256 high = _mm256_setr_ps(t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15]);
  const __m256i c = (__m256i)codes;
  // the permutation reads 3 bits; the fourth, moved to the sign, chooses the half of the table
  return (F)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, c), _mm256_permutevar8x32_ps(high, c),
                             _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
}

inline __attribute__((always_inline)) F load_bf16(const uint16_t* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline __attribute__((always_inline)) F load_fp16(const uint16_t* p) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
// The low halves of kWidth lanes of at most 65535.
inline __attribute__((always_inline)) __m128i narrow(__m256i v) {
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08));
}
inline __attribute__((always_inline)) void store_high_halves(uint16_t* p, I v) {
  _mm_storeu_si128((__m128i*)p, narrow(_mm256_srli_epi32((__m256i)v, 16)));
}
inline __attribute__((always_inline)) void store_fp16(uint16_t* p, F v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __attribute__((always_inline)) F round_fp16(F v) {
  return (F)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Around the caches; p is aligned to 32 bytes. A pair is two vectors of 16-bit values, one in each lane.
inline __attribute__((always_inline)) void stream(float* p, F v) { _mm256_stream_ps(p, (__m256)v); }
inline __attribute__((always_inline)) void stream_pair(uint16_t* p, I first, I second) {
  const __m256i packed = _mm256_packus_epi32((__m256i)first, (__m256i)second);
  _mm256_stream_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
inline __attribute__((always_inline)) I fp16_bits(F v) {
  return (I)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __attribute__((always_inline)) void stream_fence() { _mm_sfence(); }

// Number of midpoints below x; 15 for NaN, as a sorted search gives.
inline __attribute__((always_inline)) I nearest_levels(F x) {
  const float t[15] = {QLORA_NF4_MIDPOINTS};
  __m256i code = _mm256_setzero_si256();
#pragma GCC unroll 15
  for (int i = 0; i < 15; ++i) {  // a true comparison is -1
    const __m256 above = _mm256_cmp_ps(_mm256_set1_ps(t[i]), (__m256)x, _CMP_NGE_UQ);
    code = _mm256_sub_epi32(code, _mm256_castps_si256(above));
  }
  return (I)code;
}
// kWidth codes (0 ... 15) to kWidth / 2 bytes.
inline __attribute__((always_inline)) void store_codes(uint8_t* p, I codes) {
  const __m256i c = (__m256i)codes;
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(c, 4), _mm256_srli_epi64(c, 32));
  const __m256i bytes = _mm256_shuffle_epi8(
      pairs, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)));
  const uint16_t first = (uint16_t)_mm256_extract_epi16(bytes, 0), second = (uint16_t)_mm256_extract_epi16(bytes, 8);
  const uint32_t both = first | (uint32_t)second << 16;
  __builtin_memcpy(p, &both, 4);
}

}  // namespace simd
}  // namespace
