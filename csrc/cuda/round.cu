// Rounds the factors of adapters to the dtype of a product, all of a group's in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace qlora_engine::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 4;

__device__ float load(const void* source, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat32: return static_cast<const float*>(source)[i];
    case Dtype::kFloat16: return float(static_cast<const __half*>(source)[i]);
    default: return float(static_cast<const __nv_bfloat16*>(source)[i]);
  }
}

template <typename Out>
__global__ void __launch_bounds__(kThreads) round_matrices_kernel(const __grid_constant__ RoundJobs jobs) {
  const RoundJob& job = jobs.of[blockIdx.y];
  Out* target = static_cast<Out*>(job.target);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < job.count; i += step) {
    target[i] = Out(load(job.source, job.dtype, i) * job.factor);
  }
}

}  // namespace

cudaError_t round_matrices(const RoundJobs& jobs, int count, Dtype dtype, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  int64_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, jobs.of[i].count);
  if (most == 0) return cudaSuccess;
  unsigned blocks = 0;
  if (cudaError_t error = grid_for(most, kThreads * kPerThread, 4, &blocks)) return error;
  const dim3 grid(blocks, unsigned(count));
  switch (dtype) {
    case Dtype::kFloat32: round_matrices_kernel<float><<<grid, kThreads, 0, stream>>>(jobs); break;
    case Dtype::kFloat16: round_matrices_kernel<__half><<<grid, kThreads, 0, stream>>>(jobs); break;
    case Dtype::kBFloat16: round_matrices_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(jobs); break;
  }
  return cudaGetLastError();
}

}  // namespace qlora_engine::cuda
