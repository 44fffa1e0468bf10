// What the bindings need of the CUDA runtime and of torch's CUDA half.
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

namespace qlora_engine::cuda {

// torch's current stream. The function lives in libtorch_cuda.so, which a CPU-only torch lacks: a direct call would
// keep this library from loading there. So it is looked up, on first use, in the library torch has already loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "qlora_engine: this torch was built without CUDA; install a CUDA build of it");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
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
