// Product with a 4-bit weight on Hopper for up to a few hundred rows of x:
//   y[m, n] = sum over blocks b of scale[n, b] * sum over k in b of x[m, k] * level[code[n, k]]  (+ S B^T) (+ bias)
// As in linear_sm90.cu a tile of y transposed is W (operand A, from registers) times x transposed (operand B, a swizzled
// tile in shared memory). Here operand A is the levels, not the weights: a pair of codes becomes a register by one
// permutation and one look-up, and each block's float32 sums are multiplied by its scale.
//
//   block: 128 rows of W x kTokens rows of x, a stage 256 columns (128 beside 128 rows of x)     cluster: 1/s of K each
//   warp 0       codes [128, 128 bytes] and x [kTokens, 64] four times into a ring of stages (TMA); behind x comes S of an
//                adapter
//   warps 2, 3   scales of every second stage, into gaps of the look-up table
//   warps 4 on   pairs of warpgroups, 64 rows each. Up to 16 tokens two pairs share out the K-tiles of a stage, so that
//                four warps a scheduler hide each other's latencies; the second's sums are added to the first's
//
// Levels are rounded to x's type, a factor having been chosen so that this changes them little (far_table.cuh): less than
// rounding each product of level and scale, as a decoded weight has it.
//
// Bound: at few rows bytes of W, and look-ups in shared memory; at 128 the tensor cores.
#include "dispatch.h"
#include "launch.h"
#include "launch_clusters.h"
#include "linear_levels_sm90_consumer.cuh"
#include "tensor_map.h"

namespace qlora_engine::cuda {
namespace sm90 {

template <typename T, int kTokens, int kHalves>
__global__ void __launch_bounds__(LevelsTiling<T, kTokens, kHalves>::kThreads, 1)
    linear_levels_sm90_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap packed_map,
                              const __grid_constant__ CUtensorMap S_map, const __grid_constant__ LevelsProblem problem) {
#ifdef QLORA_SM90
  using Tile = LevelsTiling<T, kTokens, kHalves>;
  extern __shared__ char dynamic[];
  const FusedProblem& p = problem.of;
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(kWholeWarp, int(threadIdx.x / 32), 0);
  const LevelsBlock<Tile> block{p, FarTable::address(shared_address(dynamic)), int(blockIdx.x) / p.splits,
                                p.splits > 1 ? int(cluster_rank()) : 0};

  if (threadIdx.x == 0) {
    prefetch_map(&packed_map);
    prefetch_map(&x_map);
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(block.full(i), 2);  // the copies, the scales
      barrier_init(block.empty(i), 8 * kHalves);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(block.sums_full(i), 4);
      barrier_init(block.sums_empty(i), 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (p.splits > 1) cluster_sync();

  if (warpgroup == 0) {
    registers_give_up<Tile::kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) load_stages(block, &packed_map, &x_map, &S_map);
    } else if (warp == 1) {
      // nothing: a warpgroup is four warps
    } else if (problem.weight.absmax_codes) {
      decode_scales<true>(problem, block, warp - 2, lane);
    } else {
      decode_scales<false>(problem, block, warp - 2, lane);
    }
    __syncwarp();
    if (p.splits > 1) {  // the consumers' two meetings
      cluster_sync();
      cluster_sync();
    }
  } else {
    registers_take<Tile::kConsumerRegisters>();
    FarTable::fill<Tile::kConsumers>(block.table, problem.levels, int(threadIdx.x) - 128);
    named_barrier(4, Tile::kConsumers);
    LevelsConsumer<Tile>(problem, block, warpgroup - 1).run();
  }
#endif
}

}  // namespace sm90

namespace {

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <typename T, int kTokens, int kHalves>
cudaError_t launch(const void* x, const Adapter& adapter, sm90::LevelsProblem problem, Dtype dtype, cudaStream_t stream) {
  using Tile = sm90::LevelsTiling<T, kTokens, kHalves>;
  constexpr auto kernel = sm90::linear_levels_sm90_kernel<T, kTokens, kHalves>;
  if (cudaError_t error = allow_shared_memory<kernel>(FarTable::kDynamicBytes)) return error;
  int count = 0;
  if (cudaError_t error = multiprocessors(&count)) return error;

  sm90::FusedProblem& p = problem.of;
  problem.levels = RoundedLevels::make<T>();
  p.token_tiles = (p.M + kTokens - 1) / kTokens;
  p.row_tiles = (p.N + sm90::kTileRows - 1) / sm90::kTileRows;
  const int cluster = p.splits;
  const int64_t tiles = int64_t(p.token_tiles) * p.row_tiles;
  if (tiles * cluster > INT32_MAX) return cudaErrorInvalidValue;
  // Without splits blocks stay and take tile after tile
  const int64_t clusters = p.splits > 1 ? tiles : std::min<int64_t>(tiles, count);

  const uint64_t K = uint64_t(p.k_tiles) * sm90::kTileColumns;
  const auto M = uint64_t(p.M), N = uint64_t(p.N);
  CUtensorMap x_map, packed_map, S_map{};
  const TileMap x_tiles{x, tile_type(dtype), K, M, K * 2, sm90::kTileColumns, kTokens, true};
  const TileMap packed_tiles{problem.weight.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, K / 2, N, K / 2,
                             Tile::kCodePitch, sm90::kTileRows, true};
  if (cudaError_t error = encode(x_tiles, &x_map)) return error;
  if (cudaError_t error = encode(packed_tiles, &packed_map)) return error;
  if (adapter.rank > 0) {
    const TileMap S_tiles{adapter.S, tile_type(dtype), uint64_t(adapter.rank), M, uint64_t(adapter.pitch) * 2,
                          sm90::kTileColumns, kTokens, true};
    if (cudaError_t error = encode(S_tiles, &S_map)) return error;
  }

  return launch_clusters(kernel, clusters * cluster, Tile::kThreads, FarTable::kDynamicBytes, cluster, stream, x_map,
                         packed_map, S_map, problem);
}

template <typename T>
cudaError_t launch_config(const void* x, const Adapter& adapter, const sm90::LevelsProblem& problem, Dtype dtype,
                          const FusedConfig& config, cudaStream_t stream) {
  switch (config.tokens) {
    case 8: return launch<T, 8, 2>(x, adapter, problem, dtype, stream);
    case 16: return launch<T, 16, 2>(x, adapter, problem, dtype, stream);
    case 32: return launch<T, 32, 1>(x, adapter, problem, dtype, stream);
    case 64: return launch<T, 64, 1>(x, adapter, problem, dtype, stream);
    default: return launch<T, 128, 1>(x, adapter, problem, dtype, stream);
  }
}

}  // namespace

cudaError_t linear_nf4_levels_sm90(const void* x, const Nf4Weight& weight, const void* bias, const Adapter& adapter,
                                   Dtype dtype, void* y, int64_t M, int64_t N, int64_t K, const FusedConfig& config,
                                   cudaStream_t stream) {
  if (!valid_levels(config) || !aligned(x, 16) || adapter.rank % 8 != 0) return cudaErrorInvalidValue;
  sm90::LevelsProblem problem{};
  sm90::FusedProblem& p = problem.of;
  p.bias = bias;
  p.y = y;
  p.M = int(M);
  p.N = int(N);
  p.log2_tiles_a_scale = weight.log2_blocksize - 6;
  p.k_tiles = int(K / sm90::kTileColumns);
  p.splits = config.splits;
  p.lora_B = adapter.B;
  p.lora_rank = int(adapter.rank);
  problem.weight = weight;
  const int scales = config.tokens >= 128 ? 2 : 4;  // a row and stage
  problem.whole_scales =
      weight.log2_blocksize == 6 && p.k_tiles % scales == 0 && weight.blocks <= UINT32_MAX &&
      (weight.absmax_codes ? aligned(weight.absmax_codes, scales) : aligned(weight.absmax, scales * 4));
  problem.store_vectors = N % 8 == 0 && aligned(y, 16);
  return dtype == Dtype::kFloat16 ? launch_config<__half>(x, adapter, problem, dtype, config, stream)
                                  : launch_config<__nv_bfloat16>(x, adapter, problem, dtype, config, stream);
}

}  // namespace qlora_engine::cuda
