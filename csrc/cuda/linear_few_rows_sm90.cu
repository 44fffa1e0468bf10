// Product with a 4-bit weight for up to 16 rows of x on Hopper: as linear.cu, but for who waits. A multiprocessor takes
// one stretch of rows of W, and reads it by tile copies while everything else starts:
//
//   warps 0 ... 15  multiply. A stage holds 1,024 columns of a panel of 8 kGroups rows; warp w takes 64 of them,
//                   one block. mma.m16n8k16: A = 16 rows of x (kept in registers for a whole panel's rows),
//                   B = 8 rows of W. A pair of codes becomes a B register by one look-up (pair_table.cuh).
//   warp 16         copies W into the ring of stages, tiles of 128 bytes a row in the 128-byte swizzle. A group takes
//                   every second of 16 rows, so that the 8-byte reads of a warp (4 rows x 32 bytes at a time) meet
//                   no bank twice
//   warps 17 ... 19 decode the scales of every third stage
//
// The accumulators of a block are multiplied by its scale in float32; the 16 warps' sums meet in shared memory once a
// panel and are added in a fixed order.
//
// Bound: bytes of W. x is read from the L2 by every multiprocessor once a panel: 2 M bytes a column, where W has
// 4.1 kGroups.
#include "launch.h"
#include "pair_table.cuh"
#include "sm90.cuh"
#include "tensor_map.h"

namespace qlora_engine::cuda {
namespace {

constexpr int kWarps = 16, kScaleWarps = 3;  // with the copying one 20, 5 a scheduler: 96 registers a thread
constexpr int kThreads = (kWarps + 1 + kScaleWarps) * 32;
constexpr int kColumns = 64;                // of a warp in a stage
constexpr int kChunk = kWarps * kColumns;   // of a stage
constexpr int kTileBytes = 128;             // of a row of W, in one tile
constexpr int kTileCount = kChunk / 2 / kTileBytes;
constexpr int kSharedLimit = 227 * 1024 - PairTable::kBytes;

// kTiles: of 8 rows of x. kGroups: of 8 rows of W, in a panel.
template <int kTiles, int kGroups>
struct Layout {
  static constexpr int kRows = kGroups * 8;
  static constexpr int kCopyBytes = kRows * kTileBytes, kScales = kTileCount * kCopyBytes;  // a tile; where they begin
  static constexpr int kAlignment = 1024;  // of a tile
  static constexpr int kStageBytes = (kScales + kWarps * kRows * 4 + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kPartialBytes = kWarps * kTiles * 8 * kRows * 4;
  static constexpr int kMapBytes = 256 * 4, kBarrierBytes = 256;
  static constexpr int kFit = (kSharedLimit - kPartialBytes - kMapBytes - kBarrierBytes - kAlignment) / kStageBytes;
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static constexpr int kPartial = kStages * kStageBytes, kMap = kPartial + kPartialBytes,
                       kBarriers = kMap + kMapBytes, kBytes = kBarriers + kBarrierBytes + kAlignment;
  static_assert(kStages >= 3 && (kGroups == 1 || kGroups % 2 == 0));

  // Of a panel, the row of W that is column i % 8 of group i / 8.
  static __device__ __forceinline__ int row(int i) { return kGroups == 1 ? i : i / 16 * 16 + i % 8 * 2 + i / 8 % 2; }
};

struct FewRows {
  const void *x, *bias;
  void* y;
  int M, N, K;
  int groups_per_block;  // of 8 rows of W
  bool whole_scales;     // those of 4 neighbouring blocks of 64 columns are one aligned word, or one vector
};

#ifdef QLORA_SM90

// The scales of 4 neighbouring blocks of 64 columns in a row of W, as they are stored. Where they are one aligned word
// (or vector), it is read while the 4 before it are decoded.
template <bool kNested>
struct FourScales {
  float value[4];  // absmax; value[0] is nested_absmax where codes are nested
  uint32_t codes;

  __device__ __forceinline__ void load(const Nf4Weight& weight, uint32_t block) {
    if constexpr (kNested) {
      codes = __ldg(reinterpret_cast<const uint32_t*>(weight.absmax_codes + block));
      value[0] = __ldg(weight.nested_absmax + block / kNestedBlocksize);
    } else {
      const float4 four = __ldg(reinterpret_cast<const float4*>(weight.absmax + block));
      value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
    }
  }
  __device__ __forceinline__ float decode(int i, uint32_t map, float offset) const {
    if constexpr (kNested) {
      return decode_scale(sm90::load_shared_float(map + (codes >> (8 * i) & 255u) * 4), value[0], offset);
    }
    return value[i];
  }
};

template <bool kNested>
__device__ __forceinline__ float one_scale(const Nf4Weight& weight, int64_t block, uint32_t map, float offset) {
  if constexpr (kNested) {
    const float level = sm90::load_shared_float(map + __ldg(weight.absmax_codes + block) * 4u);
    return decode_scale(level, __ldg(weight.nested_absmax + block / kNestedBlocksize), offset);
  }
  return __ldg(weight.absmax + block);
}

#endif

template <typename T, bool kNested, int kTiles, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) linear_few_rows_sm90_kernel(
    FewRows problem, Nf4Weight weight, const __grid_constant__ CUtensorMap panel_map,
    const __grid_constant__ CUtensorMap rest_map) {
#ifdef QLORA_SM90
  using namespace sm90;
  using L = Layout<kTiles, kGroups>;
  __shared__ __align__(128) char table[PairTable::kBytes];
  extern __shared__ char unaligned[];
  const uint32_t base = (shared_address(unaligned) + uint32_t(L::kAlignment) - 1) & ~uint32_t(L::kAlignment - 1);
  const uint32_t full = base + L::kBarriers, empty = full + L::kStages * 8, map = base + L::kMap;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int M = problem.M, N = problem.N, K = problem.K;
  const int chunks = (K + kChunk - 1) / kChunk;
  const int first_row = int(blockIdx.x) * problem.groups_per_block * 8;
  const int end_row = min(first_row + problem.groups_per_block * 8, N);

  if (threadIdx.x == kWarps * 32) {
    for (int s = 0; s < L::kStages; ++s) {
      barrier_init(full + 8 * s, 2);  // the copies of W, and the scales
      barrier_init(empty + 8 * s, kWarps);
    }
    barrier_init_fence();
  }
  if (warp == kWarps) {
    __syncwarp();
    uint32_t slot = 0, parity = 1, filled = 0;  // an unused slot passes
    for (int row = first_row; row < end_row; row += L::kRows) {
      // the last panel of a block may be shorter: what does not belong to it is not read
      const bool whole = first_row + problem.groups_per_block * 8 - row >= L::kRows;
      const int rows = whole ? L::kRows : problem.groups_per_block * 8 % L::kRows;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (filled++ == L::kStages) __syncthreads();  // the others start; until then no slot is waited for
        const int first_byte = chunk * (kChunk / 2);
        const int tiles = min(kTileCount, (K / 2 - first_byte + kTileBytes - 1) / kTileBytes);
        barrier_wait(empty + 8 * slot, parity);
        if (lane == 0) {
          barrier_arrive_expecting(full + 8 * slot, uint32_t(tiles * rows * kTileBytes));
          for (int i = 0; i < tiles; ++i) {
            tile_load(base + slot * L::kStageBytes + i * L::kCopyBytes, whole ? &panel_map : &rest_map,
                      first_byte + i * kTileBytes, row, full + 8 * slot);
          }
        }
        __syncwarp();
        if (++slot == L::kStages) slot = 0, parity ^= 1;
      }
    }
    if (filled <= L::kStages) __syncthreads();
  } else if (warp > kWarps) {
    if constexpr (kNested) {
      for (int i = threadIdx.x - (kWarps + 1) * 32; i < 256; i += kScaleWarps * 32) {
        store_shared_float(map + i * 4, __ldg(kDynamicMap + i));
      }
    }
    const float offset = kNested ? __ldg(weight.nested_offset) : 0.f;
    constexpr int kQuads = L::kRows * (kWarps / 4), kOwn = kQuads / 32;  // of a stage; of a lane
    const int stages = (end_row - first_row + L::kRows - 1) / L::kRows * chunks;
    int stage = warp - kWarps - 1;
    const auto address = [&](int quad, int block) {  // [block][row]
      return base + stage % L::kStages * L::kStageBytes + L::kScales +
             ((quad / L::kRows * 4 + block) * L::kRows + quad % L::kRows) * 4;
    };
    const auto finish = [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8 * (stage % L::kStages));
    };
    const auto wait = [&] { barrier_wait(empty + 8 * (stage % L::kStages), stage / L::kStages % 2 ^ 1); };
    if (problem.whole_scales) {
      FourScales<kNested> scales[kOwn];
      const auto load = [&](int stage) {
        const int row = first_row + stage / chunks * L::kRows, chunk = stage % chunks;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int quad = i * 32 + lane;
          // rows and columns beyond the end: those of the last, whose products are never stored
          const int r = min(row + L::row(quad % L::kRows), N - 1);
          const int block = min(chunk * kWarps + quad / L::kRows * 4, K / kColumns - 4);
          scales[i].load(weight, uint32_t(r) * uint32_t(K / kColumns) + uint32_t(block));
        }
      };
      if (stage < stages) load(stage);
      __syncthreads();
      for (; stage < stages; stage += kScaleWarps) {
        FourScales<kNested> own[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) own[i] = scales[i];
        if (stage + kScaleWarps < stages) load(stage + kScaleWarps);
        wait();
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) store_shared_float(address(i * 32 + lane, j), own[i].decode(j, map, offset));
        }
        finish();
      }
    } else {
      __syncthreads();
      for (; stage < stages; stage += kScaleWarps) {
        const int row = first_row + stage / chunks * L::kRows, chunk = stage % chunks;
        wait();
        for (int quad = lane; quad < kQuads; quad += 32) {
          const int64_t start = int64_t(min(row + L::row(quad % L::kRows), N - 1)) * K;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int k = min(chunk * kChunk + (quad / L::kRows * 4 + j) * kColumns, K - kColumns);
            const float scale = one_scale<kNested>(weight, (start + k) >> weight.log2_blocksize, map, offset);
            store_shared_float(address(quad, j), scale);
          }
        }
        finish();
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    const uint32_t lane_offset = lane * 4;
    const T* x = static_cast<const T*>(problem.x);
    const T* bias = static_cast<const T*>(problem.bias);
    // Lane (g, t) multiplies columns 16 t to 16 t + 15 of its warp's 64, of row g of each tile of x.
    const auto load_x = [&](int chunk, uint4 (&v)[kTiles][2]) {
      const int k = chunk * kChunk + warp * kColumns + t * 16;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const bool inside = i * 8 + g < M && k < K;
        const uint4* p = reinterpret_cast<const uint4*>(x + int64_t(i * 8 + g) * K + k);
        v[i][0] = inside ? __ldg(p) : make_uint4(0, 0, 0, 0);
        v[i][1] = inside ? __ldg(p + 1) : make_uint4(0, 0, 0, 0);
      }
    };
    char* aligned = unaligned + (base - shared_address(unaligned));
    const auto codes_at = [&](int row) {  // of a pair of groups
      const int swizzled = (warp % 4 * 2 + t / 2) ^ row % 8;
      return aligned + warp / 4 * L::kCopyBytes + row * kTileBytes + swizzled * 16 + t % 2 * 8;
    };
    const char* own_codes[2] = {codes_at(L::row(g)), codes_at(kGroups == 1 ? 0 : L::row(8 + g))};
    const char* own_scales = aligned + L::kScales + (warp * L::kRows + t * 2) * 4;
    float* partial = reinterpret_cast<float*>(aligned + L::kPartial);

    uint32_t slot = 0, parity = 0;
    uint4 next_x[kTiles][2];
    load_x(0, next_x);
    PairTable::fill<T, kWarps * 32>(table);
    __syncthreads();
    for (int row = first_row; row < end_row; row += L::kRows) {
      float sum[kGroups][kTiles][2];
#pragma unroll
      for (int p = 0; p < kGroups; ++p) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) sum[p][i][0] = sum[p][i][1] = 0.f;
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        uint32_t own_x[kTiles][8];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            own_x[i][4 * j] = next_x[i][j].x, own_x[i][4 * j + 1] = next_x[i][j].y;
            own_x[i][4 * j + 2] = next_x[i][j].z, own_x[i][4 * j + 3] = next_x[i][j].w;
          }
        }
        load_x(chunk + 1 < chunks ? chunk + 1 : 0, next_x);
        barrier_wait(full + 8 * slot, parity);
        if (chunk * kChunk + warp * kColumns < K) {
          const int stage = slot * L::kStageBytes;
          // groups beyond the last multiply what an earlier stage left; their sums are not stored
#pragma unroll
          for (int p = 0; p < kGroups; ++p) {
            const uint2 codes = *reinterpret_cast<const uint2*>(own_codes[p % 2] + stage + p / 2 * 16 * kTileBytes);
            const float2 scale = *reinterpret_cast<const float2*>(own_scales + stage + p * 32);
            float c[4] = {0.f, 0.f, 0.f, 0.f};
            const auto multiply = [&](int j, uint32_t b0, uint32_t b1) {
              mma(T{}, c, own_x[0][2 * j], kTiles > 1 ? own_x[kTiles - 1][2 * j] : 0u, own_x[0][2 * j + 1],
                  kTiles > 1 ? own_x[kTiles - 1][2 * j + 1] : 0u, b0, b1);
            };
            const uint32_t words[2] = {codes.x, codes.y};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              multiply(2 * half, PairTable::pair<0>(table, words[half], lane_offset),
                       PairTable::pair<1>(table, words[half], lane_offset));
              multiply(2 * half + 1, PairTable::pair<2>(table, words[half], lane_offset),
                       PairTable::pair<3>(table, words[half], lane_offset));
            }
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              sum[p][i][0] += scale.x * c[2 * i], sum[p][i][1] += scale.y * c[2 * i + 1];
            }
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * slot);
        if (++slot == L::kStages) slot = 0, parity ^= 1;
      }

      float* own = partial + warp * (kTiles * 8 * L::kRows);  // [rows of x][rows of W]
#pragma unroll
      for (int p = 0; p < kGroups; ++p) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          *reinterpret_cast<float2*>(own + (i * 8 + g) * L::kRows + p * 8 + t * 2) =
              make_float2(sum[p][i][0], sum[p][i][1]);
        }
      }
      named_barrier(1, kWarps * 32);
      for (int i = threadIdx.x; i < M * L::kRows; i += kWarps * 32) {
        const int m = i / L::kRows, n = row + L::row(i % L::kRows);
        if (n >= end_row) continue;
        float total = bias ? float(bias[n]) : 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += partial[w * (kTiles * 8 * L::kRows) + i];
        static_cast<T*>(problem.y)[int64_t(m) * N + n] = from_float<T>(total);
      }
      named_barrier(1, kWarps * 32);  // before the next panel's sums overwrite these
    }
  }
#endif
}

template <typename T, bool kNested, int kTiles, int kGroups>
cudaError_t launch(const FewRows& problem, const Nf4Weight& weight, unsigned blocks, cudaStream_t stream) {
  using L = Layout<kTiles, kGroups>;
  constexpr auto kernel = linear_few_rows_sm90_kernel<T, kNested, kTiles, kGroups>;
  if (cudaError_t error = allow_shared_memory<kernel>(L::kBytes)) return error;
  const int rest = problem.groups_per_block % kGroups * 8;
  TileMap tile{weight.packed,      CU_TENSOR_MAP_DATA_TYPE_UINT8, uint64_t(problem.K) / 2, uint64_t(problem.N),
               uint64_t(problem.K) / 2, kTileBytes,                    L::kRows,                true};
  CUtensorMap panel_map, rest_map;
  if (cudaError_t error = encode(tile, &panel_map)) return error;
  rest_map = panel_map;
  if (rest > 0) {
    tile.box_rows = uint32_t(rest);
    if (cudaError_t error = encode(tile, &rest_map)) return error;
  }
  kernel<<<blocks, kThreads, L::kBytes, stream>>>(problem, weight, panel_map, rest_map);
  return cudaGetLastError();
}

template <typename T, bool kNested, int kTiles>
cudaError_t launch_for_rows(FewRows problem, const Nf4Weight& weight, cudaStream_t stream) {
  int count = 0;
  if (cudaError_t error = multiprocessors(&count)) return error;
  const int64_t groups = ceil_div(problem.N, 8);
  problem.groups_per_block = int(ceil_div(groups, count));
  const unsigned blocks = unsigned(ceil_div(groups, problem.groups_per_block));
  switch (problem.groups_per_block) {
    case 1: return launch<T, kNested, kTiles, 1>(problem, weight, blocks, stream);
    case 2: return launch<T, kNested, kTiles, 2>(problem, weight, blocks, stream);
    case 3:
    case 4: return launch<T, kNested, kTiles, 4>(problem, weight, blocks, stream);
    default: return launch<T, kNested, kTiles, 8>(problem, weight, blocks, stream);
  }
}

template <typename T>
cudaError_t launch_for(const FewRows& problem, const Nf4Weight& weight, cudaStream_t stream) {
  if (weight.absmax_codes) {
    return problem.M <= 8 ? launch_for_rows<T, true, 1>(problem, weight, stream)
                          : launch_for_rows<T, true, 2>(problem, weight, stream);
  }
  return problem.M <= 8 ? launch_for_rows<T, false, 1>(problem, weight, stream)
                        : launch_for_rows<T, false, 2>(problem, weight, stream);
}

}  // namespace

cudaError_t linear_nf4_few_rows_sm90(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y,
                                     int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
  const auto is_aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const bool whole = weight.log2_blocksize == 6 && K % (4 * kColumns) == 0 && weight.blocks <= UINT32_MAX &&
                     (weight.absmax_codes ? is_aligned(weight.absmax_codes, 4) : is_aligned(weight.absmax, 16));
  const FewRows problem{x, bias, y, int(M), int(N), int(K), 0, whole};
  return dtype == Dtype::kFloat16 ? launch_for<__half>(problem, weight, stream)
                                  : launch_for<__nv_bfloat16>(problem, weight, stream);
}

}  // namespace qlora_engine::cuda
