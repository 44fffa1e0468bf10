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
#undef __grid_constant__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__
using std::max;
using std::min;

namespace emulated {

enum class Wait { kNone, kBlock, kWarp, kNamed, kCluster, kSpin };

struct Copy {
  char* to;
  const void* from;
  size_t size, bytes;
};

struct Thread {
  std::vector<std::vector<Copy>> copies;  // groups of cp.async that nobody waited for; the last one is open
  ucontext_t context;
  uint3 index, block;
  unsigned rank;  // of the block in its cluster
  Wait wait;
  unsigned barrier, barrier_count;  // of kNamed
  bool done;
  size_t shared_used;
};

// A block of a launch with `dynamic` bytes of shared memory besides the variables' 64 KB.
constexpr size_t kStack = 256 << 10, kSharedBytes = 64 << 10, kSharedStride = 320 << 10;
constexpr size_t kSharedStart = 1024;  // where sm_90 lets a block's own shared memory start
constexpr unsigned kMaxThreads = 8192, kMaxCluster = 8;

inline Thread* current;
inline dim3 block_size, grid_size;
inline bool falling_order = false;
inline char* shared_memory = nullptr;
inline ucontext_t scheduler;
inline std::vector<Thread> threads;  // of all blocks of a cluster
inline std::function<void()> kernel;
inline uint32_t exchange[kMaxThreads][8];
inline uint64_t events = 0;  // anything that a waiting thread may wait for
// Carries one thing out that was begun and has not happened yet; false where there is none.
inline bool (*late)() = nullptr;
inline void (*before_launch)() = nullptr;

inline unsigned slot() { return unsigned(current - threads.data()); }
inline char* block_memory(unsigned rank) { return shared_memory + rank * kSharedStride; }

inline void wait(Wait reason) {
  Thread* self = current;
  self->wait = reason;
  swapcontext(&self->context, &scheduler);
}

inline void thread_main() {
  kernel();
  current->done = true;
  ++events;
  swapcontext(&current->context, &scheduler);
}

inline void run_thread(Thread& thread) {
  if (thread.wait == Wait::kSpin) thread.wait = Wait::kNone;
  if (thread.done || thread.wait != Wait::kNone) return;
  current = &thread;
  swapcontext(&scheduler, &thread.context);
}

// Runs one warp as far as it gets without the others: until its threads have ended or wait for others.
inline void run_warp(size_t first, size_t block_end) {
  const size_t count = std::min<size_t>(32, block_end - first);
  const auto begin = threads.begin() + first, end = begin + count;
  for (;;) {
    for (size_t i = 0; i < count; ++i) run_thread(threads[first + (falling_order ? count - 1 - i : i)]);
    if (!std::all_of(begin, end, [](const Thread& t) { return !t.done && t.wait == Wait::kWarp; })) return;
    std::for_each(begin, end, [](Thread& t) { t.wait = Wait::kNone; });
    ++events;
  }
}

// Ends a barrier that all threads of [begin, end) that are left have reached.
inline void end_barrier(size_t begin, size_t end, Wait kind) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    if (!threads[i].done && threads[i].wait != kind) return;
    any |= !threads[i].done;
  }
  for (size_t i = begin; i < end; ++i) threads[i].wait = Wait::kNone;
  events += any;
}

inline void end_named_barriers(size_t begin, size_t end) {
  for (unsigned id = 1; id < 16; ++id) {
    const auto here = [&](const Thread& t) { return !t.done && t.wait == Wait::kNamed && t.barrier == id; };
    const size_t arrived = std::count_if(threads.begin() + begin, threads.begin() + end, here);
    for (size_t i = begin; i < end && arrived > 0; ++i) {
      if (here(threads[i]) && threads[i].barrier_count == arrived) threads[i].wait = Wait::kNone, ++events;
    }
  }
}

inline void run_cluster(char* stacks, unsigned first_block, unsigned blocks, size_t shared_bytes) {
  const size_t size = block_size.x;
  threads.assign(size * blocks, Thread{});
  for (unsigned rank = 0; rank < blocks; ++rank) memset(block_memory(rank), 0xFF, shared_bytes);
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t.index = make_uint3(unsigned(i % size), 0, 0);
    t.rank = unsigned(i / size);
    t.block = make_uint3((first_block + t.rank) % grid_size.x, (first_block + t.rank) / grid_size.x, 0);
    t.shared_used = kSharedStart;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks + i * kStack;
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, thread_main, 0);
  }
  const size_t warps = (size + 31) / 32;
  for (;;) {
    const uint64_t before = events;
    for (size_t w = 0; w < warps * blocks; ++w) {
      const size_t turn = falling_order ? warps * blocks - 1 - w : w, block = turn / warps;
      run_warp(block * size + turn % warps * 32, (block + 1) * size);
    }
    for (unsigned rank = 0; rank < blocks; ++rank) {
      end_barrier(rank * size, (rank + 1) * size, Wait::kBlock);
      end_named_barriers(rank * size, (rank + 1) * size);
    }
    end_barrier(0, threads.size(), Wait::kCluster);
    if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.done; })) return;
    if (events == before && !(late && late())) break;
  }
  for (const Thread& t : threads) {
    if (!t.done) {
      fprintf(stderr, "block %u: thread %u waits for ever\n", t.block.x, t.index.x);
      abort();
    }
  }
}

template <typename Body>
void launch(dim3 grid, unsigned block, Body body, unsigned cluster = 1, size_t dynamic = 0) {
  static char* stacks = nullptr;
  if (stacks == nullptr) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, kFlags, -1, 0));
    // shared addresses have 32 bits
    char* mapped = static_cast<char*>(mmap(nullptr, kSharedStride * kMaxCluster + kSharedBytes, PROT_READ | PROT_WRITE,
                                           kFlags | MAP_32BIT, -1, 0));
    if (stacks == MAP_FAILED || mapped == MAP_FAILED) abort();
    shared_memory = mapped + (kSharedBytes - uintptr_t(mapped) % kSharedBytes);
  }
  const size_t used = kSharedBytes + kSharedStart + dynamic;
  if (block * cluster > kMaxThreads || used > kSharedStride || grid.x % cluster != 0) abort();
  grid_size = grid;
  block_size = dim3(block);
  kernel = body;
  for (unsigned b = 0; b < grid.x * grid.y; b += cluster) run_cluster(stacks, b, cluster, used);
}

// A shared variable: every thread meets the declarations in the same order.
template <typename T>
T& shared(size_t alignment = alignof(T)) {
  const size_t at = (current->shared_used + alignment - 1) / alignment * alignment;
  current->shared_used = at + sizeof(T);
  if (current->shared_used > kSharedBytes) abort();
  return *reinterpret_cast<T*>(block_memory(current->rank) + at);
}
// Shared memory whose size the launch gives: as far behind a multiple of 64 KB as where a kernel has no variables.
inline char* dynamic_shared() { return block_memory(current->rank) + kSharedBytes + kSharedStart; }

// cp.async: `bytes` of `size` are read, the rest becomes 0, as late as the thread's waiting allows. Shared addresses
// have 32 bits.
inline void copy(uint32_t to, const void* from, size_t size, size_t bytes) {
  if (to % size != 0 || (bytes > 0 && uintptr_t(from) % size != 0) || bytes > size) abort();
  char* target = reinterpret_cast<char*>(uintptr_t(to));
  const char* own = block_memory(current->rank);
  if (target < own || target + size > own + kSharedStride) abort();
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.back().push_back({target, from, size, bytes});
}
inline void commit_copies() {
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.emplace_back();
}
inline void wait_for_copies(size_t pending) {
  auto& groups = current->copies;
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) {
      memset(copy.to, 0, copy.size);
      memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

template <typename T>
T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const unsigned i = slot();
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
  const unsigned i = slot(), lane = i % 32;
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

// ldmatrix: lane l has two elements of row l / 4, of each of four matrices.
inline void load_matrices(uint32_t address, uint32_t& m0, uint32_t& m1, uint32_t& m2, uint32_t& m3) {
  const unsigned i = slot(), lane = i % 32;
  exchange[i][0] = address;
  wait(Wait::kWarp);
  uint32_t* const out[4] = {&m0, &m1, &m2, &m3};
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const uint32_t row = exchange[i / 32 * 32 + matrix * 8 + lane / 4][0];
    if (row % 16 != 0) fprintf(stderr, "ldmatrix at %u\n", row), abort();
    memcpy(out[matrix], reinterpret_cast<const char*>(uintptr_t(row)) + lane % 4 * 4, 4);
  }
  wait(Wait::kWarp);
}

// Two 16-bit numbers in a register, each its own result, rounded once (sums are exact in float64).
template <typename T, typename Of>
uint32_t each_half(Of of, uint32_t a, uint32_t b, uint32_t c = 0) {
  uint32_t r = 0;
  for (unsigned shift = 0; shift < 32; shift += 16) {
    const auto number = [shift](uint32_t pair) { return double(to_float(T{}, uint16_t(pair >> shift))); };
    const T rounded = T(float(of(number(a), number(b), number(c))));
    uint16_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    r |= uint32_t(bits) << shift;
  }
  return r;
}
template <typename T>
uint32_t multiply_pair(uint32_t a, uint32_t b) {
  return each_half<T>([](double x, double y, double) { return x * y; }, a, b);
}
template <typename T>
uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  return each_half<T>([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
template <typename T>
uint32_t add_pair(uint32_t a, uint32_t b) {
  return each_half<T>([](double x, double y, double) { return x + y; }, a, b);
}

// prmt.b32: bit 3 of a selector repeats the byte's sign.
inline uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 255);
    r |= (selector >> 4 * i & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return r;
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

inline int atomicAdd(int* at, int value) { return *at += value, *at - value; }
inline void __threadfence() {}
inline void __trap() { abort(); }
inline float4 __ldcg(const float4* p) { return *p; }
inline void __stcg(float4* p, float4 v) { *p = v; }

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::current->block)
inline dim3 &blockDim = emulated::block_size, &gridDim = emulated::grid_size;

// The runtime's templates over kernels.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (emulated::before_launch) emulated::before_launch();
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  emulated::launch(config->gridDim, config->blockDim.x, [&] { kernel(arguments...); }, cluster,
                   config->dynamicSmemBytes);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {  // the code that runs is none of 9.0
  *attributes = {};
  attributes->ptxVersion = 80;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  return *clusters = 0, cudaErrorNotSupported;
}

inline void __syncwarp() { emulated::wait(emulated::Wait::kWarp); }
inline void __syncthreads() { emulated::wait(emulated::Wait::kBlock); }
template <typename T>
T __shfl_sync(unsigned, T v, int source) {
  return emulated::shuffle(v, unsigned(source));
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulated::shuffle(v, emulated::current->index.x ^ unsigned(mask));
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
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}
