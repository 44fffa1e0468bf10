// Warps 4 and on of linear_levels_sm90.cu: look levels up, multiply, scale, and write y.
#pragma once
#include <type_traits>

#include "linear_levels_sm90.cuh"

#ifdef QLORA_SM90

namespace qlora_engine::cuda::sm90 {

// A consumer warp: 16 rows of W of its warpgroup's 64, all tokens of the tile; of a stage's K-tiles every kHalves-th.
template <typename Tile>
struct LevelsConsumer {
  using T = typename Tile::T;
  static constexpr int kTokens = Tile::kTokens, kHalves = Tile::kHalves, kOwn = Tile::kOwn, kStages = Tile::kStages;
  static constexpr int kSums = kTokens / 2;  // of a thread

  const LevelsProblem& problem;
  const FusedProblem& p;
  const LevelsBlock<Tile>& block;
  const int group, half, thread, lane;  // warpgroup 0 or 1 of a half; thread and lane of it
  const uint32_t own, selector;         // of the look-up table: this lane's copy, the byte of each word that is its
  const uint32_t codes_at;              // where the first codes of this lane's first row are in a stage, as swizzled
  RingPosition<kStages> ring{0, 0};
  uint32_t turns = 0;  // bit 0: parity of the halves' barriers; bit 1: of two places for y, the next to be written
  float sums[kSums];

  __device__ __forceinline__ LevelsConsumer(const LevelsProblem& levels, const LevelsBlock<Tile>& shared, int warpgroup)
      : problem(levels),
        p(levels.of),
        block(shared),
        group(warpgroup % 2),
        half(warpgroup / 2),
        thread(threadIdx.x % 128),
        lane(threadIdx.x % 32),
        own(shared.table + lane * 4),
        selector(FarTable::selector(lane % 4)),
        codes_at(row() * Tile::kCodePitch +
                 ((row() * Tile::kCodePitch / 128 % (Tile::kCodePitch / 16) << 4) ^ (half << 5))) {}

  // The first of this lane's two rows, in the tile; the other is 8 further.
  __device__ __forceinline__ int row() const { return group * 64 + thread / 32 * 16 + lane / 4; }

  // The scales of this half's K-tiles of a stage, of both rows.
  __device__ __forceinline__ void load_scales(float (&scale)[2][kOwn], uint32_t stage) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t from = block.scales(stage, row() + r * 8) + half * (kOwn * 4);
      if constexpr (kOwn == 4) {
        const uint4 v = load_shared_128(from);
        scale[r][0] = __uint_as_float(v.x), scale[r][1] = __uint_as_float(v.y);
        scale[r][2] = __uint_as_float(v.z), scale[r][3] = __uint_as_float(v.w);
      } else {
        static_assert(kOwn == 2);
        const uint2 v = load_shared_64(from);
        scale[r][0] = __uint_as_float(v.x), scale[r][1] = __uint_as_float(v.y);
      }
    }
  }
  // A K-tile's codes of two rows, columns 0 to 31 and 32 to 63.
  struct Codes {
    uint4 row[2][2];
  };
  // Of this half's i-th K-tile of a stage.
  __device__ __forceinline__ void load(Codes& codes, uint32_t stage, int i) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t at = block.codes(stage) + (codes_at ^ uint32_t(i * kHalves << 5 | part << 4));
      codes.row[0][part] = load_shared_128(at);
      codes.row[1][part] = load_shared_128(at + 8 * Tile::kCodePitch);
    }
  }
  // All A registers of a K-tile.
  __device__ __forceinline__ void look_up(const Codes& codes, uint32_t (&a)[16]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& words = codes.row[r][i / 2];
        a[4 * i + r] = FarTable::pair(i % 2 ? words.z : words.x, own, selector);
        a[4 * i + r + 2] = FarTable::pair(i % 2 ? words.w : words.y, own, selector);
      }
    }
  }
  // Products with the stage's K-tile `tile` of x, or of S.
  template <int kFirst>
  __device__ __forceinline__ void multiply(float (&to)[kSums], const uint32_t (&a)[16], uint32_t stage, int tile) const {
    const uint64_t x_tile = swizzled_tile(block.x(stage));
    const uint32_t first = tile * (Tile::kXTileBytes >> 4);
    product_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Product<T, kTokens>::rs(to, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], tile_further(x_tile, first + 2 * i),
                              i > 0 || !kFirst);
    }
    product_commit();
  }
  // Keeps the compiler from reading or writing sums before this point.
  static __device__ __forceinline__ void hold(float (&of)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(of[i])::"memory");
  }
  __device__ __forceinline__ void await() const { barrier_wait(block.full(ring.stage), ring.parity); }
  __device__ __forceinline__ void release(uint32_t stage) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(block.empty(stage));
  }

  // One stage: while the products of a K-tile run, the levels of the next one are looked up. Where registers allow it its
  // codes are there already, and those of the one behind it are loaded. No branches between products and the wait for
  // them, or the compiler would wait at once.
  template <bool kLast>
  __device__ __forceinline__ void multiply_stage(uint32_t (&a)[2][16], Codes& codes) {
    constexpr int kAhead = Tile::kCodesAhead ? 2 : 1;
    const uint32_t stage = ring.stage;
    ring.advance(1);
    float scale[2][kOwn];
    load_scales(scale, stage);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const auto load_ahead = [&] {
        if (i + kAhead < kOwn) {
          load(codes, stage, i + kAhead);
        } else if (!kLast) {
          if (i + kAhead == kOwn) await();
          load(codes, ring.stage, i + kAhead - kOwn);
        }
      };
      float part[kSums];
      multiply<1>(part, a[i % 2], stage, i * kHalves + half);
      if (!Tile::kCodesAhead) load_ahead();
      if (i + 1 < kOwn || !kLast) look_up(codes, a[(i + 1) % 2]);
      if (Tile::kCodesAhead) load_ahead();
      product_wait<0>();
      hold(part);
      if (i == kOwn - 1) release(stage);
#pragma unroll
      for (int e = 0; e < kSums; ++e) sums[e] += scale[e / 2 % 2][i] * part[e];
    }
  }
  __device__ __forceinline__ void accumulate(const WorkUnit& unit) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
    const int stages = (unit.end - unit.begin) / Tile::kStageTiles;
    if (stages == 0) return;
    static_assert(kOwn % 2 == 0, "a stage begins with the first set of A registers");
    uint32_t a[2][16];
    Codes codes;
    await();
    load(codes, ring.stage, 0);
    look_up(codes, a[0]);
    if (Tile::kCodesAhead) load(codes, ring.stage, 1);
    for (int stage = 0; stage < stages - 1; ++stage) multiply_stage<false>(a, codes);
    multiply_stage<true>(a, codes);
  }

  // S B^T, of which each half takes its 64 columns as of x.
  __device__ __forceinline__ void add_adapter(const WorkUnit& unit) {
    for (int column = 0; column < p.lora_rank; column += Tile::kStageTiles * kTileColumns) {
      await();
      for (int i = 0; i < kOwn; ++i) {
        const int tile = i * kHalves + half;
        if (column + tile * kTileColumns >= p.lora_rank) break;
        uint32_t a[16];
        load_adapter<T>(a, p, block.row0(unit) + row(), column + tile * kTileColumns, lane);
        multiply<0>(sums, a, ring.stage, tile);
        product_wait<0>();
        hold(sums);
      }
      release(ring.stage);
      ring.advance(1);
    }
  }

  // This thread's place for 4 sums of 8 tokens.
  __device__ __forceinline__ uint32_t place(uint32_t region, int i) const {
    return block.table + region + ((group * (kTokens / 8) + i) * 128 + thread) * 16;
  }
  __device__ __forceinline__ void write_sums(uint32_t region) const {
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      store_shared_128(place(region, i),
                       make_uint4(__float_as_uint(sums[4 * i]), __float_as_uint(sums[4 * i + 1]),
                                  __float_as_uint(sums[4 * i + 2]), __float_as_uint(sums[4 * i + 3])));
    }
  }
  // Adds the second half's sums to the first's; the second's warps go on to the next tile.
  __device__ __forceinline__ void join_halves() {
    if (half > 0) {
      barrier_wait(block.sums_empty(group), (turns & 1) ^ 1);
      write_sums(Tile::kSums);
      __syncwarp();
      if (lane == 0) barrier_arrive(block.sums_full(group));
    } else {
      barrier_wait(block.sums_full(group), turns & 1);
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        const uint4 other = load_shared_128(place(Tile::kSums, i));
        sums[4 * i] += __uint_as_float(other.x), sums[4 * i + 1] += __uint_as_float(other.y);
        sums[4 * i + 2] += __uint_as_float(other.z), sums[4 * i + 3] += __uint_as_float(other.w);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(block.sums_empty(group));
    }
    turns ^= 1;
  }

  // Rounds 16 tokens' sums, transposes them in shared memory, and writes rows of y.
  __device__ __forceinline__ void store_tokens(const WorkUnit& unit, int j, const float (&v)[8]) {
    const int n = block.row0(unit) + row();
    const float bias_near = bias_of<T>(p, n), bias_far = bias_of<T>(p, n + 8);
    const uint32_t out = block.table + uint32_t(Tile::kOut) + (group * 2 + (turns >> 1)) * (kStoreTokens * 128);
    turns ^= 2;  // a barrier between writing and reading is enough
    stage_tokens<T>(out, thread / 32, lane, v, bias_near, bias_far);
    named_barrier(1 + group, 128);
    const int token = thread / 8, column = block.row0(unit) + group * 64 + thread % 8 * 8;
    const int m = unit.token_tile * kTokens + j * kStoreTokens + token;
    if (m >= p.M || j * kStoreTokens + token >= kTokens) return;
    const uint32_t from = out + token * 128 + ((thread % 8 ^ (token & 7)) << 4);
    T* y = static_cast<T*>(p.y) + int64_t(m) * p.N + column;
    if (problem.store_vectors && column < p.N) {
      *reinterpret_cast<uint4*>(y) = load_shared_128(from);
    } else {
      for (int i = 0; i < 8 && column + i < p.N; ++i) y[i] = load_shared_16<T>(from + i * 2);
    }
  }

  __device__ __forceinline__ void finish(const WorkUnit& unit) {
#pragma unroll
    for (int j = 0; j < (kTokens + 15) / 16; ++j) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = 8 * j + i < kSums ? sums[8 * j + i < kSums ? 8 * j + i : 0] : 0.f;
      store_tokens(unit, j, v);
    }
  }

  // The tile from the sums of all blocks of the cluster, of which each adds up every splits-th group of 16 tokens.
  __device__ __forceinline__ void finish_split(const WorkUnit& unit) {
    if (half == 0) {
      if (kHalves == 1) named_barrier(4, Tile::kConsumers);  // both warpgroups are done with x, where the sums go
      write_sums(Tile::kPartial);
    }
    cluster_sync();
    if (half == 0) {
      for (int j = block.split; j < (kTokens + 15) / 16 && unit.token_tile * kTokens + j * kStoreTokens < p.M;
           j += p.splits) {
        float v[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
        for (int split = 0; split < p.splits; ++split) {
          const uint32_t remote = remote_address(place(Tile::kPartial, 2 * j), split);
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            if (2 * j + side >= kTokens / 8) continue;
            const float4 part = load_remote_128(remote + side * 2048);
            v[4 * side] += part.x, v[4 * side + 1] += part.y, v[4 * side + 2] += part.z, v[4 * side + 3] += part.w;
          }
        }
        store_tokens(unit, j, v);
      }
    }
    cluster_sync();  // until all have read this block's sums
  }

  __device__ __forceinline__ void run() {
    for (int tile = block.tile; block.more(tile); tile = block.next(tile)) {
      const WorkUnit unit = block.unit(tile);
      accumulate(unit);
      if (block.split == p.splits - 1) add_adapter(unit);  // its stages are part of this unit
      if (kHalves == 2) join_halves();
      if (p.splits > 1) {
        finish_split(unit);
      } else if (half == 0) {
        finish(unit);
      }
    }
  }
};

}  // namespace qlora_engine::cuda::sm90

#endif  // QLORA_SM90
