// Decoding with one rounding: the 16 products level * absmax of a row's block, each rounded once to 16 bits, are a table in
// registers, and weights are looked up in it by byte permutations: 24 instructions for 8 weights, no arithmetic.
#pragma once
#include "copy_async.cuh"
#include "decode.cuh"

namespace qlora_engine::cuda {

// The 16 products of a row in one K-tile, each rounded once to T: their low bytes, their high bytes.
struct ProductTable {
  uint4 low, high;
};

template <typename T>
__device__ __forceinline__ ProductTable product_table(float scale) {
  constexpr float kLevels[16] = {QLORA_NF4_LEVELS};
  uint32_t pairs[8], low[4], high[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    pairs[i] = pack_pair<T>(multiply_ftz(kLevels[2 * i], scale), multiply_ftz(kLevels[2 * i + 1], scale));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low[i] = permute(pairs[2 * i], pairs[2 * i + 1], 0x6420);
    high[i] = permute(pairs[2 * i], pairs[2 * i + 1], 0x7531);
  }
  return {make_uint4(low[0], low[1], low[2], low[3]), make_uint4(high[0], high[1], high[2], high[3])};
}

// Four bytes of codes, prepared for look-ups: where in an 8-entry half of the table, and which half.
struct LookUp {
  uint32_t index, half;
};

// Byte `t` of each of four words: the codes of columns 2t, 2t + 1 of four groups of eight.
__device__ __forceinline__ LookUp look_up(uint4 words, uint32_t byte_pair) {
  const uint32_t codes =
      permute(permute(words.x, words.y, byte_pair), permute(words.z, words.w, byte_pair), 0x5410);
  return {codes & 0x77777777u, ((codes & 0x88888888u) | 0x64206420u) >> 1};
}

// Two bytes of codes (the low halves of `index` and `half`) -> two pairs of weights, as A registers hold them.
// Volatile: keeps its place between the products.
__device__ __forceinline__ void decode_pairs(const ProductTable& table, uint32_t index, uint32_t half, uint32_t& first,
                                             uint32_t& second) {
  asm volatile(
      "{\n.reg .b32 a, b, c, d;\n"
      "prmt.b32 a, %2, %3, %10;\nprmt.b32 b, %4, %5, %10;\nprmt.b32 c, %6, %7, %10;\nprmt.b32 d, %8, %9, %10;\n"
      "prmt.b32 a, a, b, %11;\nprmt.b32 c, c, d, %11;\nprmt.b32 %0, a, c, 0x4051;\nprmt.b32 %1, a, c, 0x6273;\n}"
      : "=r"(first), "=r"(second)
      : "r"(table.low.x), "r"(table.low.y), "r"(table.low.z), "r"(table.low.w), "r"(table.high.x),
        "r"(table.high.y), "r"(table.high.z), "r"(table.high.w), "r"(index), "r"(half));
}

}  // namespace qlora_engine::cuda
