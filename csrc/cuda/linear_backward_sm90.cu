// Gradient of a product with a 4-bit weight: dX[m, k] = sum_n dY[m, n] * W[n, k], W decoded inside the product. sm_90a.
//
//   thread block: a tile of dX, transposed: 128 columns k x 256 tokens m; steps of 64 rows n of W
//
//        packed W [64 n, 128 k]  --cp.async-->  warpgroup 0 decodes   --st.shared-->  decoded [64 n, 128 k], swizzled
//        dY [256 m, 64 n]        --TMA------------------------------------------->  tile, swizzled
//                          warpgroups 1, 2: wgmma m64n256k16, 64 columns each: A = decoded W transposed (MN-major), B = dY
//
//   A decoding thread owns one row n and 64 columns, that is one scale: the 16 products of its block are a table in
//   its registers, and the elements are looked up by prmt. Every element is round(level * absmax), as a dequantized
//   weight has it, and the sums run in cuBLAS's order: results are equal to dequantize + cuBLAS, bit for bit, as long
//   as the sum is in one part.
//   Cluster of two: two blocks with the same columns and neighbouring tokens. Each decodes every second step and
//   copies the result into the other's shared memory.
//   An adapter, dX += dS A: further steps, over its rank, in which a tile of dS is copied where that of dY would be, and
//   one of A [64 r, 128 k] where decoded W would.
//   Few tiles: the sum over N is cut into parts, whose float32 partial sums are added in a fixed order by the block
//   that comes last.
//
// Barriers of a stage: full = dY is there (and, decoded by the other block, W) and the decoding warps have written;
// empty = all eight multiplying warps have read; ready = the other block waits for this block's decoded W.
//
// Bound: arithmetic from about 500 tokens on, 1,024 cycles a step. Reached on an H100 80GB, 4096 x 4096 and 4,096
// tokens: 210 us in a cluster, 240 without, where cuBLAS needs 176 with a decoded weight (0.84 and 0.73 of its speed).
// What limits it is shared memory: the products and the copies of dY take 0.9 of its bandwidth, and the decoded tile
// wants the rest. Without the stores of decoded W the same kernel takes 176 us, with the stores but without any
// arithmetic of decoding 204; a decoding thread alone needs about 1,600 cycles for its 64 elements, of which two have
// 2,048 in a cluster. The fence that orders its stores before the products is 0.16 of that.
#include <algorithm>
#include <atomic>

#include "launch.h"
#include "launch_clusters.h"
#include "linear_backward_sm90.cuh"
#include "tensor_map.h"

namespace qlora_engine::cuda {
namespace backward {
namespace {

// Tiles in global memory: dY, dX, and an adapter's dS and A.
struct Maps {
  CUtensorMap grad, out, grad_S, A;
};

#ifdef QLORA_SM90

using namespace sm90;

// Barriers, each kStages times.
struct Barriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t full(int stage) const { return base + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return base + (kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t ready(int stage) const { return base + (2 * kStages + stage) * 8; }
};

template <typename T, bool kNested, int kCluster>
__device__ __forceinline__ void decode(const Nf4Weight& weight, const Work& work, uint32_t base, Barriers barriers,
                                       int rank) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint32_t row_at = base + kGradBytes + thread / 64 * (kDecodedBytes / 2) + thread % 64 * 128;
  const uint32_t swizzle = thread % 8 * 16;

  Fetch<kNested> fetch(weight, work, base + kFetchedAt, base + kMapAt, thread);
  Walk ahead(work, blockIdx.x / kCluster, gridDim.x / kCluster);
  if (rank > 0) ahead.advance(rank);
  int begun = 0;
  auto begin = [&](int slot) {
    fetch.begin(ahead, slot);
    if (ahead.done()) return;
    ++begun;
    ahead.advance(kCluster);
  };
#pragma unroll
  for (int i = 0; i < kFetched; ++i) begin(i);

  uint4 words[2];
  fetch.read(0, words);
  fetch.look_up();
  int slot = 0;
  for (int i = 0; i < begun; ++i) {
    const int flat = i * kCluster + rank, stage = flat % kStages, use = flat / kStages;
    const ProductTable<T> table(fetch.absmax());
    const bool adapter = fetch.adapter();
    const uint32_t codes[8] = {words[0].x, words[0].y, words[0].z, words[0].w,
                               words[1].x, words[1].y, words[1].z, words[1].w};
    begin(slot);
    slot = slot + 1 == kFetched ? 0 : slot + 1;
    fetch.read(slot, words);

    if (use > 0) barrier_wait(barriers.empty(stage), (use - 1) & 1);
    // also: the copy of this stage's last content has been read
    if constexpr (kCluster > 1) barrier_wait(barriers.ready(stage), use & 1);
    const uint32_t to = row_at + stage * kStageBytes;
    if (!adapter) {
#pragma unroll
      for (int j = 0; j < 4; ++j) store_shared_128(to + (j * 16 ^ swizzle), table.decode(codes[j]));
    }
    fetch.look_up();
    if (!adapter) {
#pragma unroll
      for (int j = 4; j < 8; ++j) store_shared_128(to + (j * 16 ^ swizzle), table.decode(codes[j]));
    }
    proxy_fence();
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(barriers.full(stage));
      if (kCluster > 1 && !adapter) {  // a warp's rows are contiguous
        const uint32_t chunk = base + stage * kStageBytes + kGradBytes + warp * (kDecodedBytes / 4);
        bulk_copy_remote(chunk, chunk, kDecodedBytes / 4, barriers.full(stage), rank ^ 1);
      }
    }
    __syncwarp();
  }
}

template <typename T, int kCluster>
__device__ __forceinline__ void multiply(const Maps& maps, const Work& work, uint32_t base, Barriers barriers,
                                         int rank, float* partials, int32_t* counters) {
  const int lane = threadIdx.x % 32, group = threadIdx.x / 128 - 1;
  const bool loads = threadIdx.x / 32 == 4;  // this warp also fetches dY
  const int first = blockIdx.x / kCluster, stride = gridDim.x / kCluster;

  Walk ahead(work, first, stride);
  auto load = [&](int flat, bool wait) {
    if (ahead.done()) return;
    if (lane == 0) {
      const int stage = flat % kStages;
      if (wait) barrier_wait(barriers.empty(stage), (flat / kStages - 1) & 1);
      const bool decoded_here = flat % kCluster == rank;
      const int step = ahead.step(), token = (ahead.unit().token_tile * kCluster + rank) * kTokens;
      const uint32_t full = barriers.full(stage), to = base + stage * kStageBytes;
      if (step < work.weight_steps) {
        barrier_arrive_expecting(full, decoded_here ? kGradBytes : kGradBytes + kDecodedBytes);
        tile_load(to, &maps.grad, step * kStep, token, full);
      } else {
        const int r = (step - work.weight_steps) * kStep, column = ahead.unit().column_tile * kColumns;
        barrier_arrive_expecting(full, kGradBytes + kDecodedBytes);
        tile_load(to, &maps.grad_S, r, token, full);
        tile_load(to + kGradBytes, &maps.A, column, r, full);
        tile_load(to + kGradBytes + kDecodedBytes / 2, &maps.A, column + 64, r, full);
      }
      if (!decoded_here) barrier_arrive_remote(barriers.ready(stage), rank ^ 1);
    }
    ahead.advance(1);
  };
  if (loads) {
    for (int i = 0; i < kStages; ++i) load(i, false);
    __syncwarp();
  }

  int flat = 0;
  auto release = [&](int done) {
    if (lane == 0) barrier_arrive(barriers.empty(done % kStages));
    if (loads) {
      load(done + kStages, true);
      __syncwarp();
    }
  };

  float sums[kTokens / 2];
  const uint64_t grad_tile = swizzled_tile(base);
  const uint64_t decoded_tile = swizzled_tile(base + kGradBytes + group * (kDecodedBytes / 2));
  for (int index = first; index < work.units; index += stride) {
    const Unit unit = unit_at(work, index);
    for (int step = unit.begin; step < unit.end; ++step, ++flat) {
      const int stage = flat % kStages;
      barrier_wait(barriers.full(stage), flat / kStages & 1);
      const uint64_t grad = grad_tile + uint64_t(stage * (kStageBytes / 16));
      const uint64_t decoded = decoded_tile + uint64_t(stage * (kStageBytes / 16));
      product_fence();
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i) {  // 16 rows of W: 2048 bytes of its tile, 32 bytes of a row of dY
        Product<T, kTokens>::template ss<1, 0>(sums, decoded + i * 128, grad + i * 2, i > 0 || step > unit.begin);
      }
      product_commit();
      product_wait<1>();
      if (step > unit.begin) release(flat - 1);
    }
    product_wait<0>();
    release(flat - 1);

    const int token_tile = unit.token_tile * kCluster + rank;
    const int tile = index / work.splits * kCluster + rank;
    if (work.splits > 1 &&
        !add_parts(sums, work, tile, unit.split, group, partials, counters, base + kFlagsAt + group * 4)) {
      continue;
    }
    store_tile<T>(sums, work, &maps.out, unit.column_tile * kColumns + group * 64, token_tile * kTokens, group,
                  base + kOutAt + group * 2 * kOutBytes);
  }
  if (threadIdx.x % 128 == 0) stores_wait();
}

#endif  // QLORA_SM90

template <typename T, bool kNested, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    linear_backward_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Nf4Weight weight,
                           const __grid_constant__ Work work, float* __restrict__ partials, int32_t* __restrict__ counters) {
#ifdef QLORA_SM90
  extern __shared__ uint8_t shared[];
  const uint32_t base = (shared_address(shared) + 1023u) & ~1023u;
  const Barriers barriers{base + kBarriersAt};
  const int rank = kCluster > 1 ? int(cluster_rank()) : 0;

  if (threadIdx.x < 256) store_shared_float(base + kMapAt + threadIdx.x * 4, kDynamicMap[threadIdx.x]);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(barriers.full(i), i % kCluster == rank ? 5 : 1);  // the fetching warp, and four decoding ones
      barrier_init(barriers.empty(i), 8);
      barrier_init(barriers.ready(i), 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();

  if (threadIdx.x < 128) {
    registers_give_up<136>();
    decode<T, kNested, kCluster>(weight, work, base, barriers, rank);
  } else {
    registers_take<184>();
    multiply<T, kCluster>(maps, work, base, barriers, rank, partials, counters);
  }
  if constexpr (kCluster > 1) {  // nobody leaves while the other may still write here
    __syncwarp();
    cluster_sync();
  }
#endif
}

template <typename T, bool kNested, int kCluster>
cudaError_t launch(const Maps& maps, const Nf4Weight& weight, const Work& work, float* partials, int32_t* counters,
                   cudaStream_t stream) {
  const auto kernel = linear_backward_kernel<T, kNested, kCluster>;
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
    return error;
  }
  int count = 0;
  if (cudaError_t error = multiprocessors(&count)) return error;
  const int blocks = std::min(count / kCluster, work.units) * kCluster;
  return launch_clusters(kernel, blocks, kThreads, kSharedBytes, kCluster, stream, maps, weight, work, partials,
                         counters);
}

template <typename T>
cudaError_t launch(int cluster, const Maps& maps, const Nf4Weight& weight, const Work& work, float* partials,
                   int32_t* counters, cudaStream_t stream) {
  const auto chosen = weight.absmax_codes ? (cluster > 1 ? launch<T, true, 2> : launch<T, true, 1>)
                                          : (cluster > 1 ? launch<T, false, 2> : launch<T, false, 1>);
  return chosen(maps, weight, work, partials, counters, stream);
}

// Whether this library has the kernels' code for the current device. Where it has only other code for it (9.0
// without the "a"), they are empty, which their registers tell.
cudaError_t code_is_there(bool* there) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 1: no, 2: yes
  int device = 0, major = 0, minor = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < kDevices && known[device].load(std::memory_order_relaxed) != 0) {
    *there = known[device].load(std::memory_order_relaxed) == 2;
    return cudaSuccess;
  }
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  *there = false;
  if (major == 9 && minor == 0) {
    cudaFuncAttributes attributes;
    if (cudaError_t error = cudaFuncGetAttributes(&attributes, linear_backward_kernel<__nv_bfloat16, true, 1>)) {
      return error;
    }
    *there = attributes.numRegs > 128;
  }
  if (device < kDevices) known[device].store(*there ? 2 : 1, std::memory_order_relaxed);
  return cudaSuccess;
}

bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

Work cut(const BackwardPlan& plan, int64_t M, int64_t N, int64_t K, int64_t rank) {
  Work work{};
  work.M = int(M), work.N = int(N), work.K = int(K);
  work.weight_steps = int(ceil_div(N, kStep));
  work.steps = work.weight_steps + int(ceil_div(rank, kStep));
  work.column_tiles = int(ceil_div(K, kColumns));
  work.token_tiles = int(ceil_div(M, kTokens * plan.cluster));
  work.splits = plan.splits;
  work.group = plan.group;
  work.units = work.token_tiles * work.column_tiles * work.splits;
  return work;
}

}  // namespace
}  // namespace backward

bool linear_backward_sm90_fits(const Nf4Weight& weight, Dtype dtype, const void* dx, int64_t M, int64_t N,
                               int64_t K) {
  using backward::aligned;
  constexpr int64_t kMost = int64_t(1) << 30;  // rows and columns are counted in 32 bits, as are runs of 64 elements
  if (dtype == Dtype::kFloat32 || M > kMost || N > kMost || K > kMost || N * (K / 64) >= int64_t(1) << 32) return false;
  if (ceil_div(M, backward::kTokens) * ceil_div(K, backward::kColumns) > kMost / 64) return false;
  const bool scales = weight.absmax_codes ? aligned(weight.absmax_codes, 4) : aligned(weight.absmax, 4);
  if (N % 8 != 0 || K % 64 != 0 || weight.log2_blocksize < 6) return false;
  if (!aligned(dx, 16) || !aligned(weight.packed, 16) || !scales) return false;
  bool there = false;
  return backward::code_is_there(&there) == cudaSuccess && there;
}

ProductScratch linear_backward_sm90_scratch(const BackwardPlan& plan, int64_t M, int64_t K) {
  if (plan.splits == 1) return {0, 0};
  const int64_t tiles = ceil_div(M, backward::kTokens * plan.cluster) * plan.cluster * ceil_div(K, backward::kColumns);
  return {tiles * plan.splits * backward::kTokens * backward::kColumns, tiles * 2};
}

cudaError_t linear_nf4_backward_sm90(const void* grad, const Nf4Weight& weight, const Adapter& adapter, Dtype dtype,
                                     void* dx, bool add, int64_t M, int64_t N, int64_t K, const BackwardPlan& plan,
                                     float* partials, int32_t* counters, cudaStream_t stream) {
  using namespace backward;
  if (M == 0 || K == 0) return cudaSuccess;
  Work work = cut(plan, M, N, K, adapter.rank);
  work.adds = add;
  if (plan.cluster < 1 || plan.cluster > 2 || plan.splits < 1 || plan.splits > work.weight_steps || plan.group < 1) {
    return cudaErrorInvalidValue;
  }
  const CUtensorMapDataType type = tile_type(dtype);
  Maps maps{};
  const TileMap grad_tiles{grad, type, uint64_t(N), uint64_t(M), uint64_t(N) * 2, kStep, kTokens, true};
  const TileMap out_tiles{dx, type, uint64_t(K), uint64_t(M), uint64_t(K) * 2, 64, kOutTokens, true};
  if (cudaError_t error = encode(grad_tiles, &maps.grad)) return error;
  if (cudaError_t error = encode(out_tiles, &maps.out)) return error;
  if (adapter.rank > 0) {
    const auto rank = uint64_t(adapter.rank);
    const TileMap S_tiles{adapter.S, type, rank, uint64_t(M), uint64_t(adapter.pitch) * 2, kStep, kTokens, true};
    const TileMap A_tiles{adapter.B, type, uint64_t(K), rank, uint64_t(K) * 2, 64, kStep, true};
    if (cudaError_t error = encode(S_tiles, &maps.grad_S)) return error;
    if (cudaError_t error = encode(A_tiles, &maps.A)) return error;
  }
  if (plan.splits > 1) {
    const size_t bytes = size_t(linear_backward_sm90_scratch(plan, M, K).counters) * sizeof(int32_t);
    if (cudaError_t error = cudaMemsetAsync(counters, 0, bytes, stream)) return error;
  }
  return dtype == Dtype::kFloat16
             ? launch<__half>(plan.cluster, maps, weight, work, partials, counters, stream)
             : launch<__nv_bfloat16>(plan.cluster, maps, weight, work, partials, counters, stream);
}

}  // namespace qlora_engine::cuda
