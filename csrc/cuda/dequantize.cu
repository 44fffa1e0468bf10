// Dequantize: w[i] = round(level[code[i]] * absmax[i / blocksize]), in one launch, scales decoded on the way:
//             absmax[b] = dynamic_map[q8[b]] * nested_absmax[b / 256] + nested_offset, where double-quantized.
//
//   warp tile: kWords words of 8 codes a lane            one word of a lane
//   +--------------------------------+ u = 0             4 bytes read  ->  16 bytes written (16-bit types)
//   | lane 0 | lane 1 | ... | lane 31|                                     2 x 16 bytes (float32, lanes paired so
//   +--------------------------------+ u = 1 ...                           that a warp writes 512 bytes in a row)
//   Lane l decodes the l-th scale of the tile, once; shuffles hand it to the lanes that need it. Blocks and tiles
//   are powers of two: a tile holds whole blocks, or lies within one.
//
// Bound: bytes. At block 64, double-quantized, 16-bit output: 0.5 + 1/64 + 4/16384 read and 2 written an element.
// The prototype of this design reached 2,294, 2,653 and 2,867 GB/s on an H100 80GB at 4096x4096, 14336x4096 and
// 28672x8192, where a copy of the same bytes reached 2,190, 2,715 and 2,955 (bfloat16, double-quantized).
#include "decode.cuh"
#include "launch.h"

namespace qlora_engine::cuda {
namespace {

// A packed word near the weight's end, or of a weight that is not aligned to words: byte by byte.
__device__ __forceinline__ uint32_t load_bytes(const uint8_t* packed, int64_t word, int64_t bytes) {
  uint32_t r = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (word * 4 + i < bytes) r |= uint32_t(packed[word * 4 + i]) << (8 * i);
  }
  return r;
}

template <typename T>
struct Vector;  // 16 bytes of output

template <>
struct Vector<float> {
  static constexpr int kElements = 4;
  static __device__ __forceinline__ uint4 pack(const float* f) {
    return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
  }
};

template <typename T>
struct Vector {
  static constexpr int kElements = 8;
  static __device__ __forceinline__ uint4 pack(const float* f) {
    return make_uint4(pack_pair<T>(f[0], f[1]), pack_pair<T>(f[2], f[3]), pack_pair<T>(f[4], f[5]),
                      pack_pair<T>(f[6], f[7]));
  }
};

template <typename T>
__device__ __forceinline__ void decode(const LaneLevels& levels, uint32_t codes, float scale, float* f) {
  f[0] = multiply_ftz(levels.level<0>(codes), scale);
  f[1] = multiply_ftz(levels.level<1>(codes), scale);
  f[2] = multiply_ftz(levels.level<2>(codes), scale);
  f[3] = multiply_ftz(levels.level<3>(codes), scale);
  if constexpr (Vector<T>::kElements == 8) {
    f[4] = multiply_ftz(levels.level<4>(codes), scale);
    f[5] = multiply_ftz(levels.level<5>(codes), scale);
    f[6] = multiply_ftz(levels.level<6>(codes), scale);
    f[7] = multiply_ftz(levels.level<7>(codes), scale);
  }
}

template <typename T, bool kNested, int kWords, int kThreads, int kResident>
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_nf4_kernel(Nf4Weight weight, T* __restrict__ out, int64_t tiles, bool aligned) {
  static_assert(kWords * 256 / kMinBlocksize <= 32, "a lane decodes one scale of a tile");
  constexpr int kElements = Vector<T>::kElements;
  constexpr int kTileWords = kWords * 32;
  __shared__ __align__(16) char storage[LaneLevels::kStorageBytes];
  __shared__ float map[kNested ? 256 : 1];

  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (kThreads / 32);
  const int64_t bytes = (weight.numel + 1) / 2;
  const int64_t aligned_words = aligned ? weight.numel / 8 : 0;
  const int shift = weight.log2_blocksize - 3;  // of a word's index, to its block's
  const int tile_blocks = max(1, kTileWords >> shift);
  const float offset = kNested ? __ldg(weight.nested_offset) : 0.f;

  uint32_t words[kWords];
  uint32_t scale_code = 0;
  float scale = 0.f;
  auto load = [&](int64_t tile) {
    const int64_t first = tile * kTileWords + lane;
    if ((tile + 1) * kTileWords <= aligned_words) {
#pragma unroll
      for (int u = 0; u < kWords; ++u) words[u] = load_streaming_32(weight.packed + (first + u * 32) * 4);
    } else {
#pragma unroll
      for (int u = 0; u < kWords; ++u) words[u] = load_bytes(weight.packed, first + u * 32, bytes);
    }
    const int64_t block = ((tile * kTileWords) >> shift) + lane;
    if (lane < tile_blocks && block < weight.blocks) {
      if constexpr (kNested) {
        scale_code = __ldg(weight.absmax_codes + block);
        scale = __ldg(weight.nested_absmax + block / kNestedBlocksize);
      } else {
        scale = __ldg(weight.absmax + block);
      }
    }
  };

  int64_t tile = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (tile < tiles) load(tile);  // the first loads are under way while the tables are filled
  const LaneLevels levels(storage);
  levels.fill<kThreads>();
  if constexpr (kNested) {
    fill_by_block<256, kThreads>([&](int i) { map[i] = __ldg(kDynamicMap + i); });
  }
  __syncthreads();

  while (tile < tiles) {
    const float own_scale = kNested ? decode_scale(map[scale_code], scale, offset) : scale;
    uint32_t codes[kWords];
#pragma unroll
    for (int u = 0; u < kWords; ++u) codes[u] = words[u];
    const int64_t current = tile;
    tile += step;
    if (tile < tiles) load(tile);

    const bool whole = (current + 1) * kTileWords <= weight.numel / 8;
#pragma unroll
    for (int u = 0; u < kWords; ++u) {
#pragma unroll
      for (int part = 0; part < 8 / kElements; ++part) {
        const int source = kElements == 8 ? lane : part * 16 + lane / 2;  // the lane that loaded the word
        const float s = __shfl_sync(kWholeWarp, own_scale, (u * 32 + source) >> shift);
        const uint32_t word = kElements == 8 ? codes[u] : __shfl_sync(kWholeWarp, codes[u], source) >> (lane % 2 * 16);
        float f[kElements];
        decode<T>(levels, word, s, f);
        const int64_t element =
            (current * kTileWords + u * 32 + source) * 8 + (kElements == 8 ? 0 : lane % 2 * 4);
        if (whole) {
          *reinterpret_cast<uint4*>(out + element) = Vector<T>::pack(f);
        } else {
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            if (element + i < weight.numel) out[element + i] = from_float<T>(f[i]);
          }
        }
      }
    }
  }
}

__global__ void __launch_bounds__(256)
    dequantize_absmax_kernel(const uint8_t* __restrict__ codes, const float* __restrict__ nested_absmax,
                             const float* __restrict__ nested_offset, int64_t count, int log2_blocksize,
                             float* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) {
    out[i] = decode_scale(__ldg(kDynamicMap + codes[i]), __ldg(nested_absmax + (i >> log2_blocksize)),
                          __ldg(nested_offset));
  }
}

template <typename T, bool kNested, int kWords, int kThreads, int kResident>
cudaError_t launch(const Nf4Weight& weight, void* out, int resident, cudaStream_t stream) {
  const int64_t tiles = ceil_div(weight.numel, kWords * 256);
  unsigned grid = 0;
  if (cudaError_t error = grid_for(tiles, kThreads / 32, resident, &grid)) return error;
  const bool aligned = reinterpret_cast<uintptr_t>(weight.packed) % 4 == 0;
  dequantize_nf4_kernel<T, kNested, kWords, kThreads, kResident>
      <<<grid, kThreads, 0, stream>>>(weight, static_cast<T*>(out), tiles, aligned);
  return cudaGetLastError();
}

template <typename T, bool kNested>
cudaError_t launch_for_size(const Nf4Weight& weight, void* out, cudaStream_t stream) {
  // Few tiles a multiprocessor: blocks that stay and loop fill their tables once. Many: one pass is faster, because
  // blocks that finish are replaced at once (prototype: by 4% at 14336x4096, and slower at 4096x4096).
  constexpr int64_t kOnePassFrom = int64_t(1) << 25;
  if (weight.numel < kOnePassFrom) return launch<T, kNested, 4, 256, 4>(weight, out, 4, stream);
  constexpr int kResident = sizeof(T) == 4 ? 3 : 4;  // float32 needs a few registers more than 4 blocks leave
  return launch<T, kNested, 2, 512, kResident>(weight, out, 0, stream);
}

template <typename T>
cudaError_t launch_for_scales(const Nf4Weight& weight, void* out, cudaStream_t stream) {
  return weight.absmax_codes ? launch_for_size<T, true>(weight, out, stream)
                             : launch_for_size<T, false>(weight, out, stream);
}

}  // namespace

cudaError_t dequantize_nf4(const Nf4Weight& weight, Dtype dtype, void* out, cudaStream_t stream) {
  if (weight.numel == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::kFloat32: return launch_for_scales<float>(weight, out, stream);
    case Dtype::kFloat16: return launch_for_scales<__half>(weight, out, stream);
    case Dtype::kBFloat16: return launch_for_scales<__nv_bfloat16>(weight, out, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t dequantize_absmax(const uint8_t* codes, const float* nested_absmax, const float* nested_offset,
                              int64_t count, int64_t blocksize, float* out, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int log2_blocksize = __builtin_ctzll(uint64_t(blocksize));
  dequantize_absmax_kernel<<<unsigned(ceil_div(count, 256)), 256, 0, stream>>>(codes, nested_absmax, nested_offset,
                                                                               count, log2_blocksize, out);
  return cudaGetLastError();
}

}  // namespace qlora_engine::cuda
