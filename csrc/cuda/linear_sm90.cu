// Product with a 4-bit weight on Hopper: y[m, n] = sum_k x[m, k] * round(level[code[n, k]] * absmax[n, block(k)])
// (+ bias[n]), without a decoded copy of W.
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
//   A cluster that divides K leaves its partial sums in shared memory; each block adds up a part of the tile in the
//   order of the splits, so that results repeat.
//
// Bound: at many rows the tensor cores, at few the decoding.
#include "dispatch.h"
#include "launch.h"
#include "linear_sm90.cuh"
#include "tensor_map.h"

namespace qlora_engine::cuda {
namespace sm90 {

#ifdef QLORA_SM90

// Addresses of this block's shared memory, and what all warps know.
template <typename Tile>
struct Block {
  uint32_t x, out, packed, table, map;
  uint32_t full, empty;  // barriers, 8 bytes a stage
  uint32_t rank;         // in the cluster
  int first_tile, tile_step, tiles, split;

  __device__ __forceinline__ WorkUnit unit(const FusedProblem& p, int tile) const {
    return work_unit<Tile::kUnroll>(p, tile, split);
  }
  __device__ __forceinline__ int row0(const WorkUnit& unit) const {
    return (unit.row_tile * Tile::kPair + (Tile::kPair > 1 ? int(rank) : 0)) * kTileRows;
  }
};

// Warp 0, one lane.
template <typename Tile>
__device__ __forceinline__ void load_tiles(const FusedProblem& p, const Block<Tile>& block, const CUtensorMap* x_map,
                                           const CUtensorMap* packed_map) {
  constexpr int kPair = Tile::kPair;
  RingPosition<Tile::kStages> ring{0, 1};
  for (int tile = block.first_tile; tile < block.tiles; tile += block.tile_step) {
    const WorkUnit unit = block.unit(p, tile);
    const int row0 = block.row0(unit);
    int token0 = unit.token_tile * Tile::kTokens;
    if (kPair > 1) token0 += int(block.rank) * (Tile::kTokens / kPair);
    for (int k = unit.begin; k < unit.end; ++k, ring.advance(1)) {
      const uint32_t full = block.full + ring.stage * 8;
      barrier_wait(block.empty + ring.stage * 8, ring.parity);
      barrier_arrive_expecting(full, Tile::kXBytes + Tile::kPackedBytes);
      const uint32_t x = block.x + ring.stage * Tile::kXBytes;
      if constexpr (kPair > 1) {  // a part of x to all blocks of the cluster
        tile_load_multicast(x + block.rank * (Tile::kXBytes / kPair), x_map, k * kTileColumns, token0, full,
                            uint16_t((1 << kPair) - 1));
      } else {
        tile_load(x, x_map, k * kTileColumns, token0, full);
      }
      tile_load(block.packed + ring.stage * Tile::kPackedBytes, packed_map, k * (kTileColumns / 2), row0, full);
    }
  }
}

// Warps 1 to 3: every third stage, four rows a lane. The next stage's scales are under way meanwhile.
template <typename Tile>
__device__ __forceinline__ void build_tables(const FusedProblem& p, const Block<Tile>& block, int table_warp, int lane) {
  constexpr int kRows = kTileRows / 32;
  RingPosition<Tile::kStages> ring{uint32_t(table_warp), 1};
  int tile = block.first_tile, k = 0, row0 = 0;
  WorkUnit unit{0, 0, 0, 0};
  const auto enter = [&] {
    unit = block.unit(p, tile);
    row0 = block.row0(unit);
    k += unit.begin;
  };
  const auto move = [&](int steps) {
    k += steps;
    while (tile < block.tiles && k >= unit.end) {
      k -= unit.end;
      tile += block.tile_step;
      if (tile < block.tiles) enter();
    }
  };
  float scale[kRows];
  uint32_t code[kRows];
  const auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = min(row0 + lane + i * 32, p.N - 1);
      const int64_t index = (int64_t(row) * p.k_tiles + min(k, p.k_tiles - 1)) >> p.log2_tiles_a_scale;
      if (p.absmax_codes) {
        code[i] = __ldg(p.absmax_codes + index);
        scale[i] = __ldg(p.nested_absmax + index / kNestedBlocksize);
      } else {
        scale[i] = __ldg(p.absmax + index);
      }
    }
  };
  const float offset = p.absmax_codes ? __ldg(p.nested_offset) : 0.f;
  if (tile < block.tiles) {
    enter();
    move(table_warp);
  }
  if (tile < block.tiles) fetch();
  while (tile < block.tiles) {
    float own[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      own[i] = p.absmax_codes ? decode_scale(load_shared_float(block.map + code[i] * 4), scale[i], offset) : scale[i];
      if (k >= p.k_tiles) own[i] = 0.f;  // padding
    }
    move(kTableWarps);
    if (tile < block.tiles) fetch();
    barrier_wait(block.empty + ring.stage * 8, ring.parity);
    // 32 bytes a row; the two halves change places every four rows, so that eight lanes meet all banks
    const uint32_t to = block.table + ring.stage * Tile::kTableBytes + lane * 32 + ((lane >> 2) & 1) * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const ProductTable table = product_table<typename Tile::T>(own[i]);
      store_shared_128(to + i * 1024, table.low);
      store_shared_128((to ^ 16) + i * 1024, table.high);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(block.full + ring.stage * 8);
    ring.advance(kTableWarps);
  }
}

// A consumer warp: 16 rows of W of its warpgroup's 64, all tokens of the tile.
template <typename Tile>
struct Consumer {
  using T = typename Tile::T;
  static constexpr int kTokens = Tile::kTokens, kStages = Tile::kStages, kPair = Tile::kPair;
  static constexpr uint32_t kNoStage = 0xffffffffu;

  const FusedProblem& p;
  const Block<Tile>& block;
  const int group, thread, lane;  // warpgroup 0 or 1; thread and lane of it
  const uint32_t near, far;       // offsets of the two 16-byte parts of this lane's first row, as swizzled
  const uint32_t byte_pair;
  const uint64_t x_tile;
  float sums[kTokens / 2];

  __device__ __forceinline__ Consumer(const FusedProblem& problem, const Block<Tile>& shared, int warpgroup)
      : p(problem),
        block(shared),
        group(warpgroup),
        thread(threadIdx.x % 128),
        lane(threadIdx.x % 32),
        near(row() * 32 + ((row() >> 2) & 1) * 16),
        far(near ^ 16),
        byte_pair(uint32_t(lane % 4) | uint32_t(lane % 4 + 4) << 4),
        x_tile(swizzled_tile(shared.x)) {}

  // The first of this lane's two rows, in the tile; the other is 8 further.
  __device__ __forceinline__ int row() const { return group * 64 + thread / 32 * 16 + lane / 4; }

  __device__ __forceinline__ void load(StageCodes& codes, uint32_t stage) const {
    const uint32_t offset = stage * Tile::kPackedBytes;
    codes.load(block.packed + offset, block.table + offset, near, far, byte_pair);
  }
  __device__ __forceinline__ void multiply(const uint32_t* a, int i, uint32_t stage) {
    product_fence();
    Product<T, kTokens>::rs(sums, a[0], a[1], a[2], a[3], x_tile + uint64_t(stage * (Tile::kXBytes >> 4) + 2 * i), 1);
  }
  __device__ __forceinline__ void release(uint32_t stage) const {
    const uint32_t barrier = block.empty + stage * 8;
    if constexpr (kPair > 1) {
      if (lane < kPair) barrier_arrive_remote(barrier, lane);
    } else {
      if (lane == 0) barrier_arrive(barrier);
    }
  }
  // Keeps the compiler from moving reads or writes of the sums over this point.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.f;
  }

  // Few tokens: a product is issued as soon as its 16 columns are decoded, into registers that the product four
  // before has left.
  __device__ __forceinline__ void accumulate_few(const WorkUnit& unit, RingPosition<kStages>& ring) {
    uint32_t a[16], previous = kNoStage;
    for (int k = unit.begin; k < unit.end; ++k) {
      barrier_wait(block.full + ring.stage * 8, ring.parity);
      StageCodes codes;
      load(codes, ring.stage);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        product_wait<3>();
        if (i == 3 && previous != kNoStage) release(previous);
        codes.decode(i, a + 4 * i);
        multiply(a + 4 * i, i, ring.stage);
        product_commit();
      }
      previous = ring.stage;
      ring.advance(1);
    }
    product_wait<0>();
    hold();
    if (previous != kNoStage) release(previous);
  }

  // Many tokens: stages in fours. `fours` counts them, `stage(s)` is stage s of the current four: s = -1 is the last
  // of the four before, s = 4 the first of the next.
  struct Fours {
    static constexpr uint32_t kCount = kStages / 4;
    uint32_t at = 0, parity = 0;
    __device__ __forceinline__ uint32_t stage(int s) const {
      if (kCount == 1) return (s + 4) & 3;
      if (s < 0) return (at == 0 ? kCount - 1 : at - 1) * 4 + 3;
      if (s > 3) return (at == kCount - 1 ? 0 : at + 1) * 4 + (s - 4);
      return at * 4 + s;
    }
    __device__ __forceinline__ uint32_t parity_of(int s) const {
      return s > 3 && at == kCount - 1 ? parity ^ 1 : parity;
    }
    __device__ __forceinline__ void next() {
      if (at == kCount - 1) {
        at = 0;
        parity ^= 1;
      } else {
        ++at;
      }
    }
  };

  __device__ __forceinline__ void await(const Fours& fours, int s, bool ready) const {
    if (!ready) barrier_wait(block.full + fours.stage(s) * 8, fours.parity_of(s));
  }
  __device__ __forceinline__ bool test(const Fours& fours, int s) const {
    return barrier_test(block.full + fours.stage(s) * 8, fours.parity_of(s));
  }

  // The products of stage s from `now`, and meanwhile the decoding of stage s + 1 into `then`.
  __device__ __forceinline__ void step(const Fours& fours, int s, const uint32_t* now, uint32_t* then, bool& ready,
                                       bool release_previous) {
    StageCodes codes;
    const uint32_t stage = fours.stage(s);
    const auto rest = [&] {
      ready = test(fours, s + 2);
      product_wait<1>();
      if (release_previous) release(fours.stage(s - 1));
    };
    if constexpr (kTokens == 256) {
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply(now + 4 * i, i, stage);
      product_commit();
      await(fours, s + 1, ready);
      load(codes, fours.stage(s + 1));
      rest();
#pragma unroll
      for (int i = 0; i < 4; ++i) codes.decode(i, then + 4 * i);
    } else {
      await(fours, s + 1, ready);
      load(codes, fours.stage(s + 1));
      multiply(now, 0, stage);
      multiply(now + 4, 1, stage);
      product_commit();
      rest();
      codes.decode(0, then);
      multiply(now + 8, 2, stage);
      codes.decode(1, then + 4);
      codes.decode(2, then + 8);
      multiply(now + 12, 3, stage);
      product_commit();
      codes.decode(3, then + 12);
    }
  }

  __device__ __forceinline__ void accumulate_many(const WorkUnit& unit, Fours& fours) {
    const int count = (unit.end - unit.begin) / 4;
    if (count == 0) return;
    uint32_t even[16], odd[16];
    bool ready = false;
    await(fours, 0, false);
    {
      StageCodes codes;
      load(codes, fours.stage(0));
      ready = test(fours, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) codes.decode(i, even + 4 * i);
    }
    bool release_previous = false;
    for (int i = 0; i < count - 1; ++i) {
      step(fours, 0, even, odd, ready, release_previous);
      step(fours, 1, odd, even, ready, true);
      step(fours, 2, even, odd, ready, true);
      step(fours, 3, odd, even, ready, true);
      release_previous = true;
      fours.next();
    }
    step(fours, 0, even, odd, ready, release_previous);
    step(fours, 1, odd, even, ready, true);
    step(fours, 2, even, odd, ready, true);
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply(odd + 4 * i, i, fours.stage(3));
    product_commit();
    product_wait<1>();
    release(fours.stage(2));
    product_wait<0>();
    hold();
    release(fours.stage(3));
    fours.next();
  }

  // Rounds 16 tokens' sums and lays them, transposed to rows of y, where the store takes them from.
  __device__ __forceinline__ void stage_tokens(int j, const float (&v)[8], float bias_near, float bias_far) const {
    const int matrix = lane / 8, half = matrix % 2, token = matrix / 2 * 8 + lane % 8;
    const uint32_t to = out() + j * (kStoreTokens * 128) + token * 128 +
                        (((thread / 32 * 2 + half) ^ (lane % 8)) << 4);
    store_matrices_transposed(to, pack_pair<T>(v[0] + bias_near, v[1] + bias_near),
                              pack_pair<T>(v[2] + bias_far, v[3] + bias_far),
                              pack_pair<T>(v[4] + bias_near, v[5] + bias_near),
                              pack_pair<T>(v[6] + bias_far, v[7] + bias_far));
  }
  __device__ __forceinline__ uint32_t out() const { return block.out + group * kTokens * 128; }
  __device__ __forceinline__ float bias_of(int n) const {
    return p.bias && n < p.N ? float(static_cast<const T*>(p.bias)[n]) : 0.f;
  }
  __device__ __forceinline__ void join() const { named_barrier(1 + group, 128); }

  // The staged tokens of 16-token groups first, first + step, ... to y.
  __device__ __forceinline__ void store(const WorkUnit& unit, const CUtensorMap* y_map, int first, int step) const {
    const int n0 = block.row0(unit) + group * 64, m0 = unit.token_tile * kTokens;
    if (p.store_tiles) {
      proxy_fence();
      join();
      if (thread == 0) {
        for (int j = first; j < kTokens / kStoreTokens && m0 + j * kStoreTokens < p.M; j += step) {
          tile_store(y_map, n0, m0 + j * kStoreTokens, out() + j * (kStoreTokens * 128));
        }
        stores_commit();
      }
      return;
    }
    join();
    for (int j = first; j < kTokens / kStoreTokens; j += step) {
#pragma unroll
      for (int i = 0; i < kStoreTokens / 4; ++i) {
        const int token = j * kStoreTokens + i * 4 + thread / 32;
        if (m0 + token >= p.M) continue;
        T* y = static_cast<T*>(p.y) + int64_t(m0 + token) * p.N;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int n = part * 32 + lane;
          if (n0 + n < p.N) {
            y[n0 + n] = load_shared_16<T>(out() + token * 128 + (((n / 8) ^ (token & 7)) << 4) + n % 8 * 2);
          }
        }
      }
    }
  }

  // The whole tile from this block's sums.
  __device__ __forceinline__ void finish(const WorkUnit& unit, const CUtensorMap* y_map) const {
    const int n = block.row0(unit) + row();
    const float bias_near = bias_of(n), bias_far = bias_of(n + 8);
    if (thread == 0) stores_wait_read<0>();
    join();  // the tile before has left its place
#pragma unroll
    for (int j = 0; j < kTokens / kStoreTokens; ++j) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = sums[8 * j + i];
      stage_tokens(j, v, bias_near, bias_far);
    }
    store(unit, y_map, 0, 1);
  }

  // The tile from the sums of all blocks of the cluster, of which each adds up every splits-th group of 16 tokens.
  __device__ __forceinline__ void finish_split(const WorkUnit& unit, const CUtensorMap* y_map) const {
    const uint32_t partial = block.x + (group * (kTokens / 8) * 128 + thread) * 16;  // 128 x 16 bytes for 8 tokens
    named_barrier(3, 256);  // both warpgroups are done with x
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      store_shared_128(partial + i * 2048,
                       make_uint4(__float_as_uint(sums[4 * i]), __float_as_uint(sums[4 * i + 1]),
                                  __float_as_uint(sums[4 * i + 2]), __float_as_uint(sums[4 * i + 3])));
    }
    cluster_sync();
    const int n = block.row0(unit) + row();
    const float bias_near = bias_of(n), bias_far = bias_of(n + 8);
    for (int j = block.split; j < kTokens / kStoreTokens && unit.token_tile * kTokens + j * kStoreTokens < p.M;
         j += p.splits) {
      float v[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
      for (int split = 0; split < p.splits; ++split) {
        const uint32_t remote = remote_address(partial + j * 4096, split);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 part = load_remote_128(remote + half * 2048);
          v[4 * half] += part.x, v[4 * half + 1] += part.y, v[4 * half + 2] += part.z, v[4 * half + 3] += part.w;
        }
      }
      stage_tokens(j, v, bias_near, bias_far);
    }
    store(unit, y_map, block.split, p.splits);
    cluster_sync();  // until all have read this block's sums
  }

  __device__ __forceinline__ void run(const CUtensorMap* y_map) {
    RingPosition<kStages> ring{0, 0};
    Fours fours;
    for (int tile = block.first_tile; tile < block.tiles; tile += block.tile_step) {
      const WorkUnit unit = block.unit(p, tile);
      clear();
      if constexpr (Tile::kFew) {
        accumulate_few(unit, ring);
      } else {
        accumulate_many(unit, fours);
      }
      if (p.splits > 1) {
        finish_split(unit, y_map);
      } else {
        finish(unit, y_map);
      }
    }
    if (thread == 0) stores_wait();
  }
};

#endif  // QLORA_SM90

template <typename T, int kTokens, int kStages, int kPair>
__global__ void __launch_bounds__(kThreads, Tiling<T, kTokens, kStages, kPair>::kResident)
    linear_sm90_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap packed_map,
                       const __grid_constant__ CUtensorMap y_map, const FusedProblem p) {
#ifdef QLORA_SM90
  using Tile = Tiling<T, kTokens, kStages, kPair>;
  extern __shared__ char memory[];
  // static, so that the host can see whether this body was compiled (see compiled_for_sm90)
  __shared__ uint64_t barriers[2 * kStages];
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
    Consumer<Tile>(p, block, warpgroup - 1).run(&y_map);
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
cudaError_t launch(const void* x, const Nf4Weight& weight, sm90::FusedProblem p, Dtype dtype, cudaStream_t stream) {
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
  CUtensorMap x_map, packed_map, y_map{};
  const TileMap x_tiles{x, tile_type(dtype), K, M, K * 2, sm90::kTileColumns, kTokens / kPair, true};
  const TileMap packed_tiles{
      weight.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, K / 2, N, K / 2, sm90::kTileColumns / 2, sm90::kTileRows, true};
  const TileMap y_tiles{p.y, tile_type(dtype), N, M, N * 2, 64, sm90::kStoreTokens, true};
  if (cudaError_t error = encode(x_tiles, &x_map)) return error;
  if (cudaError_t error = encode(packed_tiles, &packed_map)) return error;
  if (p.store_tiles) {
    if (cudaError_t error = encode(y_tiles, &y_map)) return error;
  }

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(clusters * cluster));
  config.blockDim = dim3(sm90::kThreads);
  config.dynamicSmemBytes = Tile::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, x_map, packed_map, y_map, p);
}

template <typename T>
cudaError_t launch_config(const void* x, const Nf4Weight& weight, const sm90::FusedProblem& p, Dtype dtype,
                          const FusedConfig& config, cudaStream_t stream) {
  switch (config.tokens) {
    case 16: return launch<T, 16, 8, 1>(x, weight, p, dtype, stream);
    case 32: return launch<T, 32, 8, 1>(x, weight, p, dtype, stream);
    case 64: return launch<T, 64, 4, 1>(x, weight, p, dtype, stream);
    case 128: return launch<T, 128, 8, 1>(x, weight, p, dtype, stream);
    default:
      return config.pair == 2 ? launch<T, 256, 4, 2>(x, weight, p, dtype, stream)
                              : launch<T, 256, 4, 1>(x, weight, p, dtype, stream);
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

cudaError_t linear_nf4_sm90(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y, int64_t M,
                            int64_t N, int64_t K, const FusedConfig& config, cudaStream_t stream) {
  if (!valid_config(config) || !aligned(x)) return cudaErrorInvalidValue;
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
  return dtype == Dtype::kFloat16 ? launch_config<__half>(x, weight, p, dtype, config, stream)
                                  : launch_config<__nv_bfloat16>(x, weight, p, dtype, config, stream);
}

}  // namespace qlora_engine::cuda
