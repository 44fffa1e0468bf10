// Runs CUDA kernels on a CPU, slowly: one thread block after another, its threads as coroutines that switch where
// threads wait for each other (block barriers, shuffles, matrix instructions). What it shows without a GPU: wrong
// indices, writes outside a buffer, missing barriers (each warp runs as far as it gets without the others, in rising
// or in falling order; shared memory is poisoned before each block), barriers that not all threads reach. What it
// cannot show: races within a warp, speed, and the last bit of approximate instructions.
//
// translate.py turns a .cu file into C++ that includes this.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __device__
#undef __global__
#undef __launch_bounds__
#undef __forceinline__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline
using std::max;
using std::min;

namespace emulated {

enum class Wait { kNone, kBlock, kWarp };

struct Thread {
  ucontext_t context;
  uint3 index;
  Wait wait;
  bool done;
  size_t shared_used;
};

constexpr size_t kStack = 256 << 10, kSharedBytes = 64 << 10;
constexpr unsigned kMaxThreads = 1024;

inline Thread* current;
inline uint3 block_index;
inline dim3 block_size, grid_size;
inline bool falling_order = false;
inline char* shared_memory = nullptr;
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::function<void()> kernel;
inline uint32_t exchange[kMaxThreads][8];

inline void wait(Wait reason) {
  Thread* self = current;
  self->wait = reason;
  swapcontext(&self->context, &scheduler);
}

inline void thread_main() {
  kernel();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void run_thread(Thread& thread) {
  if (thread.done || thread.wait != Wait::kNone) return;
  current = &thread;
  swapcontext(&scheduler, &thread.context);
}

// Runs one warp as far as it gets without the others: until its threads have ended or wait for the block.
inline void run_warp(size_t first) {
  const size_t count = std::min<size_t>(32, threads.size() - first);
  const auto begin = threads.begin() + first, end = begin + count;
  for (;;) {
    for (size_t i = 0; i < count; ++i) run_thread(threads[first + (falling_order ? count - 1 - i : i)]);
    if (!std::all_of(begin, end, [](const Thread& t) { return !t.done && t.wait == Wait::kWarp; })) return;
    std::for_each(begin, end, [](Thread& t) { t.wait = Wait::kNone; });
  }
}

// Ends a barrier of the block; false where not all threads that are left have reached one.
inline bool end_barrier() {
  const auto done = [](const Thread& t) { return t.done; };
  const auto arrived = [](const Thread& t) { return t.done || t.wait == Wait::kBlock; };
  if (std::all_of(threads.begin(), threads.end(), done)) return false;
  if (!std::all_of(threads.begin(), threads.end(), arrived)) return false;
  for (Thread& t : threads) t.wait = Wait::kNone;
  return true;
}

inline void run_block(char* stacks) {
  memset(shared_memory, 0xFF, kSharedBytes);
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t = Thread{};
    t.index = make_uint3(unsigned(i), 0, 0);
    t.shared_used = 1024;  // where sm_90 lets a block's own shared memory start
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks + i * kStack;
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, thread_main, 0);
  }
  const size_t warps = (threads.size() + 31) / 32;
  do {
    for (size_t w = 0; w < warps; ++w) run_warp(32 * (falling_order ? warps - 1 - w : w));
  } while (end_barrier());
  for (const Thread& t : threads) {
    if (!t.done) {
      fprintf(stderr, "block %u: thread %u waits for ever\n", block_index.x, t.index.x);
      abort();
    }
  }
}

template <typename Body>
void launch(unsigned grid, unsigned block, Body body) {
  static char* stacks = nullptr;
  if (stacks == nullptr) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, kFlags, -1, 0));
    // shared addresses have 32 bits
    shared_memory =
        static_cast<char*>(mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, kFlags | MAP_32BIT, -1, 0));
    if (stacks == MAP_FAILED || shared_memory == MAP_FAILED || block > kMaxThreads) abort();
  }
  grid_size = dim3(grid);
  block_size = dim3(block);
  kernel = body;
  threads.resize(block);
  for (unsigned b = 0; b < grid; ++b) {
    block_index = make_uint3(b, 0, 0);
    run_block(stacks);
  }
}

// A shared variable: every thread meets the declarations in the same order.
template <typename T>
T& shared(size_t alignment = alignof(T)) {
  const size_t at = (current->shared_used + alignment - 1) / alignment * alignment;
  current->shared_used = at + sizeof(T);
  if (current->shared_used > kSharedBytes) abort();
  return *reinterpret_cast<T*>(shared_memory + at);
}

template <typename T>
T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const unsigned i = current->index.x;
  memcpy(exchange[i], &value, sizeof value);
  wait(Wait::kWarp);
  T result;
  memcpy(&result, exchange[i / 32 * 32 + source % 32], sizeof value);
  wait(Wait::kWarp);
  return result;
}

inline float to_float(__half, uint32_t bits) { return __half2float(__half(__half_raw{uint16_t(bits)})); }
inline float to_float(__nv_bfloat16, uint32_t bits) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{uint16_t(bits)}));
}

// mma.m16n8k16: fragments as in the PTX ISA's chapter on it.
template <typename T>
void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const unsigned i = current->index.x, lane = i % 32;
  auto* warp = exchange + i / 32 * 32;
  const uint32_t own[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(exchange[i], own, sizeof own);
  wait(Wait::kWarp);
  float result[4];
  for (unsigned j = 0; j < 4; ++j) {
    const unsigned row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
    double sum = c[j];
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t a = warp[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t b = warp[column * 4 + k % 8 / 2][4 + k / 8];
      sum += double(to_float(T{}, a >> k % 2 * 16)) * double(to_float(T{}, b >> k % 2 * 16));
    }
    result[j] = float(sum);
  }
  wait(Wait::kWarp);
  memcpy(c, result, sizeof result);
}

inline float flush(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.f, v) : v; }

template <typename To, typename From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

inline void __syncthreads() { emulated::wait(emulated::Wait::kBlock); }
template <typename T>
T __shfl_sync(unsigned, T v, int source) {
  return emulated::shuffle(v, unsigned(source));
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulated::shuffle(v, threadIdx.x ^ unsigned(mask));
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline uint32_t __float_as_uint(float v) { return emulated::bits_as<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return emulated::bits_as<float>(v); }
inline float __fadd_rn(float a, float b) {
  const float r = a + b;
  return std::isnan(r) ? __uint_as_float(0x7fffffffu) : r;  // the NaN a GPU makes
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}
