// Parts of the fused product in linear_sm90.cu: how the work is cut, the shared memory, tables of products, decoding.
#pragma once
#include "product_table.cuh"
#include "sm90.cuh"

namespace qlora_engine::cuda::sm90 {

constexpr int kTileRows = 128;     // of W, a thread block at a time: 64 a consumer warpgroup
constexpr int kTileColumns = 64;   // of W and x, a stage: the smallest block, so a row has one scale a stage
constexpr int kThreads = 384;      // warpgroup 0 loads and builds tables, warpgroups 1 and 2 decode and multiply
constexpr int kTableWarps = 3;
constexpr int kConsumerWarps = 8;
constexpr int kStoreTokens = 16;   // rows of y that one tile store writes

// What the kernel computes, and how the tiles of y are dealt out.
struct FusedProblem {
  const float* absmax;  // or the three pointers below
  const uint8_t* absmax_codes;
  const float* nested_absmax;
  const float* nested_offset;
  const void* bias;  // [N] or nullptr
  void* y;           // [M, N]
  int M, N;
  int log2_tiles_a_scale;         // K-tiles that share one scale, as a power of two
  int k_tiles;                    // K / 64
  int token_tiles, row_tiles;     // a row tile of a pair of blocks that share x counts once
  int splits;                     // blocks of a cluster that divide K
  bool store_tiles;               // y's pitch is a multiple of 16 bytes
  const void* lora_B;             // [N, lora_rank], of the adapter
  int lora_rank;                  // 0: no adapter
};

// One tile of y and the K-tiles [begin, end) that go into it; those from k_tiles on are padding, and zero.
struct WorkUnit {
  int token_tile, row_tile, begin, end;
};

// Tiles in groups of kGroup token tiles: the blocks at work at one time share rows of W and of x in the L2. A split of
// K begins at a multiple of kUnroll K-tiles.
template <int kUnroll>
__device__ __forceinline__ WorkUnit work_unit(const FusedProblem& p, int tile, int split) {
  constexpr int kGroup = 8;
  const int per_group = kGroup * p.row_tiles;
  const int group = tile / per_group, rest = tile - group * per_group;
  const int width = min(kGroup, p.token_tiles - group * kGroup);
  WorkUnit unit;
  unit.row_tile = rest / width;
  unit.token_tile = group * kGroup + (rest - unit.row_tile * width);
  const int steps = (p.k_tiles + kUnroll - 1) / kUnroll;
  unit.begin = int(int64_t(steps) * split / p.splits) * kUnroll;
  unit.end = int(int64_t(steps) * (split + 1) / p.splits) * kUnroll;
  return unit;
}

// One instance of the kernel: a tile of kTokens rows of x, a ring of kStages, kPair blocks that share x by multicast.
template <typename T_, int kTokens_, int kStages_, int kPair_>
struct Tiling {
  using T = T_;
  static constexpr int kTokens = kTokens_, kStages = kStages_, kPair = kPair_;
  // Few tokens: two blocks a multiprocessor hide each other's latencies; one set of A registers a warp.
  static constexpr bool kFew = kTokens <= 64;
  static constexpr int kResident = kFew ? 2 : 1;
  // Consumers of many tokens take stages in fours, so that addresses are constants: K-tiles are padded to that.
  static constexpr int kUnroll = kFew ? 1 : 4;
  static_assert(kStages % kUnroll == 0 && kTokens % kStoreTokens == 0);
  static constexpr int kProducerRegisters = kFew ? 48 : 56;
  static constexpr int kConsumerRegisters = kFew ? 96 : 224;

  // Shared memory, from a multiple of 1024 on
  static constexpr int kXBytes = kTokens * kTileColumns * 2;
  static constexpr int kPackedBytes = kTileRows * kTileColumns / 2;
  static constexpr int kTableBytes = kTileRows * 32;  // 16 products of 16 bits a row
  static constexpr int kX = 0;
  static constexpr int kOut = kX + kStages * kXBytes;  // [2 warpgroups][kTokens] rows of 128 bytes, swizzled
  static constexpr int kPacked = kOut + 2 * kTokens * 128;
  static constexpr int kTable = kPacked + kStages * kPackedBytes;
  static constexpr int kMap = kTable + kStages * kTableBytes;
  static constexpr int kEnd = kMap + 1024;
  static constexpr int kBytes = kEnd + 1024;  // the start is rounded up
  static_assert(kPackedBytes == kTableBytes, "one offset a stage serves both");
  static constexpr int kPartialBytes = kTileRows * kTokens * 4;
  static_assert(kPartialBytes <= kOut, "partial sums lie where x was, beside the output's staging");
};

// A ring position: stage and the parity of its current round.
template <int kStages>
struct RingPosition {
  uint32_t stage, parity;
  __device__ __forceinline__ void advance(uint32_t count) {
    stage += count;
    if (stage >= kStages) stage -= kStages, parity ^= 1;
  }
};

#ifdef QLORA_SM90

template <typename T>
__device__ __forceinline__ float bias_of(const FusedProblem& p, int n) {
  return p.bias && n < p.N ? float(static_cast<const T*>(p.bias)[n]) : 0.f;
}

// A registers of 64 columns of the adapter's B, from `column` on, for a lane's rows n and n + 8 of W.
template <typename T>
__device__ __forceinline__ void load_adapter(uint32_t* a, const FusedProblem& p, int n0, int column, int lane) {
  const T* b = static_cast<const T*>(p.lora_B) + column + lane % 4 * 2;
  const int columns = p.lora_rank - column - lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int n = n0 + i % 2 * 8, k = i / 4 * 16 + i / 2 % 2 * 8;
    const bool inside = n < p.N && k < columns;
    a[i] = inside ? __ldg(reinterpret_cast<const uint32_t*>(b + int64_t(n) * p.lora_rank + k)) : 0u;
  }
}

// Rounds a warpgroup's sums of 16 tokens, and lays them transposed, as rows of y, 128 bytes each, in the 128-byte
// swizzle, at `out`.
template <typename T>
__device__ __forceinline__ void stage_tokens(uint32_t out, int warp, int lane, const float (&v)[8], float bias_near,
                                             float bias_far) {
  const int matrix = lane / 8, half = matrix % 2, token = matrix / 2 * 8 + lane % 8;
  const uint32_t to = out + token * 128 + (((warp * 2 + half) ^ (lane % 8)) << 4);
  store_matrices_transposed(to, pack_pair<T>(v[0] + bias_near, v[1] + bias_near),
                            pack_pair<T>(v[2] + bias_far, v[3] + bias_far),
                            pack_pair<T>(v[4] + bias_near, v[5] + bias_near),
                            pack_pair<T>(v[6] + bias_far, v[7] + bias_far));
}

// What a lane needs to decode its two rows (r and r + 8) of a stage.
struct StageCodes {
  ProductTable tables[2];
  LookUp codes[2][2];  // [row][columns 0 to 31, 32 to 63]

  // `packed`, `table`: the stage's; `near`, `far`: offsets of the first and second 16 bytes of the row, as swizzled
  __device__ __forceinline__ void load(uint32_t packed, uint32_t table, uint32_t near, uint32_t far,
                                       uint32_t byte_pair) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint4 first = load_shared_128(packed + near + row * 256);
      const uint4 second = load_shared_128(packed + far + row * 256);
      codes[row][0] = look_up(first, byte_pair);
      codes[row][1] = look_up(second, byte_pair);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      tables[row].low = load_shared_128(table + near + row * 256);
      tables[row].high = load_shared_128(table + far + row * 256);
    }
  }
  // The A registers of columns 16 i to 16 i + 15.
  __device__ __forceinline__ void decode(int i, uint32_t* a) const {
    const int word = i >> 1, shift = (i & 1) * 16;
    decode_pairs(tables[0], codes[0][word].index >> shift, codes[0][word].half >> shift, a[0], a[2]);
    decode_pairs(tables[1], codes[1][word].index >> shift, codes[1][word].half >> shift, a[1], a[3]);
  }
};

// Addresses of this block's shared memory, and what all warps know.
template <typename Tile>
struct Block {
  uint32_t x, out, packed, table, map;
  uint32_t full, empty;  // barriers, 8 bytes a stage
  uint32_t adapter;      // barriers, 8 bytes a consumer warpgroup: a tile of S is there
  uint32_t rank;         // in the cluster
  int first_tile, tile_step, tiles, split;

  __device__ __forceinline__ WorkUnit unit(const FusedProblem& p, int tile) const {
    return work_unit<Tile::kUnroll>(p, tile, split);
  }
  __device__ __forceinline__ int row0(const WorkUnit& unit) const {
    return (unit.row_tile * Tile::kPair + (Tile::kPair > 1 ? int(rank) : 0)) * kTileRows;
  }
};

#endif  // QLORA_SM90

}  // namespace qlora_engine::cuda::sm90
