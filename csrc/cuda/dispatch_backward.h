// Which way dX = dY W goes: fused, or dequantize and cuBLAS. Measured on an H100 (benchmarks/bench_linear.py).
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "dispatch.h"
#include "kernels.h"

namespace qlora_engine::cuda {

enum class BackwardPath { kFewRows, kManyRows, kDequantize };
struct BackwardChoice {
  BackwardPath path;
  BackwardPlan plan;
};

// The plan of a product of many rows on `processors` multiprocessors. QLORA_ENGINE_BACKWARD_PLAN=cluster,splits,group
// forces one, for measurements and tests.
inline BackwardPlan backward_plan(int64_t M, int64_t N, int64_t K, int processors) {
  const int64_t steps = (N + 63) / 64, columns = (K + 127) / 128;
  const int cluster = M > 256 ? 2 : 1;
  const int64_t slots = std::max(1, processors / cluster), tiles = (M + 256 * cluster - 1) / (256 * cluster) * columns;
  // parts, as long as they find multiprocessors and have 8 steps each
  const int64_t splits = std::clamp<int64_t>(std::min(slots / tiles, steps / 8), 1, 8);
  BackwardPlan plan{cluster, int(splits), 8};
  if (const char* value = std::getenv("QLORA_ENGINE_BACKWARD_PLAN")) {
    const bool read = std::sscanf(value, "%d,%d,%d", &plan.cluster, &plan.splits, &plan.group) == 3;
    STD_TORCH_CHECK(read, "QLORA_ENGINE_BACKWARD_PLAN=", value, "; expected cluster,splits,group, as in 2,1,8");
    plan.splits = int(std::clamp<int64_t>(plan.splits, 1, steps));
  }
  return plan;
}

// The rule. `few`, `many`: the kernel for few rows, or for many, can take the product. Microseconds on an H100 80GB
// (double-quantized, block 64): the kernel, and dequantize + cuBLAS; of the kernel for many also with an adapter of rank
// 16, where the decoded way reads and writes dX once more:
//
//            M   4096 x 4096               14336 x 4096              4096 x 14336
//   few      1    20 |                        40 |                      39 |
//           16    21 |                        40 |                      36 |
//           64    34 |                        81 |                      72 |
//   many   256    39 |  36   39 |  41         71 | 115    71 | 119       72 | 110    74 | 117
//         1024    62 |  61   62 |  71        189 | 199   190 | 207      227 | 218   230 | 238
//         2048   118 | 104  119 | 119        367 | 342   367 | 355      382 | 353   387 | 389
//         4096   222 | 189  225 | 213        743 | 641   761 | 666      825 | 669   819 | 725
//
// The kernel for many takes about the same time for all M up to 256: of a large weight, it takes over from 33 rows on.
inline BackwardChoice choose_backward(const LinearChoice& asked, int64_t M, int64_t N, int64_t K, bool few, bool many,
                                      int processors) {
  const BackwardChoice dequantize{BackwardPath::kDequantize, {1, 1, 8}};
  if (asked.path == LinearChoice::kDequantize) return dequantize;
  const bool large = N * K >= int64_t(1) << 25;
  // measured on GPUs that have the kernel for many; without clusters, too few thread blocks share W
  if (few && (many ? M <= 32 || !large : asked.fused())) return {BackwardPath::kFewRows, {1, 1, 8}};
  if (!many || (asked.path == LinearChoice::kAuto && M > 1024)) return dequantize;
  return {BackwardPath::kManyRows, backward_plan(M, N, K, processors)};
}

}  // namespace qlora_engine::cuda
