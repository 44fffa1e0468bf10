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

// The fastest configurations measured on an H100 (132 multiprocessors), W 4096x4096, 14336x4096 and 4096x14336 (tiles
// of 128 rows: 32, 112, 32), tokens,pair,splits:
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

// What QLORA_ENGINE_LINEAR asks for: auto (or unset), fused, fused:TOKENS,PAIR,SPLITS, fused:sm80,
// fused:sm80:TOKENS,SPLITS, or dequantize.
struct LinearChoice {
  enum Path { kAuto, kFused, kDequantize, kSm80, kUnknown } path = kAuto;
  bool has_config = false;
  FusedConfig config{};
  Sm80Config sm80{};
  bool fused() const { return path == kFused || path == kSm80; }
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
  if (std::strcmp(text, "fused:sm80") == 0) choice.path = LinearChoice::kSm80;
  if (std::sscanf(text, "fused:sm80:%d,%d%n", &choice.sm80.tokens, &choice.sm80.splits, &read) == 2 &&
      text[read] == 0 && valid_config(choice.sm80)) {
    choice.path = LinearChoice::kSm80;
    choice.has_config = true;
  }
  return choice;
}

// The most rows for which the fused kernel is chosen over decoding W and cuBLAS. Measured as above, it is up to 2.5 times
// as fast below 2048 rows, 1.0 to 1.04 times at 2048, and 0.96 times at 4096. An adapter costs it 1 to 3%, but the other
// way a pass or two over y: with rank 16, fused | decoded at
//   M         2048        4096        8192
//   4096²     106 | 119   202 | 212    399 |  396 us
//   14336     348 | 389   721 | 724   1533 | 1458
//   K 14336   332 | 355   700 | 677   1476 | 1349
inline int64_t most_fused_rows(int64_t K, bool adapter) { return adapter && K <= 8192 ? 4096 : 2048; }

// The most rows for which the kernel for 8.0 is chosen without being asked for.
inline constexpr int64_t kMostSm80Rows = 64;

struct LinearRoute {
  enum Path { kFewRows, kFused, kDequantize, kSm80, kDoesNotFit } path;
  FusedConfig config;  // of kFused
  Sm80Config sm80;     // of kSm80
};

// The way of a product whose x is aligned to 16 bytes, with or without an adapter; kDoesNotFit where the fused kernel was
// asked for in vain.
inline LinearRoute linear_route(const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K,
                                bool adapter, const LinearChoice& choice, int multiprocessors) {
  if (choice.path == LinearChoice::kDequantize) return {LinearRoute::kDequantize, {}, {}};
  const bool forced = choice.fused();
  const int64_t few = fused_available() ? kFewRowsSm90 : kFewRows;
  if (!forced && M <= few && few_rows_fit(weight, dtype, nullptr, N, K)) return {LinearRoute::kFewRows, {}, {}};
  const auto sm80 = [&]() -> LinearRoute {
    return {LinearRoute::kSm80, {}, choice.has_config ? choice.sm80 : choose_sm80_config(M, N, K, multiprocessors)};
  };
  if (choice.path == LinearChoice::kSm80 || !fused_available()) {
    const bool fits = !(choice.has_config && choice.path == LinearChoice::kFused) &&  // a configuration of the other
                      linear_sm80_fits(weight, dtype, M, N, K);
    if (forced && !fits) return {LinearRoute::kDoesNotFit, {}, {}};
    // by itself while reading W bounds a product: not measured on a GPU of 8.0, but it moves a quarter of the bytes
    if (!fits || !(forced || M <= kMostSm80Rows)) return {LinearRoute::kDequantize, {}, {}};
    return sm80();
  }
  if (!fused_fits(weight, dtype, M, N, K)) {
    return {forced ? LinearRoute::kDoesNotFit : LinearRoute::kDequantize, {}, {}};
  }
  if (!forced && M > most_fused_rows(K, adapter)) return {LinearRoute::kDequantize, {}, {}};
  const FusedConfig config = choice.has_config ? choice.config : choose_config(M, N, K, multiprocessors);
  // where the fused kernel would divide K, the other is faster up to 64 rows (it has no adapters): fused | 8.0, us, at
  //   M         32           64
  //   4096²     27.3 | 21.2  29.6 | 26.6
  //   K 14336   52.8 | 41.6  55.6 | 53.1
  if (!forced && !adapter && M <= kMostSm80Rows && config.splits > 1 && linear_sm80_fits(weight, dtype, M, N, K)) {
    return sm80();
  }
  return {LinearRoute::kFused, config, {}};
}

}  // namespace qlora_engine::cuda
