// Product with a 4-bit weight for up to 8 rows of x: y[m, n] = sum_k x[m, k] * level[code[n, k]] * absmax[n, block(k)]
// (+ bias[n]). W is read once, packed; no 16-bit copy of it exists.
//
//   thread block: 16 rows of W at a time, 8 warps that take every 8th chunk of 128 columns
//                 128 columns = 64 bytes a row
//   row 0  | t=0 | t=1 | t=2 | t=3 |   mma.m16n8k16: A = 16 rows of W, B = x transposed (8 columns, M of them used)
//    ...   |   16 bytes a lane     |   lane (g, t) loads rows g and g + 8, columns 32 t to 32 t + 31
//   row 15 |                       |   the order of columns within a chunk is free, as long as x follows it
//   A pair of codes (one byte) becomes an A register by one look-up in a table of 256 pairs, a copy a lane: no bank
//   conflicts. The scale multiplies the float32 accumulator of each 64 columns, so a scale costs no rounding; two
//   shuffles swap half of what lanes t and t ^ 2 loaded, so that an accumulator sums over one block of 64.
//   32 scales belong to 16 rows x 128 columns at block 64: lane l decodes scale l, shuffles hand them out.
//   Each warp keeps kStages chunks under way. The 8 partial sums meet in shared memory, and are rounded once.
//
// Bound: bytes of W (0.516 a weight at block 64, double-quantized). Levels are rounded to x's type (relative error at
// most 2^-9 in bfloat16), which costs as much accuracy as a decoded 16-bit weight's rounding.
#include "decode.cuh"
#include "launch.h"
#include "pair_table.cuh"

namespace qlora_engine::cuda {
namespace {

constexpr int kRows = 16;      // of W, a thread block at a time
constexpr int kColumns = 128;  // a chunk
constexpr int kWarps = 8;
constexpr int kStages = 4;
constexpr int kResidentBlocks = 2;

// The sum over 16 columns of each lane (64 of the warp): four products of 16 columns.
template <typename T>
__device__ __forceinline__ void multiply_block(const char* table, uint32_t lane_offset, uint2 upper, uint2 lower,
                                               const uint4 (&x)[2], float (&c)[4]) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  const uint32_t above[2] = {upper.x, upper.y}, below[2] = {lower.x, lower.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mma(T{}, c, PairTable::pair<0>(table, above[i], lane_offset), PairTable::pair<0>(table, below[i], lane_offset),
        PairTable::pair<1>(table, above[i], lane_offset), PairTable::pair<1>(table, below[i], lane_offset), x[i].x,
        x[i].y);
    mma(T{}, c, PairTable::pair<2>(table, above[i], lane_offset), PairTable::pair<2>(table, below[i], lane_offset),
        PairTable::pair<3>(table, above[i], lane_offset), PairTable::pair<3>(table, below[i], lane_offset), x[i].z,
        x[i].w);
  }
}

// What one lane holds of 16 rows x 128 columns of W.
struct Stage {
  uint4 upper, lower;   // rows g and g + 8, columns 32 t to 32 t + 31
  uint32_t scale_code;  // of row lane / 2, half lane % 2
  float scale;
};

template <typename T, bool kNested>
__global__ void __launch_bounds__(kWarps * 32, kResidentBlocks)
    linear_nf4_kernel(const T* __restrict__ x, Nf4Weight weight, const T* __restrict__ bias, T* __restrict__ y, int M,
                      int N, int K) {
  __shared__ __align__(16) char table[PairTable::kBytes];
  __shared__ float map[kNested ? 257 : 1];  // and the offset: a register more would spill
  __shared__ float partial[2][kWarps][kRows][8];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = (N + kRows - 1) / kRows, chunks = (K + kColumns - 1) / kColumns;

  Stage stages[kStages];
  int load_tile = blockIdx.x, load_chunk = warp;  // the next to be loaded
  auto load = [&](Stage& s) {
    if (load_tile >= tiles || load_chunk >= chunks) return;
    const int k_lane = load_chunk * kColumns + t * 32, k_scale = load_chunk * kColumns + lane % 2 * 64;
    const auto row = [&](int i) { return int64_t(min(load_tile * kRows + i, N - 1)) * K; };  // the last, past the end
    s.upper = s.lower = make_uint4(0, 0, 0, 0);
    if (k_lane < K) {
      s.upper = load_streaming_128(weight.packed + (row(g) + k_lane) / 2);
      s.lower = load_streaming_128(weight.packed + (row(g + 8) + k_lane) / 2);
    }
    s.scale_code = 0;
    s.scale = 0.f;
    if (k_scale < K) {
      const int64_t block = (row(lane / 2) + k_scale) >> weight.log2_blocksize;
      if constexpr (kNested) {
        s.scale_code = __ldg(weight.absmax_codes + block);
        s.scale = __ldg(weight.nested_absmax + block / kNestedBlocksize);
      } else {
        s.scale = __ldg(weight.absmax + block);
      }
    }
    load_chunk += kWarps;
    if (load_chunk >= chunks) {
      load_chunk = warp;
      load_tile += gridDim.x;
    }
  };
#pragma unroll
  for (int d = 0; d < kStages; ++d) load(stages[d]);

  PairTable::fill<T, kWarps * 32>(table);
  if constexpr (kNested) {
    map[threadIdx.x] = __ldg(kDynamicMap + threadIdx.x);
    if (threadIdx.x == 0) map[256] = __ldg(weight.nested_offset);
  }
  __syncthreads();

  const uint32_t lane_offset = lane * 4;
  const int k_own = t % 2 * 32 + t / 2 * 16;  // of the 64 columns of a block, where this lane's 16 start
  const T* x_row = x + int64_t(g) * K;
  auto load_x = [&](int chunk, uint4 (&v)[2][2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = chunk * kColumns + half * 64 + k_own;
      const bool inside = g < M && k < K;
      const uint4* p = reinterpret_cast<const uint4*>(x_row + k);
      v[half][0] = inside ? __ldg(p) : make_uint4(0, 0, 0, 0);
      v[half][1] = inside ? __ldg(p + 1) : make_uint4(0, 0, 0, 0);
    }
  };

  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  int tile = blockIdx.x, chunk = warp;
  int parity = 0;
  auto finish_tile = [&] {
    float(*own)[8] = partial[parity][warp];
    own[g][2 * t] = sum[0], own[g][2 * t + 1] = sum[1], own[g + 8][2 * t] = sum[2], own[g + 8][2 * t + 1] = sum[3];
    __syncthreads();  // one a tile is enough: the next tile writes the other half of `partial`
    const int row = threadIdx.x % kRows, m = threadIdx.x / kRows;
    const int n = tile * kRows + row;
    if (m < M && n < N) {
      float total = bias ? float(bias[n]) : 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += partial[parity][w][row][m];
      y[int64_t(m) * N + n] = from_float<T>(total);
    }
    parity ^= 1;
    sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
    tile += gridDim.x;
  };

  if (warp >= chunks) {  // K is short: nothing to add, but the others wait at the barrier
    while (tile < tiles) finish_tile();
    return;
  }
  uint4 own_x[2][2];
  load_x(chunk, own_x);
  while (tile < tiles) {
#pragma unroll
    for (int d = 0; d < kStages; ++d) {
      if (tile >= tiles) break;
      Stage& s = stages[d];
      const float scale = kNested ? decode_scale(map[s.scale_code], s.scale, map[256]) : s.scale;
      // lanes t < 2 hold columns of the first block, the others of the second: swap, so that each holds 16 of both
      const bool first = t < 2;
      const auto swap = [&](const uint4& own, uint2& block0, uint2& block1) {
        const uint32_t sent_x = first ? own.z : own.x, sent_y = first ? own.w : own.y;
        const uint2 got = make_uint2(__shfl_xor_sync(kWholeWarp, sent_x, 2), __shfl_xor_sync(kWholeWarp, sent_y, 2));
        block0 = first ? make_uint2(own.x, own.y) : got;
        block1 = first ? got : make_uint2(own.z, own.w);
      };
      uint2 upper[2], lower[2];
      swap(s.upper, upper[0], upper[1]);
      swap(s.lower, lower[0], lower[1]);
      load(s);

      const bool last_of_tile = chunk + kWarps >= chunks;
      const int next_chunk = last_of_tile ? warp : chunk + kWarps;
      uint4 next_x[2][2];
      load_x(next_chunk, next_x);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float c[4];
        multiply_block<T>(table, lane_offset, upper[half], lower[half], own_x[half], c);
        const float s_upper = __shfl_sync(kWholeWarp, scale, g * 2 + half);
        const float s_lower = __shfl_sync(kWholeWarp, scale, (g + 8) * 2 + half);
        sum[0] += s_upper * c[0], sum[1] += s_upper * c[1], sum[2] += s_lower * c[2], sum[3] += s_lower * c[3];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) own_x[half][0] = next_x[half][0], own_x[half][1] = next_x[half][1];
      chunk = next_chunk;
      if (last_of_tile) finish_tile();
    }
  }
}

template <typename T>
cudaError_t launch(const void* x, const Nf4Weight& weight, const void* bias, void* y, int M, int N, int K,
                   cudaStream_t stream) {
  unsigned grid = 0;
  if (cudaError_t error = grid_for(ceil_div(N, kRows), 1, kResidentBlocks, &grid)) return error;
  const auto kernel = weight.absmax_codes ? linear_nf4_kernel<T, true> : linear_nf4_kernel<T, false>;
  kernel<<<grid, kWarps * 32, 0, stream>>>(static_cast<const T*>(x), weight, static_cast<const T*>(bias),
                                           static_cast<T*>(y), M, N, K);
  return cudaGetLastError();
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

bool few_rows_fit(const Nf4Weight& weight, Dtype dtype, const void* x, int64_t N, int64_t K) {
  const int64_t blocksize = int64_t(1) << weight.log2_blocksize;
  constexpr int64_t kMost = int64_t(1) << 30;  // rows and columns are counted in 32 bits, elements in 64
  if (N > kMost || K > kMost) return false;
  return dtype != Dtype::kFloat32 && blocksize >= 64 && K % blocksize == 0 && aligned(x) && aligned(weight.packed);
}

cudaError_t linear_nf4_few_rows(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y,
                                int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
  if (M == 0 || N == 0) return cudaSuccess;
  return dtype == Dtype::kFloat16 ? launch<__half>(x, weight, bias, y, int(M), int(N), int(K), stream)
                                  : launch<__nv_bfloat16>(x, weight, bias, y, int(M), int(N), int(K), stream);
}

}  // namespace qlora_engine::cuda
