// The scale of a block that makes the squared error of its 4-bit codes small: the one definition that host and device
// share. qlora_engine/reference/scale_search.py says the same in PyTorch.
//
// With codes given, the error sum (w - s q)^2 over a block is least at s = sum w q / sum q^2, where it is
// sum w^2 - (sum w q)^2 / sum q^2 (q: the codes' levels). So candidates for the scale make codes, and the codes for
// which (sum w q)^2 / sum q^2 is largest make the scale. Candidate g is 32 / g times the largest magnitude.
//
// The sums are of integers, so that every order of additions gives the same scale on every device:
//   u = w / max|w| in 512ths, q = the level in 256ths that is nearest to u g / 32, itself rounded to 128ths.
// That is fine enough to leave the error within 0.1% of what exact sums give.
#pragma once
#include <cstdint>

#include "nf4.h"

namespace qlora_engine {

inline constexpr int kSearchUnit = 512;        // u of the largest element
inline constexpr int kSearchFirst = 29;        // the largest candidate: 1.10 times the largest magnitude
inline constexpr int kSearchCandidates = 12;   // down to 0.80 times
inline constexpr int kSearchManyBlocksize = 512;
inline constexpr int kSearchMany = 16;         // blocks from this size on: down to 0.73 times
inline constexpr int kSearchStep = 128;        // u g counts 16,384ths of x; 128 of them are a step of the table
inline constexpr int kSearchReach = kSearchUnit * (kSearchFirst + kSearchMany - 1) / kSearchStep;  // steps each way
inline constexpr float kSearchLeast = 0x1p-100f, kSearchMost = 0x1p100f;  // other blocks keep their absmax

constexpr int search_candidates(int64_t blocksize) {
  return blocksize < kSearchManyBlocksize ? kSearchCandidates : kSearchMany;
}

// Levels in 256ths, rounded to the nearest.
struct SearchLevels {
  int of_code[16];
  int of_step[2 * kSearchReach + 1];  // of x = (i - kSearchReach) / 128

  constexpr SearchLevels() : of_code(), of_step() {
    constexpr float levels[16] = {QLORA_NF4_LEVELS};
    constexpr float midpoints[15] = {QLORA_NF4_MIDPOINTS};
    for (int c = 0; c < 16; ++c) of_code[c] = int(levels[c] * 256.0f + 256.5f) - 256;
    for (int i = 0; i <= 2 * kSearchReach; ++i) {
      int code = 0;
      while (code < 15 && float(i - kSearchReach) / 128.0f > midpoints[code]) ++code;
      of_step[i] = of_code[code];
    }
  }
};

inline constexpr SearchLevels kSearchLevels;

}  // namespace qlora_engine
