// NF4 encode and decode over the vector primitives of one instruction set (see kernels.h).
//
// Bounded by memory: 4096 x 4096 float32 is 64 MiB read for 8 MiB written (quantize), or the reverse (dequantize).
// A decoded element is round(level[code] * absmax): one float32 product, one rounding to the output's type.
#pragma once
#include "kernels.h"

namespace {

using qlora_engine::cpu::Element;
using qlora_engine::cpu::Nf4View;
using simd::F;
using simd::I;
constexpr int W = simd::kWidth;

#define QLORA_INLINE inline __attribute__((always_inline))

// A block of zeros is divided by this instead of by zero; bitsandbytes' number (backends/default/ops.py).
constexpr float kSmallestAbsmax = 1e-38f;
// Fills the half byte that an odd number of elements leaves; 0 / absmax would not do where absmax is NaN.
constexpr uint8_t kCodeOfZero = 7;

typedef uint32_t U __attribute__((vector_size(sizeof(F))));

// float32 to bfloat16 bits in the high half of each lane: nearest, ties to even. Not the processor's own
// conversion (VCVTNEPS2BF16), which flushes subnormal numbers.
QLORA_INLINE I round_bf16_bits(F v) {
  const U bits = (U)v;
  const U rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const U quiet = bits | 0x400000;  // rounding could carry a NaN's payload into zero
  return (I)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

template <Element E>
QLORA_INLINE F round_to(F v) {
  if constexpr (E == Element::kBFloat16) return (F)(round_bf16_bits(v) & (int32_t)0xffff0000);
  if constexpr (E == Element::kFloat16) return simd::round_fp16(v);
  return v;
}

template <Element E>
QLORA_INLINE F load_as_float(const void* base, int64_t i) {
  if constexpr (E == Element::kFloat32) return simd::load((const float*)base + i);
  if constexpr (E == Element::kBFloat16) return simd::load_bf16((const uint16_t*)base + i);
  return simd::load_fp16((const uint16_t*)base + i);
}

template <Element E>
QLORA_INLINE void store_from_float(void* base, int64_t i, F v) {
  if constexpr (E == Element::kFloat32) simd::store((float*)base + i, v);
  if constexpr (E == Element::kBFloat16) simd::store_high_halves((uint16_t*)base + i, round_bf16_bits(v));
  if constexpr (E == Element::kFloat16) simd::store_fp16((uint16_t*)base + i, v);
}

// The first n (< W) elements, through a vector's worth of memory.
template <Element E>
inline F load_some(const void* base, int64_t i, int n) {
  if constexpr (E == Element::kFloat32) {
    float lanes[W] = {};
    for (int j = 0; j < n; ++j) lanes[j] = ((const float*)base)[i + j];
    return simd::load(lanes);
  } else {
    uint16_t lanes[W] = {};
    for (int j = 0; j < n; ++j) lanes[j] = ((const uint16_t*)base)[i + j];
    return load_as_float<E>(lanes, 0);
  }
}

template <Element E>
inline void store_some(void* base, int64_t i, F v, int n) {
  if constexpr (E == Element::kFloat32) {
    float lanes[W];
    simd::store(lanes, v);
    for (int j = 0; j < n; ++j) ((float*)base)[i + j] = lanes[j];
  } else {
    uint16_t lanes[W];
    store_from_float<E>(lanes, 0, v);
    for (int j = 0; j < n; ++j) ((uint16_t*)base)[i + j] = lanes[j];
  }
}

// Calls with_element.operator()<E>() for a run-time element type.
template <class Function>
QLORA_INLINE void for_element(Element element, Function function) {
  switch (element) {
    case Element::kFloat32: return function.template operator()<Element::kFloat32>();
    case Element::kBFloat16: return function.template operator()<Element::kBFloat16>();
    case Element::kFloat16: return function.template operator()<Element::kFloat16>();
  }
}

// ---- encode

template <Element E>
inline float absolute_maximum(const void* weight, int64_t i, int64_t end) {
  // As integers: NaN is then the largest, so that it reaches the scale as it does in torch.
  I largest = {}, other = {};
  for (; i + 2 * W <= end; i += 2 * W) {
    const I a = (I)load_as_float<E>(weight, i) & 0x7fffffff, b = (I)load_as_float<E>(weight, i + W) & 0x7fffffff;
    largest = a > largest ? a : largest;
    other = b > other ? b : other;
  }
  for (; i < end; i += W) {
    const F v = i + W <= end ? load_as_float<E>(weight, i) : load_some<E>(weight, i, (int)(end - i));
    const I a = (I)v & 0x7fffffff;
    largest = a > largest ? a : largest;
  }
  largest = other > largest ? other : largest;
  int32_t bits = 0;
  for (int j = 0; j < W; ++j) bits = largest[j] > bits ? largest[j] : bits;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// `ragged`: a block that is not whole, the last; `divide`: by the scale, instead of multiplying by its reciprocal.
template <Element E>
inline void quantize_block(const void* weight, int64_t begin, int64_t end, float scale, bool ragged, bool divide,
                           uint8_t* packed) {
  const F factor = simd::broadcast(scale), reciprocal = 1.0f / factor;
  int64_t i = begin;
  if (!ragged) {
    for (; i + 2 * W <= end; i += 2 * W) {
      simd::store_codes(packed + i / 2, simd::nearest_levels(load_as_float<E>(weight, i) * reciprocal));
      simd::store_codes(packed + (i + W) / 2, simd::nearest_levels(load_as_float<E>(weight, i + W) * reciprocal));
    }
    return;  // a whole block: 32 elements or a multiple
  }
  for (; i < end; i += W) {
    const int n = end - i < W ? (int)(end - i) : W;
    uint8_t bytes[W / 2];
    const F v = load_some<E>(weight, i, n);
    simd::store_codes(bytes, simd::nearest_levels(divide ? v / factor : v * reciprocal));
    if (n & 1) bytes[n / 2] = (uint8_t)((bytes[n / 2] & 0xf0) | kCodeOfZero);
    for (int j = 0; j < (n + 1) / 2; ++j) packed[i / 2 + j] = bytes[j];
  }
}

template <Element E>
inline void quantize_blocks(const void* weight, int64_t numel, int64_t blocksize, int64_t first, int64_t last,
                            uint8_t* packed, float* absmax) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * blocksize, end = begin + blocksize < numel ? begin + blocksize : numel;
    const bool ragged = end - begin < blocksize;
    const float largest = absolute_maximum<E>(weight, begin, end);
    // bitsandbytes multiplies by the reciprocal, but divides in a short last block, whose bounded scale it also keeps
    const float bounded = largest < kSmallestAbsmax ? kSmallestAbsmax : largest;
    absmax[block] = ragged ? bounded : largest;
    quantize_block<E>(weight, begin, end, bounded, ragged, ragged, packed);
  }
}

void quantize(const void* weight, Element element, int64_t numel, int64_t blocksize, int64_t first, int64_t last,
              uint8_t* packed, float* absmax) {
  for_element(element, [&]<Element E>() { quantize_blocks<E>(weight, numel, blocksize, first, last, packed, absmax); });
}

// ---- decode
//
// A block has no more than 16 different values: they are scaled and rounded once, and elements are looked up.

constexpr float kLevel[16] = {QLORA_NF4_LEVELS};
constexpr int kParts = 16 / W;

// round(level * absmax) of every level.
template <Element E>
QLORA_INLINE simd::Table table_of(float absmax) {
  simd::Table table;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) table.part[p] = round_to<E>(simd::load(kLevel + p * W) * simd::broadcast(absmax));
  return table;
}

// The same as bits of a 16-bit type.
template <Element E>
QLORA_INLINE simd::HalfTable half_table_of(float absmax) {
  I bits[kParts];
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    const F v = simd::load(kLevel + p * W) * simd::broadcast(absmax);
    if constexpr (E == Element::kBFloat16) {
      bits[p] = (I)((U)round_bf16_bits(v) >> 16);
    } else {
      bits[p] = simd::fp16_bits(v);
    }
  }
  return simd::half_table(bits);
}

// One number to an element and back, with the vectors' rounding.
template <Element E>
QLORA_INLINE float round_one(float v) {
  float lanes[W];
  simd::store(lanes, round_to<E>(simd::broadcast(v)));
  return lanes[0];
}

// The element of an odd index, at which a row may begin.
template <Element E>
QLORA_INLINE float decode_odd(const Nf4View& weight, int64_t i) {
  return round_one<E>(kLevel[weight.packed[i >> 1] & 15] * weight.absmax[i >> weight.block_shift]);
}

// The packed bytes of n elements, behind which nothing may be read.
template <int BYTES>
QLORA_INLINE void copy_codes(const uint8_t* p, int n, uint8_t (&bytes)[BYTES]) {
  for (int j = 0; j < BYTES; ++j) bytes[j] = j < (n + 1) / 2 ? p[j] : 0;
}

// Calls vector(v, i, slot) with W elements, rounded to E, as float32, and single(v, i) with one, until every element of
// [first, last) was seen once, in order; i counts from 0 at `first`. Neighbouring vectors have different slots (0 and
// 1, known when compiling), so that a sum can keep two accumulators.
template <Element E, class Vector, class Single>
QLORA_INLINE void for_each_decoded(const Nf4View& weight, int64_t first, int64_t last, Vector vector, Single single) {
  int64_t i = first;
  if ((i & 1) && i < last) {
    single(decode_odd<E>(weight, i), i - first);
    ++i;
  }
  while (i < last) {
    const int64_t block = i >> weight.block_shift, next = (block + 1) << weight.block_shift;
    const int64_t end = next < last ? next : last;
    const simd::Table table = table_of<E>(weight.absmax[block]);
    for (; i + 2 * W <= end; i += 2 * W) {
      vector(simd::lookup(table, simd::unpack_codes(weight.packed + (i >> 1))), i - first, 0);
      vector(simd::lookup(table, simd::unpack_codes(weight.packed + ((i + W) >> 1))), i + W - first, 1);
    }
    for (; i + W <= end; i += W) {
      vector(simd::lookup(table, simd::unpack_codes(weight.packed + (i >> 1))), i - first, 0);
    }
    if (i < end) {
      uint8_t bytes[W / 2];
      float lanes[W];
      copy_codes(weight.packed + (i >> 1), (int)(end - i), bytes);
      simd::store(lanes, simd::lookup(table, simd::unpack_codes(bytes)));
      for (int j = 0; i < end; ++i, ++j) single(lanes[j], i - first);
    }
  }
}

// Elements [first, last) to float32, rounded to E. AROUND: around the caches; `first` is then even and out +
// (i - first) aligned to a vector wherever i - first is a multiple of 2 W.
template <Element E, bool AROUND = false>
inline void decode_floats(const Nf4View& weight, int64_t first, int64_t last, float* out) {
  for_each_decoded<E>(
      weight, first, last,
      [&](F v, int64_t i, int) __attribute__((always_inline)) {
        if constexpr (AROUND) {
          simd::stream(out + i, v);
        } else {
          simd::store(out + i, v);
        }
      },
      [&](float v, int64_t i) { out[i] = v; });
}

// Elements [first, last) to a 16-bit type.
template <Element E, bool AROUND = false>
inline void decode_halves(const Nf4View& weight, int64_t first, int64_t last, uint16_t* out) {
  int64_t i = first;
  if ((i & 1) && i < last) {
    store_some<E>(out, 0, simd::broadcast(decode_odd<E>(weight, i)), 1);
    ++i;
  }
  while (i < last) {
    const int64_t block = i >> weight.block_shift, next = (block + 1) << weight.block_shift;
    const int64_t end = next < last ? next : last;
    const simd::HalfTable table = half_table_of<E>(weight.absmax[block]);
    for (; i + 2 * W <= end; i += 2 * W) {
      const simd::Halves v = simd::lookup_halves(table, weight.packed + (i >> 1));
      if constexpr (AROUND) {
        simd::stream_halves(out + (i - first), v);
      } else {
        simd::store_halves(out + (i - first), v);
      }
    }
    if (i < end) {
      uint8_t bytes[W];
      uint16_t lanes[2 * W];
      copy_codes(weight.packed + (i >> 1), (int)(end - i), bytes);
      simd::store_halves(lanes, simd::lookup_halves(table, bytes));
      for (int j = 0; i < end; ++i, ++j) out[i - first] = lanes[j];
    }
  }
}

template <bool AROUND>
inline void dequantize_to(const Nf4View& weight, int64_t first, int64_t last, void* out, Element element) {
  switch (element) {
    case Element::kFloat32: return decode_floats<Element::kFloat32, AROUND>(weight, first, last, (float*)out);
    case Element::kBFloat16: return decode_halves<Element::kBFloat16, AROUND>(weight, first, last, (uint16_t*)out);
    case Element::kFloat16: return decode_halves<Element::kFloat16, AROUND>(weight, first, last, (uint16_t*)out);
  }
}

void dequantize(const Nf4View& weight, int64_t first, int64_t last, void* out, Element element, bool stream) {
  if (stream) {
    dequantize_to<true>(weight, first, last, out, element);
    simd::stream_fence();
  } else {
    dequantize_to<false>(weight, first, last, out, element);
  }
}

}  // namespace
