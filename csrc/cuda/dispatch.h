// What configurations the kernels of products with a 4-bit weight have, and which way is asked for.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace qlora_engine::cuda {

// A thread block of the fused kernel takes 128 rows of W and `tokens` rows of x; `pair` blocks share x, or `splits`
// blocks divide K. Instances: tokens 16, 32, 64, 128 or 256; pair 1, or 2 with 256 tokens and one split; splits 1, 2,
// 4 or 8.
inline bool valid_config(const FusedConfig& c) {
  const bool tokens = c.tokens >= 16 && c.tokens <= 256 && (c.tokens & (c.tokens - 1)) == 0;
  const bool splits = c.splits >= 1 && c.splits <= 8 && (c.splits & (c.splits - 1)) == 0;
  return tokens && splits && (c.pair == 1 || (c.pair == 2 && c.tokens == 256 && c.splits == 1));
}

// For the fused kernel asked for without a configuration. The fastest of it measured on an H100 (132 multiprocessors), W
// 4096x4096, 14336x4096 and 4096x14336 (tiles of 128 rows: 32, 112, 32), tokens,pair,splits:
//   M         32       64       128      256      512      1024     2048
//   4096²     32,1,2   64,1,2   64,1,2   128,1,2  256,1,2  256,1,1  256,1,1
//   14336     32,1,1   64,1,1   128,1,1  256,1,1  256,1,1  256,1,1  256,1,1
//   K 14336   32,1,8   64,1,8   64,1,2   128,1,2  256,1,2  256,1,1  256,1,1
// In words: the least tile that holds M, but half of it where two thirds of the multiprocessors would stay without one;
// K is divided where still less than that have one. Other shapes follow these; at 16 tiles or less K is cut in 8.
inline FusedConfig choose_config(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  const int64_t row_tiles = (N + 127) / 128;
  const auto tiles = [&](int tokens) { return (M + tokens - 1) / tokens * row_tiles; };
  const int64_t enough = int64_t(multiprocessors) * 2 / 3;
  int tokens = 16;
  while (tokens < 256 && tokens < M) tokens *= 2;
  if (M > 64 && M <= 256 && tiles(tokens) < enough) tokens /= 2;
  if (tiles(tokens) >= enough) return {tokens, 1, 1};
  return {tokens, 1, M <= 64 && (K >= 8192 || tiles(tokens) <= 16) ? 8 : 2};
}

inline bool valid_levels(const FusedConfig& c) {
  const bool tokens = c.tokens >= 8 && c.tokens <= 128 && (c.tokens & (c.tokens - 1)) == 0;
  return tokens && c.splits >= 1 && c.splits <= 8 && c.pair == 1;
}

inline bool valid_backward_levels(const FusedConfig& c) {
  return valid_levels(c) || (c.tokens == 256 && c.splits >= 1 && c.splits <= 8 && c.pair == 1);
}

inline bool valid_config(const Sm80Config& c) {
  return (c.tokens == 16 || c.tokens == 32 || c.tokens == 64 || c.tokens == 128) && c.splits >= 1 && c.splits <= 16;
}

// Of the kernel for compute capability 8.0: the least tile that holds M, of 64 rows where tiles of 128 (by 256 rows of W)
// leave multiprocessors without one; and K divided as long as parts find multiprocessors and have 8 steps each.
inline Sm80Config choose_sm80_config(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  const auto tiles = [&](int64_t tokens, int64_t rows) { return (M + tokens - 1) / tokens * ((N + rows - 1) / rows); };
  int tokens = M <= 16 ? 16 : M <= 32 ? 32 : M <= 64 ? 64 : 128;
  if (tokens == 128 && tiles(128, 256) < multiprocessors) tokens = 64;
  const int64_t count = tiles(tokens, tokens == 128 ? 256 : 128);
  const int64_t splits = std::min<int64_t>(2 * int64_t(multiprocessors) / count, K / 64 / 8);
  return {tokens, int(std::clamp<int64_t>(tokens == 128 ? 1 : splits, 1, 16))};
}

// What QLORA_ENGINE_LINEAR asks for: auto (or unset), few, levels:TOKENS,PAIR,SPLITS, fused, fused:TOKENS,PAIR,SPLITS,
// fused:sm80, fused:sm80:TOKENS,SPLITS, or dequantize.
struct LinearChoice {
  enum Path { kAuto, kFewRows, kLevels, kFused, kDequantize, kSm80, kUnknown } path = kAuto;
  bool has_config = false;
  FusedConfig config{};  // of kLevels too
  Sm80Config sm80{};
  bool fused() const { return path == kFused || path == kSm80 || path == kLevels; }
};

inline LinearChoice linear_choice() {
  const char* text = std::getenv("QLORA_ENGINE_LINEAR");
  LinearChoice choice;
  if (text == nullptr || *text == 0 || std::strcmp(text, "auto") == 0) return choice;
  choice.path = LinearChoice::kUnknown;
  if (std::strcmp(text, "dequantize") == 0) choice.path = LinearChoice::kDequantize;
  if (std::strcmp(text, "fused") == 0) choice.path = LinearChoice::kFused;
  if (std::strcmp(text, "few") == 0) choice.path = LinearChoice::kFewRows;
  FusedConfig& c = choice.config;
  int read = 0;
  if (std::sscanf(text, "levels:%d,%d,%d%n", &c.tokens, &c.pair, &c.splits, &read) == 3 && text[read] == 0 &&
      valid_levels(c)) {
    choice.path = LinearChoice::kLevels;
    choice.has_config = true;
  }
  if (std::sscanf(text, "fused:%d,%d,%d%n", &c.tokens, &c.pair, &c.splits, &read) == 3 && text[read] == 0 &&
      valid_config(c)) {
    choice.path = LinearChoice::kFused;
    choice.has_config = true;
  }
  if (std::strcmp(text, "fused:sm80") == 0) choice.path = LinearChoice::kSm80;
  if (std::sscanf(text, "fused:sm80:%d,%d%n", &choice.sm80.tokens, &choice.sm80.splits, &read) == 2 &&
      text[read] == 0 && valid_config(choice.sm80)) {
    choice.path = LinearChoice::kSm80;
    choice.has_config = true;
  }
  return choice;
}

}  // namespace qlora_engine::cuda
