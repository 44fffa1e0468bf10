// Product with a 4-bit weight on Hopper: y[m, n] = sum_k x[m, k] * round(level[code[n, k]] * absmax[n, block(k)])
// (+ bias[n]), without a decoded copy of W. With an adapter y += S B^T, S [M, r] and B [N, r].
//
// The roles are swapped: a tile of y transposed is W (operand A, decoded straight into registers) times x transposed
// (operand B, a swizzled tile in shared memory). No decoded tile exists even in shared memory.
//
//   block: 128 rows of W x kTokens rows of x, 64 columns a stage    cluster of 2: neighbouring rows of W, one x tile
//                                                                   cluster of s: the same tile, 1/s of K each
//   warp 0       copies of x [kTokens, 64] and of packed W [128, 32 bytes] into a ring of stages (TMA)
//   warps 1-3    a stage each in turn: decode its 128 scales, and write every row's 16 products level * absmax, rounded
//                once, as a table of low and a table of high bytes: round(level * absmax) is bitsandbytes' own value
//   warps 4-11   two warpgroups of 64 rows: look their rows' codes up by byte permutations, 24 instructions for 8
//                weights and no arithmetic, and multiply (wgmma m64nNk16, float32 sums)
//
//   A registers of bitsandbytes' own byte order: lane t of a quad takes byte t of each of a row's eight words, which is
//   columns 8 w + 2 t and 8 w + 2 t + 1, just what A holds.
//   Many tokens (128, 256): one block a multiprocessor; the products of K-tile k run while K-tile k + 1 is decoded into
//   the other set of A registers. Few (16, 32, 64): two blocks a multiprocessor, one set.
//   An adapter's products come last, in the same sums: a lane loads its rows of B into A registers, and S comes as tiles
//   of 64 columns to where y will be staged. Both are under way while the last K-tiles are multiplied.
//   A cluster that divides K leaves its partial sums in shared memory; each block adds up a part of the tile in the
//   order of the splits, so that results repeat.
//
// Bound: at many rows the tensor cores, at few the decoding.
#include "dispatch.h"
#include "launch.h"
#include "launch_clusters.h"
#include "linear_sm90_consumer.cuh"
#include "linear_sm90_producer.cuh"
#include "tensor_map.h"

namespace qlora_engine::cuda {
namespace sm90 {

template <typename T, int kTokens, int kStages, int kPair>
__global__ void __launch_bounds__(kThreads, Tiling<T, kTokens, kStages, kPair>::kResident)
    linear_sm90_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap packed_map,
                       const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap S_map,
                       const FusedProblem p) {
#ifdef QLORA_SM90
  using Tile = Tiling<T, kTokens, kStages, kPair>;
  extern __shared__ char memory[];
  // static, so that the host can see whether this body was compiled (see compiled_for_sm90)
  __shared__ uint64_t barriers[2 * kStages + 2];
  const uint32_t base = (shared_address(memory) + 1023u) & ~1023u;
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(kWholeWarp, int(threadIdx.x / 32), 0);
  const int cluster = p.splits > 1 ? p.splits : kPair;

  Block<Tile> block;
  block.x = base + Tile::kX;
  block.out = base + Tile::kOut;
  block.packed = base + Tile::kPacked;
  block.table = base + Tile::kTable;
  block.map = base + Tile::kMap;
  block.full = shared_address(barriers);
  block.empty = block.full + kStages * 8;
  block.adapter = block.empty + kStages * 8;
  block.rank = cluster > 1 ? cluster_rank() : 0;
  block.first_tile = int(blockIdx.x) / cluster;
  block.tile_step = int(gridDim.x) / cluster;
  block.tiles = p.token_tiles * p.row_tiles;
  block.split = p.splits > 1 ? int(block.rank) : 0;

  if (threadIdx.x < 256) store_shared_float(block.map + threadIdx.x * 4, __ldg(kDynamicMap + threadIdx.x));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(block.full + i * 8, 2);  // the copies, the tables
      barrier_init(block.empty + i * 8, kConsumerWarps * kPair);
    }
    for (int i = 0; i < 2; ++i) barrier_init(block.adapter + i * 8, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (cluster > 1) cluster_sync();

  if (warpgroup == 0) {
    registers_give_up<Tile::kProducerRegisters>();
    if (warp > 0) {
      build_tables(p, block, warp - 1, lane);
    } else if (lane == 0) {
      load_tiles(p, block, &x_map, &packed_map);
    }
    __syncwarp();
    if (p.splits > 1) {  // the consumers' two meetings
      cluster_sync();
      cluster_sync();
    }
  } else {
    registers_take<Tile::kConsumerRegisters>();
    Consumer<Tile>(p, block, warpgroup - 1, &S_map).run(&y_map);
  }
  if (kPair > 1) cluster_sync();  // nothing arrives at a block that has ended
#endif
}

}  // namespace sm90

namespace {

constexpr int kDevices = 64;

// 16-byte alignment of everything that tile copies touch.
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T, int kTokens, int kStages, int kPair>
cudaError_t launch(const void* x, const Nf4Weight& weight, const Adapter& adapter, sm90::FusedProblem p, Dtype dtype,
                   cudaStream_t stream) {
  using Tile = sm90::Tiling<T, kTokens, kStages, kPair>;
  const auto kernel = sm90::linear_sm90_kernel<T, kTokens, kStages, kPair>;
  int device = 0, multiprocessor_count = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = multiprocessors(&multiprocessor_count)) return error;
  static std::atomic<bool> prepared[kDevices];
  if (device >= kDevices || !prepared[device].load(std::memory_order_relaxed)) {
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kBytes)) {
      return error;
    }
    if (device < kDevices) prepared[device].store(true, std::memory_order_relaxed);
  }

  p.token_tiles = (p.M + kTokens - 1) / kTokens;
  p.row_tiles = (p.N + sm90::kTileRows * kPair - 1) / (sm90::kTileRows * kPair);
  const int cluster = p.splits > 1 ? p.splits : kPair;
  const int64_t tiles = int64_t(p.token_tiles) * p.row_tiles;
  if (tiles * cluster > INT32_MAX) return cudaErrorInvalidValue;
  // Without splits blocks stay and take tile after tile
  const int64_t at_once = int64_t(multiprocessor_count) * Tile::kResident / cluster;
  const int64_t clusters = p.splits > 1 ? tiles : std::min(tiles, at_once);

  const uint64_t K = uint64_t(p.k_tiles) * sm90::kTileColumns;
  const auto M = uint64_t(p.M), N = uint64_t(p.N);
  CUtensorMap x_map, packed_map, y_map{}, S_map{};
  const TileMap x_tiles{x, tile_type(dtype), K, M, K * 2, sm90::kTileColumns, kTokens / kPair, true};
  const TileMap packed_tiles{
      weight.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, K / 2, N, K / 2, sm90::kTileColumns / 2, sm90::kTileRows, true};
  const TileMap y_tiles{p.y, tile_type(dtype), N, M, N * 2, 64, sm90::kStoreTokens, true};
  if (cudaError_t error = encode(x_tiles, &x_map)) return error;
  if (cudaError_t error = encode(packed_tiles, &packed_map)) return error;
  if (p.store_tiles) {
    if (cudaError_t error = encode(y_tiles, &y_map)) return error;
  }
  if (adapter.rank > 0) {
    const TileMap S_tiles{adapter.S, tile_type(dtype), uint64_t(adapter.rank), M, uint64_t(adapter.pitch) * 2,
                          sm90::kTileColumns, kTokens, true};
    if (cudaError_t error = encode(S_tiles, &S_map)) return error;
  }

  return launch_clusters(kernel, clusters * cluster, sm90::kThreads, Tile::kBytes, cluster, stream, x_map, packed_map,
                         y_map, S_map, p);
}

template <typename T>
cudaError_t launch_config(const void* x, const Nf4Weight& weight, const Adapter& adapter, const sm90::FusedProblem& p,
                          Dtype dtype, const FusedConfig& config, cudaStream_t stream) {
  switch (config.tokens) {
    case 16: return launch<T, 16, 8, 1>(x, weight, adapter, p, dtype, stream);
    case 32: return launch<T, 32, 8, 1>(x, weight, adapter, p, dtype, stream);
    case 64: return launch<T, 64, 4, 1>(x, weight, adapter, p, dtype, stream);
    case 128: return launch<T, 128, 8, 1>(x, weight, adapter, p, dtype, stream);
    default:
      return config.pair == 2 ? launch<T, 256, 4, 2>(x, weight, adapter, p, dtype, stream)
                              : launch<T, 256, 4, 1>(x, weight, adapter, p, dtype, stream);
  }
}

}  // namespace

bool fused_available() {
  static std::atomic<int> known[kDevices];  // 0: not asked yet, 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (int state = known[device].load(std::memory_order_relaxed)) return state == 2;
  int major = 0, minor = 0;
  cudaFuncAttributes attributes = {};
  // Where the library has no code for sm_90a the kernel's body is empty, and has no barriers in shared memory
  const bool available =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
      minor == 0 &&
      cudaFuncGetAttributes(&attributes, sm90::linear_sm90_kernel<__nv_bfloat16, 64, 4, 1>) == cudaSuccess &&
      attributes.sharedSizeBytes > 0;
  cudaGetLastError();
  known[device].store(available ? 2 : 1, std::memory_order_relaxed);
  return available;
}

bool fused_fits(const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K) {
  const int64_t blocksize = int64_t(1) << weight.log2_blocksize;
  constexpr int64_t kMost = int64_t(1) << 30;  // rows and columns are counted in 32 bits, elements in 64
  if (dtype == Dtype::kFloat32 || M < 1 || N < 1 || K < 1 || M > kMost || N > kMost || K > kMost) return false;
  return blocksize >= sm90::kTileColumns && K % blocksize == 0 && aligned(weight.packed) && fused_available();
}

cudaError_t linear_nf4_sm90(const void* x, const Nf4Weight& weight, const void* bias, const Adapter& adapter,
                            Dtype dtype, void* y, int64_t M, int64_t N, int64_t K, const FusedConfig& config,
                            cudaStream_t stream) {
  if (!valid_config(config) || !aligned(x) || adapter.rank % 8 != 0) return cudaErrorInvalidValue;
  sm90::FusedProblem p{};
  p.absmax = weight.absmax;
  p.absmax_codes = weight.absmax_codes;
  p.nested_absmax = weight.nested_absmax;
  p.nested_offset = weight.nested_offset;
  p.bias = bias;
  p.y = y;
  p.M = int(M);
  p.N = int(N);
  p.log2_tiles_a_scale = weight.log2_blocksize - 6;
  p.k_tiles = int(K / sm90::kTileColumns);
  p.splits = config.splits;
  p.store_tiles = N % 8 == 0 && aligned(y);
  p.lora_B = adapter.B;
  p.lora_rank = int(adapter.rank);
  return dtype == Dtype::kFloat16 ? launch_config<__half>(x, weight, adapter, p, dtype, config, stream)
                                  : launch_config<__nv_bfloat16>(x, weight, adapter, p, dtype, config, stream);
}

}  // namespace qlora_engine::cuda
