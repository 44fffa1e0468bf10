// Host memory that kernels read and write in place, across the bus.
//
// Managed memory is told to stay in host memory (its preferred location) and is mapped into the device (accessed-by),
// so that no access migrates a page: on an H100 80GB such memory moved 41.6 GB/s each way at once, while kernels that
// fault pages in moved 9.5 GB/s, and evicting them 9 to 10. Pinned, mapped memory is as fast, and works where the host
// may not touch managed memory while a kernel runs.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <cstring>

#include "checks.h"
#include "libtorch_cuda.h"

namespace qlora_engine::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

bool concurrent_managed_access_cuda(const Tensor& like) {
  int value = 0;
  check_launch("concurrent_managed_access",
               cudaDeviceGetAttribute(&value, cudaDevAttrConcurrentManagedAccess, like.get_device_index()));
  return value != 0;
}

cudaError_t advise(void* memory, int64_t bytes, int device) {
#if CUDART_VERSION >= 13000
  const cudaMemLocation host{cudaMemLocationTypeHost, 0}, gpu{cudaMemLocationTypeDevice, device};
#else
  const int host = cudaCpuDeviceId, gpu = device;
#endif
  if (cudaError_t error = cudaMemAdvise(memory, size_t(bytes), cudaMemAdviseSetPreferredLocation, host)) return error;
  return cudaMemAdvise(memory, size_t(bytes), cudaMemAdviseSetAccessedBy, gpu);
}

cudaError_t allocate(void** memory, int64_t bytes, int device, bool managed) {
  if (!managed) return cudaHostAlloc(memory, size_t(bytes), cudaHostAllocMapped | cudaHostAllocPortable);
  if (cudaError_t error = cudaMallocManaged(memory, size_t(bytes), cudaMemAttachGlobal)) return error;
  const cudaError_t error = advise(*memory, bytes, device);
  if (error != cudaSuccess) cudaFree(*memory);
  return error;
}

Tensor host_slab_cuda(const Tensor& like, int64_t bytes, bool managed) {
  STD_TORCH_CHECK(bytes > 0, "host_slab: bytes is ", bytes, "; expected a positive number");
  const int32_t device = like.get_device_index();
  const DeviceGuard guard(device);
  void* memory = nullptr;
  const cudaError_t error = allocate(&memory, bytes, device, managed);
  if (error != cudaSuccess) cudaGetLastError();  // it is reported here, and must not show up in a later launch
  STD_TORCH_CHECK(error == cudaSuccess, "host_slab: ", bytes, " bytes of ", managed ? "managed" : "pinned",
                  " host memory could not be had: ", cudaGetErrorString(error),
                  managed ? "; try backend=\"pinned\", bits=8, or a larger device_budget"
                          : "; pinned memory is bounded by the host's free memory and `ulimit -l`: try bits=8 or a "
                            "larger device_budget");
  // by the host: the first touch decides where managed pages are made, and the device's would be one fault each
  std::memset(memory, 0, size_t(bytes));
  void* address = memory;
  if (!managed) {
    const cudaError_t mapped = cudaHostGetDevicePointer(&address, memory, 0);
    if (mapped != cudaSuccess) cudaFreeHost(memory);
    check_launch("host_slab", mapped);
  }
  const pid_t owner = getpid();
  // Both calls wait for kernels that use the memory. A forked child has no context to give it back to, and at exit the
  // driver may be gone: then the system takes it back, and the error means nothing.
  auto release = [memory, managed, owner](void*) {
    if (getpid() != owner) return;
    if ((managed ? cudaFree(memory) : cudaFreeHost(memory)) != cudaSuccess) cudaGetLastError();
  };
  const int64_t size[] = {bytes}, stride[] = {1};
  return torch::stable::from_blob(address, {size, 1}, {stride, 1}, like.device(), ScalarType::Byte, release);
}

void copy_bytes_cuda(const Tensor& source, const Tensor& target) {
  const char* op = "copy_bytes";
  for (const auto& [name, tensor] : {std::pair{"source", &source}, std::pair{"target", &target}}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Byte && tensor->is_contiguous(), op, ": ", name, " is ",
                    dtype_name(tensor->scalar_type()), "; expected contiguous uint8");
  }
  STD_TORCH_CHECK(source.numel() == target.numel(), op, ": source has ", source.numel(), " bytes, target ",
                  target.numel(), "; expected as many");
  const int32_t device = (source.is_cuda() ? source : target).get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  check_launch(op, cudaMemcpyAsync(target.mutable_data_ptr(), source.const_data_ptr(), size_t(source.numel()),
                                   cudaMemcpyDefault, stream));
  if (!source.is_cuda() || !target.is_cuda()) check_launch(op, cudaStreamSynchronize(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CUDA, m) {
  m.impl("concurrent_managed_access", TORCH_BOX(&concurrent_managed_access_cuda));
  m.impl("host_slab", TORCH_BOX(&host_slab_cuda));
  m.impl("copy_bytes", TORCH_BOX(&copy_bytes_cuda));
}

}  // namespace qlora_engine::cuda
