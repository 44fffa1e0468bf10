// Warps 4 and on of linear_backward_levels_sm90.cu: look levels up, scale them, multiply, and write dX.
#pragma once
#include "linear_backward_levels_sm90.cuh"
#include "pair_math.cuh"

#ifdef QLORA_SM90

namespace qlora_engine::cuda::backward_levels {

// A consumer warp. `ldmatrix` gives lane (g, t) a unit of four columns, 4 g to 4 g + 3 of 32: rows g and g + 8 of two
// products' operand A. Where there is one product of 64 columns two warps share such 32, and take half of each unit.
template <typename Tile>
struct Consumer {
  using T = typename Tile::T;
  static constexpr int kTokens = Tile::kTokens, kStages = Tile::kStages, kProducts = Tile::kProducts;
  static constexpr bool kShareColumns = Tile::kShareColumns;
  static constexpr int kSums = kTokens / 2;         // of a thread and product
  static constexpr int kRegisters = 4 * kProducts;  // of A, for 16 rows

  const Block<Tile>& block;
  const Problem& p;
  const int part, group, warp, lane;  // part: of a stage's rows, by 64
  const int column;                   // this lane's first, in the tile
  const uint32_t own;        // of the look-up table: this lane's copy
  const uint32_t codes_at;   // in a stage: of the row that this lane's address is for, as swizzled
  const uint32_t scales_at;  // of the first stage: those of this lane
  RingPosition<kStages> ring{0, 0};
  float sums[kProducts][kSums];

  static __device__ __forceinline__ int sixteen_bytes(int group, int warp) {  // of a row's codes
    return kShareColumns ? group * 2 + warp / 2 : warp;
  }
  __device__ __forceinline__ Consumer(const Block<Tile>& shared, int warpgroup)
      : block(shared),
        p(shared.p),
        part(kShareColumns ? 0 : warpgroup),
        group(warpgroup),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        column(sixteen_bytes(group, warp) * 32 + lane / 4 * 4 + (kShareColumns ? warp % 2 * 2 : 0)),
        own(shared.table + lane * 4),
        codes_at((part * kGroupRows + lane) * Tile::kCodePitch +
                 ((sixteen_bytes(group, warp) ^ lane / 2 % 4) << 4)),
        scales_at(shared.scales(0, part * (kGroupRows / 16)) + column / 64 * 64 + lane % 4 * 16) {}

  // Of 32 rows: register i has a unit of rows 8 i + 2 t and, in its upper half, 8 i + 2 t + 1.
  __device__ __forceinline__ uint4 load(uint32_t stage, int half) const {
    return load_matrices_transposed(block.codes(stage) + codes_at + half * (32 * Tile::kCodePitch));
  }
  // The A registers of 32 rows: levels, and what they are multiplied by, in two parts. a[i]: of 16 rows, four of each
  // product.
  __device__ __forceinline__ void decode(const uint4& codes, uint32_t scales, uint32_t (&a)[2][kRegisters]) const {
    // bytes of the upper rows of pairs, and of those below them, of all that one look-up takes: kProducts times 16 rows
    constexpr int kTurns = kProducts;
    uint32_t upper[kTurns], lower[kTurns];
    if constexpr (kProducts == 2) {
      upper[0] = permute(codes.x, codes.y, 0x5410), lower[0] = permute(codes.x, codes.y, 0x7632);
      upper[1] = permute(codes.z, codes.w, 0x5410), lower[1] = permute(codes.z, codes.w, 0x7632);
    } else {
      const uint32_t half = warp % 2 ? 0x7351 : 0x6240;
      const uint32_t first = permute(codes.x, codes.y, half), second = permute(codes.z, codes.w, half);
      upper[0] = permute(first, second, 0x5410), lower[0] = permute(first, second, 0x7632);
    }
    const uint4 scale[2] = {load_shared_128(scales), load_shared_128(scales + FarTable::kEntry)};
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      // a byte: the code of the upper row, that of the one below it
      const auto join = [](uint32_t x, uint32_t y) { return y ^ ((x ^ y) & 0xF0F0F0F0u); };  // one instruction
      const uint32_t even = join(upper[turn], lower[turn] >> 4), odd = join(upper[turn] << 4, lower[turn]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int byte = i / 2;
        const int sixteen = kProducts == 2 ? turn : byte / 2, eight = kProducts == 2 ? byte / 2 : byte % 2;
        const int product = kProducts == 2 ? byte % 2 : 0;
        const uint32_t level = FarTable::pair(i % 2 ? odd : even, own, FarTable::selector(byte));
        const uint32_t high = eight ? scale[sixteen].z : scale[sixteen].x;
        const uint32_t low = eight ? scale[sixteen].w : scale[sixteen].y;
        a[sixteen][product * 4 + eight * 2 + i % 2] =
            multiply_add_pair<T>(level, high, multiply_pair<T>(level, low));
      }
    }
  }
  // This warpgroup's tile of dY, or dS, in a stage.
  __device__ __forceinline__ uint64_t grad_tile(uint32_t stage) const {
    return tile_further(swizzled_tile(block.grad(stage)), part * (Tile::kGradTileBytes >> 4));
  }
  __device__ __forceinline__ void multiply(const uint32_t (&a)[kRegisters], uint64_t grad, int sixteen) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      Product<T, kTokens>::rs(sums[i], a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3],
                              tile_further(grad, 2 * sixteen), 1);
    }
  }
  // Keeps the compiler from reading or writing sums before this point.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int i = 0; i < kProducts * kSums; ++i) asm volatile("" : "+f"(sums[i / kSums][i % kSums])::"memory");
  }
  __device__ __forceinline__ void await() const { barrier_wait(block.full(ring.stage), ring.parity); }
  __device__ __forceinline__ void release(uint32_t stage, bool any = true) const {
    __syncwarp();
    if (lane == 0 && any) barrier_arrive(block.empty(stage));
  }

  // While the products of 32 rows run, the next are decoded. No branches between products and the wait for them, or the
  // compiler would wait at once: the last stage's codes are loaded once more instead of the next one's.
  __device__ __forceinline__ void accumulate() {
#pragma unroll
    for (int i = 0; i < kProducts * kSums; ++i) sums[i / kSums][i % kSums] = 0.f;
    await();
    uint4 codes = load(ring.stage, 0);
    uint32_t stage = 0, previous = 0;
    const int count = block.end - block.begin;
    for (int left = count; left > 0; --left) {
      previous = stage, stage = ring.stage;
      const uint32_t scales = scales_at + stage * (Tile::kGapsAStage * FarTable::kEntry);
      const uint64_t grad = grad_tile(stage);
      if (left > 1) ring.advance(1);
      uint32_t a[2][2][kRegisters];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 now = codes;
        if (half == 0) codes = load(stage, 1);
        decode(now, scales + 2 * half * FarTable::kEntry, a[half]);
        product_fence();
        multiply(a[half][0], grad, 2 * half);
        multiply(a[half][1], grad, 2 * half + 1);
        product_commit();
        if (half == 1) {
          await();
          codes = load(ring.stage, 0);
        }
        product_wait<1>();
        if (half == 0) release(previous, left < count);
      }
    }
    product_wait<0>();
    hold();
    release(stage);
    ring.advance(1);
  }

  // dS A, of which each warpgroup takes 64 rows of a stage as of W.
  __device__ __forceinline__ void add_adapter() {
    hold();  // or the sums would change registers here, through the stack
    const T* from = static_cast<const T*>(p.A) + block.column + column;
    for (int i = 0; i < block.adapter_stages(); ++i) {
      await();
      const int first = i * Tile::kStageRows + part * kGroupRows;
      // all of them, also beyond the rank, or products would be in a branch of a warp's
#pragma unroll 1
      for (int sixteen = 0; sixteen < kGroupRows / 16; ++sixteen) {
        uint32_t rows[4][kProducts];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = first + sixteen * 16 + r / 2 * 8 + lane % 4 * 2 + r % 2;
          const bool inside = row < p.rank && block.column + column < p.K;
#pragma unroll
          for (int e = 0; e < kProducts; ++e) {
            rows[r][e] = inside ? __ldg(reinterpret_cast<const uint32_t*>(from + int64_t(row) * p.K) + e) : 0;
          }
        }
        uint32_t a[kRegisters];
#pragma unroll
        for (int e = 0; e < kRegisters; ++e) {
          const uint32_t upper = rows[e / 2 % 2 * 2][e / 4], lower = rows[e / 2 % 2 * 2 + 1][e / 4];
          a[e] = permute(upper, lower, e % 2 ? 0x7632 : 0x5410);
        }
        product_fence();
        multiply(a, grad_tile(ring.stage), sixteen);
        product_commit();
        product_wait<0>();
        hold();
      }
      release(ring.stage);
      ring.advance(1);
    }
  }

  __device__ __forceinline__ void write_sums() const {
    const uint32_t to = block.table + uint32_t(Tile::kSums) + part * Tile::kSumBytes + lane % 4 * 2 * Tile::kSumPitch +
                        column * 4;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // tokens 8 i + 2 t and the next
        const auto sum = [&](int product, int far) { return __float_as_uint(sums[product][4 * i + 2 * far + e]); };
        const uint32_t at = to + (8 * i + e) * Tile::kSumPitch;
        if constexpr (kProducts == 2) {
          store_shared_128(at, make_uint4(sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1)));
        } else {
          store_shared_64(at, make_uint2(sum(0, 0), sum(0, 1)));
        }
      }
    }
  }
  // This block's share of the tile: four columns of a token from the sums of all warpgroups and blocks, in their order.
  __device__ __forceinline__ void finish() const {
    const int tokens = min(kTokens, p.M - block.token);
    constexpr int kFours = kColumns / 4;
    for (int i = block.split * Tile::kConsumers + int(threadIdx.x) - 128; i < tokens * kFours;
         i += p.splits * Tile::kConsumers) {
      const int token = i / kFours, four = i % kFours;
      const uint32_t at = block.table + uint32_t(Tile::kSums) + token * Tile::kSumPitch + four * 16;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int split = 0; split < p.splits; ++split) {
        const uint32_t there = p.splits > 1 ? remote_address(at, split) : at;
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
          const float4 v = load_remote_128(there + part * Tile::kSumBytes);
          sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
      }
      const int k = block.column + four * 4;
      if (k >= p.K) continue;
      uint2* to = reinterpret_cast<uint2*>(static_cast<T*>(p.dx) + int64_t(block.token + token) * p.K + k);
      uint2 v = make_uint2(pack_pair<T>(sum.x, sum.y), pack_pair<T>(sum.z, sum.w));
      if (p.adds) {
        const uint2 old = *to;
        v = make_uint2(add_pair<T>(v.x, old.x), add_pair<T>(v.y, old.y));
      }
      *to = v;
    }
  }

  __device__ __forceinline__ void run() {
    accumulate();
    add_adapter();
    named_barrier(4, Tile::kConsumers);  // all are done with the ring and the table
    write_sums();
    if (p.splits > 1) {
      cluster_sync();
    } else {
      named_barrier(4, Tile::kConsumers);
    }
    finish();
    if (p.splits > 1) cluster_sync();  // until all have read this block's sums
  }
};

}  // namespace qlora_engine::cuda::backward_levels

#endif  // QLORA_SM90
