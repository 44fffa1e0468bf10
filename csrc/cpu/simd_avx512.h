// Vector primitives: AVX-512 (F, BW, DQ, VL), with the bfloat16 dot product where that is switched on too.
#pragma once
#include <immintrin.h>

#include "../nf4.h"

namespace {
namespace simd {

constexpr int kWidth = 16;
constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 columns of B and a broadcast: 27 of 32 registers
constexpr int kTileVectors = 2;

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

inline __attribute__((always_inline)) F load(const float* p) { return (F)_mm512_loadu_ps(p); }
inline __attribute__((always_inline)) void store(float* p, F v) { _mm512_storeu_ps(p, (__m512)v); }
inline __attribute__((always_inline)) F broadcast(float x) { return (F)_mm512_set1_ps(x); }
inline __attribute__((always_inline)) F fmadd(F a, F b, F c) {
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline __attribute__((always_inline)) float sum(F v) { return _mm512_reduce_add_ps((__m512)v); }

// Codes of kWidth elements: 8 bytes, the first element in the high nibble. Only the low 4 bits of a lane count.
inline __attribute__((always_inline)) I unpack_codes(const uint8_t* p) {
  int64_t bytes;
  __builtin_memcpy(&bytes, p, 8);
  const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i shifts = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
  return (I)_mm512_srlv_epi32(_mm512_permutexvar_epi32(halves, _mm512_set1_epi64(bytes)), shifts);
}
inline __attribute__((always_inline)) F levels(I codes) {
  const __m512 table = {QLORA_NF4_LEVELS};
  return (F)_mm512_permutexvar_ps((__m512i)codes, table);
}

inline __attribute__((always_inline)) F load_bf16(const uint16_t* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline __attribute__((always_inline)) F load_fp16(const uint16_t* p) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline __attribute__((always_inline)) void store_high_halves(uint16_t* p, I v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)));
}
inline __attribute__((always_inline)) void store_fp16(uint16_t* p, F v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __attribute__((always_inline)) F round_fp16(F v) {
  return (F)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Around the caches; p is aligned to 64 bytes. A pair is two vectors of 16-bit values, one in each lane.
inline __attribute__((always_inline)) void stream(float* p, F v) { _mm512_stream_ps(p, (__m512)v); }
inline __attribute__((always_inline)) void stream_pair(uint16_t* p, I first, I second) {
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)first));
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(low, _mm512_cvtepi32_epi16((__m512i)second), 1));
}
inline __attribute__((always_inline)) I fp16_bits(F v) {
  return (I)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __attribute__((always_inline)) void stream_fence() { _mm_sfence(); }

// Number of midpoints below x, by bisection; 15 for NaN, as a sorted search gives.
inline __attribute__((always_inline)) I nearest_levels(F x) {
  const __m512 v = (__m512)x;
  const float t[15] = {QLORA_NF4_MIDPOINTS};
  const __m512 fours = _mm512_setr_ps(t[3], 0, 0, 0, 0, 0, 0, 0, t[11], 0, 0, 0, 0, 0, 0, 0);
  const __m512 twos = _mm512_setr_ps(t[1], 0, 0, 0, t[5], 0, 0, 0, t[9], 0, 0, 0, t[13], 0, 0, 0);
  const __m512 ones = _mm512_setr_ps(t[0], 0, t[2], 0, t[4], 0, t[6], 0, t[8], 0, t[10], 0, t[12], 0, t[14], 0);
  const __mmask16 above = _mm512_cmp_ps_mask(_mm512_set1_ps(t[7]), v, _CMP_NGE_UQ);
  __m512i code = _mm512_maskz_set1_epi32(above, 8);
  const __mmask16 m4 = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(code, fours), v, _CMP_NGE_UQ);
  code = _mm512_mask_or_epi32(code, m4, code, _mm512_set1_epi32(4));
  const __mmask16 m2 = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(code, twos), v, _CMP_NGE_UQ);
  code = _mm512_mask_or_epi32(code, m2, code, _mm512_set1_epi32(2));
  const __mmask16 m1 = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(code, ones), v, _CMP_NGE_UQ);
  return (I)_mm512_mask_or_epi32(code, m1, code, _mm512_set1_epi32(1));
}
// kWidth codes (0 ... 15) to kWidth / 2 bytes.
inline __attribute__((always_inline)) void store_codes(uint8_t* p, I codes) {
  const __m512i c = (__m512i)codes;
  const __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(c, 4), _mm512_srli_epi64(c, 32));
  _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8(bytes));
}

#ifdef QLORA_AVX512_BF16
#define QLORA_BF16_DOT
// c + a[0] b[0] + a[1] b[1] on pairs of bfloat16, in float32.
inline __attribute__((always_inline)) F dot_bf16(F c, F a, F b) {
  return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

}  // namespace simd
}  // namespace
