// The look-up table of the kernels for Hopper that multiply by levels: both levels of a packed byte as a pair of 16-bit
// numbers, a copy for every lane, so that 32 look-ups never meet in a bank. It lies at a multiple of 64 KB with entries
// 256 bytes apart: one permutation puts the byte into the address. The upper halves of the entries are free for others.
#pragma once
#include <cstring>

#include "copy_async.cuh"
#include "sm90.cuh"

namespace qlora_engine::cuda {

// The levels as 16-bit numbers, all multiplied by one factor that its inverse takes back from the scales: of all factors
// in steps of 2^-17 from 1 to 2, the one with which rounding moves the levels least, in the mean of squares. In bfloat16
// that is 0.63 thousandths of their own mean, where levels as they are lose 1.06, and products with a scale 1.66; in
// float16 0.062 (0.156, 0.21). tests/ops/test_levels.py looks for it again.
template <typename T>
constexpr float kLevelFactor = 0.f;
template <>
inline constexpr float kLevelFactor<__nv_bfloat16> = 1.4370040893554688f;
template <>
inline constexpr float kLevelFactor<__half> = 1.6776885986328125f;

// As kernels get them: a parameter needs no load from memory.
struct RoundedLevels {
  uint16_t of[16];
  float inverse;  // of the factor

  template <typename T>
  static RoundedLevels make() {
    constexpr float kLevels[16] = {QLORA_NF4_LEVELS};
    RoundedLevels levels;
    for (int i = 0; i < 16; ++i) {
      const T level(kLevels[i] * kLevelFactor<T>);
      std::memcpy(&levels.of[i], &level, sizeof level);
    }
    levels.inverse = 1.f / kLevelFactor<T>;
    return levels;
  }
};

struct FarTable {
  static constexpr int kEntry = 256, kBytes = 256 * kEntry, kAlignment = 65536;
  // Offsets from the table of a block's dynamic shared memory, which begins at address 1024 where there is no other
  static constexpr int kFirst = 1024, kLow = kFirst - kAlignment, kDynamicBytes = 227 * 1024, kEnd = kLow + kDynamicBytes;

#ifdef QLORA_SM90
  // The block's rank in its cluster is in the upper bits.
  static __device__ __forceinline__ uint32_t address(uint32_t dynamic) {
#ifdef __CUDA_ARCH__
    if ((dynamic & (kAlignment - 1)) != kFirst) __trap();
#endif
    return dynamic - uint32_t(kLow);
  }
  // Of a block that is in no cluster: a constant, so that no register holds it. On a CPU, which runs this text in a test,
  // it is any multiple of 64 KB.
  static __device__ __forceinline__ uint32_t constant_address(uint32_t dynamic) {
#ifdef __CUDA_ARCH__
    if (dynamic != kFirst) __trap();
    return kAlignment;
#else
    return address(dynamic);
#endif
  }
  // 128 bytes that are no part of it.
  static __device__ __forceinline__ uint32_t gap(uint32_t table, uint32_t i) { return table + i * kEntry + 128; }

  // By kThreads threads, of which this is `thread`.
  template <int kThreads>
  static __device__ __forceinline__ void fill(uint32_t table, const RoundedLevels& levels, int thread) {
    static_assert(kThreads % 256 == 0 && kThreads <= 512, "whole threads share out the copies of a byte");
    constexpr int kShare = kThreads / 256;
    const int byte = thread / kShare;
    const uint32_t pair = levels.of[byte / 16] | uint32_t(levels.of[byte % 16]) << 16;
#pragma unroll
    for (int i = 0; i < 8 / kShare; ++i) {
      const uint32_t piece = (i * kShare + thread + byte) % 8;  // neighbouring threads start at neighbouring banks
      sm90::store_shared_128(table + byte * kEntry + piece * 16, make_uint4(pair, pair, pair, pair));
    }
  }
  // Of byte `byte` of a word; `own`: the table's address and 4 times the lane.
  static __device__ __forceinline__ uint32_t selector(uint32_t byte) { return 0x7604 | byte << 4; }
  static __device__ __forceinline__ uint32_t pair(uint32_t word, uint32_t own, uint32_t selector) {
    return sm90::load_table_32(permute(word, own, selector));
  }
#endif
};

}  // namespace qlora_engine::cuda
