// 8-bit codes of the optimizer's state and of double-quantized scales: the nearest value of a dynamic map to a number
// that is scaled to [-1, 1].
//
// Both maps have levels at decimal exponents 1e-6 ... 1: the signed one (dynamic_map.h) is zero, 1 and 127 levels of
// either sign, the unsigned one zero, 1 and 254 levels. The search is the same for both: the upper 16 bits of a
// float (8 of exponent, 7 of fraction) name a cell that holds at most one midpoint between neighbouring levels, so a
// table of 2,945 cells and one comparison find the number of midpoints below it. Host and device share the tables,
// so that every device stores the same codes. The unsigned map is derived in
// qlora_engine/quantization/codebook.py; tests/quantization/test_codebook.py compares this text with it.
#pragma once
#include <cstdint>

#include "dynamic_map.h"
#include "nf4.h"

namespace qlora_engine {

#define QLORA_UNSIGNED_DYNAMIC_MAP \
    0.0e+00f, 3.2500003e-07f, 7.75e-07f, 2.1249998e-06f, 4.3749997e-06f, 6.625e-06f, 8.874999e-06f, \
    1.5624999e-05f, 2.6875001e-05f, 3.8125e-05f, 4.9374998e-05f, 6.0625003e-05f, 7.1875e-05f, 8.312499e-05f, \
    9.4375e-05f, 1.28125e-04f, 1.84375e-04f, 2.4062501e-04f, 2.9687502e-04f, 3.5312498e-04f, 4.0937503e-04f, \
    4.6562502e-04f, 5.2187504e-04f, 5.78125e-04f, 6.34375e-04f, 6.9062505e-04f, 7.46875e-04f, 8.031251e-04f, \
    8.5937505e-04f, 9.15625e-04f, 9.7187504e-04f, 1.140625e-03f, 1.421875e-03f, 1.703125e-03f, 1.984375e-03f, \
    2.265625e-03f, 2.5468748e-03f, 2.828125e-03f, 3.1093748e-03f, 3.3906251e-03f, 3.671875e-03f, 3.953125e-03f, \
    4.2343745e-03f, 4.515625e-03f, 4.7968747e-03f, 5.078125e-03f, 5.359375e-03f, 5.6406246e-03f, 5.921875e-03f, \
    6.2031248e-03f, 6.484375e-03f, 6.7656254e-03f, 7.0468746e-03f, 7.328125e-03f, 7.6093744e-03f, 7.890625e-03f, \
    8.171875e-03f, 8.453124e-03f, 8.734375e-03f, 9.015624e-03f, 9.2968745e-03f, 9.578126e-03f, 9.859375e-03f, \
    1.0703126e-02f, 1.2109376e-02f, 1.3515624e-02f, 1.4921876e-02f, 1.6328124e-02f, 1.7734377e-02f, 1.9140625e-02f, \
    2.0546874e-02f, 2.1953126e-02f, 2.3359375e-02f, 2.4765624e-02f, 2.6171876e-02f, 2.7578129e-02f, 2.8984373e-02f, \
    3.0390626e-02f, 3.1796873e-02f, 3.3203125e-02f, 3.4609374e-02f, 3.6015626e-02f, 3.742188e-02f, 3.8828123e-02f, \
    4.0234376e-02f, 4.1640624e-02f, 4.3046873e-02f, 4.4453125e-02f, 4.5859374e-02f, 4.7265626e-02f, 4.867187e-02f, \
    5.0078124e-02f, 5.1484372e-02f, 5.2890625e-02f, 5.4296877e-02f, 5.570313e-02f, 5.7109382e-02f, 5.8515627e-02f, \
    5.9921872e-02f, 6.1328124e-02f, 6.273438e-02f, 6.414063e-02f, 6.554688e-02f, 6.695312e-02f, 6.8359375e-02f, \
    6.976563e-02f, 7.117188e-02f, 7.2578125e-02f, 7.398438e-02f, 7.539063e-02f, 7.679688e-02f, 7.820313e-02f, \
    7.960938e-02f, 8.1015624e-02f, 8.242188e-02f, 8.382813e-02f, 8.5234374e-02f, 8.6640626e-02f, 8.804687e-02f, \
    8.945312e-02f, 9.0859376e-02f, 9.226563e-02f, 9.367188e-02f, 9.5078126e-02f, 9.648438e-02f, 9.789063e-02f, \
    9.9296875e-02f, 1.03515625e-01f, 1.1054687e-01f, 1.1757813e-01f, 1.2460937e-01f, 1.3164061e-01f, 1.3867188e-01f, \
    1.4570314e-01f, 1.5273437e-01f, 1.5976563e-01f, 1.6679686e-01f, 1.7382812e-01f, 1.8085939e-01f, 1.8789062e-01f, \
    1.9492188e-01f, 2.0195311e-01f, 2.0898438e-01f, 2.1601564e-01f, 2.2304687e-01f, 2.3007813e-01f, 2.3710936e-01f, \
    2.4414062e-01f, 2.5117186e-01f, 2.5820312e-01f, 2.6523438e-01f, 2.722656e-01f, 2.7929688e-01f, 2.8632814e-01f, \
    2.9335937e-01f, 3.003906e-01f, 3.0742186e-01f, 3.1445312e-01f, 3.214844e-01f, 3.2851562e-01f, 3.3554685e-01f, \
    3.425781e-01f, 3.4960938e-01f, 3.5664064e-01f, 3.6367187e-01f, 3.707031e-01f, 3.7773436e-01f, 3.8476562e-01f, \
    3.917969e-01f, 3.9882812e-01f, 4.0585935e-01f, 4.128906e-01f, 4.1992188e-01f, 4.2695314e-01f, 4.3398437e-01f, \
    4.410156e-01f, 4.4804686e-01f, 4.5507812e-01f, 4.621094e-01f, 4.6914062e-01f, 4.7617185e-01f, 4.832031e-01f, \
    4.9023438e-01f, 4.972656e-01f, 5.042969e-01f, 5.113281e-01f, 5.1835936e-01f, 5.253906e-01f, 5.324218e-01f, \
    5.3945315e-01f, 5.4648435e-01f, 5.535157e-01f, 5.605469e-01f, 5.6757814e-01f, 5.746094e-01f, 5.816406e-01f, \
    5.886719e-01f, 5.957031e-01f, 6.027344e-01f, 6.0976565e-01f, 6.1679685e-01f, 6.238282e-01f, 6.308594e-01f, \
    6.3789064e-01f, 6.449219e-01f, 6.519531e-01f, 6.589844e-01f, 6.660156e-01f, 6.730469e-01f, 6.8007815e-01f, \
    6.8710935e-01f, 6.941407e-01f, 7.011719e-01f, 7.0820314e-01f, 7.152344e-01f, 7.222656e-01f, 7.292969e-01f, \
    7.363281e-01f, 7.433594e-01f, 7.5039065e-01f, 7.5742185e-01f, 7.644532e-01f, 7.714844e-01f, 7.785156e-01f, \
    7.855469e-01f, 7.925781e-01f, 7.996094e-01f, 8.066406e-01f, 8.136718e-01f, 8.2070315e-01f, 8.2773435e-01f, \
    8.347657e-01f, 8.417969e-01f, 8.488281e-01f, 8.558594e-01f, 8.628906e-01f, 8.699219e-01f, 8.769531e-01f, \
    8.839843e-01f, 8.9101565e-01f, 8.9804685e-01f, 9.050782e-01f, 9.121094e-01f, 9.191406e-01f, 9.261719e-01f, \
    9.332031e-01f, 9.402344e-01f, 9.472656e-01f, 9.542968e-01f, 9.6132815e-01f, 9.6835935e-01f, 9.753907e-01f, \
    9.824219e-01f, 9.894531e-01f, 9.964844e-01f, 1.0e+00f

inline constexpr uint32_t kFirstCell = 0x3400;                       // 2^-23: below it a number is nearest to zero
inline constexpr int kCells = int(0x3f80 - kFirstCell) + 1;          // up to the cell of 1
inline constexpr int kMagnitudes = 129;                              // 0, 127 levels and 1: the signed map's
inline constexpr int kSignedZero = 127;                              // code of 0 in the signed map

// Which of two neighbouring levels stands for the number halfway between them: the one nearer to zero, or the one whose
// code is even, counted from the lowest of the signed map (-1 is not in it, so that the code of 0 is odd).
enum class Ties { kDown, kEven };

// Cells and midpoints of a rising table of non-negative levels. The midpoint after the last level is out of reach.
template <int kLevels>
struct DynamicSearch {
  float midpoints[kLevels];
  uint8_t cells[(kCells + 3) / 4 * 4];

  constexpr explicit DynamicSearch(const float* levels, Ties ties = Ties::kDown) : midpoints(), cells() {
    for (int i = 0; i + 1 < kLevels; ++i) {
      midpoints[i] = (levels[i] + levels[i + 1]) / 2.0f;
      // one float lower, so that the midpoint itself lies above
      if (ties == Ties::kEven && i % 2 == 0) midpoints[i] *= 1.0f - 0x1p-24f;
    }
    midpoints[kLevels - 1] = 2.0f;
    int code = 0;
    float power = 1.0f / 8388608.0f;  // 2^-23
    for (int cell = 0; cell < kCells; ++cell) {
      const float lower = cell == 0 ? 0.0f : power * (1.0f + float(cell % 128) / 128.0f);
      while (midpoints[code] < lower) ++code;
      cells[cell] = uint8_t(code);
      if (cell % 128 == 127) power *= 2.0f;
    }
  }
};

struct DynamicTables {
  float signed_levels[256];
  float unsigned_levels[256];
  DynamicSearch<kMagnitudes> magnitude;
  DynamicSearch<256> positive;
};

inline constexpr float kSignedMap[256] = {QLORA_DYNAMIC_MAP};
inline constexpr float kUnsignedMap[256] = {QLORA_UNSIGNED_DYNAMIC_MAP};
inline constexpr DynamicTables kDynamicTables = {{QLORA_DYNAMIC_MAP},
                                                {QLORA_UNSIGNED_DYNAMIC_MAP},
                                                DynamicSearch<kMagnitudes>(kSignedMap + kSignedZero),
                                                DynamicSearch<256>(kUnsignedMap)};

// Number of midpoints below x, 0 <= x <= 1; `bits` are those of x. More than 1 counts as 1, and NaN too.
template <int kLevels>
QLORA_HOST_DEVICE int nearest_level(const DynamicSearch<kLevels>& search, float x, uint32_t bits) {
  constexpr uint32_t kLastCell = kFirstCell + kCells - 1;
  const uint32_t cell = bits >> 16;
  const int lower = search.cells[(cell < kFirstCell ? kFirstCell : cell > kLastCell ? kLastCell : cell) - kFirstCell];
  return lower + (x > search.midpoints[lower] ? 1 : 0);
}

// The signed map has no -1: -1 takes its lowest level.
QLORA_HOST_DEVICE uint8_t signed_code(const DynamicTables& tables, float magnitude, uint32_t bits, bool negative) {
  const int level = nearest_level(tables.magnitude, magnitude, bits);
  return uint8_t(negative ? kSignedZero - (level < kSignedZero ? level : kSignedZero) : kSignedZero + level);
}

// A positive number never takes the code of zero: the optimizer divides by the root of what is stored.
QLORA_HOST_DEVICE uint8_t unsigned_code(const DynamicTables& tables, float x, uint32_t bits) {
  const int level = nearest_level(tables.positive, x, bits);
  return uint8_t(level == 0 && x > 0.0f ? 1 : level);
}

// Code of a double-quantized scale as bitsandbytes' CUDA kernels find it, by a binary search in the signed map; 0 for
// NaN. `search` is that of the signed map's magnitudes with Ties::kEven.
QLORA_HOST_DEVICE uint8_t scale_code(const DynamicSearch<kMagnitudes>& search, float x, uint32_t bits) {
  if (x != x) return 0;
  const bool negative = x < 0.0f;
  const int level = nearest_level(search, negative ? -x : x, bits & 0x7fffffffu);
  return uint8_t(negative ? kSignedZero - (level < kSignedZero ? level : kSignedZero) : kSignedZero + level);
}

}  // namespace qlora_engine
