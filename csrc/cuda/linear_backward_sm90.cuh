// Parts of linear_backward_sm90.cu: how the work is cut, how W is decoded, how a tile of dX is written.
#pragma once
#include "copy_async.cuh"
#include "kernels.h"
#include "sm90.cuh"

namespace qlora_engine::cuda::backward {

// Every tile of dX is kTokens x kColumns; the sum over N goes in steps of kStep rows of W.
constexpr int kTokens = 256;
constexpr int kColumns = 128;
constexpr int kStep = 64;
constexpr int kThreads = 384;  // one warpgroup decodes, two multiply: 64 columns each
constexpr int kStages = 4;     // tiles of dY and of decoded W under way
constexpr int kFetched = 3;    // packed tiles under way to each decoding thread
constexpr int kOutTokens = 32;  // of dX, stored at a time

// Shared memory, from an address that is a multiple of 1024.
constexpr int kGradBytes = kTokens * kStep * 2;
constexpr int kDecodedBytes = kStep * kColumns * 2;
constexpr int kStageBytes = kGradBytes + kDecodedBytes;
constexpr int kOutBytes = kOutTokens * 64 * 2;    // two for each multiplying warpgroup
constexpr int kFetchedBytes = 128 * (16 + 16 + 4 + 4);  // 32 bytes of W and what its scale is made of, a thread
constexpr int kOutAt = kStages * kStageBytes;
constexpr int kFetchedAt = kOutAt + 4 * kOutBytes;
constexpr int kMapAt = kFetchedAt + kFetched * kFetchedBytes;
constexpr int kBarriersAt = kMapAt + 256 * 4;
constexpr int kFlagsAt = kBarriersAt + 3 * kStages * 8;
constexpr int kSharedBytes = kFlagsAt + 16 + 1024;  // 1024: to align with
static_assert(kSharedBytes <= 232448, "what a block of sm_90 may have");

// What every thread block knows of the product. A unit is one tile of dX (of `cluster` neighbouring tiles along the
// tokens) and one part of the sum over N.
struct Work {
  int M, N, K;
  int steps;         // over N, and then over the adapter's rank
  int weight_steps;  // over N
  int column_tiles;  // of dX
  int token_tiles;   // of dX; of `cluster` tiles each
  int splits;        // parts of the sum
  int group;         // token tiles that are done together, for all columns: they find dY in the L2 cache
  int units;
  bool adds;  // to what dX holds
};

struct Unit {
  int token_tile, column_tile, split;
  int begin, end;  // steps
};

__device__ __forceinline__ Unit unit_at(const Work& work, int index) {
  Unit unit;
  const int tile = index / work.splits;
  unit.split = index - tile * work.splits;
  const int group_units = work.group * work.column_tiles;
  const int group = tile / group_units, rest = tile - group * group_units;
  const int height = min(work.group, work.token_tiles - group * work.group);
  unit.column_tile = rest / height;
  unit.token_tile = group * work.group + (rest - unit.column_tile * height);
  unit.begin = work.steps * unit.split / work.splits;
  unit.end = work.steps * (unit.split + 1) / work.splits;
  return unit;
}

// The steps of this cluster's units, one after the other.
class Walk {
 public:
  __device__ __forceinline__ Walk(const Work& work, int first, int stride)
      : work_(work), index_(first), stride_(stride), unit_(unit_at(work, first)), step_(unit_.begin) {}
  __device__ __forceinline__ bool done() const { return index_ >= work_.units; }
  __device__ __forceinline__ const Unit& unit() const { return unit_; }
  __device__ __forceinline__ int step() const { return step_; }
  // True where another unit began.
  __device__ __forceinline__ bool advance(int steps) {
    step_ += steps;
    if (step_ < unit_.end) return false;
    do {
      const int over = step_ - unit_.end;
      index_ += stride_;
      if (done()) return false;
      unit_ = unit_at(work_, index_);
      step_ = unit_.begin + over;
    } while (step_ >= unit_.end);
    return true;
  }

 private:
  const Work& work_;
  int index_, stride_;
  Unit unit_;
  int step_;
};

// The 16 values an element of one block can have, in registers: round(level * absmax), low and high bytes apart, so
// that one prmt looks up a byte of four elements in eight values.
template <typename T>
struct ProductTable {
  uint32_t low[4], high[4];

  explicit __device__ __forceinline__ ProductTable(float absmax) {
    constexpr float kLevels[16] = {QLORA_NF4_LEVELS};
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pairs[i] = pack_pair<T>(multiply_ftz(kLevels[2 * i], absmax), multiply_ftz(kLevels[2 * i + 1], absmax));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = permute(pairs[2 * i], pairs[2 * i + 1], 0x6420);
      high[i] = permute(pairs[2 * i], pairs[2 * i + 1], 0x7531);
    }
  }

  // Eight codes (a word of packed W) -> eight elements in their order.
  __device__ __forceinline__ uint4 decode(uint32_t word) const {
    uint4 out;
    uint32_t index = word & 0x77777777u;
    uint32_t half = ((word & 0x88888888u) | 0x64206420u) >> 1;  // byte i of the lower or of the upper eight values
    four(index, half, out.x, out.y);
    four(index >> 16, half >> 16, out.z, out.w);
    return out;
  }

 private:
  __device__ __forceinline__ void four(uint32_t index, uint32_t half, uint32_t& first, uint32_t& second) const {
    const uint32_t lows = permute(permute(low[0], low[1], index), permute(low[2], low[3], index), half);
    const uint32_t highs = permute(permute(high[0], high[1], index), permute(high[2], high[3], index), half);
    first = permute(lows, highs, 0x4051);  // the first element of a byte is its high nibble
    second = permute(lows, highs, 0x6273);
  }
};

#ifdef QLORA_SM90

__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// What one decoding thread fetches: of row `row` of a step and 64 columns, 32 bytes of W and one scale. The copies are
// the thread's own, so they need no barrier, and no register waits for them.
template <bool kNested>
class Fetch {
 public:
  __device__ __forceinline__ Fetch(const Nf4Weight& weight, const Work& work, uint32_t fetched, uint32_t map,
                                   int thread)
      : weight_(weight),
        work_(work),
        at_(fetched + thread * 16),
        word_at_(fetched + 4096 + thread * 4),
        map_(map),
        row_(thread % 64),
        half_(thread / 64),
        shift_(weight.log2_blocksize - 6),
        offset_(kNested ? __ldg(weight.nested_offset) : 0.f) {}

  // Begins the copies of the walk's step into slot `slot`; always ends a group. Of an adapter's step there are none.
  __device__ __forceinline__ void begin(const Walk& walk, int slot) {
    bytes_ <<= 8;
    if (!walk.done()) {
      const int n = walk.step() * kStep + row_, run = 2 * walk.unit().column_tile + half_;  // a run: 64 columns
      const bool inside = n < work_.N && run * 64 < work_.K;
      if (walk.step() >= work_.weight_steps) bytes_ |= kAdapter;
      const uint32_t flat = inside ? uint32_t(n) * uint32_t(work_.K / 64) + run : 0, block = flat >> shift_;
      const uint8_t* from = weight_.packed + size_t(flat) * 32;
      const uint32_t to = at_ + slot * kFetchedBytes, word_to = word_at_ + slot * kFetchedBytes;
      copy_async<16>(to, from, inside ? 16 : 0);
      copy_async<16>(to + 2048, from + 16, inside ? 16 : 0);
      if constexpr (kNested) {  // the aligned word that the code lies in, as far as there are codes
        const uint32_t first = block & ~3u, codes = uint32_t(weight_.blocks) - first;
        copy_async<4>(word_to, weight_.absmax_codes + first, inside ? min(codes, 4u) : 0);
        copy_async<4>(word_to + 512, weight_.nested_absmax + block / uint32_t(kNestedBlocksize), inside ? 4 : 0);
        bytes_ |= block & 3u;
      } else {
        copy_async<4>(word_to + 512, weight_.absmax + block, inside ? 4 : 0);
      }
    }
    copies_commit();
  }

  // Whether the step that the last begin() but kFetched - 1 was called for is an adapter's.
  __device__ __forceinline__ bool adapter() const { return bytes_ >> (kFetched - 1) * 8 & kAdapter; }

  // What the last begin() but kFetched - 1 copied, in three steps, so that other work may hide the accesses of each:
  // the words of W and what the scale is made of, ...
  __device__ __forceinline__ void read(int slot, uint4 (&words)[2]) {
    copies_wait<kFetched - 1>();
    const uint32_t from = at_ + slot * kFetchedBytes, word_from = word_at_ + slot * kFetchedBytes;
    if constexpr (kNested) code_word_ = load_shared_word(word_from);
    words[0] = sm90::load_shared_128(from);
    words[1] = sm90::load_shared_128(from + 2048);
    absmax_ = sm90::load_shared_float(word_from + 512);
  }
  // ... the level of the scale's code, ...
  __device__ __forceinline__ void look_up() {
    if constexpr (kNested) {
      const uint32_t byte = bytes_ >> (kFetched - 1) * 8 & 3u;
      level_ = sm90::load_shared_float(map_ + permute(code_word_, 0, 0x4440u | byte) * 4);
    }
  }
  // ... and the scale.
  __device__ __forceinline__ float absmax() const {
    return kNested ? decode_scale(level_, absmax_, offset_) : absmax_;
  }

 private:
  static constexpr uint32_t kAdapter = 4;  // in a byte of bytes_

  const Nf4Weight& weight_;
  const Work& work_;
  uint32_t at_, word_at_, map_;
  int row_, half_, shift_;
  float offset_;
  uint32_t bytes_ = 0;  // where in their words the codes of the last four calls of begin() lie
  uint32_t code_word_ = 0;
  float absmax_ = 0.f, level_ = 0.f;
};

using namespace sm90;

// Adds the parts of a tile, in order, into `sums` of the block that comes last; true there.
__device__ __forceinline__ bool add_parts(float (&sums)[kTokens / 2], const Work& work, int tile, int part, int group,
                                          float* partials, int32_t* counters, uint32_t flag) {
  const int thread = threadIdx.x % 128;
  const int64_t slot = int64_t(tile) * 2 + group;
  constexpr int kVectors = kTokens / 8;
  float4* parts = reinterpret_cast<float4*>(partials) + slot * work.splits * kVectors * 128 + thread;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    __stcg(parts + (part * kVectors + i) * 128,
           make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  }
  __threadfence();
  named_barrier(1 + group, 128);
  if (thread == 0) store_shared_float(flag, float(atomicAdd(counters + slot, 1)));
  named_barrier(1 + group, 128);
  const bool last = load_shared_float(flag) == float(work.splits - 1);
  named_barrier(1 + group, 128);  // before the flag is written again
  if (!last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.f;
  for (int s = 0; s < work.splits; ++s) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float4 v = __ldcg(parts + (s * kVectors + i) * 128);
      sums[4 * i] += v.x, sums[4 * i + 1] += v.y, sums[4 * i + 2] += v.z, sums[4 * i + 3] += v.w;
    }
  }
  return true;
}

// 64 columns of a tile, kOutTokens tokens at a time, through two buffers of this warpgroup.
template <typename T>
__device__ __forceinline__ void store_tile(const float (&sums)[kTokens / 2], const Work& work, const CUtensorMap* map,
                                           int column, int token, int group, uint32_t buffers) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  // lane 8 i + j writes row j (a token) of matrix i: eight columns of eight tokens; i counts columns, then tokens
  const int row = lane % 8, chunk = 2 * warp + lane / 8 % 2;
  const uint32_t at = buffers + (lane / 16 * 8 + row) * 128 + ((chunk ^ row) * 16);
#pragma unroll
  for (int q = 0; q < kTokens / kOutTokens; ++q) {
    if (token + q * kOutTokens >= work.M) break;
    if (threadIdx.x % 128 == 0) q == 0 ? stores_wait_read<0>() : stores_wait_read<1>();
    named_barrier(1 + group, 128);
#pragma unroll
    for (int j = 0; j < kOutTokens / 8; j += 2) {
      const float* s = sums + (q * kOutTokens / 8 + j) * 4;
      store_matrices_transposed(at + q % 2 * kOutBytes + j * 1024, pack_pair<T>(s[0], s[1]), pack_pair<T>(s[2], s[3]),
                                pack_pair<T>(s[4], s[5]), pack_pair<T>(s[6], s[7]));
    }
    proxy_fence();
    named_barrier(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
      const uint32_t from = buffers + q % 2 * kOutBytes;
      if (work.adds) {
        tile_add(map, column, token + q * kOutTokens, from);
      } else {
        tile_store(map, column, token + q * kOutTokens, from);
      }
      stores_commit();
    }
  }
}

#endif  // QLORA_SM90

}  // namespace qlora_engine::cuda::backward
