// Stands in for csrc/cuda/sm90.cuh and wgmma.cuh (after decode.cuh): Hopper's barriers, copies, clusters and warpgroup
// products on a CPU, for the kernels' own text above them.
//
// What is asynchronous on the GPU happens here either at once or as late as it may: a copy when nothing else can run; a
// product at the wait that names it, and a store when its memory is given back, while whoever arrives at a barrier lets
// all others go first. A kernel that reads a stage before its copy, or frees one before its product, is wrong in one of
// these. Not emulated: the proxies' fences.
#pragma once
#include <cuda.h>

#include <deque>
#include <unordered_map>
#include <utility>

#undef __grid_constant__
#define __grid_constant__

namespace emulated {

inline bool copies_at_once = true, products_at_once = true;

// mbarriers, by their shared address.
struct Barrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t parity = 0;  // of the phase under way
  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = count;
      parity ^= 1;
      ++events;
    }
  }
};
inline std::unordered_map<uint32_t, Barrier> barriers;
inline Barrier& barrier_at(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fprintf(stderr, "no barrier at %u\n", address), abort();
  return found->second;
}

inline std::deque<std::function<void()>> copies;
inline bool run_late_copy() {
  if (copies.empty()) return false;
  copies.front()();
  copies.pop_front();
  return true;
}
inline void begin_copy(std::function<void()> copy) {
  if (copies_at_once) return copy();
  late = run_late_copy;
  copies.push_back(std::move(copy));
}

template <typename T>
T& at(uint32_t address) {
  if (address % sizeof(T) != 0) fprintf(stderr, "shared address %u is not aligned\n", address), abort();
  return *reinterpret_cast<T*>(uintptr_t(address));
}

// The same address in another block of the cluster.
inline uint32_t in_block(uint32_t address, unsigned rank) {
  return address + uint32_t((int64_t(rank) - int64_t(current->rank)) * int64_t(kSharedStride));
}

// What tensor_map.h says of a matrix, in the place of the driver's 128 opaque bytes.
struct Map {
  char* data;
  uint64_t columns, rows, pitch;
  uint32_t box_columns, box_rows, element, swizzle;  // bytes of the swizzle, or 0
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// Offset in a tile, as the swizzle of that many bytes moves it.
inline uint32_t swizzled(uint32_t offset, uint32_t swizzle) {
  return swizzle == 0 ? offset : offset ^ ((offset / 128 & (swizzle / 16 - 1)) << 4);
}

// Between a tile in shared memory and a matrix; what lies outside reads as zero, and is not written.
inline void move_tile(const Map& map, uint32_t shared, int64_t x, int64_t y, bool load) {
  if (map.swizzle && shared % (map.swizzle * 8) != 0) fprintf(stderr, "a tile at %u\n", shared), abort();
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    for (uint32_t c = 0; c < map.box_columns; ++c) {
      char* there = &at<char>(shared + swizzled((r * map.box_columns + c) * map.element, map.swizzle));
      const bool inside = x + c >= 0 && uint64_t(x + c) < map.columns && y + r >= 0 && uint64_t(y + r) < map.rows;
      char* here = inside ? map.data + uint64_t(y + r) * map.pitch + uint64_t(x + c) * map.element : nullptr;
      if (load && inside) memcpy(there, here, map.element);
      if (load && !inside) memset(there, 0, map.element);
      if (!load && inside) memcpy(here, there, map.element);
    }
  }
}

// Products under way, of each thread: they end in order. A group ends with a commit.
struct Products {
  std::deque<std::deque<std::function<void()>>> groups{{}};
  std::deque<std::function<void()>> stores;
};
inline std::unordered_map<unsigned, Products> under_way;

inline void wait_for_products(size_t pending) {
  auto& groups = under_way[slot()].groups;
  while (groups.size() > pending + 1) {
    for (auto& product : groups.front()) product();
    groups.pop_front();
  }
}
inline void finish_stores() {
  for (auto& store : under_way[slot()].stores) store();
  under_way[slot()].stores.clear();
}

// Row r, column k of an operand: a tile of 128-byte rows in the 128-byte swizzle. `tile` counts 16 bytes.
template <typename T>
float element(uint64_t tile, unsigned r, unsigned k) {
  const uint32_t address = uint32_t(tile << 4), base = address & ~1023u;
  return to_float(T{}, at<uint16_t>(base + swizzled(address - base + r * 128 + k * 2, 128)));
}

// D (+)= A B for this lane's elements of D: rows `row` and `row` + 8 of the warp's 16.
template <typename T, int kCount>
void begin_product(float (&d)[kCount], std::function<float(unsigned row, unsigned k)> a, uint64_t b, bool accumulate) {
  float own[2][16];
  const unsigned lane = current->index.x % 32;
  const auto run = [&d, b, accumulate, lane](const float (&own)[2][16]) {
    for (unsigned i = 0; i < unsigned(kCount); ++i) {
      const unsigned column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = accumulate ? d[i] : 0.0;
      for (unsigned k = 0; k < 16; ++k) sum += double(own[i / 2 % 2][k]) * double(element<T>(b, column, k));
      d[i] = float(sum);
    }
  };
  const auto load = [a](float (&own)[2][16]) {
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned k = 0; k < 16; ++k) own[half][k] = a(half * 8, k);
    }
  };
  if (products_at_once) return load(own), run(own);
  under_way[slot()].groups.back().push_back([run, load] {
    float late[2][16];
    load(late);
    run(late);
  });
}

}  // namespace emulated

namespace qlora_engine::cuda::sm90 {

#define QLORA_SM90 1

inline void product_fence() {}
inline void product_commit() { emulated::under_way[emulated::slot()].groups.emplace_back(); }
template <int kPending>
void product_wait() {
  emulated::wait_for_products(kPending);
  __syncwarp();  // of the instruction (.sync.aligned)
}

template <typename T, int kN>
struct Product {
  static void rs(float (&d)[kN / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int accumulate) {
    const unsigned i = emulated::slot();
    const uint32_t own[4] = {a0, a1, a2, a3};
    memcpy(emulated::exchange[i], own, sizeof own);
    __syncwarp();
    std::vector<uint32_t> quad(16);
    for (unsigned t = 0; t < 4; ++t) memcpy(&quad[t * 4], emulated::exchange[i / 4 * 4 + t], sizeof own);
    __syncwarp();
    emulated::begin_product<T>(
        d,
        [quad](unsigned row, unsigned k) {
          return emulated::to_float(T{}, quad[k % 8 / 2 * 4 + k / 8 * 2 + row / 8] >> k % 2 * 16);
        },
        b, accumulate);
  }
  template <int kTransposeA = 0, int kTransposeB = 0>
  static void ss(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
    static_assert(kTransposeA == 0 && kTransposeB == 0, "not emulated");
    const unsigned first = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    __syncwarp();
    emulated::begin_product<T>(
        d, [a, first](unsigned row, unsigned k) { return emulated::element<T>(a, first + row, k); }, b, accumulate);
  }
};

inline void barrier_init(uint32_t barrier, uint32_t count) { emulated::barriers[barrier] = {count, count}; }
inline void barrier_init_fence() {}
inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  auto& b = emulated::barrier_at(barrier);
  if (b.pending == 0) fprintf(stderr, "more arrivals than barrier %u counts\n", barrier), abort();
  b.bytes += bytes;
  --b.pending;
  ++emulated::events;
  b.settle();
}
inline void barrier_arrive(uint32_t barrier) {
  barrier_arrive_expecting(barrier, 0);
  if (!emulated::products_at_once) emulated::wait(emulated::Wait::kSpin);
}
inline void barrier_arrive_remote(uint32_t barrier, uint32_t rank) { barrier_arrive(emulated::in_block(barrier, rank)); }
inline bool barrier_test(uint32_t barrier, uint32_t parity) { return emulated::barrier_at(barrier).parity != parity; }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_test(barrier, parity)) emulated::wait(emulated::Wait::kSpin);
}
inline void named_barrier(int id, int threads) {
  emulated::current->barrier = unsigned(id);
  emulated::current->barrier_count = unsigned(threads);
  emulated::wait(emulated::Wait::kNamed);
}

inline void prefetch_map(const CUtensorMap*) {}
inline void load_tile(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  const emulated::Map m = *reinterpret_cast<const emulated::Map*>(map);
  emulated::begin_copy([=] {
    emulated::move_tile(m, to, x, y, true);
    auto& b = emulated::barrier_at(barrier);
    b.bytes -= int64_t(m.box_columns) * m.box_rows * m.element;
    ++emulated::events;
    b.settle();
  });
}
inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if ((bytes | to | uintptr_t(from)) % 16 != 0) fprintf(stderr, "a copy of %u bytes to %u\n", bytes, to), abort();
  emulated::begin_copy([=] {
    memcpy(&emulated::at<char>(to), from, bytes);
    auto& b = emulated::barrier_at(barrier);
    b.bytes -= bytes;
    ++emulated::events;
    b.settle();
  });
}
inline void tile_load(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  load_tile(to, map, x, y, barrier);
}
inline void tile_load_multicast(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint16_t blocks) {
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (blocks >> rank & 1) load_tile(emulated::in_block(to, rank), map, x, y, emulated::in_block(barrier, rank));
  }
}
inline void tile_store(const CUtensorMap* map, int x, int y, uint32_t from) {
  const emulated::Map m = *reinterpret_cast<const emulated::Map*>(map);
  emulated::under_way[emulated::slot()].stores.push_back([=] { emulated::move_tile(m, from, x, y, false); });
  if (emulated::products_at_once) emulated::finish_stores();
}
inline void stores_commit() {}
template <int kPending>
void stores_wait_read() {
  static_assert(kPending == 0, "not emulated");
  emulated::finish_stores();
}
inline void stores_wait() { emulated::finish_stores(); }
inline void proxy_fence() {}

inline uint32_t cluster_rank() { return emulated::current->rank; }
inline uint32_t remote_address(uint32_t address, uint32_t rank) { return emulated::in_block(address, rank); }
inline float4 load_remote_128(uint32_t remote) { return emulated::at<float4>(remote); }
inline void cluster_sync() { emulated::wait(emulated::Wait::kCluster); }
template <int>
void registers_give_up() {}
template <int>
void registers_take() {}

inline uint4 load_shared_128(uint32_t address) { return emulated::at<uint4>(address); }
inline uint32_t load_shared_32(uint32_t address) { return emulated::at<uint32_t>(address); }
inline uint32_t load_table_32(uint32_t address) { return load_shared_32(address); }
inline uint2 load_shared_64(uint32_t address) { return emulated::at<uint2>(address); }
inline float load_shared_float(uint32_t address) { return emulated::at<float>(address); }
template <typename T>
T load_shared_16(uint32_t address) {
  return emulated::at<T>(address);
}
inline void store_shared_128(uint32_t address, uint4 v) { emulated::at<uint4>(address) = v; }
inline void store_shared_64(uint32_t address, uint2 v) { emulated::at<uint2>(address) = v; }
inline void store_shared_float(uint32_t address, float v) { emulated::at<float>(address) = v; }
inline void store_matrices_transposed(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const unsigned i = emulated::slot(), lane = i % 32;
  const uint32_t own[5] = {m0, m1, m2, m3, address};
  memcpy(emulated::exchange[i], own, sizeof own);
  __syncwarp();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {  // this lane's two elements: row lane / 4, columns 2 (lane % 4) on
    for (unsigned j = 0; j < 2; ++j) {
      const uint32_t row = emulated::exchange[i / 32 * 32 + matrix * 8 + lane % 4 * 2 + j][4];
      emulated::at<uint16_t>(row + lane / 4 * 2) = uint16_t(own[matrix] >> j * 16);
    }
  }
  __syncwarp();
}
inline uint4 load_matrices_transposed(uint32_t address) {
  const unsigned i = emulated::slot(), lane = i % 32;
  emulated::exchange[i][0] = address;
  __syncwarp();
  uint32_t m[4];
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto row = [&](unsigned r) {
      const uint32_t at = emulated::exchange[i / 32 * 32 + matrix * 8 + r][0];
      if (at % 16 != 0) fprintf(stderr, "ldmatrix at %u\n", at), abort();
      return uint32_t(emulated::at<uint16_t>(at + lane / 4 * 2));
    };
    m[matrix] = row(lane % 4 * 2) | row(lane % 4 * 2 + 1) << 16;
  }
  __syncwarp();
  return make_uint4(m[0], m[1], m[2], m[3]);
}
inline uint64_t swizzled_tile(uint32_t address) {
  if (address % 1024 != 0) fprintf(stderr, "an operand at %u\n", address), abort();
  return address >> 4;
}
inline uint64_t tile_further(uint64_t tile, uint32_t sixteens) { return tile + sixteens; }

}  // namespace qlora_engine::cuda::sm90

namespace emulated {
[[maybe_unused]] inline const bool forgets = (before_launch = [] { barriers.clear(), under_way.clear(); }, true);
}
