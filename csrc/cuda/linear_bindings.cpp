// Products with a 4-bit weight as torch sees them: argument checks, allocation, the way each product goes. As bindings.cpp.
#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

#include "bindings.h"
#include "dispatch.h"
#include "dispatch_backward.h"
#include "launch.h"
#include "linear_route.h"
#include "products.h"

namespace qlora_engine::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

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
                  "; expected auto, few, levels:TOKENS,PAIR,SPLITS (such as levels:64,1,4), fused, "
                  "fused:TOKENS,PAIR,SPLITS, fused:sm80, fused:sm80:TOKENS,SPLITS or dequantize");
  return choice;
}

LinearRoute route_of(const char* op, const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K,
                     bool adapter) {
  const LinearChoice choice = checked_choice(op);
  int count = 0;
  check_launch(op, multiprocessors(&count));
  const LinearRoute route = linear_route(weight, dtype, M, N, K, adapter, choice, count);
  STD_TORCH_CHECK(route.path != LinearRoute::kDoesNotFit, op, ": QLORA_ENGINE_LINEAR=",
                  std::getenv("QLORA_ENGINE_LINEAR"), ", but ",
                  choice.path == LinearChoice::kFewRows
                      ? "the kernel for few rows takes up to 16 rows of x and whole blocks in a row of W; use "
                        "QLORA_ENGINE_LINEAR=auto"
                  : fused_available() || !choice.has_config
                      ? "the fused kernel takes float16 or bfloat16, a blocksize of 64 or more that divides "
                        "in_features, and a weight aligned to 16 bytes; use QLORA_ENGINE_LINEAR=auto"
                      : "this configuration needs a GPU of compute capability 9.0 and a library compiled for it (9.0a "
                        "in TORCH_CUDA_ARCH_LIST); use QLORA_ENGINE_LINEAR=auto");
  return route;
}

// x contiguous, at an address that is a multiple of 16.
Tensor aligned_rows(const Tensor& x) {
  Tensor rows = torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

// A low-rank addition S B to a product, or S B^T; S [M, rank], B [rank, columns] or [columns, rank].
struct LowRank {
  OptionalTensor S, B;
  int64_t rank = 0;
};

// S and B as the kernels want them: S's rows at multiples of 16 bytes, but not necessarily one behind the other.
struct KernelAdapter {
  OptionalTensor S, B;
  Adapter adapter{};

  // For a rank that kernels do not take there is none.
  explicit KernelAdapter(const LowRank& lora) {
    if (lora.rank == 0 || lora.rank % 8 != 0) return;
    const bool fits = lora.S->stride(1) == 1 && lora.S->stride(0) % 8 == 0 && lora.S->stride(0) >= lora.rank &&
                      reinterpret_cast<uintptr_t>(lora.S->const_data_ptr()) % 16 == 0;
    S = fits ? *lora.S : aligned_rows(*lora.S);
    B = aligned_rows(*lora.B);
    adapter = {S->const_data_ptr(), S->stride(0), B->const_data_ptr(), lora.rank};
  }
};

// y = x W^T (+ S B^T) (+ bias)
Tensor multiply(const char* op, const Tensor& x, const Nf4Pointers& weight, int64_t N, const LowRank& lora,
                const OptionalTensor& bias) {
  const int64_t K = x.size(x.dim() - 1);
  const DeviceGuard guard(x.get_device_index());
  const auto [shape, M] = replace_last(x, N);
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  const Nf4Weight w4 = to_weight(weight);
  const Dtype dtype = to_dtype(x.scalar_type());
  const LinearRoute route = route_of(op, w4, dtype, M, N, K, lora.rank > 0);
  const Tensor flat = torch::stable::view(y, {M, N});
  const auto add_narrow = [&](const OptionalTensor& to) {
    matrix_product(flat, *lora.S, torch::stable::transpose(*lora.B, 0, 1), to);
  };
  if (route.path == LinearRoute::kDequantize) {
    // the narrow product first: the wide one adds to it while it writes
    if (lora.rank > 0) add_narrow(bias);
    const Tensor w = decoded(op, weight, x, {N, K}, x.scalar_type());
    matrix_product(flat, torch::stable::reshape(x, {M, K}), torch::stable::transpose(w, 0, 1),
                   lora.rank > 0 ? OptionalTensor(flat) : bias);
    return y;
  }
  const Tensor rows = aligned_rows(x);
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  const cudaStream_t stream = current_stream(x.get_device_index());
  bool added = lora.rank == 0;
  if (route.path == LinearRoute::kFused || route.path == LinearRoute::kLevels) {
    const KernelAdapter with(lora);
    const auto launch = route.path == LinearRoute::kFused ? linear_nf4_sm90 : linear_nf4_levels_sm90;
    check_launch(op, launch(rows.const_data_ptr(), w4, bias_data, with.adapter, dtype, y.mutable_data_ptr(), M, N, K,
                            route.config, stream));
    added |= with.adapter.rank > 0;
  } else if (route.path == LinearRoute::kSm80) {
    const ProductScratch scratch = linear_sm80_scratch(route.sm80, M, N);
    const Tensor partials = empty(x, {scratch.partials}, ScalarType::Float);
    const Tensor counters = empty(x, {scratch.counters}, ScalarType::Int);
    check_launch(op, linear_nf4_sm80(rows.const_data_ptr(), w4, bias_data, dtype, y.mutable_data_ptr(), M, N, K,
                                     route.sm80, static_cast<float*>(partials.mutable_data_ptr()),
                                     static_cast<int32_t*>(counters.mutable_data_ptr()), stream));
  } else {
    const auto launch = fused_available() ? linear_nf4_few_rows_sm90 : linear_nf4_few_rows;
    check_launch(op, launch(rows.const_data_ptr(), w4, bias_data, dtype, y.mutable_data_ptr(), M, N, K, stream));
  }
  if (!added) add_narrow(flat);
  return y;
}

Tensor linear_nf4_cuda(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                       const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset, int64_t blocksize,
                       int64_t out_features, const OptionalTensor& bias) {
  const char* op = "linear_nf4";
  const Nf4Pointers weight =
      check_linear(op, x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias);
  return multiply(op, x, weight, out_features, {}, bias);
}

}  // namespace

Tensor linear_nf4_lora_cuda(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                            int64_t blocksize, int64_t out_features, const Tensor& S, const Tensor& B,
                            const OptionalTensor& bias) {
  const char* op = "linear_nf4_lora";
  const Nf4Pointers weight =
      check_linear(op, x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias);
  const int64_t rank = check_low_rank(op, "S", S, "B", B, x, out_features, true);
  return multiply(op, x, weight, out_features, {S, B, rank}, bias);
}

namespace {

BackwardRoute route_of_gradient(const char* op, const Nf4Weight& weight, Dtype dtype, const void* dx, int64_t M,
                                int64_t N, int64_t K, bool adapter) {
  const BackwardChoice asked = backward_choice(checked_choice(op));
  STD_TORCH_CHECK(asked.path != BackwardChoice::kUnknown, op, ": QLORA_ENGINE_BACKWARD=",
                  std::getenv("QLORA_ENGINE_BACKWARD"), "; expected auto, few, levels:TOKENS,1,SPLITS (such as "
                  "levels:64,1,3), many, many:CLUSTER,SPLITS,GROUP (such as many:2,1,8) or dequantize");
  if (N == 0) return {BackwardRoute::kDequantize, {}, {}};
  int processors = 0;
  check_launch(op, multiprocessors(&processors));
  const BackwardRoute route =
      backward_route(asked, M, N, K, adapter, linear_backward_few_rows_fit(weight, dtype, dx, M, N, K),
                     linear_backward_sm90_fits(weight, dtype, dx, M, N, K), processors);
  STD_TORCH_CHECK(route.path != BackwardRoute::kDoesNotFit, op,
                  ": a fused kernel was asked for (QLORA_ENGINE_BACKWARD, or QLORA_ENGINE_LINEAR=fused), but no kernel "
                  "takes this gradient so: expected float16 or bfloat16, a blocksize of 64 or more, in_features that are "
                  "a multiple of 64 and out_features of 8 (4 for `few`), 16-byte alignment, up to 64 rows for `few`, and "
                  "a GPU of compute capability 9.0 for the others; use auto");
  return route;
}

// dx = grad W (+ S B), or dx += that.
void multiply_backward(const char* op, const Tensor& grad, const Nf4Pointers& weight, const LowRank& lora,
                       const Tensor& dx, bool add) {
  const int64_t N = grad.size(grad.dim() - 1), K = dx.size(dx.dim() - 1), M = dx.numel() / K;
  const Tensor flat = torch::stable::view(dx, {M, K});
  const Nf4Weight w4 = to_weight(weight);
  const Dtype dtype = to_dtype(grad.scalar_type());
  void* to = dx.mutable_data_ptr();
  const BackwardRoute route = route_of_gradient(op, w4, dtype, to, M, N, K, lora.rank > 0);
  const cudaStream_t stream = current_stream(grad.get_device_index());

  if (route.path == BackwardRoute::kDequantize) {
    if (lora.rank > 0) matrix_product(flat, *lora.S, *lora.B, add ? OptionalTensor(flat) : std::nullopt);
    const Tensor w = decoded(op, weight, grad, {N, K}, grad.scalar_type());
    matrix_product(flat, torch::stable::reshape(grad, {M, N}), w,
                   add || lora.rank > 0 ? OptionalTensor(flat) : std::nullopt);
    return;
  }
  const Tensor rows = aligned_rows(grad);
  const void* from = rows.const_data_ptr();
  bool added = lora.rank == 0;
  if (route.path == BackwardRoute::kFewRows) {
    const Tensor fresh = add ? empty(grad, {M, K}, grad.scalar_type()) : flat;
    check_launch(op, linear_nf4_backward_few_rows(from, w4, dtype, fresh.mutable_data_ptr(), M, N, K, stream));
    if (add) add_to(flat, fresh);
  } else {
    const KernelAdapter with(lora);
    added |= with.adapter.rank > 0;
    if (route.path == BackwardRoute::kLevels) {
      check_launch(op, linear_nf4_backward_levels_sm90(from, w4, with.adapter, dtype, to, add, M, N, K, route.levels,
                                                       stream));
    } else {
      const ProductScratch scratch = linear_backward_sm90_scratch(route.plan, M, K);
      const Tensor partials = empty(grad, {scratch.partials}, ScalarType::Float);
      const Tensor counters = empty(grad, {scratch.counters}, ScalarType::Int);
      check_launch(op, linear_nf4_backward_sm90(from, w4, with.adapter, dtype, to, add, M, N, K, route.plan,
                                                static_cast<float*>(partials.mutable_data_ptr()),
                                                static_cast<int32_t*>(counters.mutable_data_ptr()), stream));
    }
  }
  if (!added) matrix_product(flat, *lora.S, *lora.B, flat);
}

Tensor linear_nf4_backward_cuda(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                int64_t blocksize, int64_t in_features) {
  const char* op = "linear_nf4_backward";
  const Nf4Pointers weight =
      check_backward(op, grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features);
  const DeviceGuard guard(grad.get_device_index());
  const Tensor dx = empty(grad, replace_last(grad, in_features).first, grad.scalar_type());
  if (dx.numel() > 0) multiply_backward(op, grad, weight, {}, dx, false);
  return dx;
}

}  // namespace

Tensor linear_nf4_backward_lora_cuda(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                     const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                     int64_t blocksize, int64_t in_features, const Tensor& dS, const Tensor& A,
                                     const OptionalTensor& addend) {
  const char* op = "linear_nf4_backward_lora";
  const Nf4Pointers weight =
      check_backward(op, grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features);
  const int64_t rank = check_low_rank(op, "dS", dS, "A", A, grad, in_features, false);
  const auto [shape, M] = replace_last(grad, in_features);
  if (addend.has_value()) check_tensor(op, "addend", *addend, grad.scalar_type(), M * in_features, grad);
  const DeviceGuard guard(grad.get_device_index());
  const Tensor dx = addend ? torch::stable::reshape(torch::stable::clone(*addend), shape)
                           : empty(grad, shape, grad.scalar_type());
  if (dx.numel() > 0) multiply_backward(op, grad, weight, {dS, A, rank}, dx, addend.has_value());
  return dx;
}

void linear_nf4_backward_add_cuda(Tensor dx, const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                  const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                  int64_t blocksize) {
  const char* op = "linear_nf4_backward_add";
  STD_TORCH_CHECK(dx.dim() > 0, op, ": dx has no dimensions; expected [..., in_features]");
  const int64_t in_features = dx.size(dx.dim() - 1);
  const Nf4Pointers weight =
      check_backward(op, grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features);
  check_tensor(op, "dx", dx, grad.scalar_type(), replace_last(grad, in_features).second * in_features, grad);
  const DeviceGuard guard(grad.get_device_index());
  if (dx.numel() > 0) multiply_backward(op, grad, weight, {}, dx, true);
}

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CUDA, m) {
  m.impl("linear_nf4", TORCH_BOX(&linear_nf4_cuda));
  m.impl("linear_nf4_lora", TORCH_BOX(&linear_nf4_lora_cuda));
  m.impl("linear_nf4_backward", TORCH_BOX(&linear_nf4_backward_cuda));
  m.impl("linear_nf4_backward_lora", TORCH_BOX(&linear_nf4_backward_lora_cuda));
  m.impl("linear_nf4_backward_add", TORCH_BOX(&linear_nf4_backward_add_cuda));
}

}  // namespace qlora_engine::cuda

// The way linear_nf4 takes on the current device: route[0] = 0 few rows, 1 fused, 2 dequantize, 3 fused for compute
// capability 8.0, 4 levels; route[1..3] the configuration; adapter: of linear_nf4_lora. With `gradient` that of
// linear_nf4_backward (or _lora): 0 few rows, 1 many rows, 2 dequantize, 3 levels. Returns what is wrong, or nullptr;
// the words hold until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* qlora_engine_linear_route(
    int64_t M, int64_t N, int64_t K, int64_t blocksize, int dtype, int adapter, int gradient, int32_t route[4]) noexcept {
  using namespace qlora_engine::cuda;
  static thread_local std::string words;
  const auto set = [route](int path, int a, int b, int c) {
    route[0] = path, route[1] = a, route[2] = b, route[3] = c;
  };
  try {
    Nf4Weight weight{};
    weight.numel = N * K;
    weight.log2_blocksize = __builtin_ctzll(uint64_t(blocksize));
    if (gradient != 0) {
      const BackwardRoute r = route_of_gradient("gradient_path", weight, Dtype(dtype), nullptr, M, N, K, adapter != 0);
      if (r.path == BackwardRoute::kManyRows) {
        set(r.path, r.plan.cluster, r.plan.splits, r.plan.group);
      } else {
        set(r.path, r.levels.tokens, r.levels.pair, r.levels.splits);
      }
      return nullptr;
    }
    const LinearRoute r = route_of("linear_path", weight, Dtype(dtype), M, N, K, adapter != 0);
    if (r.path == LinearRoute::kSm80) {
      set(r.path, r.sm80.tokens, 1, r.sm80.splits);
    } else {
      set(r.path, r.config.tokens, r.config.pair, r.config.splits);
    }
    return nullptr;
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
}
