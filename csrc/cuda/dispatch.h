// Which way a product with a 4-bit weight goes, and in what configuration.
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

// Time of a configuration in units of one K-tile of one block, on `multiprocessors`: rounds of blocks times their
// K-tiles, and what a block costs besides. Few tokens: two blocks run on a multiprocessor at once.
inline double estimated_time(const FusedConfig& c, int64_t M, int64_t N, int64_t K, int multiprocessors) {
  const int64_t tiles = (M + c.tokens - 1) / c.tokens * ((N + 127) / 128);
  const int64_t k_tiles = (K / 64 + c.splits - 1) / c.splits;
  const int64_t at_once = int64_t(multiprocessors) * (c.tokens <= 64 ? 2 : 1);
  const int64_t rounds = (tiles * c.splits + at_once - 1) / at_once;
  const double k_tile = c.tokens <= 64 ? 1.0 : c.tokens == 128 ? 0.8 : 1.2;
  const double fixed = 4.0 + (c.splits > 1 ? 2.0 + c.tokens / 64.0 : 0.0);
  return double(rounds) * (k_tile * double(k_tiles) + fixed);
}

inline FusedConfig choose_config(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  FusedConfig best{256, 1, 1};
  double least = estimated_time(best, M, N, K, multiprocessors);
  for (int tokens = 16; tokens <= 256; tokens *= 2) {
    if (tokens < 256 && tokens < M && tokens < 128) continue;  // W would be decoded more than once
    for (int splits = 1; splits <= 8; splits *= 2) {
      const FusedConfig c{tokens, 1, splits};
      const double time = estimated_time(c, M, N, K, multiprocessors);
      if (time < least) best = c, least = time;
    }
    if (tokens >= M) break;
  }
  return best;
}

// What QLORA_ENGINE_LINEAR asks for: auto (or unset), fused, fused:TOKENS,PAIR,SPLITS, or dequantize.
struct LinearChoice {
  enum Path { kAuto, kFused, kDequantize, kUnknown } path = kAuto;
  bool has_config = false;
  FusedConfig config{};
};

inline LinearChoice linear_choice() {
  const char* text = std::getenv("QLORA_ENGINE_LINEAR");
  LinearChoice choice;
  if (text == nullptr || *text == 0 || std::strcmp(text, "auto") == 0) return choice;
  choice.path = LinearChoice::kUnknown;
  if (std::strcmp(text, "dequantize") == 0) choice.path = LinearChoice::kDequantize;
  if (std::strcmp(text, "fused") == 0) choice.path = LinearChoice::kFused;
  FusedConfig& c = choice.config;
  int read = 0;
  if (std::sscanf(text, "fused:%d,%d,%d%n", &c.tokens, &c.pair, &c.splits, &read) == 3 && text[read] == 0 &&
      valid_config(c)) {
    choice.path = LinearChoice::kFused;
    choice.has_config = true;
  }
  return choice;
}

// Whether the fused kernel is faster than decoding W and cuBLAS. Measured: benchmarks/bench_linear.py.
inline bool fused_wins(int64_t M, int64_t, int64_t) { return M <= 4096; }

struct LinearRoute {
  enum Path { kFewRows, kFused, kDequantize, kDoesNotFit } path;
  FusedConfig config;  // of kFused
};

// The way of a product whose x is aligned to 16 bytes; kDoesNotFit where the fused kernel was asked for in vain.
inline LinearRoute linear_route(const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K,
                                const LinearChoice& choice, int multiprocessors) {
  if (choice.path == LinearChoice::kDequantize) return {LinearRoute::kDequantize, {}};
  const bool forced = choice.path == LinearChoice::kFused;
  const int64_t few = fused_available() ? kFewRowsSm90 : kFewRows;
  if (!forced && M <= few && few_rows_fit(weight, dtype, nullptr, N, K)) return {LinearRoute::kFewRows, {}};
  if (!fused_fits(weight, dtype, M, N, K)) return {forced ? LinearRoute::kDoesNotFit : LinearRoute::kDequantize, {}};
  if (!forced && !fused_wins(M, N, K)) return {LinearRoute::kDequantize, {}};
  return {LinearRoute::kFused, choice.has_config ? choice.config : choose_config(M, N, K, multiprocessors)};
}

}  // namespace qlora_engine::cuda
