// Scales to 8 bits: code[i] = the level of the dynamic map that stands for (absmax[i] - offset) / nested_absmax, in
// groups that share nested_absmax = max|absmax - offset|.
//
// One warp a group; 256 scales are held in registers, 8 neighbours a lane, so a group of the 4-bit format is read once.
// A code is two look-ups in tables of 3.5 KB (csrc/dynamic_code.h).
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
constexpr int kResident = 4, kResidentSummed = 6;  // thread blocks a multiprocessor
constexpr int kHeld = 8;      // scales a lane holds

using Search = DynamicSearch<kMagnitudes>;
__device__ const Search kSearch = Search(kSignedMap + kSignedZero, Ties::kEven);

// Scales first ... first + 7; NaN past `end`, which maxima pass over.
template <typename T>
__device__ __forceinline__ void load_scales(float (&v)[kHeld], const T* absmax, int64_t first, int64_t end,
                                            bool aligned) {
  if (aligned && first + kHeld <= end) {
    constexpr int kWords = kHeld * int(sizeof(T)) / 16;
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(absmax + first)[i];
    const T* scales = reinterpret_cast<const T*>(words);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) v[j] = float(scales[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) v[j] = first + j < end ? float(absmax[first + j]) : __uint_as_float(0x7fffffffu);
  }
}

// A group's codes; v holds what its first 256 scales are to this lane. `aligned`: scales to 16 bytes, codes to 8.
template <typename T>
__device__ __forceinline__ void quantize_group(const Search& search, float (&v)[kHeld], const T* absmax, float offset,
                                               int64_t first, int64_t end, bool aligned, uint8_t* codes,
                                               float* nested_absmax) {
  constexpr int kAtOnce = 32 * kHeld;
  const int lane = threadIdx.x % 32;
  const bool longer = end - first > kAtOnce;
  float m = 0.f;
  for (int64_t i = first; i < end; i += kAtOnce) {
    if (i > first) load_scales(v, absmax, i + lane * kHeld, end, aligned);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) m = fmaxf(m, fabsf(__fsub_rn(v[j], offset)));
  }
#pragma unroll
  for (int s = 1; s < 32; s *= 2) m = fmaxf(m, __shfl_xor_sync(kWholeWarp, m, s));
  m = multiply_ftz(m, 1.0f);
  const float reciprocal = reciprocal_ftz(m);
  for (int64_t i = first; i < end; i += kAtOnce) {
    const int64_t own = i + lane * kHeld;
    if (longer) load_scales(v, absmax, own, end, aligned);
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const float x = multiply_ftz(__fsub_rn(v[j], offset), reciprocal);
      words[j / 4] |= uint32_t(scale_code(search, x, __float_as_uint(x))) << (8 * (j % 4));
    }
    if (aligned && own + kHeld <= end) {
      *reinterpret_cast<uint2*>(codes + own) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (own + j < end) codes[own + j] = uint8_t(words[j / 4] >> (8 * (j % 4)));
      }
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
                           int blocksize, int64_t groups, bool aligned, uint8_t* __restrict__ codes,
                           float* __restrict__ nested_absmax) {
  __shared__ __align__(16) char storage[sizeof(Search)];
  Search& search = *reinterpret_cast<Search*>(storage);
  fill(search);
  __syncthreads();
  const float mean = __ldg(offset);
  for (int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; group < groups; group += gridDim.x * kWarps) {
    const int64_t first = group * blocksize, end = min(first + blocksize, count);
    float v[kHeld];
    load_scales(v, absmax, first + threadIdx.x % 32 * kHeld, end, aligned);
    quantize_group(search, v, absmax, mean, first, end, aligned, codes, nested_absmax + group);
  }
}

// The same where the offset is the mean, given `parts` sums of scales. T: what the first kernel wrote them in.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentSummed)
    quantize_summed_absmax_kernel(const T* absmax, const double* sums, int parts, int64_t count, int64_t groups,
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
  const auto load = [&](int64_t g) {
    load_scales(v, absmax, first_of(g) + threadIdx.x % 32 * kHeld, end_of(g), true);
  };
  if (group < groups) load(group);

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
    quantize_group(search, v, absmax, mean, first_of(group), end_of(group), true, codes, nested_absmax + group);
    group += gridDim.x * kWarps;
    if (group < groups) load(group);
  }
}

}  // namespace

cudaError_t quantize_absmax(const float* absmax, const float* offset, int64_t count, int64_t blocksize,
                            uint8_t* codes, float* nested_absmax, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t groups = ceil_div(count, blocksize);
  unsigned grid = 0;
  if (cudaError_t error = grid_for(groups, kWarps, kResident, &grid)) return error;
  const bool aligned = reinterpret_cast<uintptr_t>(absmax) % 16 == 0 && reinterpret_cast<uintptr_t>(codes) % 8 == 0;
  quantize_absmax_kernel<<<grid, kThreads, 0, stream>>>(absmax, offset, count, int(blocksize), groups, aligned, codes,
                                                        nested_absmax);
  return cudaGetLastError();
}

cudaError_t quantize_summed_absmax(const void* absmax, Dtype dtype, const double* sums, int parts, int64_t count,
                                   uint8_t* codes, float* nested_absmax, float* offset, cudaStream_t stream) {
  const int64_t groups = ceil_div(count, kNestedBlocksize);
  unsigned grid = 0;
  if (cudaError_t error = grid_for(std::max<int64_t>(groups, 1), kWarps, kResidentSummed, &grid)) return error;
  const auto launch = [&]<typename T>() {
    return launch_dependent(quantize_summed_absmax_kernel<T>, grid, kThreads, stream, static_cast<const T*>(absmax),
                            sums, parts, count, groups, codes, nested_absmax, offset);
  };
  switch (dtype) {
    case Dtype::kFloat32: return launch.template operator()<float>();
    case Dtype::kFloat16: return launch.template operator()<__half>();
    case Dtype::kBFloat16: return launch.template operator()<__nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora_engine::cuda
