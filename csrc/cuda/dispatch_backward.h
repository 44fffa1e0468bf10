// Which way dX = dY W goes: fused, or dequantize and cuBLAS.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "dispatch.h"
#include "kernels.h"
#include "measured.h"

namespace qlora_engine::cuda {

struct BackwardRoute {
  enum Path { kFewRows, kManyRows, kDequantize, kLevels, kDoesNotFit } path;
  BackwardPlan plan;   // of kManyRows
  FusedConfig levels;  // of kLevels
};

static_assert(BackwardRoute::kFewRows == 0 && BackwardRoute::kManyRows == 1 && BackwardRoute::kDequantize == 2 &&
                  BackwardRoute::kLevels == 3,
              "linear_table.h, tune_linear.py and ops/linear.py name ways by these numbers");

// What QLORA_ENGINE_BACKWARD asks for: auto (or unset), few, levels:TOKENS,1,SPLITS, many, many:CLUSTER,SPLITS,GROUP,
// or dequantize. Where it is unset, fused and dequantize of QLORA_ENGINE_LINEAR count here too.
struct BackwardChoice {
  enum Path { kAuto, kFused, kFewRows, kLevels, kManyRows, kDequantize, kUnknown } path = kAuto;
  bool has_plan = false;
  BackwardPlan plan{};
  FusedConfig levels{};
};

inline BackwardChoice backward_choice(const LinearChoice& linear) {
  BackwardChoice choice;
  const char* text = std::getenv("QLORA_ENGINE_BACKWARD");
  if (text == nullptr || *text == 0) {
    if (linear.path == LinearChoice::kDequantize) choice.path = BackwardChoice::kDequantize;
    if (linear.path == LinearChoice::kFused || linear.path == LinearChoice::kSm80) choice.path = BackwardChoice::kFused;
    return choice;  // few and levels are ways of y alone
  }
  if (std::strcmp(text, "auto") == 0) return choice;
  choice.path = BackwardChoice::kUnknown;
  if (std::strcmp(text, "few") == 0) choice.path = BackwardChoice::kFewRows;
  if (std::strcmp(text, "many") == 0) choice.path = BackwardChoice::kManyRows;
  if (std::strcmp(text, "dequantize") == 0) choice.path = BackwardChoice::kDequantize;
  int read = 0;
  BackwardPlan& p = choice.plan;
  if (std::sscanf(text, "many:%d,%d,%d%n", &p.cluster, &p.splits, &p.group, &read) == 3 && text[read] == 0 &&
      (p.cluster == 1 || p.cluster == 2) && p.splits >= 1 && p.group >= 1) {
    choice.path = BackwardChoice::kManyRows;
    choice.has_plan = true;
  }
  FusedConfig& c = choice.levels;
  if (std::sscanf(text, "levels:%d,%d,%d%n", &c.tokens, &c.pair, &c.splits, &read) == 3 && text[read] == 0 &&
      valid_backward_levels(c)) {
    choice.path = BackwardChoice::kLevels;
  }
  return choice;
}

// The plan of the kernel for many rows where none is measured or asked for: parts of the sum, as long as they find
// multiprocessors and have 8 steps each.
inline BackwardPlan backward_plan(int64_t M, int64_t N, int64_t K, int processors) {
  const int64_t steps = (N + 63) / 64, columns = (K + 127) / 128;
  const int cluster = M > 256 ? 2 : 1;
  const int64_t slots = std::max(1, processors / cluster), tiles = (M + 256 * cluster - 1) / (256 * cluster) * columns;
  const int64_t splits = std::clamp<int64_t>(std::min(slots / tiles, steps / 8), 1, 8);
  return {cluster, int(splits), 8};
}

// The way of a gradient, with or without an adapter. `few`, `many`: the kernel for few rows can take it; those for 9.0
// can.
inline BackwardRoute backward_route(const BackwardChoice& asked, int64_t M, int64_t N, int64_t K, bool adapter,
                                    bool few, bool many, int processors) {
  const BackwardRoute few_rows{BackwardRoute::kFewRows, {}, {}}, dequantize{BackwardRoute::kDequantize, {}, {}};
  const BackwardRoute none{BackwardRoute::kDoesNotFit, {}, {}};
  BackwardRoute many_rows{BackwardRoute::kManyRows, backward_plan(M, N, K, processors), {}};
  if (asked.has_plan) many_rows.plan = asked.plan;
  many_rows.plan.splits = int(std::clamp<int64_t>(many_rows.plan.splits, 1, (N + 63) / 64));
  switch (asked.path) {
    case BackwardChoice::kDequantize: return dequantize;
    case BackwardChoice::kFewRows: return few ? few_rows : none;
    case BackwardChoice::kManyRows: return many ? many_rows : none;
    case BackwardChoice::kLevels:
      return many ? BackwardRoute{BackwardRoute::kLevels, {}, asked.levels} : none;
    case BackwardChoice::kFused:
      if (few && (M <= 32 || !many)) return few_rows;
      return many ? many_rows : none;
    default: break;
  }
  // without clusters, too few thread blocks share W in the kernel for few rows
  const MeasuredProduct* found = many ? nearest(kMeasuredGradients, M, N, K, adapter) : nullptr;
  if (found == nullptr) return dequantize;
  const auto& [a, b, c] = found->config;
  switch (found->path) {
    case BackwardRoute::kFewRows: return few ? few_rows : dequantize;
    case BackwardRoute::kLevels: return {BackwardRoute::kLevels, {}, {a, b, c}};
    case BackwardRoute::kManyRows: {
      const int splits = int(std::min<int64_t>(b, (N + 63) / 64));
      return {BackwardRoute::kManyRows, {a, splits, c}, {}};
    }
    default: return dequantize;
  }
}

}  // namespace qlora_engine::cuda
