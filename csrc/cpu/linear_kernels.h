// Products with a 4-bit weight over the vector primitives of one instruction set (see kernels.h).
//
// Few rows: `dot` (forward, up to four) and `combine` (gradient of x, up to two) decode W in registers and multiply at
// once; bounded by decoding. More rows: both y = x W^T and dX = dY W become C[M, P] = A[M, R] B[R, P]. A chunk of B
// (kChunk steps x one panel of two vectors) is decoded once into the first-level cache and multiplied with every row
// of A:
//
//   B chunk   kChunk x 2 vectors     32 KiB (AVX-512), read in order
//   A tile    12 rows x kChunk       broadcast, one lane at a time
//   C tile    12 rows x 2 vectors    24 registers for the whole chunk, then added to a float32 scratch
//
// Decoding is one part in M/16 of the multiply-adds, so from M = 64 on the multipliers bound it.
#pragma once
#include "search_kernels.h"

namespace {

using qlora_engine::cpu::kChunk;
constexpr int V = simd::kTileVectors;
constexpr int kPanel = V * W;

void widen(const void* x, Element element, int64_t n, float* out) {
  for_element(element, [&]<Element E>() {
    int64_t i = 0;
    for (; i + W <= n; i += W) simd::store(out + i, load_as_float<E>(x, i));
    if (i < n) store_some<Element::kFloat32>(out, i, load_some<E>(x, i, (int)(n - i)), (int)(n - i));
  });
}

// n float32 to elements i, i + 1, ... of y.
template <Element E>
inline void store_floats(const float* from, int64_t n, void* y, int64_t i) {
  int64_t j = 0;
  for (; j + W <= n; j += W) store_from_float<E>(y, i + j, simd::load(from + j));
  if (j < n) store_some<E>(y, i + j, load_some<Element::kFloat32>(from, j, (int)(n - j)), (int)(n - j));
}

// ---- a few rows of x or of a gradient

template <Element E, int ROWS>
inline void dot_rows(const float* x, int64_t K, int64_t N, const Nf4View& weight, int64_t first, int64_t last,
                     const void* bias, void* y) {
  for (int64_t n = first; n < last; ++n) {
    F sums[ROWS][2] = {};
    float tails[ROWS] = {};
    for_each_decoded<E>(
        weight, n * K, (n + 1) * K,
        [&](F w, int64_t k, int slot) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int m = 0; m < ROWS; ++m) sums[m][slot] = simd::fmadd(w, simd::load(x + m * K + k), sums[m][slot]);
        },
        [&](float w, int64_t k) __attribute__((always_inline)) {
          for (int m = 0; m < ROWS; ++m) tails[m] += w * x[m * K + k];
        });
    float b = 0;
    if (bias) {
      float lanes[W];
      simd::store(lanes, load_some<E>(bias, n, 1));
      b = lanes[0];
    }
    for (int m = 0; m < ROWS; ++m) {
      store_some<E>(y, m * N + n, simd::broadcast(simd::sum(sums[m][0] + sums[m][1]) + tails[m] + b), 1);
    }
  }
}

void dot(const float* x, int rows, int64_t K, int64_t N, const Nf4View& weight, int64_t first, int64_t last,
         const void* bias, void* y, Element element) {
  for_element(element, [&]<Element E>() {
    switch (rows) {
      case 1: return dot_rows<E, 1>(x, K, N, weight, first, last, bias, y);
      case 2: return dot_rows<E, 2>(x, K, N, weight, first, last, bias, y);
      case 3: return dot_rows<E, 3>(x, K, N, weight, first, last, bias, y);
      case 4: return dot_rows<E, 4>(x, K, N, weight, first, last, bias, y);
    }
  });
}

// Row by row of W, so that it is read in order: acc[m, k - first] += grad[m, n] W[n, k].
template <Element E, int ROWS>
inline void combine_rows(const float* grad, int64_t K, int64_t N, const Nf4View& weight, int64_t first, int64_t last,
                         float* acc, void* dx) {
  const int64_t width = last - first;
  __builtin_memset(acc, 0, ROWS * width * sizeof(float));
  for (int64_t n = 0; n < N; ++n) {
    F factors[ROWS];
    for (int m = 0; m < ROWS; ++m) factors[m] = simd::broadcast(grad[m * N + n]);
    for_each_decoded<E>(
        weight, n * K + first, n * K + last,
        [&](F w, int64_t k, int) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int m = 0; m < ROWS; ++m) {
            float* sum = acc + m * width + k;
            simd::store(sum, simd::fmadd(w, factors[m], simd::load(sum)));
          }
        },
        [&](float w, int64_t k) __attribute__((always_inline)) {
          for (int m = 0; m < ROWS; ++m) acc[m * width + k] += w * grad[m * N + n];
        });
  }
  for (int m = 0; m < ROWS; ++m) store_floats<E>(acc + m * width, width, dx, m * K + first);
}

void combine(const float* grad, int rows, int64_t K, int64_t N, const Nf4View& weight, int64_t first, int64_t last,
             float* acc, void* dx, Element element) {
  for_element(element, [&]<Element E>() {
    switch (rows) {
      case 1: return combine_rows<E, 1>(grad, K, N, weight, first, last, acc, dx);
      case 2: return combine_rows<E, 2>(grad, K, N, weight, first, last, acc, dx);
    }
  });
}

// ---- packing

void pack_a(const void* row, Element element, bool paired, int64_t step, int64_t steps, float* out) {
  if (paired) {  // two neighbouring bfloat16 are a lane as they lie in memory
    __builtin_memcpy(out, (const uint16_t*)row + step, steps * 2);
    if (steps & 1) ((uint16_t*)out)[steps] = 0;
    return;
  }
  for_element(element, [&]<Element E>() {
    int64_t i = 0;
    for (; i + W <= steps; i += W) simd::store(out + i, load_as_float<E>(row, step + i));
    if (i < steps) simd::store(out + i, load_some<E>(row, step + i, (int)(steps - i)));
  });
}

// In place: lane j of vector i to lane i of vector j. Each stage interleaves vector i with vector i + W / 2.
QLORA_INLINE void transpose(F (&v)[W]) {
  I low, high;
  for (int j = 0; j < W; ++j) {
    low[j] = j / 2 + (j & 1) * W;
    high[j] = W / 2 + j / 2 + (j & 1) * W;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
    F next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

// `steps` decoded elements from `begin`, and zeros up to the next vector, as float32 or, paired, as bfloat16.
template <Element E, bool PAIRED>
inline void decode_row(const Nf4View& weight, int64_t begin, int64_t steps, float* out) {
  constexpr int PER_VECTOR = PAIRED ? 2 * W : W;
  const int64_t padded = (steps + PER_VECTOR - 1) / PER_VECTOR * PER_VECTOR;
  for (int64_t i = padded - PER_VECTOR; i < padded && i >= 0; i += PAIRED ? 2 : 1) out[PAIRED ? i / 2 : i] = 0;
  if constexpr (PAIRED) {
    decode_halves<E>(weight, begin, begin + steps, (uint16_t*)out);
  } else {
    decode_floats<E>(weight, begin, begin + steps, out);
  }
}

template <Element E, bool PAIRED>
inline void pack_transposed(const Nf4View& weight, int64_t P, int64_t R, int64_t p0, int64_t lane0, int lanes,
                            float* out) {
  constexpr int STEPS = PAIRED ? 2 : 1;
  const int64_t r0 = lane0 * STEPS;
  const int64_t steps = r0 + lanes * STEPS < R ? lanes * STEPS : R - r0;
  alignas(64) float rows[W][kChunk];
  for (int column = 0; column < kPanel; column += W) {
    for (int j = 0; j < W; ++j) {
      const int64_t p = p0 + column + j;
      if (p < P) {
        decode_row<E, PAIRED>(weight, p * R + r0, steps, rows[j]);
      } else {
        __builtin_memset(rows[j], 0, sizeof rows[j]);
      }
    }
    for (int lane = 0; lane < lanes; lane += W) {
      F v[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) v[j] = simd::load(rows[j] + lane);
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) simd::store(out + (lane + j) * kPanel + column, v[j]);
    }
  }
}

template <Element E, bool PAIRED>
inline void pack_rows(const Nf4View& weight, int64_t P, int64_t R, int64_t p0, int64_t lane0, int lanes, float* out) {
  const int64_t columns = P - p0 < kPanel ? P - p0 : kPanel;
  for (int lane = 0; lane < lanes; ++lane, out += kPanel) {
    if constexpr (PAIRED) {
      alignas(64) uint16_t even[kPanel] = {}, odd[kPanel] = {};
      const int64_t r = 2 * (lane0 + lane);
      decode_halves<E>(weight, r * P + p0, r * P + p0 + columns, even);
      if (r + 1 < R) decode_halves<E>(weight, (r + 1) * P + p0, (r + 1) * P + p0 + columns, odd);
      for (int i = 0; i < kPanel; i += W) {  // load_bf16 moves the bits to the high half of a lane
        simd::store(out + i, (F)((U)simd::load_bf16(odd + i) | ((U)simd::load_bf16(even + i) >> 16)));
      }
    } else {
      if (columns < kPanel) __builtin_memset(out, 0, kPanel * sizeof(float));
      const int64_t begin = (lane0 + lane) * P + p0;
      decode_floats<E>(weight, begin, begin + columns, out);
    }
  }
}

void pack_b_transposed(const Nf4View& weight, int64_t P, int64_t R, int64_t p0, int64_t lane0, int lanes,
                       Element element, bool paired, float* out) {
  if (paired) return pack_transposed<Element::kBFloat16, true>(weight, P, R, p0, lane0, lanes, out);
  for_element(element, [&]<Element E>() { pack_transposed<E, false>(weight, P, R, p0, lane0, lanes, out); });
}

void pack_b(const Nf4View& weight, int64_t P, int64_t R, int64_t p0, int64_t lane0, int lanes, Element element,
            bool paired, float* out) {
  if (paired) return pack_rows<Element::kBFloat16, true>(weight, P, R, p0, lane0, lanes, out);
  for_element(element, [&]<Element E>() { pack_rows<E, false>(weight, P, R, p0, lane0, lanes, out); });
}

// ---- multiply

template <int ROWS, bool PAIRED>
inline void multiply(const float* a, const float* b, int lanes, bool accumulate, float* c) {
  F sums[ROWS][V];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = accumulate ? simd::load(c + r * kPanel + v * W) : F{};
  }
  for (int lane = 0; lane < lanes; ++lane) {
    F columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = simd::load(b + (int64_t)lane * kPanel + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const F row = simd::broadcast(a[r * kChunk + lane]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
#ifdef QLORA_BF16_DOT
        if constexpr (PAIRED) {
          sums[r][v] = simd::dot_bf16(sums[r][v], row, columns[v]);
          continue;
        }
#endif
        sums[r][v] = simd::fmadd(row, columns[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) simd::store(c + r * kPanel + v * W, sums[r][v]);
  }
}

// multiply<rows> for rows = 1 ... kTileRows.
template <bool PAIRED, int ROWS = simd::kTileRows>
inline void multiply_rows(const float* a, const float* b, int rows, int lanes, bool accumulate, float* c) {
  if (rows == ROWS) return multiply<ROWS, PAIRED>(a, b, lanes, accumulate, c);
  if constexpr (ROWS > 1) multiply_rows<PAIRED, ROWS - 1>(a, b, rows, lanes, accumulate, c);
}

void tile(const float* a, const float* b, int rows, int lanes, bool paired, bool accumulate, float* c) {
#ifdef QLORA_BF16_DOT
  if (paired) return multiply_rows<true>(a, b, rows, lanes, accumulate, c);
#endif
  multiply_rows<false>(a, b, rows, lanes, accumulate, c);
}

void store_row(const float* c, int columns, const void* bias, void* y, Element element) {
  for_element(element, [&]<Element E>() {
    for (int i = 0; i < columns; i += W) {
      const bool whole = i + W <= columns;
      F v = simd::load(c + i);
      if (bias) v += whole ? load_as_float<E>(bias, i) : load_some<E>(bias, i, columns - i);
      if (whole) {
        store_from_float<E>(y, i, v);
      } else {
        store_some<E>(y, i, v, columns - i);
      }
    }
  });
}

#ifdef QLORA_BF16_DOT
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

}  // namespace

#define QLORA_KERNELS(NAME)                                                                             \
  {                                                                                                     \
    NAME, quantize, quantize_search, dequantize, widen, dot, combine, kHasBf16Dot, kPanel,                \
        simd::kTileRows, pack_a, pack_b_transposed, pack_b, tile, store_row                             \
  }
