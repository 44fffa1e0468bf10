// Which way a product with a 4-bit weight goes.
#pragma once
#include "dispatch.h"
#include "measured.h"

namespace qlora_engine::cuda {

// The most rows for which the kernel for 8.0 is chosen where that for 9.0 is missing: while reading W bounds a product.
// Not measured on a GPU of 8.0, but it moves a quarter of the bytes that decoding does.
inline constexpr int64_t kMostSm80Rows = 64;

struct LinearRoute {
  enum Path { kFewRows, kFused, kDequantize, kSm80, kLevels, kDoesNotFit } path;
  FusedConfig config;  // of kFused and kLevels
  Sm80Config sm80;     // of kSm80
};

static_assert(LinearRoute::kFewRows == 0 && LinearRoute::kFused == 1 && LinearRoute::kDequantize == 2 &&
                  LinearRoute::kSm80 == 3 && LinearRoute::kLevels == 4,
              "linear_table.h, tune_linear.py and ops/linear.py name ways by these numbers");

// The fastest way measured for the product nearest to this one (linear_table.h). Beyond the table's rows W is decoded.
inline LinearRoute measured_route(int64_t M, int64_t N, int64_t K, bool adapter) {
  const MeasuredProduct* found = nearest(kMeasuredProducts, M, N, K, adapter);
  if (found == nullptr) return {LinearRoute::kDequantize, {}, {}};
  return {LinearRoute::Path(found->path), {found->config[0], found->config[1], found->config[2]}, {}};
}

// The way of a product whose x is aligned to 16 bytes, with or without an adapter; kDoesNotFit where a fused kernel was
// asked for in vain.
inline LinearRoute linear_route(const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K,
                                bool adapter, const LinearChoice& choice, int multiprocessors) {
  if (choice.path == LinearChoice::kDequantize) return {LinearRoute::kDequantize, {}, {}};
  const bool forced = choice.fused();
  const int64_t most_few = fused_available() ? kFewRowsSm90 : kFewRows;
  const bool few = M <= most_few && few_rows_fit(weight, dtype, nullptr, N, K);
  const LinearRoute plain{few ? LinearRoute::kFewRows : LinearRoute::kDequantize, {}, {}};
  if (choice.path == LinearChoice::kFewRows) return few ? plain : LinearRoute{LinearRoute::kDoesNotFit, {}, {}};
  if (choice.path == LinearChoice::kSm80 || !fused_available()) {
    const bool fits = !(choice.has_config && choice.path != LinearChoice::kSm80) &&  // a configuration of another
                      linear_sm80_fits(weight, dtype, M, N, K);
    if (forced && !fits) return {LinearRoute::kDoesNotFit, {}, {}};
    if (!forced && (few || !fits || M > kMostSm80Rows)) return plain;
    return {LinearRoute::kSm80, {}, choice.has_config ? choice.sm80 : choose_sm80_config(M, N, K, multiprocessors)};
  }
  if (!fused_fits(weight, dtype, M, N, K)) return forced ? LinearRoute{LinearRoute::kDoesNotFit, {}, {}} : plain;
  if (choice.path == LinearChoice::kLevels) return {LinearRoute::kLevels, choice.config, {}};
  if (choice.path == LinearChoice::kFused) {
    return {LinearRoute::kFused, choice.has_config ? choice.config : choose_config(M, N, K, multiprocessors), {}};
  }
  LinearRoute measured = measured_route(M, N, K, adapter);
  if (measured.path == LinearRoute::kFewRows && !few) return {LinearRoute::kDequantize, {}, {}};
  if (measured.path == LinearRoute::kSm80) measured.sm80 = choose_sm80_config(M, N, K, multiprocessors);
  return measured;
}

}  // namespace qlora_engine::cuda
