// What the bindings use of torch's CUDA half. These functions of torch's C interface live in libtorch_cuda.so, which
// a CPU-only torch lacks: direct calls would keep this library from loading there. So each is looked up, on first
// use, in the library that torch has already loaded.
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>

namespace qlora_engine::cuda {

template <typename Function>
Function find_in_libtorch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(library != nullptr, "qlora_engine: this torch was built without CUDA; install a CUDA build of it");
  void* found = dlsym(library, name);
  STD_TORCH_CHECK(found != nullptr, "qlora_engine: this torch's libtorch_cuda.so has no ", name,
                  "; install torch 2.11 or newer");
  return reinterpret_cast<Function>(found);
}

inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = find_in_libtorch_cuda<Function>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// out = a @ b (+ bias), by cuBLAS through torch: its settings (TF32, determinism, workspaces) hold. These functions
// lie below the dispatcher, so that neither autograd nor autocast sees the product inside the operator.
inline void matrix_product(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                           const torch::stable::Tensor& b, const std::optional<torch::stable::Tensor>& bias) {
  using Product = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
  using SumProduct =
      AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  if (bias.has_value()) {
    static const auto function = find_in_libtorch_cuda<SumProduct>("aoti_torch_cuda_addmm_out");
    TORCH_ERROR_CODE_CHECK(function(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    static const auto function = find_in_libtorch_cuda<Product>("aoti_torch_cuda_mm_out");
    TORCH_ERROR_CODE_CHECK(function(out.get(), a.get(), b.get()));
  }
}

// out += other, of the same shape
inline void add_to(torch::stable::Tensor out, const torch::stable::Tensor& other) {
  using Sum = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, double, AtenTensorHandle*);
  static const auto function = find_in_libtorch_cuda<Sum>("aoti_torch_cuda_add_Tensor");
  AtenTensorHandle sum = nullptr;
  TORCH_ERROR_CODE_CHECK(function(out.get(), other.get(), 1.0, &sum));
  torch::stable::copy_(out, torch::stable::Tensor(sum));
}

// out = factor * a @ b, rounded once, to the dtype of out: that of a and b, or float32. Factors other than 1 are for
// products of one dtype; below the dispatcher as matrix_product, but for float32 sums of 16-bit products.
inline void scaled_product(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                           const torch::stable::Tensor& b, double factor) {
  if (out.scalar_type() == a.scalar_type()) {
    using SumProduct =
        AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
    static const auto function = find_in_libtorch_cuda<SumProduct>("aoti_torch_cuda_addmm_out");
    TORCH_ERROR_CODE_CHECK(function(out.get(), out.get(), a.get(), b.get(), 0.0, factor));  // beta 0: reads no out
    return;
  }
  STD_TORCH_CHECK(factor == 1.0, "qlora_engine: a product of two dtypes has no factor");
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out.scalar_type()), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // takes over the reference that was returned
}

inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  const bool other_gpu = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  STD_TORCH_CHECK(false, op, ": CUDA error: ", cudaGetErrorString(error),
                  other_gpu ? "; this library has no code for this GPU: reinstall with its compute capability in "
                              "TORCH_CUDA_ARCH_LIST (8.0 is the oldest that works)"
                            : "");
}

}  // namespace qlora_engine::cuda
