// Quantize to NF4: absmax[b] = max|w| over block b; code[i] = the number of thresholds below w[i] / absmax[b].
// Double quantization: the same with 256 levels, over absmax less its mean.
//
//   warp tile: at least 1,024 elements, 16 bytes a lane and vector
//   vector 0 | lane 0 | lane 1 | ... | lane 31|     16-bit types: 8 elements a lane -> 4 bytes of codes
//   vector 1 |                                |     float32: 4 elements -> 2 bytes; two vectors' halves are swapped
//   ...                                             by shuffles into whole words
//   A block of 32 to 256 elements (128 for float32) lies in some lanes of one vector, a larger one in several
//   vectors; its maximum is taken by shuffles. Nothing is read twice.
//   A code costs one 64-bit look-up and one comparison: the sum w/absmax + 4098 has the bucket of width 1/16 that
//   w/absmax falls in as bits 7 to 12, and no bucket holds more than one threshold. 16 copies of the table, one a
//   lane of each half warp: no bank conflicts.
//
// Bound: bytes. bfloat16 at block 64: 2 read, 0.5 + 1/16 written an element. The prototype of this design reached
// 2,106, 2,695 and 2,951 GB/s on an H100 80GB at 4096x4096, 14336x4096 and 28672x8192 (copy: 3,020).
//
// Equal to bitsandbytes' CUDA backend bit for bit, which is compiled with --use_fast_math: the reciprocal of absmax
// is approximate, products and scales that are subnormal become zero. A block of zeros gives 0 * inf = NaN, and code 0.
#include "decode.cuh"
#include "launch.h"

namespace qlora_engine::cuda {
namespace {

struct Bucket {
  float threshold;  // the one inside the bucket, or infinity
  uint32_t below;   // thresholds below the bucket
};

struct Buckets {
  Bucket bucket[64];
};

constexpr Buckets make_buckets() {
  constexpr float thresholds[15] = {QLORA_NF4_THRESHOLDS};
  Buckets r{};
  for (int i = 0; i < 64; ++i) {
    const float low = float(i - 32) / 16, high = float(i - 31) / 16;
    r.bucket[i] = {__builtin_huge_valf(), 0};
    for (float t : thresholds) {
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
constexpr bool buckets_are_exact() {
  constexpr float thresholds[15] = {QLORA_NF4_THRESHOLDS};
  for (int i = 0; i < 15; ++i) {
    const double at = (double(thresholds[i]) + 2) * 16;
    const double within = at - double(int(at));
    if (within < 1. / 64 || within > 1 - 1. / 64) return false;  // rounding is by less than 1/128 of a bucket
    if (i > 0 && int(at) == int((double(thresholds[i - 1]) + 2) * 16)) return false;
  }
  return true;
}
static_assert(buckets_are_exact());

constexpr int kCopies = 16;
__device__ const Buckets kBuckets = make_buckets();

__device__ __forceinline__ uint32_t code_of(float v, float reciprocal, uint32_t table) {
  const float x = multiply_ftz(v, reciprocal);
  const uint32_t entry = (__float_as_uint(__fadd_rn(x, 4098.0f)) & 0x1F80u) + table;
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
template <typename T>
__device__ __forceinline__ uint32_t encode(uint4 v, float reciprocal, uint32_t table) {
  float f[Elements<T>::kCount];
  Elements<T>::unpack(v, f);
  uint32_t r = 0;
#pragma unroll
  for (int j = 0; j < Elements<T>::kCount / 2; ++j) {
    const uint32_t high = code_of(f[2 * j], reciprocal, table), low = code_of(f[2 * j + 1], reciprocal, table);
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
  static constexpr int kVector = 32 * Elements<T>::kCount;                               // elements of a warp's vector
  static constexpr int kBlockVectors = kBlocksize > kVector ? kBlocksize / kVector : 1;  // vectors that share a scale
  static constexpr int kBlockLanes = kBlocksize > kVector ? 32 : kBlocksize / Elements<T>::kCount;
  static constexpr int kVectors = kBlockVectors > 1024 / kVector ? kBlockVectors : 1024 / kVector;
  static constexpr int kElements = kVectors * kVector;
  static constexpr int kThreads = kVectors > 8 ? 128 : 256;
  // thread blocks a multiprocessor: as many as the vectors leave registers for
  static constexpr int kResident = kVectors > 16 ? 2 : kVectors > 8 || (kVectors == 8 && sizeof(T) == 2) ? 3 : 4;
};

template <typename T, int kBlocksize>
__global__ void __launch_bounds__(Tile<T, kBlocksize>::kThreads, Tile<T, kBlocksize>::kResident)
    quantize_nf4_kernel(const T* __restrict__ weight, int64_t numel, int64_t tiles, bool aligned,
                        uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  using S = Tile<T, kBlocksize>;
  using E = Elements<T>;
  __shared__ __align__(16) Bucket buckets[64 * kCopies];
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (S::kThreads / 32);
  const int64_t aligned_numel = aligned ? numel : 0;
  const int64_t bytes = (numel + 1) / 2, blocks = ceil_div(numel, kBlocksize);

  uint4 v[S::kVectors];
  auto load = [&](int64_t tile) {
    const int64_t first = tile * S::kElements + lane * E::kCount;
    if ((tile + 1) * S::kElements <= aligned_numel) {
#pragma unroll
      for (int u = 0; u < S::kVectors; ++u) v[u] = load_streaming_128(weight + first + u * S::kVector);
    } else {
#pragma unroll
      for (int u = 0; u < S::kVectors; ++u) v[u] = load_elements(weight, first + u * S::kVector, numel);
    }
  };

  int64_t tile = int64_t(blockIdx.x) * (S::kThreads / 32) + threadIdx.x / 32;
  if (tile < tiles) load(tile);  // the first loads are under way while the table is filled
  fill_by_block<64 * kCopies, S::kThreads>([&](int i) { buckets[i] = kBuckets.bucket[i / kCopies]; });
  __syncthreads();
  const uint32_t table = shared_address(buckets) + lane % kCopies * sizeof(Bucket);

  while (tile < tiles) {
    float kept = 0.f;  // lane l keeps the scale that it will write: whole warps write scales in one instruction
    uint32_t codes[S::kVectors];
#pragma unroll
    for (int b = 0; b < S::kVectors / S::kBlockVectors; ++b) {
      uint32_t m = E::absmax(v[b * S::kBlockVectors]);
#pragma unroll
      for (int u = 1; u < S::kBlockVectors; ++u) m = E::larger(m, E::absmax(v[b * S::kBlockVectors + u]));
#pragma unroll
      for (int s = 1; s < S::kBlockLanes; s *= 2) m = E::larger(m, __shfl_xor_sync(kWholeWarp, m, s));
      const float scale = multiply_ftz(E::whole(m), 1.0f);
      if (lane % S::kBlockLanes == b) kept = scale;
      const float reciprocal = reciprocal_ftz(scale);
#pragma unroll
      for (int u = b * S::kBlockVectors; u < (b + 1) * S::kBlockVectors; ++u) {
        codes[u] = encode<T>(v[u], reciprocal, table);
      }
    }

    const int64_t word = tile * (S::kElements / 8) + lane;
    if constexpr (E::kCount == 8) {
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
    const int own = lane % S::kBlockLanes;
    const int64_t block = tile * (S::kElements / kBlocksize) + own * (32 / S::kBlockLanes) + lane / S::kBlockLanes;
    if (own < S::kVectors / S::kBlockVectors && block < blocks) absmax[block] = kept;

    tile += step;
    if (tile < tiles) load(tile);
  }
}

// The code bitsandbytes finds: seven steps of a binary search from entry 127, then the nearer neighbour. Not quite
// the nearest level everywhere (the search cannot reach every entry), so a search of another kind would differ.
__device__ __forceinline__ int dynamic_code(const float* map, float x) {
  int low = 0, high = 255, at = 127;
#pragma unroll
  for (int step = 64; step > 0; step /= 2) {
    if (x > map[at]) {
      low = at;
      at += step;
    } else {
      high = at;
      at -= step;
    }
  }
  const float here = map[at];
  if (x > here) return x > (map[high] + here) * 0.5f ? high : at;
  return x < (map[low] + here) * 0.5f ? low : at;
}

// One warp a group of `blocksize` scales; the second pass over them finds them in the L1 cache.
__global__ void __launch_bounds__(256)
    quantize_absmax_kernel(const float* __restrict__ absmax, const float* __restrict__ offset, int64_t count,
                           int blocksize, int64_t groups, uint8_t* __restrict__ codes,
                           float* __restrict__ nested_absmax) {
  __shared__ float map[256];
  map[threadIdx.x] = __ldg(kDynamicMap + threadIdx.x);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t group = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (group >= groups) return;
  const float mean = __ldg(offset);
  const int64_t first = group * blocksize, end = min(first + blocksize, count);
  float m = 0.f;
  for (int64_t i = first + lane; i < end; i += 32) m = fmaxf(m, fabsf(__fsub_rn(__ldg(absmax + i), mean)));
#pragma unroll
  for (int s = 1; s < 32; s *= 2) m = fmaxf(m, __shfl_xor_sync(kWholeWarp, m, s));
  m = multiply_ftz(m, 1.0f);
  const float reciprocal = reciprocal_ftz(m);
  for (int64_t i = first + lane; i < end; i += 32) {
    codes[i] = uint8_t(dynamic_code(map, multiply_ftz(__fsub_rn(__ldg(absmax + i), mean), reciprocal)));
  }
  if (lane == 0) nested_absmax[group] = m;
}

template <typename T, int kBlocksize>
cudaError_t launch(const void* weight, int64_t numel, uint8_t* packed, float* absmax, cudaStream_t stream) {
  using S = Tile<T, kBlocksize>;
  const int64_t tiles = ceil_div(numel, S::kElements);
  unsigned grid = 0;
  if (cudaError_t error = grid_for(tiles, S::kThreads / 32, S::kResident, &grid)) return error;
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  quantize_nf4_kernel<T, kBlocksize>
      <<<grid, S::kThreads, 0, stream>>>(static_cast<const T*>(weight), numel, tiles, aligned, packed, absmax);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_blocksize(const void* weight, int64_t numel, int64_t blocksize, uint8_t* packed, float* absmax,
                                 cudaStream_t stream) {
  switch (blocksize) {
    case 32: return launch<T, 32>(weight, numel, packed, absmax, stream);
    case 64: return launch<T, 64>(weight, numel, packed, absmax, stream);
    case 128: return launch<T, 128>(weight, numel, packed, absmax, stream);
    case 256: return launch<T, 256>(weight, numel, packed, absmax, stream);
    case 512: return launch<T, 512>(weight, numel, packed, absmax, stream);
    case 1024: return launch<T, 1024>(weight, numel, packed, absmax, stream);
    case 2048: return launch<T, 2048>(weight, numel, packed, absmax, stream);
    case 4096: return launch<T, 4096>(weight, numel, packed, absmax, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t quantize_nf4(const void* weight, Dtype dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                         float* absmax, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::kFloat32: return launch_for_blocksize<float>(weight, numel, blocksize, packed, absmax, stream);
    case Dtype::kFloat16: return launch_for_blocksize<__half>(weight, numel, blocksize, packed, absmax, stream);
    case Dtype::kBFloat16:
      return launch_for_blocksize<__nv_bfloat16>(weight, numel, blocksize, packed, absmax, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t quantize_absmax(const float* absmax, const float* offset, int64_t count, int64_t blocksize,
                            uint8_t* codes, float* nested_absmax, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t groups = ceil_div(count, blocksize);
  quantize_absmax_kernel<<<unsigned(ceil_div(groups, 8)), 256, 0, stream>>>(absmax, offset, count, int(blocksize),
                                                                            groups, codes, nested_absmax);
  return cudaGetLastError();
}

}  // namespace qlora_engine::cuda
