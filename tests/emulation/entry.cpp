// Plain C names for the launch functions of csrc/cuda/kernels.h, over the emulation; and the little of the CUDA
// runtime that they call: one device of two multiprocessors, so that blocks loop over their tiles.
#include "cuda_on_cpu.h"
#undef threadIdx
#undef blockIdx
#include "csrc/cuda/kernels.h"

using namespace qlora_engine::cuda;

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
           : attribute == cudaDevAttrComputeCapabilityMajor     ? 8
                                                                : 2;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}

void run_threads_in_falling_order(bool falling) { emulated::falling_order = falling; }

int run_quantize_nf4(const void* weight, int dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                     float* absmax) {
  return quantize_nf4(weight, Dtype(dtype), numel, blocksize, packed, absmax, nullptr);
}

int run_quantize_nf4_search(const void* weight, int dtype, int64_t numel, int64_t blocksize, bool signed_scales,
                            uint8_t* packed, float* absmax) {
  return quantize_nf4_search(weight, Dtype(dtype), numel, blocksize, signed_scales, packed, absmax, nullptr);
}

int run_quantize_nf4_double(const void* weight, int dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                            uint8_t* codes, float* nested_absmax, float* offset, void* absmax) {
  std::vector<double> sums(kMaxScaleSums, NAN);
  return quantize_nf4_double(weight, Dtype(dtype), numel, blocksize, packed, codes, nested_absmax, offset, absmax,
                             sums.data(), nullptr);
}

int run_quantize_absmax(const float* absmax, const float* offset, int64_t count, int64_t blocksize, uint8_t* codes,
                        float* nested_absmax) {
  return quantize_absmax(absmax, offset, count, blocksize, codes, nested_absmax, nullptr);
}

int run_dequantize_nf4(const Nf4Weight* weight, int dtype, void* out) {
  return dequantize_nf4(*weight, Dtype(dtype), out, nullptr);
}

int run_dequantize_absmax(const uint8_t* codes, const float* nested_absmax, const float* nested_offset, int64_t count,
                          int64_t blocksize, float* out) {
  return dequantize_absmax(codes, nested_absmax, nested_offset, count, blocksize, out, nullptr);
}

// -1 where the kernel does not take this product
int run_linear_nf4(const void* x, const Nf4Weight* weight, const void* bias, int dtype, void* y, int64_t M, int64_t N,
                   int64_t K) {
  if (M > kFewRows || !few_rows_fit(*weight, Dtype(dtype), x, N, K)) return -1;
  return linear_nf4_few_rows(x, *weight, bias, Dtype(dtype), y, M, N, K, nullptr);
}

// -1 where the kernel does not take this product
int run_linear_nf4_sm80(const void* x, const Nf4Weight* weight, const void* bias, int dtype, void* y, int64_t M,
                        int64_t N, int64_t K, int tokens, int splits) {
  if (!linear_sm80_fits(*weight, Dtype(dtype), M, N, K)) return -1;
  const Sm80Config config{tokens, splits};
  const ProductScratch scratch = linear_sm80_scratch(config, M, N);
  std::vector<float> partials(scratch.partials + 4, NAN);
  std::vector<int32_t> counters(scratch.counters, -1);
  float* aligned = partials.data() + -reinterpret_cast<uintptr_t>(partials.data()) % 16 / 4;
  return linear_nf4_sm80(x, *weight, bias, Dtype(dtype), y, M, N, K, config, aligned, counters.data(), nullptr);
}

// -1 where the kernel does not take this product
int run_linear_nf4_backward(const void* grad, const Nf4Weight* weight, int dtype, void* dx, int64_t M, int64_t N,
                            int64_t K) {
  if (!linear_backward_few_rows_fit(*weight, Dtype(dtype), dx, M, N, K)) return -1;
  return linear_nf4_backward_few_rows(grad, *weight, Dtype(dtype), dx, M, N, K, nullptr);
}

// target = source * factor of two jobs at once, in out_dtype
int run_round_matrices(const void* first, const void* second, void* first_out, void* second_out, int64_t count,
                       int64_t second_count, float factor, int dtype, int out_dtype) {
  RoundJobs jobs{};
  jobs.of[0] = {first, first_out, count, factor, Dtype(dtype)};
  jobs.of[1] = {second, second_out, second_count, 1.0f, Dtype(dtype)};
  return round_matrices(jobs, 2, Dtype(out_dtype), nullptr);
}

}  // extern "C"
