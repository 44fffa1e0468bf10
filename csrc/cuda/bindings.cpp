// Quantizing and dequantizing as torch sees them: argument checks, allocation. Compiled by g++; the kernels are in the
// .cu files behind kernels.h, products in linear_bindings.cpp. Everything is enqueued on torch's current stream, nothing
// synchronises, and memory comes from torch's allocator alone, so that every operator can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "bindings.h"

namespace qlora_engine::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> quantize_nf4_cuda(const Tensor& weight, int64_t blocksize) {
  const char* op = "quantize_nf4";
  check_weight(op, weight, blocksize);
  const DeviceGuard guard(weight.get_device_index());
  const int64_t n = weight.numel();
  Tensor packed = empty(weight, {ceil_div(n, 2)}, ScalarType::Byte);
  Tensor absmax = empty(weight, {ceil_div(n, blocksize)}, ScalarType::Float);
  check_launch(op, quantize_nf4(weight.const_data_ptr(), to_dtype(weight.scalar_type()), n, blocksize,
                                static_cast<uint8_t*>(packed.mutable_data_ptr()),
                                static_cast<float*>(absmax.mutable_data_ptr()),
                                current_stream(weight.get_device_index())));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_nf4_search_cuda(const Tensor& weight, int64_t blocksize, bool signed_scales) {
  const char* op = "quantize_nf4_search";
  check_weight(op, weight, blocksize);
  const DeviceGuard guard(weight.get_device_index());
  const int64_t n = weight.numel();
  Tensor packed = empty(weight, {ceil_div(n, 2)}, ScalarType::Byte);
  Tensor absmax = empty(weight, {ceil_div(n, blocksize)}, ScalarType::Float);
  check_launch(op, quantize_nf4_search(weight.const_data_ptr(), to_dtype(weight.scalar_type()), n, blocksize,
                                       signed_scales, static_cast<uint8_t*>(packed.mutable_data_ptr()),
                                       static_cast<float*>(absmax.mutable_data_ptr()),
                                       current_stream(weight.get_device_index())));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_nf4_double_cuda(const Tensor& weight, int64_t blocksize) {
  const char* op = "quantize_nf4_double";
  check_weight(op, weight, blocksize);
  const DeviceGuard guard(weight.get_device_index());
  const int64_t n = weight.numel(), blocks = ceil_div(n, blocksize);
  Tensor packed = empty(weight, {ceil_div(n, 2)}, ScalarType::Byte);
  Tensor codes = empty(weight, {blocks}, ScalarType::Byte);
  Tensor nested = empty(weight, {ceil_div(blocks, kNestedBlocksize)}, ScalarType::Float);
  Tensor offset = empty(weight, {}, ScalarType::Float);
  const Tensor absmax = empty(weight, {blocks}, weight.scalar_type());
  const Tensor sums = empty(weight, {kMaxScaleSums}, ScalarType::Double);
  check_launch(op, quantize_nf4_double(weight.const_data_ptr(), to_dtype(weight.scalar_type()), n, blocksize,
                                       static_cast<uint8_t*>(packed.mutable_data_ptr()),
                                       static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                       static_cast<float*>(nested.mutable_data_ptr()),
                                       static_cast<float*>(offset.mutable_data_ptr()),
                                       absmax.mutable_data_ptr(),
                                       static_cast<double*>(sums.mutable_data_ptr()),
                                       current_stream(weight.get_device_index())));
  return {packed, codes, nested, offset};
}

std::tuple<Tensor, Tensor> quantize_absmax_cuda(const Tensor& absmax, const Tensor& offset, int64_t blocksize) {
  const char* op = "quantize_absmax";
  check_blocksize(op, blocksize);
  check_tensor(op, "absmax", absmax, ScalarType::Float, absmax.numel(), absmax);
  check_tensor(op, "offset", offset, ScalarType::Float, 1, absmax);
  const DeviceGuard guard(absmax.get_device_index());
  const int64_t n = absmax.numel();
  Tensor codes = empty(absmax, {n}, ScalarType::Byte);
  Tensor nested = empty(absmax, {ceil_div(n, blocksize)}, ScalarType::Float);
  check_launch(op, quantize_absmax(static_cast<const float*>(absmax.const_data_ptr()),
                                   static_cast<const float*>(offset.const_data_ptr()), n, blocksize,
                                   static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                   static_cast<float*>(nested.mutable_data_ptr()),
                                   current_stream(absmax.get_device_index())));
  return {codes, nested};
}

Tensor dequantize_absmax_cuda(const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                              int64_t blocksize) {
  const char* op = "dequantize_absmax";
  const int64_t n = codes.numel();
  check_blocksize(op, blocksize);
  check_tensor(op, "quantized", codes, ScalarType::Byte, n, codes);
  check_tensor(op, "nested_absmax", nested_absmax, ScalarType::Float, ceil_div(n, blocksize), codes);
  check_tensor(op, "nested_offset", nested_offset, ScalarType::Float, 1, codes);
  const DeviceGuard guard(codes.get_device_index());
  Tensor out = empty(codes, {n}, ScalarType::Float);
  check_launch(op, dequantize_absmax(static_cast<const uint8_t*>(codes.const_data_ptr()),
                                     static_cast<const float*>(nested_absmax.const_data_ptr()),
                                     static_cast<const float*>(nested_offset.const_data_ptr()), n, blocksize,
                                     static_cast<float*>(out.mutable_data_ptr()),
                                     current_stream(codes.get_device_index())));
  return out;
}

Tensor dequantize_nf4_cuda(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                           const OptionalTensor& nested_offset, int64_t blocksize, std::vector<int64_t> shape,
                           ScalarType dtype) {
  const char* op = "dequantize_nf4";
  check_compute_dtype(op, "dtype", dtype);
  const Nf4Pointers weight =
      check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, product(shape), packed);
  const DeviceGuard guard(packed.get_device_index());
  return decoded(op, weight, packed, shape, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CUDA, m) {
  m.impl("quantize_nf4", TORCH_BOX(&quantize_nf4_cuda));
  m.impl("quantize_nf4_search", TORCH_BOX(&quantize_nf4_search_cuda));
  m.impl("quantize_nf4_double", TORCH_BOX(&quantize_nf4_double_cuda));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax_cuda));
  m.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4_cuda));
  m.impl("dequantize_absmax", TORCH_BOX(&dequantize_absmax_cuda));
}

}  // namespace qlora_engine::cuda
