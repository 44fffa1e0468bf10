// Copies from global to shared memory that a thread begins and later waits for: its own data need no other barrier.
// Bytes looked up by prmt.
#pragma once
#include <cstdint>

namespace qlora_engine::cuda {

// kBytes (4, 8 or 16, both sides aligned to it), of which `bytes` are read and the rest becomes 0. Those of 16 pass by
// the L1 cache.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint32_t bytes = kBytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
// The copies begun since the last call are a group.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of this thread's groups but the last kPending are there.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Byte i of the result is byte (digit i of selector) of a, then b. __byte_perm would first clear the selector's upper
// bits, which are zero wherever this is used.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

}  // namespace qlora_engine::cuda
