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

// Whether the kernels below can take this product: 16-bit x, whole blocks of at least 64 in every row of W, 16-byte
// alignment. They take up to so many rows.
constexpr int64_t kFewRows = 8, kFewRowsSm90 = 16;
bool few_rows_fit(const Nf4Weight& weight, Dtype dtype, const void* x, int64_t N, int64_t K);

// x [M, K] contiguous -> y [M, N] = x @ W.T (+ bias [N], or nullptr), without a decoded copy of W.
cudaError_t linear_nf4_few_rows(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y,
                                int64_t M, int64_t N, int64_t K, cudaStream_t stream);
cudaError_t linear_nf4_few_rows_sm90(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y,
                                     int64_t M, int64_t N, int64_t K, cudaStream_t stream);

// How the fused kernel of linear_sm90.cu cuts a product; see dispatch.h.
struct FusedConfig {
  int tokens, pair, splits;
};

// Whether the current device and this library have the fused kernel: compute capability 9.0, compiled for sm_90a.
bool fused_available();

// Whether the fused kernel takes this product: 16-bit x, whole blocks of at least 64 in every row of W, `packed`
// aligned to 16 bytes. x must be aligned likewise, which the caller sees to.
bool fused_fits(const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K);

// A low-rank addition S B to a product: S [M, rank], whose rows are `pitch` elements apart; B [N, rank] where y += S B^T,
// [rank, K] where dx += S B, contiguous. Both of the product's dtype and aligned to 16 bytes; rank and pitch multiples of
// 8. rank 0: none.
struct Adapter {
  const void* S;
  int64_t pitch;
  const void* B;
  int64_t rank;
};

// As linear_nf4_few_rows, for any M; with an adapter y = x @ W.T + S @ B.T (+ bias).
cudaError_t linear_nf4_sm90(const void* x, const Nf4Weight& weight, const void* bias, const Adapter& adapter,
                            Dtype dtype, void* y, int64_t M, int64_t N, int64_t K, const FusedConfig& config,
                            cudaStream_t stream);

// As linear_nf4_sm90, which fits where this does, but levels are rounded instead of weights. tokens 8, 16, 32, 64 or 128;
// pair 1; splits 1 to 8.
cudaError_t linear_nf4_levels_sm90(const void* x, const Nf4Weight& weight, const void* bias, const Adapter& adapter,
                                   Dtype dtype, void* y, int64_t M, int64_t N, int64_t K, const FusedConfig& config,
                                   cudaStream_t stream);

// What a product whose sum is in parts needs beside its output: float32 numbers, and counters. Both may hold anything.
struct ProductScratch {
  int64_t partials;
  int64_t counters;
};

// How the kernel of linear_sm80.cu cuts a product: rows of x a thread block, 16, 32, 64 or 128, and parts of K.
struct Sm80Config {
  int tokens, splits;
};
ProductScratch linear_sm80_scratch(const Sm80Config& config, int64_t M, int64_t N);

// Whether the kernel of linear_sm80.cu takes this product: a GPU of compute capability 8.0 or later, 16-bit x, whole
// blocks of at least 64 in every row of W, `packed` aligned to 16 bytes. x must be aligned likewise.
bool linear_sm80_fits(const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K);

// As linear_nf4_few_rows, for any M.
cudaError_t linear_nf4_sm80(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y, int64_t M,
                            int64_t N, int64_t K, const Sm80Config& config, float* partials, int32_t* counters,
                            cudaStream_t stream);

// Whether linear_nf4_backward_few_rows can take this product: up to kFewBackwardRows rows of 16-bit grad, N a multiple
// of 4, K of 64, blocks of at least 64, 16-byte alignment of packed (4 of dx and scales; grad must have 8).
constexpr int64_t kFewBackwardRows = 64;
bool linear_backward_few_rows_fit(const Nf4Weight& weight, Dtype dtype, const void* dx, int64_t M, int64_t N, int64_t K);

// grad [M, N] contiguous -> dx [M, K] = grad @ W, without a decoded copy of W.
cudaError_t linear_nf4_backward_few_rows(const void* grad, const Nf4Weight& weight, Dtype dtype, void* dx, int64_t M,
                                         int64_t N, int64_t K, cudaStream_t stream);

// How linear_nf4_backward_sm90 shares out a product (dispatch_backward.h chooses).
struct BackwardPlan {
  int cluster;  // 1, or 2: pairs of thread blocks share what they decode
  int splits;   // parts of the sum over N, at most ceil(N / 64); 1: results equal cuBLAS's on the dequantized weight
  int group;    // tiles of 256 (cluster of 2: 512) tokens that are done together
};

ProductScratch linear_backward_sm90_scratch(const BackwardPlan& plan, int64_t M, int64_t K);

// Whether linear_nf4_backward_sm90 can take this product on the current device: sm_90, 16-bit types, N a multiple of 8,
// K of 64, blocks of at least 64, 16-byte alignment (4-byte for scales); grad must have 16.
bool linear_backward_sm90_fits(const Nf4Weight& weight, Dtype dtype, const void* dx, int64_t M, int64_t N, int64_t K);

// grad [M, N] contiguous -> dx [M, K] = grad @ W (+ adapter's S @ B), without a decoded copy of W; with `add` this is
// added to what dx holds, rounded before and after.
cudaError_t linear_nf4_backward_sm90(const void* grad, const Nf4Weight& weight, const Adapter& adapter, Dtype dtype,
                                     void* dx, bool add, int64_t M, int64_t N, int64_t K, const BackwardPlan& plan,
                                     float* partials, int32_t* counters, cudaStream_t stream);

// As linear_nf4_backward_sm90, which fits where this does, but levels are rounded, and their products with scales. tokens
// 8, 16, 32, 64 or 128; pair 1; splits 1 to 8.
cudaError_t linear_nf4_backward_levels_sm90(const void* grad, const Nf4Weight& weight, const Adapter& adapter,
                                            Dtype dtype, void* dx, bool add, int64_t M, int64_t N, int64_t K,
                                            const FusedConfig& config, cudaStream_t stream);

// target[i] = source[i] * factor, rounded to one dtype for all jobs of a launch.
struct RoundJob {
  const void* source;
  void* target;
  int64_t count;
  float factor;
  Dtype dtype;  // of the source
};
constexpr int kMaxRoundJobs = 6;
struct RoundJobs {
  RoundJob of[kMaxRoundJobs];
};
cudaError_t round_matrices(const RoundJobs& jobs, int count, Dtype dtype, cudaStream_t stream);

}  // namespace qlora_engine::cuda
