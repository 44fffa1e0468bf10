// The CUDA operators as torch sees them: argument checks, allocation, dispatch. Compiled by g++; the kernels are in
// the .cu files behind kernels.h. Everything is enqueued on torch's current stream, nothing synchronises, and memory
// comes from torch's allocator alone, so that every operator can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <utility>

#include "checks.h"
#include "dispatch.h"
#include "dispatch_backward.h"
#include "kernels.h"
#include "launch.h"
#include "libtorch_cuda.h"

namespace qlora_engine::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

Dtype to_dtype(ScalarType t) {
  return t == ScalarType::Float ? Dtype::kFloat32 : t == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

Nf4Weight to_weight(const Nf4Pointers& w) {
  return {w.packed, w.absmax, w.absmax_codes, w.nested_absmax, w.nested_offset, w.numel, w.blocks,
          __builtin_ctzll(uint64_t(w.blocksize))};
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

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

// The whole weight in one 16- or 32-bit tensor. The caller has checked it and set the device.
Tensor decoded(const char* op, const Nf4Pointers& weight, const Tensor& like, const std::vector<int64_t>& shape,
               ScalarType dtype) {
  Tensor out = empty(like, shape, dtype);
  check_launch(op, dequantize_nf4(to_weight(weight), to_dtype(dtype), out.mutable_data_ptr(),
                                  current_stream(like.get_device_index())));
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

// The shape of x with another last dimension, and the product of all but the last.
std::pair<std::vector<int64_t>, int64_t> replace_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return {shape, rows};
}

LinearChoice checked_choice(const char* op) {
  const LinearChoice choice = linear_choice();
  STD_TORCH_CHECK(choice.path != LinearChoice::kUnknown, op, ": QLORA_ENGINE_LINEAR=", std::getenv("QLORA_ENGINE_LINEAR"),
                  "; expected auto, fused, fused:TOKENS,PAIR,SPLITS (such as fused:64,1,4) or dequantize");
  return choice;
}

LinearRoute route_of(const char* op, const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K) {
  const LinearChoice choice = checked_choice(op);
  int count = 0;
  check_launch(op, multiprocessors(&count));
  const LinearRoute route = linear_route(weight, dtype, M, N, K, choice, count);
  STD_TORCH_CHECK(route.path != LinearRoute::kDoesNotFit, op, ": QLORA_ENGINE_LINEAR=fused, but ",
                  fused_available()
                      ? "the fused kernel takes float16 or bfloat16, a blocksize of 64 or more that divides "
                        "in_features, and a weight aligned to 16 bytes; use QLORA_ENGINE_LINEAR=auto"
                      : "the fused kernel needs a GPU of compute capability 9.0 and a library compiled for it (9.0a "
                        "in TORCH_CUDA_ARCH_LIST); use QLORA_ENGINE_LINEAR=auto");
  return route;
}

// x contiguous, at an address that is a multiple of 16.
Tensor aligned_rows(const Tensor& x) {
  Tensor rows = torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

Tensor linear_nf4_cuda(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                       const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset, int64_t blocksize,
                       int64_t out_features, const OptionalTensor& bias) {
  const char* op = "linear_nf4";
  check_compute_dtype(op, "x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() > 0, op, ": x has no dimensions; expected [..., in_features]");
  const int64_t K = x.size(x.dim() - 1), N = out_features;
  const Nf4Pointers weight = check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, N * K, x);
  if (bias.has_value()) check_tensor(op, "bias", *bias, x.scalar_type(), N, x);
  const DeviceGuard guard(x.get_device_index());
  const auto [shape, M] = replace_last(x, N);
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  const Nf4Weight w4 = to_weight(weight);
  const Dtype dtype = to_dtype(x.scalar_type());
  const LinearRoute route = route_of(op, w4, dtype, M, N, K);
  if (route.path != LinearRoute::kDequantize) {
    const Tensor rows = aligned_rows(x);
    const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
    const cudaStream_t stream = current_stream(x.get_device_index());
    if (route.path == LinearRoute::kFused) {
      check_launch(op, linear_nf4_sm90(rows.const_data_ptr(), w4, bias_data, dtype, y.mutable_data_ptr(), M, N, K,
                                       route.config, stream));
    } else {
      const auto launch = fused_available() ? linear_nf4_few_rows_sm90 : linear_nf4_few_rows;
      check_launch(op, launch(rows.const_data_ptr(), w4, bias_data, dtype, y.mutable_data_ptr(), M, N, K, stream));
    }
    return y;
  }
  const Tensor w = decoded(op, weight, x, {N, K}, x.scalar_type());
  matrix_product(torch::stable::view(y, {M, N}), torch::stable::reshape(x, {M, K}), torch::stable::transpose(w, 0, 1),
                 bias);
  return y;
}

// dx = grad @ W without a decoded copy of W, where that is the better way; false: nothing was done.
bool fused_backward(const char* op, const Nf4Weight& weight, const Tensor& grad, const Tensor& dx, int64_t M, int64_t N,
                    int64_t K) {
  if (N == 0) return false;
  const LinearChoice asked = checked_choice(op);
  const auto decline = [&] {
    STD_TORCH_CHECK(asked.path != LinearChoice::kFused, op, ": QLORA_ENGINE_LINEAR=fused, but no kernel takes this ",
                    "gradient: expected float16 or bfloat16, a blocksize of 64 or more that divides in_features, 16-byte ",
                    "alignment, and beyond 64 rows a GPU of compute capability 9.0; use QLORA_ENGINE_LINEAR=auto");
    return false;
  };
  const Dtype dtype = to_dtype(grad.scalar_type());
  void* to = dx.mutable_data_ptr();
  int processors = 0;
  check_launch(op, multiprocessors(&processors));
  const bool few = linear_backward_few_rows_fit(weight, dtype, to, M, N, K);
  const bool many = linear_backward_sm90_fits(weight, dtype, to, M, N, K);
  const BackwardChoice choice = choose_backward(asked.path, M, N, K, few, many, processors);
  if (choice.path == BackwardPath::kDequantize) return decline();
  const Tensor rows = aligned_rows(grad);
  const void* from = rows.const_data_ptr();
  const cudaStream_t stream = current_stream(grad.get_device_index());
  if (choice.path == BackwardPath::kFewRows) {
    check_launch(op, linear_nf4_backward_few_rows(from, weight, dtype, to, M, N, K, stream));
    return true;
  }
  const BackwardScratch scratch = linear_backward_sm90_scratch(choice.plan, M, K);
  const Tensor partials = empty(grad, {scratch.partials}, ScalarType::Float);
  const Tensor counters = empty(grad, {scratch.counters}, ScalarType::Int);
  check_launch(op, linear_nf4_backward_sm90(from, weight, dtype, to, M, N, K, choice.plan,
                                            static_cast<float*>(partials.mutable_data_ptr()),
                                            static_cast<int32_t*>(counters.mutable_data_ptr()), stream));
  return true;
}

Tensor linear_nf4_backward_cuda(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                int64_t blocksize, int64_t in_features) {
  const char* op = "linear_nf4_backward";
  check_compute_dtype(op, "grad", grad.scalar_type());
  STD_TORCH_CHECK(grad.dim() > 0, op, ": grad has no dimensions; expected [..., out_features]");
  const int64_t N = grad.size(grad.dim() - 1), K = in_features;
  const Nf4Pointers weight = check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, N * K, grad);
  const DeviceGuard guard(grad.get_device_index());
  const auto [shape, M] = replace_last(grad, K);
  Tensor dx = empty(grad, shape, grad.scalar_type());
  if (dx.numel() == 0) return dx;
  if (fused_backward(op, to_weight(weight), grad, dx, M, N, K)) return dx;
  const Tensor w = decoded(op, weight, grad, {N, K}, grad.scalar_type());
  matrix_product(torch::stable::view(dx, {M, K}), torch::stable::reshape(grad, {M, N}), w, std::nullopt);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CUDA, m) {
  m.impl("quantize_nf4", TORCH_BOX(&quantize_nf4_cuda));
  m.impl("quantize_nf4_search", TORCH_BOX(&quantize_nf4_search_cuda));
  m.impl("quantize_nf4_double", TORCH_BOX(&quantize_nf4_double_cuda));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax_cuda));
  m.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4_cuda));
  m.impl("dequantize_absmax", TORCH_BOX(&dequantize_absmax_cuda));
  m.impl("linear_nf4", TORCH_BOX(&linear_nf4_cuda));
  m.impl("linear_nf4_backward", TORCH_BOX(&linear_nf4_backward_cuda));
}

}  // namespace qlora_engine::cuda

// The way linear_nf4 takes on the current device: route[0] = 0 few rows, 1 fused, 2 dequantize; route[1..3] the fused
// configuration. Returns what is wrong, or nullptr; the words hold until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* qlora_engine_linear_route(
    int64_t M, int64_t N, int64_t K, int64_t blocksize, int dtype, int32_t route[4]) noexcept {
  using namespace qlora_engine::cuda;
  static thread_local std::string words;
  try {
    Nf4Weight weight{};
    weight.numel = N * K;
    weight.log2_blocksize = __builtin_ctzll(uint64_t(blocksize));
    const LinearRoute found = route_of("linear_path", weight, Dtype(dtype), M, N, K);
    route[0] = int32_t(found.path);
    route[1] = found.config.tokens, route[2] = found.config.pair, route[3] = found.config.splits;
    return nullptr;
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
}
