// Product with a 4-bit weight on GPUs before and beside Hopper (sm_80 and later): y[m, n] = sum_k x[m, k] * w[n, k]
// (+ bias[n]), w[n, k] = round(level[code[n, k]] * absmax[n, block(k)]), without a decoded copy of W.
//
//   block: kWarps x 32 rows of W, kTokens rows of x, 64 columns a step; cp.async fills a ring of stages
//
//        packed W [rows, 32 bytes] --> codes, A registers --+
//        scale of a row --> its 16 products, in a table ----+--> mma.m16n8k16: A = 16 rows of W, B = x transposed
//        x [kTokens, 64], swizzled --> ldmatrix ------------+    (8 rows of x); sums in float32
//
//   A warp owns its 32 rows of W alone, so that nothing is decoded twice in a block: lane l makes the products of row l
//   and leaves them in shared memory, where the lanes that decode the row take them (product_table.cuh). A lane's A
//   registers hold the columns that one byte of each packed word encodes: bitsandbytes' order needs no repacking.
//   Few tiles: `splits` blocks divide K; the last of them adds the float32 partial sums in the order of the splits.
//   The tile of y is transposed in shared memory, and leaves in rows.
//
// Bound: the tensor cores at many rows of x, decoding (about 3 instructions a weight) at few. Measured on
// Hopper alone, where it is taken by name or by linear_table.h; on a GPU of 8.0 for few rows (linear_route.h).
#include "copy_async.cuh"
#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "launch_clusters.h"
#include "pair_table.cuh"
#include "product_table.cuh"

namespace qlora_engine::cuda {
namespace {

constexpr int kStep = 64;  // columns: the smallest block, so that a row has one scale in them

struct Sm80Problem {
  const void* x;
  const void* bias;
  void* y;
  Nf4Weight weight;
  int M, N, K;
  int steps;                    // K / 64
  int log2_steps_a_scale;
  int token_tiles, row_tiles, splits;
  float* partials;              // [tile][split][sums, by fours][threads]
  int32_t* counters;            // [tile], zero
  bool vectors;                 // rows of y begin at multiples of 16 bytes
};

template <typename T_, int kTokens_, int kWarps_, int kStages_>
struct Sm80Tile {
  using T = T_;
  static constexpr int kTokens = kTokens_, kWarps = kWarps_, kStages = kStages_;
  static constexpr int kRows = kWarps * 32, kThreads = kWarps * 32;
  static constexpr int kXBytes = kTokens * kStep * 2, kPackedBytes = kRows * kStep / 2;
  static constexpr int kStageBytes = kXBytes + kPackedBytes;
  static constexpr int kTable = kStages * kStageBytes;  // [kRows] tables of 32 bytes
  static constexpr int kMap = kTable + kRows * 32;
  static constexpr int kPitch = kRows * 2 + 16;  // of y's tile, which takes the ring's place: bytes a token
  static constexpr int kRing = kMap + 1024, kBytes = kRing > kTokens * kPitch ? kRing : kTokens * kPitch;
};

__device__ __forceinline__ uint4& vector_at(char* memory, int offset) {
  return *reinterpret_cast<uint4*>(memory + offset);
}
// Four 8 x 8 matrices of 16-bit numbers; lane 8 i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t& m0, uint32_t& m1, uint32_t& m2, uint32_t& m3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
               : "r"(address)
               : "memory");
}

// The scale of one row of W in each step, fetched a step early.
class RowScale {
 public:
  __device__ __forceinline__ RowScale(const Sm80Problem& p, int row)
      : p_(p),
        first_(int64_t(min(row, p.N - 1)) * (p.steps >> p.log2_steps_a_scale)),
        offset_(p.weight.absmax_codes ? __ldg(p.weight.nested_offset) : 0.f) {}

  __device__ __forceinline__ void fetch(int step) {
    const int64_t block = first_ + (step >> p_.log2_steps_a_scale);
    if (p_.weight.absmax_codes) {
      code_ = __ldg(p_.weight.absmax_codes + block);
      value_ = __ldg(p_.weight.nested_absmax + block / kNestedBlocksize);
    } else {
      value_ = __ldg(p_.weight.absmax + block);
    }
  }
  __device__ __forceinline__ float get(const float* map) const {
    return p_.weight.absmax_codes ? decode_scale(map[code_], value_, offset_) : value_;
  }

 private:
  const Sm80Problem& p_;
  int64_t first_;
  float offset_;
  uint32_t code_ = 0;
  float value_ = 0.f;
};

// Copies x and packed W of a step into a stage, all threads together. What lies outside becomes 0.
template <typename Tile>
__device__ __forceinline__ void copy_step(const Sm80Problem& p, uint32_t stage, int m0, int n0, int step) {
  const char* x = static_cast<const char*>(p.x);
#pragma unroll
  for (int i = 0; i < Tile::kTokens * 8 / Tile::kThreads; ++i) {
    const int piece = i * Tile::kThreads + int(threadIdx.x), token = piece / 8, part = piece % 8;
    const bool inside = m0 + token < p.M;
    const int64_t from = (int64_t(inside ? m0 + token : 0) * p.K + step * kStep) * 2 + part * 16;
    copy_async<16>(stage + token * 128 + ((part ^ (token & 7)) << 4), x + from, inside ? 16 : 0);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int piece = i * Tile::kThreads + int(threadIdx.x), row = piece / 2, part = piece % 2;
    const bool inside = n0 + row < p.N;
    const int64_t from = (int64_t(inside ? n0 + row : 0) * p.K + step * kStep) / 2 + part * 16;
    // the halves of a row are swapped every four rows: eight rows' pieces meet all banks
    copy_async<16>(stage + Tile::kXBytes + row * 32 + ((part ^ (row >> 2 & 1)) << 4), p.weight.packed + from,
                   inside ? 16 : 0);
  }
}

// Adds the partial sums of a tile's blocks, in order; false in all blocks but the one that comes last.
template <typename Tile, int kProducts>
__device__ __forceinline__ bool add_splits(const Sm80Problem& p, float (&sums)[kProducts][4], int tile, int split,
                                           int* last) {
  float4* own = reinterpret_cast<float4*>(p.partials) + int64_t(tile) * p.splits * kProducts * Tile::kThreads + threadIdx.x;
  const auto part = [&](int s, int i) { return own + (s * kProducts + i) * Tile::kThreads; };
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    __stcg(part(split, i), make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(p.counters + tile, 1) == p.splits - 1;
  __syncthreads();
  if (!*last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kProducts; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
  for (int other = 0; other < p.splits; ++other) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const float4 v = __ldcg(part(other, i));
      sums[i][0] += v.x, sums[i][1] += v.y, sums[i][2] += v.z, sums[i][3] += v.w;
    }
  }
  return true;
}

template <typename T, int kTokens, int kWarps, int kStages, int kResident>
__global__ void __launch_bounds__(kWarps * 32, kResident) linear_sm80_kernel(const Sm80Problem p) {
  using Tile = Sm80Tile<T, kTokens, kWarps, kStages>;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t base = shared_address(memory);
  float* map = reinterpret_cast<float*>(memory + Tile::kMap);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;

  // groups of 8 token tiles go through all rows of W together: they find both in the L2
  const int tile = int(blockIdx.x) / p.splits, split = int(blockIdx.x) % p.splits;
  constexpr int kGroup = 8;
  const int group = tile / (kGroup * p.row_tiles), rest = tile % (kGroup * p.row_tiles);
  const int width = min(kGroup, p.token_tiles - group * kGroup);
  const int m0 = (group * kGroup + rest % width) * kTokens, n0 = rest / width * Tile::kRows;
  const int begin = int(int64_t(p.steps) * split / p.splits), end = int(int64_t(p.steps) * (split + 1) / p.splits);

  for (int i = int(threadIdx.x); i < 256; i += Tile::kThreads) map[i] = __ldg(kDynamicMap + i);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) copy_step<Tile>(p, base + i * Tile::kStageBytes, m0, n0, begin + i);
    copies_commit();
  }
  RowScale scale(p, n0 + warp * 32 + lane);
  if (begin < end) scale.fetch(begin);

  // Of 16 rows i and 8 tokens j: rows lane / 4 and 8 further, tokens 2 (lane % 4) and the next
  constexpr int kTokenGroups = kTokens / 8;
  float sums[2 * kTokenGroups][4];
#pragma unroll
  for (int i = 0; i < 2 * kTokenGroups; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
  const int row = warp * 32 + lane / 4;
  const int near = row * 32 + (row >> 2 & 1) * 16;
  const uint32_t byte_pair = uint32_t(lane % 4) | uint32_t(lane % 4 + 4) << 4;
  const int own_table = Tile::kTable + int(threadIdx.x) * 32 + (int(threadIdx.x) >> 2 & 1) * 16;
  // ldmatrix: lanes 0-7 and 8-15 the two halves of 16 columns of tokens 0-7, lanes 16-31 those of tokens 8-15
  const int token = lane / 16 * 8 + lane % 8, column_half = lane / 8 % 2;

  int stage = 0;
  for (int step = begin; step < end; ++step) {
    copies_wait<kStages - 2>();
    __syncthreads();  // the step is there, and the stage that is filled next has been read
    const int ahead = step + kStages - 1, free = stage == 0 ? kStages - 1 : stage - 1;
    if (ahead < end) copy_step<Tile>(p, base + free * Tile::kStageBytes, m0, n0, ahead);
    copies_commit();
    const uint32_t x = base + stage * Tile::kStageBytes;
    const int packed = stage * Tile::kStageBytes + Tile::kXBytes;
    stage = stage + 1 == kStages ? 0 : stage + 1;

    const ProductTable products = product_table<T>(scale.get(map));
    if (step + 1 < end) scale.fetch(step + 1);
    vector_at(memory, own_table) = products.low;
    vector_at(memory, own_table ^ 16) = products.high;
    __syncwarp();
    uint32_t a[2][16];  // of 16 rows each; four registers for 16 columns
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows 8 apart
        const int at = near + i * 512 + half * 256;
        const ProductTable own{vector_at(memory, Tile::kTable + at), vector_at(memory, Tile::kTable + (at ^ 16))};
        const LookUp codes[2] = {look_up(vector_at(memory, packed + at), byte_pair),
                                 look_up(vector_at(memory, packed + (at ^ 16)), byte_pair)};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int shift = k % 2 * 16;
          decode_pairs(own, codes[k / 2].index >> shift, codes[k / 2].half >> shift, a[i][4 * k + half],
                       a[i][4 * k + 2 + half]);
        }
      }
    }
    __syncwarp();  // before the tables are written again
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        uint32_t b[4];
        load_matrices(x + (j * 16 + token) * 128 + (((k * 2 + column_half) ^ (token & 7)) << 4), b[0], b[1], b[2], b[3]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            mma(T{}, sums[i * kTokenGroups + j * 2 + half], a[i][4 * k], a[i][4 * k + 1], a[i][4 * k + 2],
                a[i][4 * k + 3], b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }
  }
  copies_wait<0>();
  __syncthreads();  // the tables have been read
  if (p.splits > 1 && !add_splits<Tile>(p, sums, tile, split, reinterpret_cast<int*>(memory + Tile::kTable))) return;
  __syncthreads();  // the ring has been read

  // y's tile, a row of kPitch bytes a token
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + i * 16 + half * 8;
      const float added = bias && n0 + r < p.N ? float(bias[n0 + r]) : 0.f;
#pragma unroll
      for (int j = 0; j < kTokenGroups; ++j) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int m = j * 8 + lane % 4 * 2 + t;
          *reinterpret_cast<T*>(memory + m * Tile::kPitch + r * 2) =
              from_float<T>(sums[i * kTokenGroups + j][half * 2 + t] + added);
        }
      }
    }
  }
  __syncthreads();
  T* y = static_cast<T*>(p.y);
  if (p.vectors) {
    for (int i = int(threadIdx.x); i < kTokens * (Tile::kRows / 8); i += Tile::kThreads) {
      const int m = i / (Tile::kRows / 8), n = i % (Tile::kRows / 8) * 8;
      if (m0 + m >= p.M || n0 + n >= p.N) continue;
      *reinterpret_cast<uint4*>(y + int64_t(m0 + m) * p.N + n0 + n) =
          *reinterpret_cast<const uint4*>(memory + m * Tile::kPitch + n * 2);
    }
  } else {
    for (int i = int(threadIdx.x); i < kTokens * Tile::kRows; i += Tile::kThreads) {
      const int m = i / Tile::kRows, n = i % Tile::kRows;
      if (m0 + m < p.M && n0 + n < p.N) {
        y[int64_t(m0 + m) * p.N + n0 + n] = *reinterpret_cast<const T*>(memory + m * Tile::kPitch + n * 2);
      }
    }
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T, int kTokens, int kWarps, int kStages, int kResident>
cudaError_t launch(const Sm80Problem& p, cudaStream_t stream) {
  using Tile = Sm80Tile<T, kTokens, kWarps, kStages>;
  constexpr auto kernel = linear_sm80_kernel<T, kTokens, kWarps, kStages, kResident>;
  if (cudaError_t error = allow_shared_memory<kernel>(Tile::kBytes)) return error;
  return launch_clusters(kernel, p.token_tiles * p.row_tiles * p.splits, Tile::kThreads, Tile::kBytes, 1, stream, p);
}

template <typename T>
cudaError_t launch_config(const Sm80Problem& p, int tokens, cudaStream_t stream) {
  switch (tokens) {
    case 16: return launch<T, 16, 4, 6, 4>(p, stream);
    case 32: return launch<T, 32, 4, 4, 4>(p, stream);
    case 64: return launch<T, 64, 4, 4, 3>(p, stream);
    default: return launch<T, 128, 8, 3, 1>(p, stream);
  }
}

// Rows of W that a block takes beside so many rows of x.
constexpr int rows_of(int tokens) { return tokens == 128 ? 256 : 128; }

}  // namespace

bool linear_sm80_fits(const Nf4Weight& weight, Dtype dtype, int64_t M, int64_t N, int64_t K) {
  const int64_t blocksize = int64_t(1) << weight.log2_blocksize;
  constexpr int64_t kMost = int64_t(1) << 30;  // rows and columns are counted in 32 bits, elements in 64
  if (dtype == Dtype::kFloat32 || M < 1 || N < 1 || K < 1 || M > kMost || N > kMost || K > kMost) return false;
  if (ceil_div(M, 16) * ceil_div(N, 128) > kMost / 16) return false;
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 8) return false;
  return blocksize >= kStep && K % blocksize == 0 && aligned(weight.packed);
}

ProductScratch linear_sm80_scratch(const Sm80Config& config, int64_t M, int64_t N) {
  if (config.splits == 1) return {0, 0};
  const int rows = rows_of(config.tokens);
  const int64_t tiles = ceil_div(M, config.tokens) * ceil_div(N, rows);
  return {tiles * config.splits * config.tokens * rows, tiles};
}

cudaError_t linear_nf4_sm80(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y, int64_t M,
                            int64_t N, int64_t K, const Sm80Config& config, float* partials, int32_t* counters,
                            cudaStream_t stream) {
  if (!valid_config(config) || !aligned(x)) return cudaErrorInvalidValue;
  Sm80Problem p{};
  p.x = x, p.bias = bias, p.y = y, p.weight = weight;
  p.M = int(M), p.N = int(N), p.K = int(K);
  p.steps = int(K / kStep);
  p.log2_steps_a_scale = weight.log2_blocksize - 6;
  p.token_tiles = int(ceil_div(M, config.tokens));
  p.row_tiles = int(ceil_div(N, rows_of(config.tokens)));
  p.splits = config.splits;
  p.partials = partials, p.counters = counters;
  p.vectors = N % 8 == 0 && aligned(y);
  if (p.splits > 1) {
    const size_t bytes = size_t(linear_sm80_scratch(config, M, N).counters) * sizeof(int32_t);
    if (cudaError_t error = cudaMemsetAsync(counters, 0, bytes, stream)) return error;
  }
  return dtype == Dtype::kFloat16 ? launch_config<__half>(p, config.tokens, stream)
                                  : launch_config<__nv_bfloat16>(p, config.tokens, stream);
}

}  // namespace qlora_engine::cuda
