// Warpgroups 1 and 2 of linear_sm90.cu: decode W into registers, multiply, and write y.
#pragma once
#include "linear_sm90.cuh"

#ifdef QLORA_SM90

namespace qlora_engine::cuda::sm90 {

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
  const CUtensorMap* const S_map;
  const bool adds_adapter;  // of a cluster that divides K, the last block does
  uint32_t adapter_parity = 0;
  float sums[kTokens / 2];

  __device__ __forceinline__ Consumer(const FusedProblem& problem, const Block<Tile>& shared, int warpgroup,
                                      const CUtensorMap* adapter_map)
      : p(problem),
        block(shared),
        group(warpgroup),
        thread(threadIdx.x % 128),
        lane(threadIdx.x % 32),
        near(row() * 32 + ((row() >> 2) & 1) * 16),
        far(near ^ 16),
        byte_pair(uint32_t(lane % 4) | uint32_t(lane % 4 + 4) << 4),
        x_tile(swizzled_tile(shared.x)),
        S_map(adapter_map),
        adds_adapter(problem.lora_rank > 0 && shared.split == problem.splits - 1) {}

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

  // Begins the copy of 64 columns of S to where y is staged, once the tile before has left it.
  __device__ __forceinline__ void begin_adapter(const WorkUnit& unit, int column) const {
    join();
    if (thread == 0) {
      stores_wait_read<0>();
      const uint32_t there = block.adapter + group * 8;
      barrier_arrive_expecting(there, Tile::kXBytes);
      tile_load(out(), S_map, column, unit.token_tile * kTokens, there);
    }
    __syncwarp();
  }
  // Issues the products of the adapter, of which the first tile of S is under way; the last are not waited for.
  __device__ __forceinline__ void multiply_adapter(uint32_t* a, const WorkUnit& unit) {
    const uint64_t S_tile = swizzled_tile(out());
    const auto multiply_columns = [&](int i) {
      product_fence();
      Product<T, kTokens>::rs(sums, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], S_tile + uint64_t(2 * i), 1);
    };
    for (int column = 0; column < p.lora_rank; column += kTileColumns) {
      if (column > 0) {
        product_wait<0>();
        hold();
        begin_adapter(unit, column);
      }
      load_adapter<T>(a, p, block.row0(unit) + row(), column, lane);
      barrier_wait(block.adapter + group * 8, adapter_parity);
      adapter_parity ^= 1;
      multiply_columns(0);
      if (p.lora_rank - column > 16) {
#pragma unroll
        for (int i = 1; i < 4; ++i) multiply_columns(i);
      }
      product_commit();
    }
  }

  // Few tokens: a product is issued as soon as its 16 columns are decoded, into registers that the product four
  // before has left.
  __device__ __forceinline__ void accumulate_few(const WorkUnit& unit, RingPosition<kStages>& ring) {
    uint32_t a[16], previous = kNoStage;
    for (int k = unit.begin; k < unit.end; ++k) {
      if (k == unit.end - 1 && adds_adapter) begin_adapter(unit, 0);
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
    if (adds_adapter) {
      multiply_adapter(a, unit);
      product_wait<0>();
      hold();
    }
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
    if (adds_adapter) begin_adapter(unit, 0);
    step(fours, 0, even, odd, ready, release_previous);
    step(fours, 1, odd, even, ready, true);
    step(fours, 2, even, odd, ready, true);
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply(odd + 4 * i, i, fours.stage(3));
    product_commit();
    product_wait<1>();
    release(fours.stage(2));
    if (adds_adapter) multiply_adapter(even, unit);  // its copies and loads meet the products of the last stage
    product_wait<0>();
    hold();
    release(fours.stage(3));
    fours.next();
  }

  __device__ __forceinline__ uint32_t out() const { return block.out + group * kTokens * 128; }
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
    const float bias_near = bias_of<T>(p, n), bias_far = bias_of<T>(p, n + 8);
    if (thread == 0) stores_wait_read<0>();
    join();  // the tile before has left its place
#pragma unroll
    for (int j = 0; j < kTokens / kStoreTokens; ++j) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = sums[8 * j + i];
      stage_tokens<T>(out() + j * (kStoreTokens * 128), thread / 32, lane, v, bias_near, bias_far);
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
    const float bias_near = bias_of<T>(p, n), bias_far = bias_of<T>(p, n + 8);
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
      stage_tokens<T>(out() + j * (kStoreTokens * 128), thread / 32, lane, v, bias_near, bias_far);
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

}  // namespace qlora_engine::cuda::sm90

#endif  // QLORA_SM90
