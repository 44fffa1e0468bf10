// Parts of the gradient in linear_backward_levels_sm90.cu: the shared memory, and who copies and decodes scales.
#pragma once
#include "far_table.cuh"
#include "linear_sm90.cuh"
#include "pair_math.cuh"
#include "row_scales.cuh"

namespace qlora_engine::cuda::backward_levels {

using sm90::RingPosition;

constexpr int kColumns = 128;   // of W and dX, a thread block
constexpr int kGroupRows = 64;  // of W, a warpgroup and stage
constexpr int kScaleWarps = 2;

struct Problem {
  Nf4Weight weight;
  RoundedLevels levels;
  const void* A;  // [rank, K], of the adapter
  void* dx;       // [M, K]
  int M, N, K;
  int rank;           // of the adapter; 0: none
  int log2_runs;      // runs of 64 columns that share one scale, as a power of two
  int column_tiles;   // of dX
  int splits;         // blocks of a cluster that divide N
  bool whole_scales;  // both of a row and tile are one aligned word, or vector
  bool adds;          // to what dX holds
};

// One instance: kTokens rows of dY, kGroups warpgroups. Up to 128 tokens each of these takes 64 rows of W in a stage,
// and all columns of the tile, in two products; with 256 tokens it takes all rows, 64, and 64 of the columns. Offsets
// are from the look-up table.
template <typename T_, int kTokens_, int kGroups_>
struct Tiling {
  using T = T_;
  static constexpr int kTokens = kTokens_, kGroups = kGroups_;
  static constexpr bool kShareColumns = kTokens == 256;
  static constexpr int kProducts = kShareColumns ? 1 : 2, kParts = kShareColumns ? 1 : kGroups;  // of the sum over rows
  static_assert(kGroups == 2 || !kShareColumns);
  static constexpr int kStageRows = kParts * kGroupRows;
  static constexpr int kConsumers = 128 * kGroups, kThreads = 128 + kConsumers;
  static constexpr int kProducerRegisters = kGroups == 4 ? 64 : 72;
  static constexpr int kConsumerRegisters = kGroups == 4 ? 104 : 216;

  static constexpr int kGradTileBytes = kTokens * kGroupRows * 2, kGradBytes = kParts * kGradTileBytes;
  static constexpr int kCodePitch = kColumns / 2, kCodeBytes = kStageRows * kCodePitch;
  static constexpr int kStages = kTokens == 8 ? 6 : kTokens == 16 ? 5 : kTokens == 32 ? 4 : 3;
  // below the table
  static constexpr int kLowCodes = std::min(3, kStages), kHighCodes = kStages - kLowCodes;
  static constexpr int kMap = FarTable::kLow + kLowCodes * kCodeBytes;
  static constexpr int kBarriers = kMap + 1024;
  static_assert(kBarriers + 2 * kStages * 8 <= 0);
  // above it
  static constexpr int kCodes = FarTable::kBytes;
  static constexpr int kGrad = kCodes + kHighCodes * kCodeBytes;
  static_assert(kGrad % 1024 == 0 && kGrad + kStages * kGradBytes <= FarTable::kEnd);
  // scales of 16 rows: a gap of the table
  static constexpr int kGapsAStage = kStageRows / 16;
  static_assert(kStages * kGapsAStage <= 256);
  // In the end the parts of the sum lie there, and over all else: rows of kColumns for each token, pairs of tokens 8
  // banks apart.
  static constexpr int kSums = FarTable::kLow, kSumPitch = (kColumns + 4) * 4, kSumBytes = kTokens * kSumPitch;
  static_assert(kParts * kSumBytes <= FarTable::kDynamicBytes);
};

#ifdef QLORA_SM90

using namespace sm90;

// What this block does, and where its shared memory is.
template <typename Tile>
struct Block {
  const Problem& p;
  uint32_t table;
  int split;          // of N: the rank in the cluster
  int column, token;  // the first
  int begin, end;     // stages of W's rows

  __device__ __forceinline__ Block(const Problem& problem, uint32_t at)
      : p(problem), table(at), split(problem.splits > 1 ? int(cluster_rank()) : 0) {
    const int tile = int(blockIdx.x) / p.splits;
    column = tile % p.column_tiles * kColumns;
    token = tile / p.column_tiles * Tile::kTokens;
    const int stages = (p.N + Tile::kStageRows - 1) / Tile::kStageRows;
    begin = int(int64_t(stages) * split / p.splits);
    end = int(int64_t(stages) * (split + 1) / p.splits);
  }
  __device__ __forceinline__ uint32_t full(uint32_t i) const { return table + uint32_t(Tile::kBarriers) + i * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t i) const { return full(Tile::kStages + i); }
  __device__ __forceinline__ uint32_t codes(uint32_t i) const {
    const bool low = Tile::kHighCodes == 0 || i < Tile::kLowCodes;
    return table + uint32_t(low ? FarTable::kLow : Tile::kCodes - Tile::kLowCodes * Tile::kCodeBytes) +
           i * Tile::kCodeBytes;
  }
  __device__ __forceinline__ uint32_t grad(uint32_t i) const {
    return table + uint32_t(Tile::kGrad) + i * Tile::kGradBytes;
  }
  // Scales of 16 rows of stage i, from row 16 `sixteen` on: those of the first 64 columns, then of the second; of each
  // four times 16 bytes, for rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
  __device__ __forceinline__ uint32_t scales(uint32_t i, uint32_t sixteen) const {
    return FarTable::gap(table, i * Tile::kGapsAStage + sixteen);
  }
  // Stages of dS, behind those of the last split's dY.
  __device__ __forceinline__ int adapter_stages() const {
    return split == p.splits - 1 ? (p.rank + Tile::kStageRows - 1) / Tile::kStageRows : 0;
  }
};

// Warp 0, one lane: codes and dY, then dS.
template <typename Tile>
__device__ __forceinline__ void load_stages(const Block<Tile>& block, const CUtensorMap* packed_map,
                                            const CUtensorMap* grad_map, const CUtensorMap* S_map) {
  RingPosition<Tile::kStages> ring{0, 1};
  const auto load = [&](const CUtensorMap* map, int stage) {
#pragma unroll
    for (int i = 0; i < Tile::kParts; ++i) {
      tile_load(block.grad(ring.stage) + i * Tile::kGradTileBytes, map, stage * Tile::kStageRows + i * kGroupRows,
                block.token, block.full(ring.stage));
    }
    ring.advance(1);
  };
  for (int stage = block.begin; stage < block.end; ++stage) {
    barrier_wait(block.empty(ring.stage), ring.parity);
    barrier_arrive_expecting(block.full(ring.stage), Tile::kGradBytes + Tile::kCodeBytes);
    tile_load(block.codes(ring.stage), packed_map, block.column / 2, stage * Tile::kStageRows, block.full(ring.stage));
    load(grad_map, stage);
  }
  for (int i = 0; i < block.adapter_stages(); ++i) {
    barrier_wait(block.empty(ring.stage), ring.parity);
    barrier_arrive_expecting(block.full(ring.stage), Tile::kGradBytes);
    load(S_map, i);
  }
}

// Warps 2 and 3, a stage each in turn, a pair of rows a lane for each 64 of them. Scales that are whole words are read
// a turn ahead.
template <bool kNested, typename Tile>
__device__ __forceinline__ void decode_scales(const Block<Tile>& block, int warp, int lane) {
  constexpr int kPairs = Tile::kParts;
  const Problem& p = block.p;
  const Nf4Weight& weight = p.weight;
  const int runs = p.K / 64, run = block.column / 64;
  const auto row = [&](int stage, int i) {
    return min(stage * Tile::kStageRows + (i / 2 * 32 + lane) * 2 + i % 2, p.N - 1);
  };
  RowScales<kNested, 2> next[2 * kPairs];
  const auto fetch = [&](int stage) {
    if (stage >= block.end || !p.whole_scales) return;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) next[i].load(weight, uint32_t(row(stage, i)) * uint32_t(runs) + uint32_t(run));
  };
  fetch(block.begin + warp);

  const uint32_t map = block.table + uint32_t(Tile::kMap);
  if constexpr (kNested) {
    for (int i = warp * 32 + lane; i < 256; i += kScaleWarps * 32) {
      store_shared_float(map + i * 4, __ldg(kDynamicMap + i));
    }
    named_barrier(3, kScaleWarps * 32);
  }
  const float offset = kNested ? __ldg(weight.nested_offset) : 0.f, inverse = p.levels.inverse;
  RingPosition<Tile::kStages> ring{uint32_t(warp), 1};
  const auto put = [&](uint32_t stage, int i, const float (&v)[2][2]) {  // [row of pair i][run]
    const int pair = i * 32 + lane;
    const uint32_t to = block.scales(stage, pair / 8) + pair % 4 * 16 + pair / 4 % 2 * 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const SplitPair scale = split_pair<typename Tile::T>(v[0][j] * inverse, v[1][j] * inverse);
      store_shared_64(to + j * 64, make_uint2(scale.high, scale.low));
    }
  };
  const int end = block.end + block.adapter_stages();  // an adapter's stages need nothing but an arrival
  for (int stage = block.begin + warp; stage < end; stage += kScaleWarps) {
    if (stage < block.end && p.whole_scales) {
      RowScales<kNested, 2> own[2 * kPairs];
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) own[i] = next[i];
      fetch(stage + kScaleWarps);
      barrier_wait(block.empty(ring.stage), ring.parity);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        float v[2][2];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e / 2][e % 2] = own[2 * i + e / 2].decode(e % 2, map, offset);
        put(ring.stage, i, v);
      }
    } else {
      barrier_wait(block.empty(ring.stage), ring.parity);
#pragma unroll 1
      for (int i = 0; stage < block.end && i < kPairs; ++i) {
        float v[2][2];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t index = int64_t(row(stage, 2 * i + e / 2)) * runs + min(run + e % 2, runs - 1);
          v[e / 2][e % 2] = one_scale<kNested>(weight, index >> p.log2_runs, map, offset);
        }
        put(ring.stage, i, v);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(block.full(ring.stage));
    ring.advance(kScaleWarps);
  }
}

#endif  // QLORA_SM90

}  // namespace qlora_engine::cuda::backward_levels
