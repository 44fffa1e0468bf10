// The products with 4-bit weights as C++ functions, for operators that are made of them. Each is as the operator of its
// name (ops/linear.py).
#pragma once
#include "checks.h"

namespace qlora_engine::cuda {

Tensor linear_nf4_lora_cuda(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                            int64_t blocksize, int64_t out_features, const Tensor& S, const Tensor& B,
                            const OptionalTensor& bias);

Tensor linear_nf4_backward_lora_cuda(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                     const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                     int64_t blocksize, int64_t in_features, const Tensor& dS, const Tensor& A,
                                     const OptionalTensor& addend);

void linear_nf4_backward_add_cuda(Tensor dx, const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                  const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                  int64_t blocksize);

}  // namespace qlora_engine::cuda
