// The nearest of measured products.
#pragma once
#include <algorithm>
#include <cstdint>

#include "linear_table.h"

namespace qlora_engine::cuda {

// Of the least number of rows that is not below M, the entry of the W whose sides are nearest by their ratios; nullptr
// beyond the table's rows.
template <int kCount>
const MeasuredProduct* nearest(const MeasuredProduct (&table)[kCount], int64_t M, int64_t N, int64_t K, bool adapter) {
  int rows = 0;
  for (const MeasuredProduct& entry : table) {
    if (entry.adapter == adapter && entry.M >= M && (rows == 0 || entry.M < rows)) rows = entry.M;
  }
  const auto ratio = [](int64_t a, int64_t b) { return double(std::max(a, b)) / double(std::min(a, b)); };
  const MeasuredProduct* found = nullptr;
  double least = 0;
  for (const MeasuredProduct& entry : table) {
    if (entry.adapter != adapter || entry.M != rows) continue;
    const double distance = ratio(entry.N, N) * ratio(entry.K, K);
    if (found != nullptr && distance >= least) continue;
    least = distance;
    found = &entry;
  }
  return found;
}

}  // namespace qlora_engine::cuda
