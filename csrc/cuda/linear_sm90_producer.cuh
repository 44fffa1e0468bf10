// Warpgroup 0 of linear_sm90.cu: tile copies into the ring of stages, and every row's table of products.
#pragma once
#include "linear_sm90.cuh"

#ifdef QLORA_SM90

namespace qlora_engine::cuda::sm90 {

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

}  // namespace qlora_engine::cuda::sm90

#endif  // QLORA_SM90
