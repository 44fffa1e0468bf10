// Programmatic dependent launch: a kernel whose thread blocks start while those of the kernel before it on the stream
// still run, as they leave room, so that its start and its preparations cost no time. From sm_90 on; elsewhere the
// kernels follow each other as usual.
#pragma once
#include <cuda_runtime.h>

namespace qlora_engine::cuda {

// In the first kernel: all its thread blocks are running, or have called this, before the next kernel starts.
__device__ __forceinline__ void let_dependent_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In the next kernel: until the first has ended and all that it wrote can be read. Nothing that the first one writes
// may be read before, and not through `const __restrict__` pointers after: the compiler may move such loads.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel that calls wait_for_previous_kernel(). Can be captured in a CUDA graph.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), unsigned grid, unsigned threads, cudaStream_t stream,
                             Arguments... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &early;
  int device = 0, major = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace qlora_engine::cuda
