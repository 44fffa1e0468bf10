// NF4 encode with searched scales, over the vector primitives of one instruction set: csrc/scale_search.h has the
// definition. A block's elements are kept as whole numbers; a candidate costs them about 20 instructions a vector.
#pragma once
#include "../scale_search.h"
#include "codec_kernels.h"

namespace {

inline int32_t sum_of_lanes(I v) {
  int32_t sum = 0;
  for (int j = 0; j < W; ++j) sum += v[j];
  return sum;
}

// The scale of elements [begin, end), whose largest magnitude is absmax. False where none is found.
template <Element E>
inline bool find_scale(const void* weight, int64_t begin, int64_t end, int64_t blocksize, bool signed_scales,
                       float absmax, float* scale) {
  using namespace qlora_engine;
  if (!(absmax >= kSearchLeast && absmax <= kSearchMost)) return false;
  alignas(64) float u[kMaxBlocksize];
  const F to_units = simd::broadcast(float(kSearchUnit) * (1.0f / absmax));
  const F round = simd::broadcast(0x1.8p23f);  // adding and subtracting it rounds to a whole number
  int count = 0;
  for (int64_t i = begin; i < end; i += W, count += W) {
    const F w = i + W <= end ? load_as_float<E>(weight, i) : load_some<E>(weight, i, (int)(end - i));
    simd::store(u + count, (w * to_units + round) - round);
  }
  simd::Table levels;
  for (int p = 0; p < 16 / W; ++p) {
    I part;
    __builtin_memcpy(&part, kSearchLevels.of_code + p * W, sizeof part);
    levels.part[p] = (F)part;
  }

  float best_product = 0, best_square = 1, best_sign = 1;
  for (int pass = 0; pass < (signed_scales ? 2 : 1); ++pass) {
    const float sign = pass == 0 ? 1.0f : -1.0f;
    for (int c = 0; c < search_candidates(blocksize); ++c) {
      const F factor = simd::broadcast(sign * float(kSearchFirst + c));
      I products = {}, squares = {};
      for (int i = 0; i < count; i += W) {
        const F v = simd::load(u + i);
        const I step = __builtin_convertvector(v * factor + float(kSearchStep / 2), I) >> 7;
        const F x = __builtin_convertvector(step, F) * (1.0f / kSearchStep);
        const I q = (I)simd::lookup(levels, simd::nearest_levels(x));
        products += __builtin_convertvector(v, I) * q;
        squares += q * q;
      }
      const float product = sign * float(sum_of_lanes(products)), square = float(sum_of_lanes(squares));
      if (product * product * best_square > best_product * best_product * square) {
        best_product = product, best_square = square, best_sign = sign;
      }
    }
  }
  static_assert(kSearchStep == 1 << 7);
  *scale = absmax * best_sign * (best_product / best_square * 0.5f);  // products are 131,072ths, squares 65,536ths
  return best_product > 0;
}

template <Element E>
inline void quantize_searched_blocks(const void* weight, int64_t numel, int64_t blocksize, int64_t first, int64_t last,
                                     bool signed_scales, uint8_t* packed, float* absmax) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * blocksize, end = begin + blocksize < numel ? begin + blocksize : numel;
    const float largest = absolute_maximum<E>(weight, begin, end);
    float scale;
    if (find_scale<E>(weight, begin, end, blocksize, signed_scales, largest, &scale)) {
      absmax[block] = scale;
      quantize_block<E>(weight, begin, end, scale, end - begin < blocksize, false, packed);
    } else {
      quantize_blocks<E>(weight, numel, blocksize, block, block + 1, packed, absmax);
    }
  }
}

void quantize_search(const void* weight, Element element, int64_t numel, int64_t blocksize, int64_t first,
                     int64_t last, bool signed_scales, uint8_t* packed, float* absmax) {
  for_element(element, [&]<Element E>() {
    quantize_searched_blocks<E>(weight, numel, blocksize, first, last, signed_scales, packed, absmax);
  });
}

}  // namespace
