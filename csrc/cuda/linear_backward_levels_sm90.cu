// Gradient of a product with a 4-bit weight on Hopper for up to a few hundred rows:
//   dX[m, k] = sum over n of dY[m, n] * W[n, k]  (+ dS A)
// A tile of dX transposed is W transposed (operand A, from registers) times dY transposed (operand B, a swizzled tile
// in shared memory). The sum runs over rows of W, each of which has a scale of its own: levels are looked up in pairs,
// those of two rows in one column, and such a pair is multiplied by the pair of the rows' scales.
//
//   block: 128 columns of W x kTokens rows of dY, a stage 64 to 256 rows of W       cluster: 1/s of W's rows each
//   warp 0       codes [rows, 64 bytes] and dY [kTokens, 64] for each warpgroup, into a ring of stages (TMA); behind dY
//                comes dS of an adapter
//   warps 2, 3   scales of every second stage, as pairs of rows, into gaps of the look-up table
//   warps 4 on   two or four warpgroups, each 64 rows of a stage: codes by ldmatrix, transposed; their sums are added
//                in the end, through shared memory. With 256 tokens two, each 64 of the columns
//
// Rounding: levels as in far_table.cuh; a scale is the sum of two 16-bit numbers, and the product of both is rounded.
// Weights are 1.1 times as far off as decoded ones, dX is 1.06 times as far off as from those.
//
// Bound: at few rows bytes of W and look-ups in shared memory; at 128 the tensor cores.
#include "dispatch.h"
#include "launch.h"
#include "launch_clusters.h"
#include "linear_backward_levels_sm90_consumer.cuh"
#include "tensor_map.h"

namespace qlora_engine::cuda {
namespace backward_levels {

template <typename T, int kTokens, int kGroups>
__global__ void __launch_bounds__(Tiling<T, kTokens, kGroups>::kThreads, 1)
    linear_backward_levels_sm90_kernel(const __grid_constant__ CUtensorMap grad_map,
                                       const __grid_constant__ CUtensorMap packed_map,
                                       const __grid_constant__ CUtensorMap S_map,
                                       const __grid_constant__ Problem problem) {
#ifdef QLORA_SM90
  using Tile = Tiling<T, kTokens, kGroups>;
  extern __shared__ char dynamic[];
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(kWholeWarp, int(threadIdx.x / 32), 0);
  const Block<Tile> block(problem, FarTable::address(shared_address(dynamic)));

  if (threadIdx.x == 0) {
    prefetch_map(&packed_map);
    prefetch_map(&grad_map);
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(block.full(i), 2);  // the copies, the scales
      barrier_init(block.empty(i), 4 * kGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 0) {
    registers_give_up<Tile::kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) load_stages(block, &packed_map, &grad_map, &S_map);
    } else if (warp == 1) {
      // nothing: a warpgroup is four warps
    } else if (problem.weight.absmax_codes) {
      decode_scales<true>(block, warp - 2, lane);
    } else {
      decode_scales<false>(block, warp - 2, lane);
    }
    __syncwarp();
    if (problem.splits > 1) {  // the consumers' two meetings
      cluster_sync();
      cluster_sync();
    }
  } else {
    registers_take<Tile::kConsumerRegisters>();
    FarTable::fill<Tile::kConsumers>(block.table, problem.levels, int(threadIdx.x) - 128);
    named_barrier(4, Tile::kConsumers);
    Consumer<Tile>(block, warpgroup - 1).run();
  }
#endif
}

namespace {

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <typename T, int kTokens, int kGroups>
cudaError_t launch(const void* grad, const Adapter& adapter, Problem problem, Dtype dtype, cudaStream_t stream) {
  using Tile = Tiling<T, kTokens, kGroups>;
  constexpr auto kernel = linear_backward_levels_sm90_kernel<T, kTokens, kGroups>;
  if (cudaError_t error = allow_shared_memory<kernel>(FarTable::kDynamicBytes)) return error;
  problem.levels = RoundedLevels::make<T>();
  problem.splits = int(std::min<int64_t>(problem.splits, ceil_div(problem.N, Tile::kStageRows)));  // a stage for each
  const int64_t token_tiles = ceil_div(problem.M, kTokens);
  const int64_t blocks = token_tiles * problem.column_tiles * problem.splits;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;

  const auto M = uint64_t(problem.M), N = uint64_t(problem.N), K = uint64_t(problem.K);
  CUtensorMap grad_map, packed_map, S_map{};
  const TileMap grad_tiles{grad, tile_type(dtype), N, M, N * 2, kGroupRows, kTokens, true};
  const TileMap packed_tiles{problem.weight.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, K / 2, N, K / 2,
                             Tile::kCodePitch, Tile::kStageRows, true};
  if (cudaError_t error = encode(grad_tiles, &grad_map)) return error;
  if (cudaError_t error = encode(packed_tiles, &packed_map)) return error;
  if (adapter.rank > 0) {
    const TileMap S_tiles{adapter.S, tile_type(dtype), uint64_t(adapter.rank), M, uint64_t(adapter.pitch) * 2,
                          kGroupRows, kTokens, true};
    if (cudaError_t error = encode(S_tiles, &S_map)) return error;
  }
  return launch_clusters(kernel, blocks, Tile::kThreads, FarTable::kDynamicBytes, problem.splits, stream, grad_map,
                         packed_map, S_map, problem);
}

template <typename T>
cudaError_t launch_config(const void* grad, const Adapter& adapter, const Problem& problem, Dtype dtype,
                          const FusedConfig& config, cudaStream_t stream) {
  switch (config.tokens) {
    case 8: return launch<T, 8, 4>(grad, adapter, problem, dtype, stream);
    case 16: return launch<T, 16, 4>(grad, adapter, problem, dtype, stream);
    case 32: return launch<T, 32, 4>(grad, adapter, problem, dtype, stream);
    case 64: return launch<T, 64, 2>(grad, adapter, problem, dtype, stream);
    case 128: return launch<T, 128, 2>(grad, adapter, problem, dtype, stream);
    default: return launch<T, 256, 2>(grad, adapter, problem, dtype, stream);
  }
}

}  // namespace
}  // namespace backward_levels

cudaError_t linear_nf4_backward_levels_sm90(const void* grad, const Nf4Weight& weight, const Adapter& adapter,
                                            Dtype dtype, void* dx, bool add, int64_t M, int64_t N, int64_t K,
                                            const FusedConfig& config, cudaStream_t stream) {
  using namespace backward_levels;
  if (!valid_backward_levels(config) || !aligned(grad, 16) || !aligned(weight.packed, 16) || adapter.rank % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  Problem problem{};
  problem.weight = weight;
  problem.A = adapter.B;
  problem.dx = dx;
  problem.M = int(M);
  problem.N = int(N);
  problem.K = int(K);
  problem.rank = int(adapter.rank);
  problem.log2_runs = weight.log2_blocksize - 6;
  problem.column_tiles = int(ceil_div(K, kColumns));
  problem.splits = config.splits;
  problem.whole_scales = weight.log2_blocksize == 6 && K % kColumns == 0 && weight.blocks <= UINT32_MAX &&
                         (weight.absmax_codes ? aligned(weight.absmax_codes, 2) : aligned(weight.absmax, 8));
  problem.adds = add;
  return dtype == Dtype::kFloat16 ? launch_config<__half>(grad, adapter, problem, dtype, config, stream)
                                  : launch_config<__nv_bfloat16>(grad, adapter, problem, dtype, config, stream);
}

}  // namespace qlora_engine::cuda
