// Argument checks of adamw_step and gradient_norm; qlora_engine/ops/checks.py has the same words.
#pragma once
#include "adamw.h"
#include "checks.h"

namespace qlora_engine {

using TensorList = std::vector<Tensor>;
using OptionalTensorList = std::vector<OptionalTensor>;

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_gradients(const char* op, const OptionalTensorList& grads) {
  const Tensor* first = nullptr;
  for (const OptionalTensor& grad : grads) {
    if (!grad.has_value()) continue;
    check_compute_dtype(op, "a gradient", grad->scalar_type());
    if (first == nullptr) first = &*grad;
    STD_TORCH_CHECK(same_device(*grad, *first), op,
                    ": gradients are on several devices; step each device's parameters by themselves");
  }
}

inline void check_tensor_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " is ", dtype_name(t.scalar_type()),
                  "; expected its parameter's ", dtype_name(like.scalar_type()));
  STD_TORCH_CHECK(t.numel() == like.numel(), op, ": ", name, " has ", t.numel(),
                  " elements; expected its parameter's ", like.numel());
  STD_TORCH_CHECK(t.is_contiguous() && like.is_contiguous(), op, ": ", name,
                  " or its parameter is not contiguous; pass views that are");
  STD_TORCH_CHECK(same_device(t, like), op, ": ", name, " is on another device than its parameter");
}

inline void check_adamw_step(const TensorList& params, const OptionalTensorList& grads, const Tensor& steps,
                             const TensorList& memory, const Tensor& pages, int64_t cold_pages,
                             const OptionalTensor& multiplier, const OptionalTensor& skip,
                             const std::vector<double>& hyper, const std::vector<int64_t>& groups,
                             const std::vector<int64_t>& layouts) {
  const char* op = "adamw_step";
  check_gradients(op, grads);
  STD_TORCH_CHECK(grads.size() == params.size(), op, ": got ", grads.size(), " gradients; expected ", params.size(),
                  ", one or None a parameter");
  for (size_t i = 0; i < params.size(); ++i) {
    check_compute_dtype(op, "a parameter", params[i].scalar_type());
    if (grads[i].has_value()) check_tensor_like(op, "a gradient", *grads[i], params[i]);
  }
  STD_TORCH_CHECK(!params.empty(), op, ": there are no parameters");
  const Tensor& like = params[0];
  const int64_t count = int64_t(params.size());
  check_tensor(op, "steps", steps, ScalarType::Float, count, like);
  STD_TORCH_CHECK(pages.dim() == 2 && pages.size(1) == 5, op, ": pages has another shape; expected [pages, 5]");
  check_tensor(op, "pages", pages, ScalarType::Long, pages.numel(), like);
  STD_TORCH_CHECK(0 <= cold_pages && cold_pages <= pages.size(0), op, ": cold_pages is ", cold_pages,
                  "; expected 0 to ", pages.size(0));
  for (const Tensor& slab : memory) check_tensor(op, "memory", slab, ScalarType::Byte, slab.numel(), like);
  if (multiplier) check_tensor(op, "multiplier", *multiplier, ScalarType::Float, 1, like);
  if (skip) check_tensor(op, "skip", *skip, ScalarType::Float, 1, like);
  STD_TORCH_CHECK(groups.size() == params.size() && layouts.size() == params.size(), op,
                  ": groups and layouts need one number a parameter, ", count);
  bool known = hyper.size() % kHyperparameters == 0;
  for (int64_t group : groups) known = known && 0 <= group && group < int64_t(hyper.size()) / kHyperparameters;
  STD_TORCH_CHECK(known, op, ": hyper has ", hyper.size(),
                  " numbers; expected 6 for every group that groups names");
  for (size_t i = 0; i < params.size(); ++i) {
    const ScalarType dtype = params[i].scalar_type();
    const bool stochastic = layouts[i] & kStochasticRounding;
    STD_TORCH_CHECK(0 <= layouts[i] && layouts[i] < 8 && !(stochastic && dtype != ScalarType::BFloat16), op,
                    ": a layout is ", layouts[i], " for ", dtype_name(dtype),
                    "; expected 0 to 3, or to 7 for bfloat16");
  }
}

}  // namespace qlora_engine
