// Layers with adapters as operators of few calls: what an autograd node does for one projection or several of one
// input, without Python between the launches. A layer's step is bound by the host where its products are small.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <tuple>
#include <vector>

#include "adapter_checks.h"
#include "bindings.h"
#include "products.h"

namespace qlora_engine::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// A matrix over the storage of `t`, `offset` elements after its first: a view without the dispatcher.
Tensor matrix_view(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                   int64_t offset = 0) {
  int64_t first = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &first));
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, first + offset, &view));
  return Tensor(view);
}

Tensor transposed(const Tensor& t) { return matrix_view(t, t.size(1), t.size(0), t.stride(1), t.stride(0)); }

Tensor columns_of(const Tensor& t, int64_t first, int64_t count) {
  return matrix_view(t, t.size(0), count, t.stride(0), t.stride(1), first * t.stride(1));
}

Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return torch::stable::new_empty(like, {rows, columns}, dtype);
}

int64_t sum_of_ranks(const TensorList& factors, int dim) {
  int64_t sum = 0;
  for (const Tensor& factor : factors) sum += factor.size(dim);
  return sum;
}

// Factors of adapters in the dtype of a product, all of them rounded by one launch.
class Rounded {
 public:
  Rounded(const Tensor& like, int64_t elements) : all_(empty_matrix(like, 1, elements, like.scalar_type())) {}

  // A matrix [rows, columns] of what follows.
  Tensor matrix(int64_t rows, int64_t columns) const { return matrix_view(all_, rows, columns, columns, 1, used_); }

  void add(const Tensor& factor, double scaling) {
    char* target = static_cast<char*>(all_.mutable_data_ptr()) + used_ * all_.element_size();
    jobs_.of[count_++] = {factor.const_data_ptr(), target, factor.numel(), float(scaling), to_dtype(factor.scalar_type())};
    used_ += factor.numel();
  }

  void launch(const char* op) {
    check_launch(op, round_matrices(jobs_, count_, to_dtype(all_.scalar_type()), current_stream(all_.get_device_index())));
  }

 private:
  Tensor all_;
  RoundJobs jobs_{};
  int count_ = 0;
  int64_t used_ = 0;
};

int64_t total_elements(const TensorList& tensors) {
  int64_t sum = 0;
  for (const Tensor& t : tensors) sum += t.numel();
  return sum;
}

std::tuple<TensorList, Tensor> adapter_forward_cuda(
    const Tensor& x, TensorList packed, TensorList absmax, OptionalTensorList nested_absmax,
    OptionalTensorList nested_offset, std::vector<int64_t> blocksizes, std::vector<int64_t> out_features,
    OptionalTensorList biases, TensorList lora_A, TensorList lora_B, std::vector<double> scalings) {
  const char* op = "adapter_forward";
  check_adapter_forward(x, packed, absmax, nested_absmax, nested_offset, blocksizes, out_features, biases, lora_A, lora_B,
                        scalings);
  const DeviceGuard guard(x.get_device_index());
  const int64_t M = x.size(0), K = x.size(1), rank = sum_of_ranks(lora_A, 0);
  Rounded rounded(x, total_elements(lora_A) + total_elements(lora_B));
  const Tensor A = rounded.matrix(rank, K);
  for (const Tensor& factor : lora_A) rounded.add(factor, 1.0);
  TensorList B;
  for (size_t i = 0; i < lora_B.size(); ++i) {
    B.push_back(rounded.matrix(lora_B[i].size(0), lora_B[i].size(1)));
    rounded.add(lora_B[i], scalings[i]);
  }
  rounded.launch(op);
  Tensor S = empty_matrix(x, M, rank, x.scalar_type());
  matrix_product(S, x, transposed(A), std::nullopt);
  TensorList outputs;
  int64_t first = 0;
  for (size_t i = 0; i < packed.size(); ++i) {
    const int64_t ranks = lora_A[i].size(0);
    outputs.push_back(linear_nf4_lora_cuda(x, packed[i], absmax[i], nested_absmax[i], nested_offset[i], blocksizes[i],
                                           out_features[i], columns_of(S, first, ranks), B[i], biases[i]));
    first += ranks;
  }
  return {outputs, S};
}

std::tuple<Tensor, TensorList> adapter_backward_S_cuda(TensorList grads, const Tensor& S, TensorList lora_B,
                                                       std::vector<double> scalings) {
  const char* op = "adapter_backward_S";
  check_adapter_backward_S(grads, S, lora_B, scalings);
  const DeviceGuard guard(S.get_device_index());
  const int64_t M = S.size(0);
  Rounded rounded(S, total_elements(lora_B));
  Tensor grad_S = empty_matrix(S, M, S.size(1), S.scalar_type());
  TensorList B, grads_B;
  for (size_t i = 0; i < lora_B.size(); ++i) {
    B.push_back(rounded.matrix(lora_B[i].size(0), lora_B[i].size(1)));
    rounded.add(lora_B[i], scalings[i]);
  }
  rounded.launch(op);
  RoundJobs scale{};
  int scaled = 0;
  int64_t first = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t N = lora_B[i].size(0), ranks = lora_B[i].size(1);
    matrix_product(columns_of(grad_S, first, ranks), grads[i], B[i], std::nullopt);
    Tensor grad_B = empty_matrix(S, N, ranks, lora_B[i].scalar_type());
    const bool wider = grad_B.scalar_type() != S.scalar_type();
    scaled_product(grad_B, transposed(grads[i]), columns_of(S, first, ranks), wider ? 1.0 : scalings[i]);
    if (wider && scalings[i] != 1.0) {
      scale.of[scaled++] = {grad_B.const_data_ptr(), grad_B.mutable_data_ptr(), grad_B.numel(), float(scalings[i]),
                            Dtype::kFloat32};
    }
    grads_B.push_back(grad_B);
    first += ranks;
  }
  check_launch(op, round_matrices(scale, scaled, Dtype::kFloat32, current_stream(S.get_device_index())));
  return {grad_S, grads_B};
}

Tensor adapter_backward_x_cuda(TensorList grads, const Tensor& grad_S, TensorList packed, TensorList absmax,
                               OptionalTensorList nested_absmax, OptionalTensorList nested_offset,
                               std::vector<int64_t> blocksizes, TensorList lora_A) {
  const char* op = "adapter_backward_x";
  check_adapter_backward_x(grads, grad_S, packed, absmax, nested_absmax, nested_offset, blocksizes, lora_A);
  const DeviceGuard guard(grad_S.get_device_index());
  const int64_t K = lora_A[0].size(1), rank = grad_S.size(1);
  Rounded rounded(grad_S, total_elements(lora_A));
  const Tensor A = rounded.matrix(rank, K);
  for (const Tensor& factor : lora_A) rounded.add(factor, 1.0);
  rounded.launch(op);
  // all adapters' part comes with the first product, and the others add to it
  Tensor grad_x = linear_nf4_backward_lora_cuda(grads[0], packed[0], absmax[0], nested_absmax[0], nested_offset[0],
                                                blocksizes[0], K, grad_S, A, std::nullopt);
  for (size_t i = 1; i < grads.size(); ++i) {
    linear_nf4_backward_add_cuda(grad_x, grads[i], packed[i], absmax[i], nested_absmax[i], nested_offset[i],
                                 blocksizes[i]);
  }
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CUDA, m) {
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward_cuda));
  m.impl("adapter_backward_S", TORCH_BOX(&adapter_backward_S_cuda));
  m.impl("adapter_backward_x", TORCH_BOX(&adapter_backward_x_cuda));
}

}  // namespace qlora_engine::cuda
