// Parts of the product in linear_levels_sm90.cu: how the work is cut, the shared memory, and who copies and decodes scales.
#pragma once
#include "far_table.cuh"
#include "linear_sm90.cuh"
#include "row_scales.cuh"

namespace qlora_engine::cuda::sm90 {

constexpr int kScaleWarps = 2;

struct LevelsProblem {
  FusedProblem of;
  Nf4Weight weight;
  RoundedLevels levels;
  bool whole_scales;   // those of a row in a stage are one aligned word, or vector
  bool store_vectors;  // y and its pitch are multiples of 16 bytes
};

// One instance: a tile of kTokens rows of x; stages of kStageTiles K-tiles, which kHalves pairs of warpgroups share out.
// Offsets are from the look-up table.
template <typename T_, int kTokens_, int kHalves_>
struct LevelsTiling {
  using T = T_;
  static constexpr int kTokens = kTokens_, kHalves = kHalves_;
  static constexpr int kStageTiles = kTokens >= 128 ? 2 : 4, kOwn = kStageTiles / kHalves;  // K-tiles; of a half
  static constexpr int kConsumers = 256 * kHalves, kThreads = 128 + kConsumers;
  static constexpr int kProducerRegisters = kHalves == 2 ? 64 : 72;
  static constexpr int kConsumerRegisters = kHalves == 2 ? 104 : 216;

  static constexpr bool kCodesAhead = kHalves == 1;  // codes are loaded two K-tiles ahead

  static constexpr int kXTileBytes = kTokens * kTileColumns * 2, kXBytes = kStageTiles * kXTileBytes;
  static constexpr int kCodePitch = kStageTiles * kTileColumns / 2, kCodeBytes = kTileRows * kCodePitch;
  static constexpr int kStages = kTokens == 8 ? 6 : kTokens == 16 ? 5 : kTokens == 32 ? 4 : 3;
  // below the table
  static constexpr int kLowCodes = std::min(3, kStages), kHighCodes = kStages - kLowCodes;
  static constexpr int kOut = FarTable::kLow + kLowCodes * kCodeBytes;  // [2 warpgroups][2][16 tokens] of 128 bytes
  static constexpr int kMap = kOut + 2 * 2 * kStoreTokens * 128;
  static constexpr int kBarriers = kMap + 1024;
  static_assert(kBarriers + (2 * kStages + 4) * 8 <= 0);
  // above it
  static constexpr int kSums = FarTable::kBytes, kPartialBytes = kTileRows * kTokens * 4;
  static constexpr int kCodes = kSums + (kHalves == 2 ? kPartialBytes : 0);
  static constexpr int kX = kCodes + kHighCodes * kCodeBytes;
  static constexpr int kPartial = kHalves == 2 ? kSums : kX;  // of a cluster that divides K
  static_assert(kHalves == 2 || kPartialBytes <= kStages * kXBytes);
  static_assert(kX % 1024 == 0 && kX + kStages * kXBytes <= FarTable::kEnd);
  static constexpr int kScalePitch = kStageTiles * 4, kRowsAGap = 128 / kScalePitch;  // scales: in the table's gaps
  static_assert(kStages * kTileRows / kRowsAGap <= 256);
};

#ifdef QLORA_SM90

template <typename Tile>
struct LevelsBlock {
  const FusedProblem& p;
  uint32_t table;
  int tile;   // the first
  int split;  // of K: the rank in the cluster

  __device__ __forceinline__ bool more(int at) const { return at < p.token_tiles * p.row_tiles; }
  __device__ __forceinline__ int next(int at) const { return at + int(gridDim.x) / p.splits; }

  __device__ __forceinline__ uint32_t full(uint32_t i) const { return table + uint32_t(Tile::kBarriers) + i * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t i) const { return full(Tile::kStages + i); }
  // a warpgroup's sums of the second half are there; have been read
  __device__ __forceinline__ uint32_t sums_full(uint32_t group) const { return full(2 * Tile::kStages + group); }
  __device__ __forceinline__ uint32_t sums_empty(uint32_t group) const { return sums_full(2 + group); }
  __device__ __forceinline__ uint32_t codes(uint32_t i) const {
    const bool low = Tile::kHighCodes == 0 || i < Tile::kLowCodes;
    return table + uint32_t(low ? FarTable::kLow : Tile::kCodes - Tile::kLowCodes * Tile::kCodeBytes) +
           i * Tile::kCodeBytes;
  }
  __device__ __forceinline__ uint32_t x(uint32_t i) const { return table + uint32_t(Tile::kX) + i * Tile::kXBytes; }
  // The scales of a row in stage i: those of the first half's K-tiles, then those of the second's.
  __device__ __forceinline__ uint32_t scales(uint32_t i, uint32_t row) const {
    constexpr uint32_t kRows = Tile::kRowsAGap;
    return FarTable::gap(table, i * (kTileRows / kRows) + row / kRows) + row % kRows * Tile::kScalePitch;
  }
  __device__ __forceinline__ WorkUnit unit(int at) const {
    return work_unit<Tile::kStageTiles>(p, at, split);
  }
  __device__ __forceinline__ int row0(const WorkUnit& unit) const { return unit.row_tile * kTileRows; }
  // Stages of S that follow those of a unit's K-tiles.
  __device__ __forceinline__ int adapter_stages() const {
    constexpr int kColumns = Tile::kStageTiles * kTileColumns;
    return split == p.splits - 1 ? (p.lora_rank + kColumns - 1) / kColumns : 0;
  }
};

// Warp 0, one lane: codes and x, and behind a unit's x its S.
template <typename Tile>
__device__ __forceinline__ void load_stages(const LevelsBlock<Tile>& block, const CUtensorMap* packed_map,
                                            const CUtensorMap* x_map, const CUtensorMap* S_map) {
  RingPosition<Tile::kStages> ring{0, 1};
  const auto load = [&](const CUtensorMap* map, int column, int token0) {
#pragma unroll
    for (int i = 0; i < Tile::kStageTiles; ++i) {
      tile_load(block.x(ring.stage) + i * Tile::kXTileBytes, map, column + i * kTileColumns, token0,
                block.full(ring.stage));
    }
    ring.advance(1);
  };
  for (int tile = block.tile; block.more(tile); tile = block.next(tile)) {
    const WorkUnit unit = block.unit(tile);
    const int token0 = unit.token_tile * Tile::kTokens, row0 = block.row0(unit);
    for (int k = unit.begin; k < unit.end; k += Tile::kStageTiles) {
      barrier_wait(block.empty(ring.stage), ring.parity);
      barrier_arrive_expecting(block.full(ring.stage), Tile::kXBytes + Tile::kCodeBytes);
      tile_load(block.codes(ring.stage), packed_map, k * (kTileColumns / 2), row0, block.full(ring.stage));
      load(x_map, k * kTileColumns, token0);
    }
    for (int i = 0; i < block.adapter_stages(); ++i) {
      barrier_wait(block.empty(ring.stage), ring.parity);
      barrier_arrive_expecting(block.full(ring.stage), Tile::kXBytes);
      load(S_map, i * Tile::kStageTiles * kTileColumns, token0);
    }
  }
}

// Warps 2 and 3, a stage each in turn, 4 rows a lane. Scales that are whole words are read a turn ahead.
template <bool kNested, typename Tile>
__device__ __forceinline__ void decode_scales(const LevelsProblem& problem, const LevelsBlock<Tile>& block, int warp,
                                              int lane) {
  constexpr int kRows = kTileRows / 32, kScales = Tile::kStageTiles;
  const FusedProblem& p = problem.of;
  const Nf4Weight& weight = problem.weight;
  // K-tile k of a unit; from its end on, adapter's stages, which need nothing but an arrival
  int tile = block.tile, k = 0, row0 = 0;
  WorkUnit unit{0, 0, 0, 0};
  const int adapter = block.adapter_stages() * kScales;
  const auto enter = [&] {
    unit = block.unit(tile);
    row0 = block.row0(unit);
    k += unit.begin;
  };
  const auto move = [&](int stages) {
    k += stages * kScales;
    while (block.more(tile) && k >= unit.end + adapter) {
      k -= unit.end + adapter;
      tile = block.next(tile);
      if (block.more(tile)) enter();
    }
  };
  const auto row = [&](int i) { return min(row0 + lane + i * 32, p.N - 1); };
  RowScales<kNested, kScales> next[kRows];
  const auto fetch = [&] {
    if (!block.more(tile) || k >= unit.end || !problem.whole_scales) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) next[i].load(weight, uint32_t(row(i)) * uint32_t(p.k_tiles) + uint32_t(k));
  };
  if (block.more(tile)) {
    enter();
    move(warp);
  }
  fetch();

  const uint32_t map = block.table + uint32_t(Tile::kMap);
  if constexpr (kNested) {
#pragma unroll
    for (int i = 0; i < 256 / 32 / kScaleWarps; ++i) {
      const int at = (i * kScaleWarps + warp) * 32 + lane;
      store_shared_float(map + at * 4, __ldg(kDynamicMap + at));
    }
    named_barrier(3, kScaleWarps * 32);
  }
  const float offset = kNested ? __ldg(weight.nested_offset) : 0.f, inverse = problem.levels.inverse;
  RingPosition<Tile::kStages> ring{uint32_t(warp), 1};
  while (block.more(tile)) {
    const bool any = k < unit.end;
    const auto put = [&](int i, const float (&v)[kScales]) {  // in the order of the halves
      const uint32_t to = block.scales(ring.stage, lane + i * 32);
      const auto of = [&](int at) { return __float_as_uint(v[at % Tile::kOwn * Tile::kHalves + at / Tile::kOwn] * inverse); };
      if constexpr (kScales == 4) {
        store_shared_128(to, make_uint4(of(0), of(1), of(2), of(3)));
      } else {
        store_shared_64(to, make_uint2(of(0), of(1)));
      }
    };
    if (any && problem.whole_scales) {
      RowScales<kNested, kScales> own[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) own[i] = next[i];
      move(kScaleWarps);
      fetch();
      barrier_wait(block.empty(ring.stage), ring.parity);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float v[kScales];
#pragma unroll
        for (int j = 0; j < kScales; ++j) v[j] = own[i].decode(j, map, offset);
        put(i, v);
      }
    } else {
      barrier_wait(block.empty(ring.stage), ring.parity);
#pragma unroll 1
      for (int i = 0; any && i < kRows; ++i) {
        float v[kScales];
#pragma unroll
        for (int j = 0; j < kScales; ++j) {
          const int64_t index = (int64_t(row(i)) * p.k_tiles + min(k + j, p.k_tiles - 1)) >> p.log2_tiles_a_scale;
          v[j] = k + j < p.k_tiles ? one_scale<kNested>(weight, index, map, offset) : 0.f;  // beyond it: padding
        }
        put(i, v);
      }
      move(kScaleWarps);
      fetch();
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(block.full(ring.stage));
    ring.advance(kScaleWarps);
  }
}

#endif  // QLORA_SM90

}  // namespace qlora_engine::cuda::sm90
