// Written by benchmarks/tune_linear.py: the fastest way measured for each product.
#pragma once
#include <cstdint>

namespace qlora_engine::cuda {

struct MeasuredProduct {
  bool adapter;
  int32_t M, N, K;
  uint8_t path;  // LinearRoute::Path
  int16_t tokens, pair, splits;
};

inline constexpr MeasuredProduct kMeasuredProducts[] = {
    {false, 2048, 4096, 4096, 1, 256, 1, 1},
    {true, 2048, 4096, 4096, 1, 256, 1, 1},
};

}  // namespace qlora_engine::cuda
