// Launch functions of the CUDA kernels. Plain pointers and no torch header: including torch's headers would take nvcc
// longer than all the kernels do. Every function enqueues on `stream` and returns the launch's error; none allocates
// or synchronises.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace qlora_engine::cuda {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// A 4-bit weight in device memory (csrc/nf4.h); either absmax, or the last three pointers.
struct Nf4Weight {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* absmax_codes;
  const float* nested_absmax;
  const float* nested_offset;
  int64_t numel;
  int64_t blocks;
  int log2_blocksize;
};

cudaError_t quantize_nf4(const void* weight, Dtype dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                         float* absmax, cudaStream_t stream);

// quantize_nf4 and then quantize_summed_absmax: codes of the scales, their nested absmax, and their mean, `offset`.
// absmax [blocks] and sums [kMaxScaleSums] are scratch, absmax in the weight's dtype, which holds its largest
// magnitudes exactly; outputs and scratch are aligned to 16 bytes. The offset of no scales is zero.
constexpr int kMaxScaleSums = 512;
cudaError_t quantize_nf4_double(const void* weight, Dtype dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                                uint8_t* codes, float* nested_absmax, float* offset, void* absmax, double* sums,
                                cudaStream_t stream);

// The second kernel of quantize_nf4_double, for the first kernel's absmax and the sums of its `parts` thread blocks.
cudaError_t quantize_summed_absmax(const void* absmax, Dtype dtype, const double* sums, int parts, int64_t count,
                                   uint8_t* codes, float* nested_absmax, float* offset, cudaStream_t stream);

// Scales that make the squared error small (csrc/scale_search.h); of either sign with signed_scales.
cudaError_t quantize_nf4_search(const void* weight, Dtype dtype, int64_t numel, int64_t blocksize, bool signed_scales,
                                uint8_t* packed, float* absmax, cudaStream_t stream);

cudaError_t quantize_absmax(const float* absmax, const float* offset, int64_t count, int64_t blocksize,
                            uint8_t* codes, float* nested_absmax, cudaStream_t stream);

cudaError_t dequantize_nf4(const Nf4Weight& weight, Dtype dtype, void* out, cudaStream_t stream);

cudaError_t dequantize_absmax(const uint8_t* codes, const float* nested_absmax, const float* nested_offset,
                              int64_t count, int64_t blocksize, float* out, cudaStream_t stream);

// Whether linear_nf4_few_rows can take this product: up to kFewRows rows of 16-bit x, whole blocks of at least 64 in
// every row of W, 16-byte alignment.
constexpr int64_t kFewRows = 8;
bool few_rows_fit(const Nf4Weight& weight, Dtype dtype, const void* x, int64_t M, int64_t N, int64_t K);

// x [M, K] contiguous -> y [M, N] = x @ W.T (+ bias [N], or nullptr), without a decoded copy of W.
cudaError_t linear_nf4_few_rows(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y,
                                int64_t M, int64_t N, int64_t K, cudaStream_t stream);

}  // namespace qlora_engine::cuda
