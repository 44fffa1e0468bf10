// How many thread blocks to launch.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace qlora_engine::cuda {

// Multiprocessors of the current device; asked of the driver once a device.
inline cudaError_t multiprocessors(int* count) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  *count = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (*count != 0) return cudaSuccess;
  if (cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device)) return error;
  if (device < kDevices) known[device].store(*count, std::memory_order_relaxed);
  return cudaSuccess;
}

// Whether the current device runs code for sm_90a; asked of the driver once a device.
inline bool is_hopper() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // compute capability, 10 major + minor
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int capability = known[device].load(std::memory_order_relaxed);
  if (capability == 0) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
      return false;
    }
    capability = 10 * major + minor;
    known[device].store(capability, std::memory_order_relaxed);
  }
  return capability == 90;
}

// Lets `kKernel` be launched with `bytes` of dynamic shared memory on the current device; said once a device.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  constexpr int kDevices = 64;
  static std::atomic<bool> allowed[kDevices];
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
  if (cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
    return error;
  }
  if (device < kDevices) allowed[device].store(true, std::memory_order_relaxed);
  return cudaSuccess;
}

// Thread blocks for `work` items of which one block takes `per_block` at a time, at most `resident` blocks a
// multiprocessor (the kernel then loops); resident = 0: one pass, as many blocks as there is work.
inline cudaError_t grid_for(int64_t work, int64_t per_block, int resident, unsigned* grid) {
  int64_t blocks = (work + per_block - 1) / per_block;
  if (resident > 0) {
    int count = 0;
    if (cudaError_t error = multiprocessors(&count)) return error;
    blocks = std::min<int64_t>(blocks, int64_t(count) * resident);
  }
  *grid = unsigned(std::min<int64_t>(blocks, INT32_MAX));
  return cudaSuccess;
}

}  // namespace qlora_engine::cuda
