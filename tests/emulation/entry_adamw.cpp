// Plain C names for the AdamW kernels over the emulation; see entry.cpp.
#include "cuda_on_cpu.h"
#undef threadIdx
#undef blockIdx
#include "csrc/cuda/adamw_kernels.h"

using namespace qlora_engine::cuda;
using qlora_engine::AdamWPage;

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

void run_threads_in_falling_order(bool falling) { emulated::falling_order = falling; }

int run_adamw_step(int64_t tensors, const AdamWTensor* tensor, int64_t groups, const double* hyper, int64_t slabs,
                   uint8_t** slab, const AdamWPage* pages, int64_t hot, int64_t cold, const float* multiplier,
                   const float* skip, float* steps, int64_t seed, bool eight_bit) {
  std::vector<char> memory(size_t(AdamWTable(nullptr, groups, tensors, slabs).bytes), char(0xff));
  AdamWTable table(memory.data(), groups, tensors, slabs);
  std::copy(hyper, hyper + groups * qlora_engine::kHyperparameters, table.hyper);
  std::copy(tensor, tensor + tensors, table.tensors);
  std::copy(slab, slab + slabs, table.slabs);
  AdamWLaunch launch{pages, hot, cold, tensors, multiplier, skip, steps, uint32_t(seed), eight_bit};
  return adamw_step(launch, table, nullptr);
}

int run_gradient_norm(int64_t tensors, const AdamWTensor* tensor, float* norm) {
  std::vector<char> memory(size_t(AdamWTable(nullptr, 0, tensors, 0).bytes), char(0xff));
  AdamWTable table(memory.data(), 0, tensors, 0);
  std::copy(tensor, tensor + tensors, table.tensors);
  return gradient_norm(table, tensors, norm, nullptr);
}

}  // extern "C"
