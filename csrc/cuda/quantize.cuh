// What the kernels share that quantize weights to NF4: reading tiles, codes by bucket, writing codes.
//
//   warp tile: at least 1,024 elements, 16 bytes a lane and vector
//   vector 0 | lane 0 | lane 1 | ... | lane 31|     16-bit types: 8 elements a lane -> 4 bytes of codes
//   vector 1 |                                |     float32: 4 elements -> 2 bytes; two vectors' halves are swapped
//   ...                                             by shuffles into whole words
//   A block of 32 to 256 elements (128 for float32) lies in some lanes of one vector, a larger one in several
//   vectors; its maximum is taken by shuffles. Nothing is read twice.
//   A code costs one 64-bit look-up and one comparison: the sum x + 4098 has the bucket of width 1/16 that x = w/absmax
//   falls in as bits 7 to 12, and no bucket holds more than one threshold. 16 copies of the table, one a lane of each
//   half warp: no bank conflicts.
#pragma once
#include "decode.cuh"
#include "launch.h"

namespace qlora_engine::cuda {
namespace {

struct Bucket {
  float threshold;  // the one inside the bucket, or infinity
  uint32_t below;   // thresholds below the bucket
};

struct Thresholds {
  float value[15];
};

struct Buckets {
  Bucket bucket[64];
};

constexpr Buckets make_buckets(const Thresholds& thresholds) {
  Buckets r{};
  for (int i = 0; i < 64; ++i) {
    const float low = float(i - 32) / 16, high = float(i - 31) / 16;
    r.bucket[i] = {__builtin_huge_valf(), 0};
    for (float t : thresholds.value) {
      if (t < low) {
        ++r.bucket[i].below;
      } else if (t < high) {
        r.bucket[i].threshold = t;
      }
    }
  }
  // the sum's mantissa is zero for an infinity and all ones for a NaN
  r.bucket[0].below = r.bucket[63].below = 0;
  return r;
}

// One threshold a bucket at most, and none so near a bucket's edge that rounding the sum could cross it.
constexpr bool buckets_are_exact(const Thresholds& thresholds) {
  for (int i = 0; i < 15; ++i) {
    const double at = (double(thresholds.value[i]) + 2) * 16;
    const double within = at - double(int(at));
    if (within < 1. / 64 || within > 1 - 1. / 64) return false;  // rounding is by less than 1/128 of a bucket
    if (i > 0 && int(at) == int((double(thresholds.value[i - 1]) + 2) * 16)) return false;
  }
  return true;
}

// Code of -2 < x < 2; 0 for a NaN. `table` is the shared address of the lane's copy of the first bucket.
template <int kCopies>
__device__ __forceinline__ uint32_t code_of(float x, uint32_t table) {
  constexpr uint32_t kLog2Stride = kCopies == 16 ? 7 : kCopies == 4 ? 5 : 3;
  static_assert((1u << kLog2Stride) == kCopies * sizeof(Bucket));
  const uint32_t entry = ((__float_as_uint(__fadd_rn(x, 4098.0f)) & 0x1F80u) >> (7 - kLog2Stride)) + table;
  uint32_t threshold, below;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(threshold), "=r"(below) : "r"(entry));
  return below + (x > __uint_as_float(threshold) ? 1u : 0u);
}

// 16 bytes of a weight: what the kernel does with them, a type each. The partial maximum of 16-bit types is a pair.
template <typename T>
struct Elements;

template <>
struct Elements<float> {
  static constexpr int kCount = 4;
  static __device__ __forceinline__ uint32_t bits(float v) { return __float_as_uint(v); }
  static __device__ __forceinline__ uint4 push(uint4 v, uint32_t last) { return make_uint4(v.y, v.z, v.w, last); }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ uint32_t absmax(uint4 v) {
    const float a = fmaxf(fabsf(__uint_as_float(v.x)), fabsf(__uint_as_float(v.y)));
    const float b = fmaxf(fabsf(__uint_as_float(v.z)), fabsf(__uint_as_float(v.w)));
    return __float_as_uint(fmaxf(a, b));
  }
  static __device__ __forceinline__ float whole(uint32_t m) { return __uint_as_float(m); }
  static __device__ __forceinline__ void unpack(uint4 v, float* f) {
    f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
  }
};

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

__device__ __forceinline__ float2 to_floats(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 to_floats(__nv_bfloat162 v) { return __bfloat1622float2(v); }

template <typename T>
struct Elements {
  using Two = typename Pair<T>::Type;
  static constexpr int kCount = 8;
  static __device__ __forceinline__ Two two(uint32_t bits) { return *reinterpret_cast<const Two*>(&bits); }
  static __device__ __forceinline__ uint32_t raw(Two v) { return *reinterpret_cast<const uint32_t*>(&v); }
  static __device__ __forceinline__ uint32_t bits(T v) { return *reinterpret_cast<const uint16_t*>(&v); }
  static __device__ __forceinline__ uint4 push(uint4 v, uint32_t last) {
    return make_uint4(__funnelshift_r(v.x, v.y, 16), __funnelshift_r(v.y, v.z, 16), __funnelshift_r(v.z, v.w, 16),
                      v.w >> 16 | last << 16);
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return raw(__hmax2(two(a), two(b))); }
  static __device__ __forceinline__ uint32_t absmax(uint4 v) {
    const Two a = __hmax2(__habs2(two(v.x)), __habs2(two(v.y))), b = __hmax2(__habs2(two(v.z)), __habs2(two(v.w)));
    return raw(__hmax2(a, b));
  }
  static __device__ __forceinline__ float whole(uint32_t m) {
    const float2 f = to_floats(two(m));
    return fmaxf(f.x, f.y);
  }
  static __device__ __forceinline__ void unpack(uint4 v, float* f) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_floats(two(w[i]));
      f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
    }
  }
};

// A vector that reaches past the weight's end, or of a weight that is not aligned to vectors; zeros past the end.
template <typename T>
__device__ __forceinline__ uint4 load_elements(const T* weight, int64_t first, int64_t numel) {
  uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = 0; i < Elements<T>::kCount; ++i) {
    v = Elements<T>::push(v, first + i < numel ? Elements<T>::bits(weight[first + i]) : 0u);
  }
  return v;
}

// Codes of one vector: 32 bits (16-bit types) or 16 bits (float32), the first element in the first byte's high nibble.
// code(w) is the code of an element.
template <typename T, typename Code>
__device__ __forceinline__ uint32_t encode(uint4 v, Code code) {
  float f[Elements<T>::kCount];
  Elements<T>::unpack(v, f);
  uint32_t r = 0;
#pragma unroll
  for (int j = 0; j < Elements<T>::kCount / 2; ++j) {
    const uint32_t high = code(f[2 * j]), low = code(f[2 * j + 1]);
    r |= (high * 16 + low) << (8 * j);
  }
  return r;
}

__device__ __forceinline__ void store_word(uint8_t* packed, int64_t word, uint32_t codes, int64_t bytes) {
  if ((word + 1) * 4 <= bytes) {
    *reinterpret_cast<uint32_t*>(packed + word * 4) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (word * 4 + i < bytes) packed[word * 4 + i] = uint8_t(codes >> (8 * i));
    }
  }
}

template <typename T, int kBlocksize>
struct Tile {
  static constexpr int kBlock = kBlocksize;
  static constexpr int kVector = 32 * Elements<T>::kCount;                               // elements of a warp's vector
  static constexpr int kBlockVectors = kBlocksize > kVector ? kBlocksize / kVector : 1;  // vectors that share a scale
  static constexpr int kBlockLanes = kBlocksize > kVector ? 32 : kBlocksize / Elements<T>::kCount;
  static constexpr int kVectors = kBlockVectors > 1024 / kVector ? kBlockVectors : 1024 / kVector;
  static constexpr int kElements = kVectors * kVector;
  static constexpr int kThreads = kVectors > 8 ? 128 : 256;
  // thread blocks a multiprocessor: as many as the vectors leave registers for
  static constexpr int kResident = kVectors > 16 ? 2 : kVectors > 8 || (kVectors == 8 && sizeof(T) == 2) ? 3 : 4;
};

// A warp's tile in registers.
template <typename S, typename T>
__device__ __forceinline__ void load_tile(uint4 (&v)[S::kVectors], const T* weight, int64_t tile, int64_t numel,
                                          bool aligned) {
  const int64_t first = tile * S::kElements + threadIdx.x % 32 * Elements<T>::kCount;
  if (aligned && (tile + 1) * S::kElements <= numel) {
#pragma unroll
    for (int u = 0; u < S::kVectors; ++u) v[u] = load_streaming_128(weight + first + u * S::kVector);
  } else {
#pragma unroll
    for (int u = 0; u < S::kVectors; ++u) v[u] = load_elements(weight, first + u * S::kVector, numel);
  }
}

// The largest magnitude of the tile's block b, the same in all lanes of the block.
template <typename S, typename T>
__device__ __forceinline__ float block_absmax(const uint4 (&v)[S::kVectors], int b) {
  using E = Elements<T>;
  uint32_t m = E::absmax(v[b * S::kBlockVectors]);
#pragma unroll
  for (int u = 1; u < S::kBlockVectors; ++u) m = E::larger(m, E::absmax(v[b * S::kBlockVectors + u]));
#pragma unroll
  for (int s = 1; s < S::kBlockLanes; s *= 2) m = E::larger(m, __shfl_xor_sync(kWholeWarp, m, s));
  return multiply_ftz(E::whole(m), 1.0f);
}

// Codes of a tile, as `encode` made them, to memory.
template <typename S, typename T>
__device__ __forceinline__ void store_tile(const uint32_t (&codes)[S::kVectors], uint8_t* packed, int64_t tile,
                                           int64_t bytes) {
  const int lane = threadIdx.x % 32;
  const int64_t word = tile * (S::kElements / 8) + lane;
  if constexpr (Elements<T>::kCount == 8) {
#pragma unroll
    for (int u = 0; u < S::kVectors; ++u) store_word(packed, word + u * 32, codes[u], bytes);
  } else {
    // word w of 256 elements has the codes of lanes 2w and 2w + 1 of the first vector (w < 16) or of the second
#pragma unroll
    for (int u = 0; u < S::kVectors; u += 2) {
      const uint32_t both = codes[u] | codes[u + 1] << 16;
      const uint32_t first = __shfl_sync(kWholeWarp, both, 2 * lane % 32);
      const uint32_t second = __shfl_sync(kWholeWarp, both, (2 * lane + 1) % 32);
      store_word(packed, word + u * 16, __byte_perm(first, second, lane < 16 ? 0x5410 : 0x7632), bytes);
    }
  }
}

// The scale that each lane kept of the blocks it lies in: whole warps write scales in one instruction.
template <typename S, typename Scale>
__device__ __forceinline__ void store_scales(float kept, Scale* absmax, int64_t tile, int64_t blocks) {
  const int lane = threadIdx.x % 32, own = lane % S::kBlockLanes;
  const int64_t block = tile * (S::kElements / S::kBlock) + own * (32 / S::kBlockLanes) + lane / S::kBlockLanes;
  if (own < S::kVectors / S::kBlockVectors && block < blocks) absmax[block] = from_float<Scale>(kept);
}

// Calls launch.operator()<T, kBlocksize>() for a weight's element type and block size.
template <typename Launch>
cudaError_t for_weight(Dtype dtype, int64_t blocksize, Launch launch) {
  const auto for_blocksize = [&]<typename T>() {
    switch (blocksize) {
      case 32: return launch.template operator()<T, 32>();
      case 64: return launch.template operator()<T, 64>();
      case 128: return launch.template operator()<T, 128>();
      case 256: return launch.template operator()<T, 256>();
      case 512: return launch.template operator()<T, 512>();
      case 1024: return launch.template operator()<T, 1024>();
      case 2048: return launch.template operator()<T, 2048>();
      case 4096: return launch.template operator()<T, 4096>();
    }
    return cudaErrorInvalidValue;
  };
  switch (dtype) {
    case Dtype::kFloat32: return for_blocksize.template operator()<float>();
    case Dtype::kFloat16: return for_blocksize.template operator()<__half>();
    case Dtype::kBFloat16: return for_blocksize.template operator()<__nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace qlora_engine::cuda
