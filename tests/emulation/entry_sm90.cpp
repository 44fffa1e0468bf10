// A plain C name for the fused product of csrc/cuda/kernels.h, over the emulation; and the little of the CUDA runtime
// that its launch calls: one device of two multiprocessors, so that blocks loop over their tiles.
#include "cuda_on_cpu.h"
#include "csrc/cuda/sm90.cuh"
#undef threadIdx
#undef blockIdx
#include "csrc/cuda/kernels.h"

using namespace qlora_engine::cuda;

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

void run_threads_in_falling_order(bool falling) { emulated::falling_order = falling; }
void run_at_once(bool copies, bool products) {
  emulated::copies_at_once = copies;
  emulated::products_at_once = products;
}

int run_linear_sm90(const void* x, const Nf4Weight* weight, const void* bias, int dtype, void* y, int64_t M, int64_t N,
                    int64_t K, const void* S, int64_t pitch, const void* B, int64_t rank, int tokens, int pair,
                    int splits) {
  return linear_nf4_sm90(x, *weight, bias, {S, pitch, B, rank}, Dtype(dtype), y, M, N, K, {tokens, pair, splits},
                         nullptr);
}

int run_linear_levels_sm90(const void* x, const Nf4Weight* weight, const void* bias, int dtype, void* y, int64_t M,
                           int64_t N, int64_t K, const void* S, int64_t pitch, const void* B, int64_t rank, int tokens,
                           int pair, int splits) {
  return linear_nf4_levels_sm90(x, *weight, bias, {S, pitch, B, rank}, Dtype(dtype), y, M, N, K, {tokens, pair, splits},
                                nullptr);
}

int run_linear_backward_levels_sm90(const void* grad, const Nf4Weight* weight, int dtype, void* dx, int64_t M, int64_t N,
                                    int64_t K, const void* S, int64_t pitch, const void* A, int64_t rank, int tokens,
                                    int splits, int add) {
  return linear_nf4_backward_levels_sm90(grad, *weight, {S, pitch, A, rank}, Dtype(dtype), dx, add != 0, M, N, K,
                                         {tokens, 1, splits}, nullptr);
}

int run_few_rows_sm90(const void* x, const Nf4Weight* weight, const void* bias, int dtype, void* y, int64_t M,
                      int64_t N, int64_t K) {
  return linear_nf4_few_rows_sm90(x, *weight, bias, Dtype(dtype), y, M, N, K, nullptr);
}

}  // extern "C"
