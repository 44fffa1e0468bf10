// Quantize to NF4: absmax[b] = max|w| over block b; code[i] = the number of thresholds below w[i] / absmax[b].
// Tiles and codes: quantize.cuh.
//
// Bound: bytes. bfloat16 at block 64: 2 read, 0.5 + 1/16 written an element. On an H100 80GB 2,337, 2,987 and 2,850
// GB/s at 4096x4096, 14336x4096 and 28672x8192, where a copy reaches 3,020; with double quantization 1,868, 2,607 and
// 2,569, measured while scales still went from one kernel to the other in float32.
//
// Equal to bitsandbytes' CUDA backend bit for bit, which is compiled with --use_fast_math: the reciprocal of absmax
// is approximate, products and scales that are subnormal become zero. A block of zeros gives 0 * inf = NaN, and code 0.
//
// For double quantization the kernel also sums its scales, in float64: each thread block those of the tiles that it
// takes. Which they are, and the order of the additions, depends on the weight's size alone, not on how many
// multiprocessors there are: the sum is the same on every card and in every run. The kernel that follows
// (quantize_absmax.cu) adds the thread blocks' sums.
#include <type_traits>

#include "dependent_launch.cuh"
#include "quantize.cuh"

namespace qlora_engine::cuda {
namespace {

constexpr Thresholds kThresholds = {{QLORA_NF4_THRESHOLDS}};
static_assert(buckets_are_exact(kThresholds));

constexpr int kCopies = 16;
__device__ const Buckets kBuckets = make_buckets(kThresholds);

// Thread blocks a multiprocessor: one less where a sum leaves too few registers.
template <typename S, bool kSums>
constexpr int kResident = kSums && S::kVectors == 8 ? 3 : S::kResident;

// Thread blocks of the kernel that sums; a round number below what 132 multiprocessors hold.
template <typename S>
constexpr int kSummingBlocks = 128 * kResident<S, true>;

// What scales are written in: a 16-bit weight's largest magnitudes are 16-bit numbers.
template <typename T, bool kSums>
using ScaleOf = typename std::conditional<kSums, T, float>::type;

template <typename T, int kBlocksize, bool kSums>
__global__ void __launch_bounds__(Tile<T, kBlocksize>::kThreads, kResident<Tile<T, kBlocksize>, kSums>)
    quantize_nf4_kernel(const T* __restrict__ weight, int64_t numel, int64_t tiles, bool aligned,
                        uint8_t* __restrict__ packed, ScaleOf<T, kSums>* __restrict__ absmax,
                        double* __restrict__ sums) {
  using S = Tile<T, kBlocksize>;
  __shared__ __align__(16) Bucket buckets[64 * kCopies];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t step = int64_t(gridDim.x) * (S::kThreads / 32);
  const int64_t bytes = (numel + 1) / 2, blocks = ceil_div(numel, kBlocksize);

  uint4 v[S::kVectors];
  int64_t tile = int64_t(blockIdx.x) * (S::kThreads / 32) + warp;
  if (tile < tiles) load_tile<S>(v, weight, tile, numel, aligned);  // under way while the table is filled
  fill_by_block<64 * kCopies, S::kThreads>([&](int i) { buckets[i] = kBuckets.bucket[i / kCopies]; });
  __syncthreads();
  const uint32_t table = shared_address(buckets) + lane % kCopies * sizeof(Bucket);

  // in shared memory: registers are all taken
  __shared__ double sum_of[kSums ? S::kThreads : 1];
  if constexpr (kSums) sum_of[threadIdx.x] = 0;
  while (tile < tiles) {
    float kept = 0.f;  // lane l keeps the scale that it will write
    uint32_t codes[S::kVectors];
#pragma unroll
    for (int b = 0; b < S::kVectors / S::kBlockVectors; ++b) {
      const float scale = block_absmax<S, T>(v, b);
      if (lane % S::kBlockLanes == b) kept = scale;
      const float reciprocal = reciprocal_ftz(scale);
#pragma unroll
      for (int u = b * S::kBlockVectors; u < (b + 1) * S::kBlockVectors; ++u) {
        codes[u] = encode<T>(v[u], [&](float w) { return code_of<kCopies>(multiply_ftz(w, reciprocal), table); });
      }
    }
    store_tile<S, T>(codes, packed, tile, bytes);
    store_scales<S>(kept, absmax, tile, blocks);
    if constexpr (kSums) sum_of[threadIdx.x] += kept;  // a block past the end has a scale of zero
    tile += step;
    if (tile < tiles) load_tile<S>(v, weight, tile, numel, aligned);
  }

  if constexpr (kSums) {
    let_dependent_start();
    __syncthreads();
    if (warp == 0) {
      double sum = 0;
#pragma unroll
      for (int i = 0; i < S::kThreads; i += 32) sum += sum_of[i + lane];
#pragma unroll
      for (int s = 1; s < 32; s *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, s);
      if (lane == 0) sums[blockIdx.x] = sum;
    }
  }
}

template <typename T, int kBlocksize, bool kSums>
cudaError_t launch(const void* weight, int64_t numel, uint8_t* packed, void* absmax, double* sums, unsigned* grid,
                   cudaStream_t stream) {
  using S = Tile<T, kBlocksize>;
  const int64_t tiles = ceil_div(numel, S::kElements), at_once = S::kThreads / 32;
  if constexpr (kSums) {
    *grid = unsigned(std::min<int64_t>(ceil_div(tiles, at_once), kSummingBlocks<S>));
    static_assert(kSummingBlocks<S> <= kMaxScaleSums);
  } else if (cudaError_t error = grid_for(tiles, at_once, kResident<S, kSums>, grid)) {
    return error;
  }
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  quantize_nf4_kernel<T, kBlocksize, kSums><<<*grid, S::kThreads, 0, stream>>>(
      static_cast<const T*>(weight), numel, tiles, aligned, packed, static_cast<ScaleOf<T, kSums>*>(absmax), sums);
  return cudaGetLastError();
}

}  // namespace

cudaError_t quantize_nf4(const void* weight, Dtype dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                         float* absmax, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return for_weight(dtype, blocksize, [&]<typename T, int kBlocksize>() {
    unsigned grid = 0;
    return launch<T, kBlocksize, false>(weight, numel, packed, absmax, nullptr, &grid, stream);
  });
}

cudaError_t quantize_nf4_double(const void* weight, Dtype dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                                uint8_t* codes, float* nested_absmax, float* offset, void* absmax, double* sums,
                                cudaStream_t stream) {
  unsigned grid = 0;
  if (numel != 0) {
    const cudaError_t error = for_weight(dtype, blocksize, [&]<typename T, int kBlocksize>() {
      return launch<T, kBlocksize, true>(weight, numel, packed, absmax, sums, &grid, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return quantize_summed_absmax(absmax, dtype, sums, int(grid), ceil_div(numel, blocksize), codes, nested_absmax,
                                offset, stream);
}

}  // namespace qlora_engine::cuda
