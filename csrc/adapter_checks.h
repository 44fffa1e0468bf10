// Argument checks of the adapter_* operators; qlora_engine/ops/checks.py has the same words.
#pragma once
#include "adamw_checks.h"

namespace qlora_engine {

constexpr size_t kMaxProjections = 3;

inline void check_projections(const char* op, size_t count, std::initializer_list<size_t> others) {
  bool same = count >= 1 && count <= kMaxProjections;
  for (size_t other : others) same = same && other == count;
  STD_TORCH_CHECK(same, op, ": the lists have different lengths; expected one to 3 entries, one a projection, in each");
}

// A factor of an adapter; `rows` or `columns` is -1 where any number will do.
inline void check_factor(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns,
                         const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns), op, ": ",
                  name, " has another shape; expected lora_A [r, in_features] and lora_B [out_features, r]");
  const bool fits = t.scalar_type() == ScalarType::Float || t.scalar_type() == like.scalar_type();
  STD_TORCH_CHECK(fits, op, ": ", name, " is ", dtype_name(t.scalar_type()), "; expected float32 or ",
                  dtype_name(like.scalar_type()));
  check_tensor(op, name, t, t.scalar_type(), t.numel(), like);
}

// S or its gradient, or a gradient of an output: a contiguous matrix.
inline void check_rows(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns,
                       const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name,
                  " has another shape; expected [", rows, ", ", columns, "]");
  check_tensor(op, name, t, like.scalar_type(), rows * columns, like);
}

inline void check_adapter_forward(const Tensor& x, const TensorList& packed, const TensorList& absmax,
                                  const OptionalTensorList& nested_absmax, const OptionalTensorList& nested_offset,
                                  const std::vector<int64_t>& blocksizes, const std::vector<int64_t>& out_features,
                                  const OptionalTensorList& biases, const TensorList& lora_A, const TensorList& lora_B,
                                  const std::vector<double>& scalings) {
  const char* op = "adapter_forward";
  check_projections(op, packed.size(), {absmax.size(), nested_absmax.size(), nested_offset.size(), blocksizes.size(),
                                        out_features.size(), biases.size(), lora_A.size(), lora_B.size(),
                                        scalings.size()});
  check_compute_dtype(op, "x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() == 2, op, ": x has ", x.dim(), " dimensions; expected [rows, in_features]");
  check_tensor(op, "x", x, x.scalar_type(), x.numel(), x);
  for (size_t i = 0; i < lora_A.size(); ++i) {
    check_factor(op, "lora_A", lora_A[i], -1, x.size(1), x);
    check_factor(op, "lora_B", lora_B[i], out_features[i], lora_A[i].size(0), x);
  }
}

inline void check_adapter_backward_S(const TensorList& grads, const Tensor& S, const TensorList& lora_B,
                                     const std::vector<double>& scalings) {
  const char* op = "adapter_backward_S";
  check_projections(op, grads.size(), {lora_B.size(), scalings.size()});
  check_compute_dtype(op, "S", S.scalar_type());
  STD_TORCH_CHECK(S.dim() == 2, op, ": S has ", S.dim(), " dimensions; expected [rows, sum of ranks]");
  int64_t ranks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_factor(op, "lora_B", lora_B[i], -1, -1, S);
    check_rows(op, "a gradient", grads[i], S.size(0), lora_B[i].size(0), S);
    ranks += lora_B[i].size(1);
  }
  check_rows(op, "S", S, S.size(0), ranks, S);
}

inline void check_adapter_backward_x(const TensorList& grads, const Tensor& grad_S, const TensorList& packed,
                                     const TensorList& absmax, const OptionalTensorList& nested_absmax,
                                     const OptionalTensorList& nested_offset, const std::vector<int64_t>& blocksizes,
                                     const TensorList& lora_A) {
  const char* op = "adapter_backward_x";
  check_projections(op, grads.size(), {packed.size(), absmax.size(), nested_absmax.size(), nested_offset.size(),
                                       blocksizes.size(), lora_A.size()});
  check_compute_dtype(op, "grad_S", grad_S.scalar_type());
  STD_TORCH_CHECK(grad_S.dim() == 2, op, ": grad_S has ", grad_S.dim(), " dimensions; expected [rows, sum of ranks]");
  int64_t ranks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_factor(op, "lora_A", lora_A[i], -1, i == 0 ? -1 : lora_A[0].size(1), grad_S);
    check_rows(op, "a gradient", grads[i], grad_S.size(0), grads[i].dim() == 2 ? grads[i].size(1) : 0, grad_S);
    ranks += lora_A[i].size(0);
  }
  check_rows(op, "grad_S", grad_S, grad_S.size(0), ranks, grad_S);
}

}  // namespace qlora_engine
