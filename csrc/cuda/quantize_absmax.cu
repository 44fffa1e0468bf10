// Scales to 8 bits: code[i] = the level of the dynamic map that stands for (absmax[i] - offset) / nested_absmax, in
// groups that share nested_absmax = max|absmax - offset|.
//
// One warp a group; 256 scales are held in registers, 8 a lane, so a group of the 4-bit format is read once. A code is
// two look-ups in tables of 3.5 KB (csrc/dynamic_code.h).
//
// After quantize_nf4 (quantize.cu) the offset is the mean of all scales: every thread block adds the same few hundred
// sums in the same order. The tables are loaded while the last tiles of the weight are still being quantized.
//
// Equal to bitsandbytes' CUDA backend bit for bit, given the same offset: approximate reciprocal, subnormal products
// are zero, and of a number halfway between two levels the binary search that defines its codes takes the even level.
#include "../dynamic_code.h"
#include "decode.cuh"
#include "dependent_launch.cuh"
#include "launch.h"

namespace qlora_engine::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kResident = 4;  // thread blocks a multiprocessor
constexpr int kHeld = 8;      // scales a lane holds

using Search = DynamicSearch<kMagnitudes>;
__device__ const Search kSearch = Search(kSignedMap + kSignedZero, Ties::kEven);

// Scales first, first + 32, ...; NaN past `end`, which maxima pass over.
__device__ __forceinline__ void load_scales(float (&v)[kHeld], const float* absmax, int64_t first, int64_t end) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j) v[j] = first + 32 * j < end ? absmax[first + 32 * j] : __uint_as_float(0x7fffffffu);
}

// A group's codes; v holds its first 256 scales.
__device__ __forceinline__ void quantize_group(const Search& search, float (&v)[kHeld], const float* absmax,
                                               float offset, int64_t first, int64_t end, uint8_t* codes,
                                               float* nested_absmax) {
  constexpr int kAtOnce = 32 * kHeld;
  const int lane = threadIdx.x % 32;
  const bool longer = end - first > kAtOnce;
  float m = 0.f;
  for (int64_t i = first; i < end; i += kAtOnce) {
    if (i > first) load_scales(v, absmax, i + lane, end);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) m = fmaxf(m, fabsf(__fsub_rn(v[j], offset)));
  }
#pragma unroll
  for (int s = 1; s < 32; s *= 2) m = fmaxf(m, __shfl_xor_sync(kWholeWarp, m, s));
  m = multiply_ftz(m, 1.0f);
  const float reciprocal = reciprocal_ftz(m);
  for (int64_t i = first; i < end; i += kAtOnce) {
    if (longer) load_scales(v, absmax, i + lane, end);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const float x = multiply_ftz(__fsub_rn(v[j], offset), reciprocal);
      const int64_t at = i + lane + 32 * j;
      if (at < end) codes[at] = scale_code(search, x, __float_as_uint(x));
    }
  }
  if (lane == 0) *nested_absmax = m;
}

__device__ __forceinline__ void fill(Search& search) {
  constexpr int kWords = sizeof(Search) / 4;
  const auto* from = reinterpret_cast<const uint32_t*>(&kSearch);
  auto* to = reinterpret_cast<uint32_t*>(&search);
  fill_by_block<kWords, kThreads>([&](int i) { to[i] = __ldg(from + i); });
}

__global__ void __launch_bounds__(kThreads, kResident)
    quantize_absmax_kernel(const float* __restrict__ absmax, const float* __restrict__ offset, int64_t count,
                           int blocksize, int64_t groups, uint8_t* __restrict__ codes,
                           float* __restrict__ nested_absmax) {
  __shared__ __align__(16) char storage[sizeof(Search)];
  Search& search = *reinterpret_cast<Search*>(storage);
  fill(search);
  __syncthreads();
  const float mean = __ldg(offset);
  for (int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; group < groups; group += gridDim.x * kWarps) {
    const int64_t first = group * blocksize, end = min(first + blocksize, count);
    float v[kHeld];
    load_scales(v, absmax, first + threadIdx.x % 32, end);
    quantize_group(search, v, absmax, mean, first, end, codes, nested_absmax + group);
  }
}

// The same where the offset is the mean, given `parts` sums of scales.
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_summed_absmax_kernel(const float* absmax, const double* sums, int parts, int64_t count, int64_t groups,
                                  uint8_t* codes, float* nested_absmax, float* offset) {
  __shared__ __align__(16) char storage[sizeof(Search)];
  __shared__ double of_warps[kWarps];
  Search& search = *reinterpret_cast<Search*>(storage);
  fill(search);
  wait_for_previous_kernel();

  // the first scales are on their way while the sums are added
  float v[kHeld];
  int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const auto first_of = [&](int64_t g) { return g * kNestedBlocksize; };
  const auto end_of = [&](int64_t g) { return min(first_of(g) + kNestedBlocksize, count); };
  if (group < groups) load_scales(v, absmax, first_of(group) + threadIdx.x % 32, end_of(group));

  double sum = 0;
#pragma unroll
  for (int i = 0; i < kMaxScaleSums; i += kThreads) {
    if (i + int(threadIdx.x) < parts) sum += sums[i + threadIdx.x];
  }
#pragma unroll
  for (int s = 1; s < 32; s *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, s);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += of_warps[i];
  const float mean = count > 0 ? float(sum / double(count)) : 0.f;
  if (blockIdx.x == 0 && threadIdx.x == 0) *offset = mean;

  while (group < groups) {
    quantize_group(search, v, absmax, mean, first_of(group), end_of(group), codes, nested_absmax + group);
    group += gridDim.x * kWarps;
    if (group < groups) load_scales(v, absmax, first_of(group) + threadIdx.x % 32, end_of(group));
  }
}

}  // namespace

cudaError_t quantize_absmax(const float* absmax, const float* offset, int64_t count, int64_t blocksize,
                            uint8_t* codes, float* nested_absmax, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t groups = ceil_div(count, blocksize);
  unsigned grid = 0;
  if (cudaError_t error = grid_for(groups, kWarps, kResident, &grid)) return error;
  quantize_absmax_kernel<<<grid, kThreads, 0, stream>>>(absmax, offset, count, int(blocksize), groups, codes,
                                                        nested_absmax);
  return cudaGetLastError();
}

cudaError_t quantize_summed_absmax(const float* absmax, const double* sums, int parts, int64_t count, uint8_t* codes,
                                   float* nested_absmax, float* offset, cudaStream_t stream) {
  const int64_t groups = ceil_div(count, kNestedBlocksize);
  unsigned grid = 0;
  if (cudaError_t error = grid_for(std::max<int64_t>(groups, 1), kWarps, kResident, &grid)) return error;
  return launch_dependent(quantize_summed_absmax_kernel, grid, kThreads, stream, absmax, sums, parts, count, groups,
                          codes, nested_absmax, offset);
}

}  // namespace qlora_engine::cuda
