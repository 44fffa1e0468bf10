// Quantize to NF4 with scales that are searched for, not max|w|: csrc/scale_search.h has the definition.
//
//   vector: 256 elements, 8 a lane; its blocks of 32 to 256 elements lie in 4 to 32 lanes, a larger block in several
//   vectors, which are read three times (maximum, search, codes), the last two from the caches.
//   A candidate costs an element five instructions: u g + 2^23 rounded down to a step of the table by masking bits,
//   one look-up of q, and two fused additions to sum u q and sum q^2. All sums are of integers that float32 holds
//   exactly: at most 128 elements a lane, 2^17 each; over the lanes of blocks larger than 128 they go on in int32.
//   The table is held once a lane: no bank conflicts.
//
// Bound: instructions, about 110 an element at block 64, of which the search's inner loop takes 60. On an H100 80GB, in
// bfloat16: 467, 506 and 520 GB/s at 4096x4096, 14336x4096 and 28672x8192, three quarters of what that many
// instructions allow; 284, 300 and 307 where both signs are tried. Two, three or four thread blocks a multiprocessor
// make no difference.
#include <type_traits>

#include "../scale_search.h"
#include "quantize.cuh"

namespace qlora_engine::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kResident = 3;
constexpr int kVector = 256, kOwn = 8;  // elements of a vector, and of a lane in it

constexpr Thresholds kMidpoints = {{QLORA_NF4_MIDPOINTS}};
static_assert(buckets_are_exact(kMidpoints));

constexpr int kCopies = 4;
__device__ const Buckets kMidpointBuckets = make_buckets(kMidpoints);
__device__ const SearchLevels kLevels = SearchLevels();

template <int kBlocksize>
struct Unit {
  static constexpr int kVectors = kBlocksize > kVector ? kBlocksize / kVector : 1;
  static constexpr int kLanes = kBlocksize > kVector ? 32 : kBlocksize / kOwn;
  static constexpr int kCandidates = search_candidates(kBlocksize);
  static constexpr int kReach = kSearchUnit * (kSearchFirst + kCandidates - 1) / kSearchStep;
  static constexpr int kSteps = 2 * kReach + 1;
};

// The lane's 8 elements, from `first` on; zeros past the end.
template <typename T>
__device__ __forceinline__ void load_own(float (&w)[kOwn], const T* weight, int64_t first, int64_t numel,
                                         bool aligned) {
  using E = Elements<T>;
#pragma unroll
  for (int i = 0; i < kOwn; i += E::kCount) {
    uint4 v;
    if (aligned && first + i + E::kCount <= numel) {
      v = *reinterpret_cast<const uint4*>(weight + first + i);
    } else {
      v = load_elements(weight, first + i, numel);
    }
    E::unpack(v, w + i);
  }
}

// Sums over the lanes of a block; float32 holds those of a block of up to 128 elements.
template <int kBlocksize>
__device__ __forceinline__ float sum_over_block(float own) {
  using Sum = typename std::conditional<kBlocksize <= 128, float, int>::type;
  Sum sum = Sum(own);
#pragma unroll
  for (int s = 1; s < Unit<kBlocksize>::kLanes; s *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, s);
  return float(sum);
}

template <typename T, int kBlocksize>
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_nf4_search_kernel(const T* __restrict__ weight, int64_t numel, int64_t units, bool aligned,
                               bool signed_scales, uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  using U = Unit<kBlocksize>;
  __shared__ __align__(128) float levels[U::kSteps * 32];
  __shared__ __align__(16) Bucket buckets[64 * kCopies];
  fill_by_block<U::kSteps * 32, kThreads>([&](int i) {
    levels[i] = float(__ldg(kLevels.of_step + kSearchReach - U::kReach + i / 32));
  });
  fill_by_block<64 * kCopies, kThreads>([&](int i) { buckets[i] = kMidpointBuckets.bucket[i / kCopies]; });
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const char* level_bytes = reinterpret_cast<const char*>(levels);
  const uint32_t lane_offset = lane * 4;
  const uint32_t table = shared_address(buckets) + lane % kCopies * sizeof(Bucket);
  const int64_t bytes = (numel + 1) / 2;

  for (int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; unit < units; unit += gridDim.x * kWarps) {
    const int64_t first = unit * (U::kVectors * kVector) + lane * kOwn;
    float w[kOwn];
    float largest = 0.f;
#pragma unroll 1
    for (int v = 0; v < U::kVectors; ++v) {
      load_own(w, weight, first + v * kVector, numel, aligned);
#pragma unroll
      for (int e = 0; e < kOwn; ++e) largest = fmaxf(largest, fabsf(w[e]));
    }
#pragma unroll
    for (int s = 1; s < U::kLanes; s *= 2) largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, s));
    largest = multiply_ftz(largest, 1.0f);
    const bool searched = largest >= kSearchLeast && largest <= kSearchMost;
    const float to_units = searched ? float(kSearchUnit) * __frcp_rn(largest) : 0.f;

    float best_product = 0.f, best_square = 1.f, sign = 1.f;
#pragma unroll 1
    for (int pass = 0; pass < (signed_scales ? 2 : 1); ++pass) {
      const float flip = pass == 0 ? 1.f : -1.f;
      float products[U::kCandidates] = {}, squares[U::kCandidates] = {};
#pragma unroll 1
      for (int v = 0; v < U::kVectors; ++v) {
        if (U::kVectors > 1) load_own(w, weight, first + v * kVector, numel, aligned);
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
          constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to a whole number
          const float x = __fmul_rn(w[e], to_units) * flip;
          const float u = x == x ? __fadd_rn(__fadd_rn(x, kRound), -kRound) : 0.f;
#pragma unroll
          for (int c = 0; c < U::kCandidates; ++c) {
            // whole numbers below 2^24: exact. The step is what lies above the lower 7 bits.
            constexpr float kBias = 0x1p23f + float(U::kReach * kSearchStep + kSearchStep / 2);
            const uint32_t bits = __float_as_uint(__fmaf_rn(u, float(kSearchFirst + c), kBias));
            const float q = *reinterpret_cast<const float*>(level_bytes + ((bits & 0x007FFF80u) | lane_offset));
            products[c] = __fmaf_rn(u, q, products[c]);
            squares[c] = __fmaf_rn(q, q, squares[c]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < U::kCandidates; ++c) {
        const float product = sum_over_block<kBlocksize>(products[c]), square = sum_over_block<kBlocksize>(squares[c]);
        const float gain = __fmul_rn(__fmul_rn(product, product), best_square);
        if (gain > __fmul_rn(__fmul_rn(best_product, best_product), square)) {
          best_product = product, best_square = square, sign = flip;
        }
      }
    }
    float scale = largest, reciprocal = reciprocal_ftz(largest);
    if (best_product > 0.f) {  // u is in 512ths, q in 256ths
      scale = __fmul_rn(largest * sign, __fmul_rn(__fdiv_rn(best_product, best_square), 0.5f));
      reciprocal = __frcp_rn(scale);
    }

#pragma unroll 1
    for (int v = 0; v < U::kVectors; ++v) {
      if (U::kVectors > 1) load_own(w, weight, first + v * kVector, numel, aligned);
      uint32_t codes = 0;
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        const float x = fminf(fmaxf(multiply_ftz(w[e], reciprocal), -1.f), 1.f);
        codes |= code_of<kCopies>(x, table) << (8 * (e / 2) + (e % 2 ? 0 : 4));
      }
      store_word(packed, (first + v * kVector) / 8, codes, bytes);
    }
    if (lane % U::kLanes == 0 && first < numel) absmax[first / kBlocksize] = scale;
  }
}

}  // namespace

cudaError_t quantize_nf4_search(const void* weight, Dtype dtype, int64_t numel, int64_t blocksize, bool signed_scales,
                                uint8_t* packed, float* absmax, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  return for_weight(dtype, blocksize, [&]<typename T, int kBlocksize>() {
    const int64_t units = ceil_div(numel, Unit<kBlocksize>::kVectors * kVector);
    unsigned grid = 0;
    if (cudaError_t error = grid_for(units, kWarps, kResident, &grid)) return error;
    quantize_nf4_search_kernel<T, kBlocksize><<<grid, kThreads, 0, stream>>>(
        static_cast<const T*>(weight), numel, units, aligned, signed_scales, packed, absmax);
    return cudaGetLastError();
  });
}

}  // namespace qlora_engine::cuda
