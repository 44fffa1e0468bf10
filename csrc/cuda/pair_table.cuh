// mma.sync on 16-bit operands, and NF4 codes as its operands: a packed byte becomes a register of two levels by one
// look-up.
#pragma once
#include "decode.cuh"

namespace qlora_engine::cuda {

__device__ __forceinline__ void mma(__half, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(__nv_bfloat16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Both levels of a packed byte as a pair of 16-bit numbers; the table of byte b for lane l is at 128 b + 4 l.
class PairTable {
 public:
  static constexpr int kBytes = 256 * 128;

  // By threads 0 to kThreads - 1 of the block.
  template <typename T, int kThreads>
  static __device__ __forceinline__ void fill(char* table) {
    static_assert(kThreads % 256 == 0 && kThreads <= 1024, "a byte's 32 copies are shared out among whole threads");
    constexpr int kShare = kThreads / 256;  // threads a byte
    const int byte = threadIdx.x / kShare, part = threadIdx.x % kShare;
    const uint32_t pair = pack_pair<T>(__ldg(kNf4Levels + byte / 16), __ldg(kNf4Levels + byte % 16));
#pragma unroll
    for (int i = 0; i < 8 / kShare; ++i) {  // neighbouring threads start at neighbouring banks
      const int piece = (i * kShare + part + byte) % 8;
      *reinterpret_cast<uint4*>(table + byte * 128 + piece * 16) = make_uint4(pair, pair, pair, pair);
    }
  }

  template <int kByte>
  static __device__ __forceinline__ uint32_t pair(const char* table, uint32_t word, uint32_t lane_offset) {
    constexpr int kRight = kByte * 8 - 7;  // the byte at bits 7 to 14: 128 bytes an entry
    const uint32_t shifted = kRight >= 0 ? word >> (kRight >= 0 ? kRight : 0) : word << (kRight >= 0 ? 0 : -kRight);
    return *reinterpret_cast<const uint32_t*>(table + ((shifted & 0x7F80u) | lane_offset));
  }
};

}  // namespace qlora_engine::cuda
