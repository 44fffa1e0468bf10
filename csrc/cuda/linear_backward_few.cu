// Gradient of a product with a 4-bit weight for up to 64 rows: dX[m, k] = sum_n dY[m, n] * W[n, k]. W is read once,
// packed, and every element is round(level * absmax), as a dequantized weight has it.
//
//   thread block: 256 columns k and a range of rows n; warps side by side have 64 kWords columns each, the others take
//                 every next 16 rows
//   mma.m16n8k16: A = W transposed [16 k x 16 n], B = dY transposed [16 n x 8 m]; the sum runs over n
//                 lane (g, t) holds rows 4 t to 4 t + 3, of each a run of 8 kWords columns from 8 kWords g on; byte j
//                 of its runs holds columns 2 j and 2 j + 1, which are rows g and g + 8 of product j
//   A byte becomes two float32 levels by one look-up in a table of 256 pairs, a copy a lane (no bank conflicts; the
//   address is one prmt), each is multiplied by its scale, and two rows of one column are rounded into one register.
//   What a lane reads of W it copies itself, kDepth chunks of 16 rows ahead: no barrier until the sums are complete.
//   The warps' sums meet in shared memory; the blocks of a cluster, which share the rows among them, add theirs
//   through it. The order of all sums is fixed.
//
// Bound: bytes of W (0.516 a weight at block 64, double-quantized), then the look-ups (8 bytes of shared memory for two
// weights). Reached on an H100 80GB at one row: 4096 x 4096 20 us, 14336 x 4096 40 us, where a kernel that only reads
// the same bytes takes 6 and 10 (cuBLAS with a decoded weight: 21 and 55). Stalls: a quarter of them wait for the
// copies of scales to be accepted (4 bytes each from 8 rows: 22 passes of the L1 cache a copy), a quarter for look-ups.
#include <algorithm>
#include <atomic>

#include "copy_async.cuh"
#include "decode.cuh"
#include "launch.h"
#include "pair_table.cuh"

namespace qlora_engine::cuda {
namespace {

constexpr int kColumns = 256;  // of dX, a thread block
constexpr int kChunk = 16;     // rows of W, a warp at a time
constexpr int kTableBytes = 256 * 256;
constexpr int kMapBytes = 256 * 4;
constexpr int kMostBlocks = 8;  // of a cluster, on every GPU that has clusters

// kTiles: tiles of 8 tokens. Fewer columns a warp where there are more tokens: the accumulators must fit.
template <int kTiles>
struct Shape {
  static constexpr int kWords = kTiles == 1 ? 4 : kTiles == 2 ? 2 : 1;  // of each row, a lane
  static constexpr int kWarps = kTiles == 8 ? 8 : 16;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kAcross = 4 / kWords;           // warps side by side
  static constexpr int kGroups = kWarps / kAcross;     // warps that share the rows
  static constexpr int kBlocks = kWords;               // of 64 columns, a warp
  static constexpr int kScales = kWords == 4 ? 2 : 1;  // a lane decodes, of the 16 kBlocks of a chunk
  static constexpr int kProducts = 4 * kWords;
  static constexpr int kDepth = kWords == 4 ? 3 : kWords == 2 ? 4 : 6;
  static constexpr int kWordsBytes = 4 * kWords * 4 * 32;  // a chunk's share of a warp
  static constexpr int kChunkBytes = kWordsBytes + kScales * 8 * 32;
  static constexpr int kTokens = kTiles * 8;
  // sums of a warp group: a row of kColumns for each token, pairs of tokens 8 banks apart
  static constexpr int kPairPitch = 2 * kColumns + 8;
  static constexpr int kSumBytes = kTokens / 2 * kPairPitch * 4;
  static constexpr int kSharedBytes =
      std::max(kMapBytes + kTableBytes + kWarps * kDepth * kChunkBytes, kGroups * kSumBytes);
  static_assert(kSharedBytes <= 232448, "what a block of sm_90 may have");
};

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// A float32 pair of shared memory of block `rank` of the cluster.
__device__ __forceinline__ float2 load_of_block(const float* own, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  float2 v;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %2, %3;\nld.shared::cluster.v2.f32 {%0, %1}, [there];\n}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(shared_address(own)), "r"(rank)
      : "memory");
  return v;
#else
  return *reinterpret_cast<const float2*>(own);
#endif
}

template <typename T, bool kNested, int kTiles>
__global__ void __launch_bounds__(Shape<kTiles>::kThreads, 1)
    linear_backward_few_rows_kernel(const T* __restrict__ grad, const __grid_constant__ Nf4Weight weight,
                                    T* __restrict__ dx, int M, int N, int K) {
  using S = Shape<kTiles>;
  constexpr int kWords = S::kWords;
  extern __shared__ __align__(1024) char shared[];
  char* table = shared;
  float* map = reinterpret_cast<float*>(shared + kTableBytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int across = warp % S::kAcross, group = warp / S::kAcross;
  const int blocks = gridDim.x, rank = blockIdx.x;  // a cluster is a row of the grid
  const int first_column = blockIdx.y * kColumns;

  // this block's chunks: first, first + kGroups, ... below end
  const int chunks = (N + kChunk - 1) / kChunk;
  const int begin = chunks * rank / blocks, end = chunks * (rank + 1) / blocks;

  // W and what the scales are made of, chunk by chunk, into this lane's part of a ring
  const int column = first_column + (across * 8 + g) * 8 * kWords;
  const bool column_inside = column < K;
  const uint32_t ring = shared_address(shared) + kTableBytes + kMapBytes + warp * S::kDepth * S::kChunkBytes;
  const uint32_t words_at = ring + lane * kWords * 4, scales_at = ring + S::kWordsBytes + lane * 4;
  // the scales that this lane decodes: of rows scale_row (and scale_row + 2), 64 columns from scale_column on
  const int scale_row = kWords == 4 ? lane / 8 * 4 + lane / 4 % 2 : lane / 2;
  const int scale_column = first_column + (across * S::kBlocks + (kWords == 4   ? lane % 4
                                                                  : kWords == 2 ? lane % 2
                                                                                : 0)) * 64;
  // N is a multiple of 4: a lane's four rows lie all inside, or none does
  const int64_t row_bytes = K / 2;
  const int end_row = min(end * kChunk, N);
  const uint8_t* load_from = weight.packed + (int64_t((begin + group) * kChunk + 4 * t) * K + column) / 2;
  // runs of 64 columns are counted in 32 bits, from the beginning of W
  uint32_t load_run = uint32_t((begin + group) * kChunk + scale_row) * uint32_t(K / 64) + scale_column / 64;
  const uint32_t row_runs = K / 64;
  const int shift = weight.log2_blocksize - 6;
  uint32_t bytes = 0;  // where in their words the codes of the chunks under way lie, 4 bits a chunk
  auto load = [&](int chunk, int slot) {
    bytes <<= 4;
    const uint32_t to = words_at + slot * S::kChunkBytes, scale_to = scales_at + slot * S::kChunkBytes;
    if (column_inside && chunk * kChunk + 4 * t < end_row) {
#pragma unroll
      for (int r = 0; r < 4; ++r) copy_async<kWords * 4>(to + r * kWords * 128, load_from + r * row_bytes);
    }
#pragma unroll
    for (int i = 0; i < S::kScales; ++i) {
      const bool inside = scale_column < K && chunk * kChunk + scale_row + 2 * i < end_row;
      const uint32_t block = inside ? (load_run + 2 * i * row_runs) >> shift : 0;
      const uint32_t at = scale_to + i * 256;
      if constexpr (kNested) {  // the aligned word that the code lies in, as far as there are codes
        const uint32_t first = block & ~3u, codes = uint32_t(weight.blocks) - first;
        copy_async<4>(at, weight.absmax_codes + first, min(codes, 4u));
        copy_async<4>(at + 128, weight.nested_absmax + block / uint32_t(kNestedBlocksize), inside ? 4 : 0);
        bytes |= (block & 3u) << (2 * i);
      } else {
        copy_async<4>(at + 128, weight.absmax + block, inside ? 4 : 0);
      }
    }
    copies_commit();
    load_from += S::kGroups * kChunk * row_bytes;
    load_run += S::kGroups * kChunk * row_runs;
  };
#pragma unroll
  for (int i = 0; i < S::kDepth; ++i) load(begin + group + i * S::kGroups, i);

  // of dY, rows g, g + 8, ..., columns 4 t to 4 t + 3 of the chunk
  const T* grad_from = grad + int64_t(g) * N + (begin + group) * kChunk + 4 * t;
  auto load_grad = [&](int chunk, uint2 (&v)[kTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const bool inside = chunk * kChunk + 4 * t < end_row && g + 8 * i < M;
      v[i] = inside ? __ldg(reinterpret_cast<const uint2*>(grad_from + int64_t(8 * i) * N)) : make_uint2(0, 0);
    }
    grad_from += S::kGroups * kChunk;
  };
  uint2 next_grad[kTiles];
  load_grad(begin + group, next_grad);

  {  // the table of pairs: byte b for lane l at 256 b + 8 l
    constexpr int kEntries = 256 * 16;  // of 16 bytes: the pairs of two lanes
#pragma unroll 1
    for (int i = threadIdx.x; i < kEntries; i += S::kThreads) {
      const int byte = i / 16;
      const float first = __ldg(kNf4Levels + byte / 16), second = __ldg(kNf4Levels + byte % 16);
      reinterpret_cast<float4*>(table)[i] = make_float4(first, second, first, second);
    }
    if (kNested && threadIdx.x < 256) map[threadIdx.x] = __ldg(kDynamicMap + threadIdx.x);
  }
  const float offset = kNested ? __ldg(weight.nested_offset) : 0.f;
  __syncthreads();

  float sums[kTiles][S::kProducts][4] = {};
  const uint32_t lane_offset = lane * 8;
  int slot = 0;
  for (int chunk = begin + group; chunk < end; chunk += S::kGroups) {
    copies_wait<S::kDepth - 1>();
    const char* own = shared + (words_at - shared_address(shared)) + slot * S::kChunkBytes;
    const char* own_scales = shared + (scales_at - shared_address(shared)) + slot * S::kChunkBytes;
    uint32_t words[4][kWords];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const char* from = own + r * kWords * 128;
      if constexpr (kWords == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        words[r][0] = v.x, words[r][1] = v.y, words[r][2] = v.z, words[r][3] = v.w;
      } else if constexpr (kWords == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        words[r][0] = v.x, words[r][1] = v.y;
      } else {
        words[r][0] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
    float decoded[S::kScales];
#pragma unroll
    for (int i = 0; i < S::kScales; ++i) {
      decoded[i] = *reinterpret_cast<const float*>(own_scales + i * 256 + 128);
      if constexpr (kNested) {
        const uint32_t byte = bytes >> (4 * (S::kDepth - 1) + 2 * i) & 3u;
        const uint32_t code = permute(*reinterpret_cast<const uint32_t*>(own_scales + i * 256), 0, 0x4440u | byte);
        decoded[i] = decode_scale(map[code], decoded[i], offset);
      }
    }
    uint2 b[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) b[i] = next_grad[i];
    load(chunk + S::kDepth * S::kGroups, slot);
    slot = slot + 1 == S::kDepth ? 0 : slot + 1;
    load_grad(chunk + S::kGroups, next_grad);

    float scale[4];  // of rows 4 t + r
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int from = kWords == 4 ? t * 8 + r % 2 * 4 + g / 2 : t * 8 + r * 2 + (kWords == 2 ? g / 4 : 0);
      scale[r] = __shfl_sync(kWholeWarp, decoded[kWords == 4 ? r / 2 : 0], from);
    }
#pragma unroll
    for (int j = 0; j < S::kProducts; ++j) {
      float2 w[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t at = permute(words[r][j / 4], lane_offset, 0x5504u | j % 4 << 4);
        const float2 level = *reinterpret_cast<const float2*>(table + at);
        w[r] = make_float2(multiply_ftz(level.x, scale[r]), multiply_ftz(level.y, scale[r]));
      }
      const uint32_t a[4] = {pack_pair<T>(w[0].x, w[1].x), pack_pair<T>(w[0].y, w[1].y), pack_pair<T>(w[2].x, w[3].x),
                             pack_pair<T>(w[2].y, w[3].y)};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma(T{}, sums[i][j], a[0], a[1], a[2], a[3], b[i].x, b[i].y);
    }
  }
  copies_wait<0>();
  __syncthreads();  // the table and the ring have been read: sums may lie there

  // A group's sums: token m at m / 2 * kPairPitch + m % 2 * kColumns, and there the columns of a warp in the order
  // (product, g, column of the pair), which neither conflicts here nor below
  float* totals = reinterpret_cast<float*>(shared);
  {
    float* own = totals + group * (S::kSumBytes / 4) + across * 64 * kWords;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float* pair = own + (4 * i + t) * S::kPairPitch + g * 2;
      if (8 * i + 2 * t >= M) continue;
#pragma unroll
      for (int j = 0; j < S::kProducts; ++j) {
        const float(&c)[4] = sums[i][j];
        *reinterpret_cast<float2*>(pair + j * 16) = make_float2(c[0], c[2]);
        *reinterpret_cast<float2*>(pair + j * 16 + kColumns) = make_float2(c[1], c[3]);
      }
    }
  }
  __syncthreads();
  const auto place = [&](int i) {  // of pair i: token, column / 2
    return i / (kColumns / 2) / 2 * S::kPairPitch + i / (kColumns / 2) % 2 * kColumns + i % (kColumns / 2) * 2;
  };
  const int pairs = M * (kColumns / 2);
  if (blocks > 1) {
    for (int i = threadIdx.x; i < pairs; i += S::kThreads) {
      float2* first = reinterpret_cast<float2*>(totals + place(i));
      float2 sum = *first;
#pragma unroll
      for (int other = 1; other < S::kGroups; ++other) {
        const float2 v = first[other * (S::kSumBytes / 8)];
        sum.x += v.x, sum.y += v.y;
      }
      *first = sum;
    }
    cluster_barrier();
  }
  // this block's share of the sums over all
  for (int i = threadIdx.x + rank * S::kThreads; i < pairs; i += blocks * S::kThreads) {
    const float* first = totals + place(i);
    float2 sum = make_float2(0.f, 0.f);
    if (blocks > 1) {
      for (int other = 0; other < blocks; ++other) {
        const float2 v = load_of_block(first, other);
        sum.x += v.x, sum.y += v.y;
      }
    } else {
#pragma unroll
      for (int other = 0; other < S::kGroups; ++other) {
        const float2 v = *reinterpret_cast<const float2*>(first + other * (S::kSumBytes / 4));
        sum.x += v.x, sum.y += v.y;
      }
    }
    const int m = i / (kColumns / 2), p = i % (kColumns / 2);
    constexpr int kWarpPairs = 32 * kWords;  // of a warp's columns: (product, g)
    const int in_warp = p % kWarpPairs;
    const int k = first_column + p / kWarpPairs * 64 * kWords + in_warp % 8 * 8 * kWords + in_warp / 8 * 2;
    if (k < K) *reinterpret_cast<uint32_t*>(dx + int64_t(m) * K + k) = pack_pair<T>(sum.x, sum.y);
  }
  if (blocks > 1) cluster_barrier();  // nobody leaves while others read here
}

// Clusters of `blocks` thread blocks, one for each of `tiles` tiles.
template <int kTiles>
cudaLaunchConfig_t launch_config(int blocks, int tiles, cudaStream_t stream, cudaLaunchAttribute* cluster) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks), unsigned(tiles));
  config.blockDim = dim3(Shape<kTiles>::kThreads);
  config.dynamicSmemBytes = Shape<kTiles>::kSharedBytes;
  config.stream = stream;
  config.attrs = cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  return config;
}

// How many clusters of `blocks` thread blocks the current device runs at the same time; 0 where the code that it runs
// was compiled for GPUs without clusters. Asked of the driver once a kernel, device and size.
template <typename T, bool kNested, int kTiles>
cudaError_t clusters_at_once(int blocks, int* clusters) {
  using S = Shape<kTiles>;
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kMostBlocks + 1];  // one more than the count
  const auto kernel = linear_backward_few_rows_kernel<T, kNested, kTiles>;
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  std::atomic<int>* entry = device < kDevices ? &known[device][blocks] : nullptr;
  if (entry != nullptr && (*clusters = entry->load(std::memory_order_relaxed) - 1) >= 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  *clusters = 0;
  if (attributes.ptxVersion >= 90) {
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t config = launch_config<kTiles>(blocks, 1, nullptr, &cluster);
    if (cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config)) return error;
  }
  if (entry != nullptr) entry->store(*clusters + 1, std::memory_order_relaxed);
  return cudaSuccess;
}

template <typename T, bool kNested, int kTiles>
cudaError_t launch(const void* grad, const Nf4Weight& weight, void* dx, int M, int N, int K, cudaStream_t stream) {
  using S = Shape<kTiles>;
  const auto kernel = linear_backward_few_rows_kernel<T, kNested, kTiles>;
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes)) {
    return error;
  }
  const int tiles = int(ceil_div(K, kColumns)), chunks = int(ceil_div(N, kChunk));
  // blocks that share the rows: as many as run at once, with a chunk for each of their warps
  int blocks = std::clamp(chunks / S::kGroups, 1, kMostBlocks);
  while (blocks > 1) {
    int clusters = 0;
    if (cudaError_t error = clusters_at_once<T, kNested, kTiles>(blocks, &clusters)) return error;
    if (tiles <= clusters) break;
    --blocks;
  }
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config<kTiles>(blocks, tiles, stream, &cluster);
  return cudaLaunchKernelEx(&config, kernel, static_cast<const T*>(grad), weight, static_cast<T*>(dx), M, N, K);
}

template <typename T, bool kNested>
cudaError_t launch(const void* grad, const Nf4Weight& weight, void* dx, int M, int N, int K, cudaStream_t stream) {
  const auto chosen = M <= 8    ? launch<T, kNested, 1>
                      : M <= 16 ? launch<T, kNested, 2>
                      : M <= 32 ? launch<T, kNested, 4>
                                : launch<T, kNested, 8>;
  return chosen(grad, weight, dx, M, N, K, stream);
}

bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

bool linear_backward_few_rows_fit(const Nf4Weight& weight, Dtype dtype, const void* dx, int64_t M, int64_t N,
                                  int64_t K) {
  constexpr int64_t kMost = 1 << 23;  // a grid has at most 65,535 rows of 256 columns
  if (dtype == Dtype::kFloat32 || M > kFewBackwardRows || N > (int64_t(1) << 28) || K > kMost) return false;
  if (N * (K / 64) >= int64_t(1) << 32) return false;
  const bool scales = aligned(weight.absmax_codes ? static_cast<const void*>(weight.absmax_codes) : weight.absmax, 4);
  if (N % 4 != 0 || K % 64 != 0 || weight.log2_blocksize < 6 || !scales) return false;
  int device = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return false;
  if (shared < std::max({Shape<1>::kSharedBytes, Shape<2>::kSharedBytes, Shape<4>::kSharedBytes, Shape<8>::kSharedBytes})) {
    return false;
  }
  return aligned(dx, 4) && aligned(weight.packed, 16);
}

cudaError_t linear_nf4_backward_few_rows(const void* grad, const Nf4Weight& weight, Dtype dtype, void* dx, int64_t M,
                                         int64_t N, int64_t K, cudaStream_t stream) {
  if (M == 0 || K == 0) return cudaSuccess;
  const auto chosen = dtype == Dtype::kFloat16
                          ? (weight.absmax_codes ? launch<__half, true> : launch<__half, false>)
                          : (weight.absmax_codes ? launch<__nv_bfloat16, true> : launch<__nv_bfloat16, false>);
  return chosen(grad, weight, dx, int(M), int(N), int(K), stream);
}

}  // namespace qlora_engine::cuda
