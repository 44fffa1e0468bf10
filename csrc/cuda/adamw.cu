// AdamW (formula and page layout: csrc/adamw.h) over all pages of all parameters in one launch, after a launch of one
// thread a parameter that counts the step and works out its constants in float64.
//
//   blocks 0 ... cold - 1        walk the pages that lie in host memory: reads and writes cross the bus, both ways at
//                                once, and need few warps to fill it
//   blocks cold ... grid - 1     walk the pages in device memory meanwhile
//
//   item: 8192 elements of a page
//   32 bits   a thread takes 2 x 4 neighbouring elements at a time: 16-byte accesses to state, and to float32
//    8 bits   a warp takes a block of 256 that shares a scale: lane l elements 4l ... 4l+3 and 128+4l ... 128+4l+3
//
// Bound: bytes. An element of float32 with 32-bit state reads 16 and writes 12; with 8-bit state 10 and 6. In host
// memory 8 of each cross the bus (2 with 8 bits).
#include "adamw_kernels.h"
#include "decode.cuh"
#include "launch.h"

#include "../dynamic_code.h"

namespace qlora_engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kItem = 8192;
constexpr int64_t kItems = kPageElements / kItem;  // of a whole page

// With 8-bit state a block has its tables in shared memory and needs more registers.
template <bool kEightBit>
struct Shape {
  static constexpr int kVectors = kEightBit ? 1 : 2;  // of 4 elements that a thread takes at a time (32 bits)
  static constexpr int kResident = kEightBit ? 3 : 3;  // blocks a multiprocessor
};

static __device__ const DynamicTables kTables = kDynamicTables;

__global__ void __launch_bounds__(128) adamw_prepare_kernel(AdamWLaunch launch, AdamWTable table) {
  const int64_t t = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (t >= launch.tensors) return;
  AdamWRecord& record = table.records[t];
  const bool skipped = launch.skip != nullptr && *launch.skip != 0.f;
  const bool active = table.tensors[t].grad != nullptr && !skipped;
  record.active = active ? 1 : 0;
  if (!active) return;
  const float step = launch.steps[t] + 1.f;
  launch.steps[t] = step;
  const float multiplier = launch.multiplier != nullptr ? *launch.multiplier : 1.f;
  record.constants =
      adamw_constants(table.hyper + table.tensors[t].group * kHyperparameters, double(step), multiplier);
  record.key = random_key(launch.seed, uint32_t(step), uint32_t(t));
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
struct alignas(sizeof(T) * 4) Four {
  T x[4];
};

// Four neighbouring elements of which `left` exist.
template <typename T>
__device__ __forceinline__ void load_four(const T* p, int left, bool aligned, float* f) {
  if (aligned && left >= 4) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = widen(four.x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = i < left ? widen(p[i]) : 0.f;
  }
}

struct Rounding {
  bool stochastic;
  uint32_t key, element;  // of the first of four
};

template <typename T>
__device__ __forceinline__ T round_to(float v, const Rounding& rounding, int i) {
  if constexpr (sizeof(T) == 2 && !std::is_same_v<T, __half>) {
    if (rounding.stochastic) {
      const uint32_t random = random_bits(rounding.key, rounding.element + uint32_t(i));
      return __ushort_as_bfloat16(stochastic_bfloat16(__float_as_uint(v), random));
    }
  }
  return from_float<T>(v);
}

template <typename T>
__device__ __forceinline__ void store_four(T* p, int left, bool aligned, const float* f,
                                           const Rounding& rounding) {
  if (aligned && left >= 4) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.x[i] = round_to<T>(f[i], rounding, i);
    *reinterpret_cast<Four<T>*>(p) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) p[i] = round_to<T>(f[i], rounding, i);
    }
  }
}

// One page of one parameter, from its first element on.
template <typename T>
struct PageOf {
  T* param;
  const T* grad;
  uint8_t* state;
  int count, room;  // elements; rounded up to whole blocks
  uint32_t first;
  int layout;
  bool aligned;
  uint32_t key;

  __device__ PageOf(const AdamWPage& page, const AdamWTensor& tensor, const AdamWRecord& record, uint8_t* slab)
      : param(static_cast<T*>(tensor.param) + page.first),
        grad(static_cast<const T*>(tensor.grad) + page.first),
        state(slab + page.offset),
        count(int(page.count)),
        room((count + int(kStateBlock) - 1) / int(kStateBlock) * int(kStateBlock)),
        first(uint32_t(page.first)),
        layout(tensor.layout),
        aligned((reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad)) % sizeof(Four<T>) == 0),
        key(record.key) {}

  __device__ __forceinline__ bool eight() const { return layout & kEightBitState; }
  __device__ __forceinline__ bool has_master() const { return layout & kMasterCopy; }

  __device__ __forceinline__ float* moment(int which) const {
    return reinterpret_cast<float*>(state) + which * room;
  }
  __device__ __forceinline__ uint8_t* codes(int which) const { return state + which * room; }
  __device__ __forceinline__ float* master() const {
    return eight() ? reinterpret_cast<float*>(state + 2 * room) : moment(2);
  }
  __device__ __forceinline__ float* scales(int which) const {
    return master() + (has_master() ? room : 0) + which * (room / int(kStateBlock));
  }

  // Elements [e, e + 4) of the page; the padding of a master copy may be read and written.
  __device__ __forceinline__ void load(int e, float* p, float* g) const {
    load_four(grad + e, count - e, aligned, g);
    if (has_master()) {
      load_four(master() + e, 4, true, p);
    } else {
      load_four(param + e, count - e, aligned, p);
    }
  }
  __device__ __forceinline__ void store(int e, const float* p) const {
    const Rounding rounding{(layout & kStochasticRounding) != 0, key, first + uint32_t(e)};
    store_four(param + e, count - e, aligned, p, rounding);
    if (has_master()) store_four(master() + e, 4, true, p, rounding);
  }
};

template <typename T, int kVectors>
__device__ __forceinline__ void update_32bit(const PageOf<T>& page, int begin, const AdamWConstants& c) {
  constexpr int kStride = kThreads * 4;
  const int end = min(begin + int(kItem), page.count);
  float *exp_avg = page.moment(0), *exp_avg_sq = page.moment(1);
  for (int base = begin + int(threadIdx.x) * 4; base < end; base += kStride * kVectors) {
    float p[kVectors][4], g[kVectors][4], m[kVectors][4], v[kVectors][4];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int e = base + u * kStride;
      if (e < end) {
        page.load(e, p[u], g[u]);
        load_four(exp_avg + e, 4, true, m[u]);
        load_four(exp_avg_sq + e, 4, true, v[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int e = base + u * kStride;
      if (e < end) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          adamw_update(p[u][i], rounded::multiply(g[u][i], c.gradient_multiplier), m[u][i], v[u][i], c);
        }
        store_four(exp_avg + e, 4, true, m[u], Rounding{});
        store_four(exp_avg_sq + e, 4, true, v[u], Rounding{});
        page.store(e, p[u]);
      }
    }
  }
}

// The largest magnitude of a block as float bits, in every lane.
__device__ __forceinline__ uint32_t largest_bits(const float* x) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, offset));
  }
  return largest;
}

// A lane's 8 values to codes, 4 in a word; returns the scale of the block.
template <bool kSigned>
__device__ __forceinline__ float encode(const DynamicTables& tables, const float* x, uint32_t* words) {
  constexpr uint32_t kSmallestNormal = 0x00800000u;
  const uint32_t largest = largest_bits(x);
  if (largest < kSmallestNormal) {
    words[0] = words[1] = kSigned ? 0x01010101u * kSignedZero : 0u;
    return 0.f;
  }
  const float scale = __uint_as_float(largest);
  const float reciprocal = rounded::divide(1.f, scale);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    words[half] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = rounded::multiply(x[half * 4 + i], reciprocal), magnitude = fabsf(value);
      const uint32_t bits = __float_as_uint(magnitude);
      const uint32_t code = kSigned ? signed_code(tables, magnitude, bits, value < 0.f)
                                    : unsigned_code(tables, value, bits);
      words[half] |= code << (8 * i);
    }
  }
  return scale;
}

// What a lane holds of a block of 256: elements 4 lane ... 4 lane + 3, and those 128 further on.
template <typename T>
struct BlockShare {
  uint32_t codes_m[2], codes_v[2];
  float scale_m, scale_v, p[2][4], g[2][4];

  __device__ __forceinline__ void load(const PageOf<T>& page, int base) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = base + half * 128 + int(threadIdx.x % 32) * 4;
      codes_m[half] = *reinterpret_cast<const uint32_t*>(page.codes(0) + e);
      codes_v[half] = *reinterpret_cast<const uint32_t*>(page.codes(1) + e);
      page.load(e, p[half], g[half]);
    }
    scale_m = page.scales(0)[base / int(kStateBlock)];
    scale_v = page.scales(1)[base / int(kStateBlock)];
  }
};

// All loads of a block come before its first store: the compiler moves none across a store to the page by itself.
template <typename T>
__device__ __forceinline__ void update_8bit(const PageOf<T>& page, int begin, const AdamWConstants& c,
                                            const DynamicTables& tables) {
  constexpr int kStride = kWarps * int(kStateBlock);
  const int end = min(begin + int(kItem), page.count), lane = threadIdx.x % 32;
  int base = begin + int(threadIdx.x / 32) * int(kStateBlock);
  for (; base < end; base += kStride) {
    BlockShare<T> share;
    share.load(page, base);
    float m[8], v[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = base + half * 128 + lane * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = half * 4 + i;
        m[k] = rounded::multiply(tables.signed_levels[share.codes_m[half] >> (8 * i) & 255u], share.scale_m);
        v[k] = rounded::multiply(tables.unsigned_levels[share.codes_v[half] >> (8 * i) & 255u], share.scale_v);
        adamw_update(share.p[half][i], rounded::multiply(share.g[half][i], c.gradient_multiplier), m[k], v[k], c);
        if (e + i >= page.count) m[k] = v[k] = 0.f;
      }
      page.store(e, share.p[half]);
    }
    uint32_t codes_m[2], codes_v[2];
    const float scale_m = encode<true>(tables, m, codes_m), scale_v = encode<false>(tables, v, codes_v);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = base + half * 128 + lane * 4;
      *reinterpret_cast<uint32_t*>(page.codes(0) + e) = codes_m[half];
      *reinterpret_cast<uint32_t*>(page.codes(1) + e) = codes_v[half];
    }
    if (lane == 0) {
      page.scales(0)[base / int(kStateBlock)] = scale_m;
      page.scales(1)[base / int(kStateBlock)] = scale_v;
    }
  }
}

template <typename T, bool kEightBit>
__device__ __forceinline__ void update_item(const AdamWPage& row, const AdamWTensor& tensor,
                                            const AdamWRecord& record, uint8_t* slab, int begin,
                                            const DynamicTables& tables) {
  const PageOf<T> page(row, tensor, record, slab);
  const AdamWConstants c = record.constants;
  if (kEightBit && page.eight()) {
    update_8bit(page, begin, c, tables);
  } else {
    update_32bit<T, Shape<kEightBit>::kVectors>(page, begin, c);
  }
}

template <bool kEightBit>
__global__ void __launch_bounds__(kThreads, Shape<kEightBit>::kResident)
    adamw_kernel(AdamWLaunch launch, AdamWTable table, int64_t cold_blocks) {
  __shared__ __align__(16) char storage[kEightBit ? sizeof(DynamicTables) : 16];
  const DynamicTables& tables = *reinterpret_cast<const DynamicTables*>(storage);
  if constexpr (kEightBit) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&kTables);
    for (int i = threadIdx.x; i < int(sizeof(DynamicTables) / 4); i += kThreads) {
      reinterpret_cast<uint32_t*>(storage)[i] = from[i];
    }
    __syncthreads();
  }
  const bool cold = blockIdx.x < cold_blocks;
  const int64_t step = cold ? cold_blocks : gridDim.x - cold_blocks;
  const int64_t items = (cold ? launch.cold_pages : launch.hot_pages) * kItems;
  const AdamWPage* pages = launch.pages + (cold ? launch.hot_pages : 0);
  for (int64_t item = cold ? blockIdx.x : blockIdx.x - cold_blocks; item < items; item += step) {
    const AdamWPage& page = pages[item / kItems];
    const int begin = int(item % kItems * kItem);
    const AdamWTensor& tensor = table.tensors[page.parameter];
    const AdamWRecord& record = table.records[page.parameter];
    if (begin >= page.count || record.active == 0) continue;
    uint8_t* slab = table.slabs[page.slab];
    switch (Dtype(tensor.dtype)) {
      case Dtype::kFloat32: update_item<float, kEightBit>(page, tensor, record, slab, begin, tables); break;
      case Dtype::kFloat16: update_item<__half, kEightBit>(page, tensor, record, slab, begin, tables); break;
      case Dtype::kBFloat16: update_item<__nv_bfloat16, kEightBit>(page, tensor, record, slab, begin, tables); break;
    }
  }
}

template <typename T>
__device__ __forceinline__ float squares(const T* grad, int64_t begin, int64_t end) {
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % sizeof(Four<T>) == 0;
  float sum = 0.f;
  for (int64_t e = begin + threadIdx.x * 4; e < end; e += kThreads * 4) {
    float g[4];
    load_four(grad + e, int(end - e), aligned, g);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += g[i] * g[i];
  }
  return sum;
}

// The sum of a block's values, in thread 0, in a fixed order.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// Block b takes pieces b, b + grid, ... of every tensor, counted through, so that the order of the sum is fixed.
__global__ void __launch_bounds__(kThreads) gradient_squares_kernel(AdamWTable table, int64_t tensors) {
  double sum = 0;
  int64_t piece = blockIdx.x;  // counted from the first piece of the tensor at hand
  for (int64_t t = 0; t < tensors; ++t) {
    const AdamWTensor tensor = table.tensors[t];
    if (tensor.grad == nullptr) continue;
    const int64_t pieces = (tensor.numel + kItem - 1) / kItem;
    for (; piece < pieces; piece += gridDim.x) {
      const int64_t begin = piece * kItem, end = min(begin + kItem, tensor.numel);
      switch (Dtype(tensor.dtype)) {
        case Dtype::kFloat32: sum += squares(static_cast<const float*>(tensor.grad), begin, end); break;
        case Dtype::kFloat16: sum += squares(static_cast<const __half*>(tensor.grad), begin, end); break;
        case Dtype::kBFloat16: sum += squares(static_cast<const __nv_bfloat16*>(tensor.grad), begin, end); break;
      }
    }
    piece -= pieces;
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) table.partial_sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) gradient_norm_kernel(const double* partial_sums, int count, float* norm) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial_sums[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) *norm = float(sqrt(total));
}

template <bool kEightBit>
cudaError_t launch_update(const AdamWLaunch& launch, const AdamWTable& table, cudaStream_t stream) {
  int count = 0;
  if (cudaError_t error = multiprocessors(&count)) return error;
  // One block a multiprocessor fills the bus; without hot pages beside them the cold ones take two.
  const int64_t cold_limit = int64_t(count) * (launch.hot_pages > 0 ? 1 : 2);
  const int64_t cold_blocks = std::min(launch.cold_pages * kItems, cold_limit);
  const int64_t hot_blocks =
      std::min(launch.hot_pages * kItems, int64_t(count) * Shape<kEightBit>::kResident - cold_blocks);
  if (cold_blocks + hot_blocks == 0) return cudaSuccess;
  const unsigned grid = unsigned(cold_blocks + hot_blocks);
  adamw_kernel<kEightBit><<<grid, kThreads, 0, stream>>>(launch, table, cold_blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t adamw_step(const AdamWLaunch& launch, const AdamWTable& table, cudaStream_t stream) {
  adamw_prepare_kernel<<<unsigned(ceil_div(launch.tensors, 128)), 128, 0, stream>>>(launch, table);
  if (cudaError_t error = cudaGetLastError()) return error;
  return launch.eight_bit ? launch_update<true>(launch, table, stream) : launch_update<false>(launch, table, stream);
}

cudaError_t gradient_norm(const AdamWTable& table, int64_t tensors, float* norm, cudaStream_t stream) {
  int count = 0;
  if (cudaError_t error = multiprocessors(&count)) return error;
  const int blocks = std::min(kNormBlocks, count * 8);
  gradient_squares_kernel<<<unsigned(blocks), kThreads, 0, stream>>>(table, tensors);
  if (cudaError_t error = cudaGetLastError()) return error;
  gradient_norm_kernel<<<1, kThreads, 0, stream>>>(table.partial_sums, blocks, norm);
  return cudaGetLastError();
}

}  // namespace qlora_engine::cuda
