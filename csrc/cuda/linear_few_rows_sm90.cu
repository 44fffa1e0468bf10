// Product with a 4-bit weight for up to 16 rows of x on Hopper: as linear.cu, but for who waits. A multiprocessor takes a
// stretch of rows of W and reads it by bulk copies, a stage of 8 rows (a panel) of 4,096 columns at a time, or 2,048 where
// x has more than 8 rows:
//
//   warps 0 ... 15  multiply. Of a stage's columns a warp takes 4 (or 2) blocks of 64. mma.m16n8k16: A = 16 rows of W, from
//                   two stages; B = 8 rows of x, kept in registers while 4 panels go by. A pair of codes becomes an A
//                   register by one permutation, which makes an address, and one look-up.
//   warp 16         copies W into the ring of stages. Rows lie 32 bytes more than a multiple of 128 apart, so that the
//                   8-byte reads of a warp (4 rows x 32 bytes at a time) meet no bank twice
//   warps 17 ... 19 decode the scales of every third stage. They are read as early as W is: behind the copies that are
//                   under way a load would wait for all of them
//
// The accumulators of a block are multiplied by its scale in float32; the 16 warps' sums meet in shared memory once 4
// panels and are added in a fixed order.
//
// Shared memory: the scales of a stage's 16 warps are in gaps of the look-up table (far_table.cuh), stages before and
// behind it.
//
// Bound: bytes of W. Where K is more than a stage's columns, x is read from the L2 again for every 4 panels: at 8 rows as
// many bytes as W has, at 16 twice as many.
#include "far_table.cuh"
#include "launch.h"
#include "launch_clusters.h"
#include "pair_table.cuh"
#include "row_scales.cuh"

namespace qlora_engine::cuda {
namespace {

constexpr int kWarps = 16, kScaleWarps = 3;
constexpr int kThreads = (kWarps + 1 + kScaleWarps) * 32;  // 5 warps a scheduler: 96 registers a thread
constexpr int kColumns = 64;                               // of a block
constexpr int kRows = 8, kPanels = 4;                      // of W in a stage, a panel; panels whose sums a warp keeps

// kTiles: of 8 rows of x. Offsets are from the table.
template <int kTiles>
struct Layout {
  static constexpr int kBlocks = 4 / kTiles;  // of a warp in a stage
  static constexpr int kChunk = kWarps * kBlocks * kColumns, kPitch = kChunk / 2 + 32;  // columns of a stage; bytes
  static constexpr int kStageBytes = kRows * kPitch;
  static constexpr int kLow = FarTable::kLow, kLowStages = (-kLow - 2048) / kStageBytes;
  static constexpr int kMap = kLow + kLowStages * kStageBytes, kBarriers = kMap + 256 * 4;
  static constexpr int kSumPitch = kPanels * kRows + 4;  // floats; every second row of x lies in other banks
  static constexpr int kSums = FarTable::kBytes, kSumBytes = kWarps * kTiles * 8 * kSumPitch * 4;
  static constexpr int kHigh = kSums + kSumBytes, kHighStages = (FarTable::kEnd - kHigh) / kStageBytes;
  static constexpr int kStages = kTiles == 1 ? 6 : 10;  // 100 KB; more under way make all other loads wait
  static_assert(kStages <= kLowStages + kHighStages);
  static_assert(kStages >= 4 && kStages * kWarps <= 256 && kBarriers + 2 * kStages * 8 <= 0);
};

struct FewRows {
  const void *x, *bias;
  void* y;
  int M, N, K;
  RoundedLevels levels;
  bool whole_scales;    // those of 4 neighbouring blocks of 64 columns are one aligned word, or one vector
};

#ifdef QLORA_SM90

// The stages of a thread block, in the order in which they pass: kPanels at a time, for each chunk of K, each panel.
struct Order {
  int first, end, chunks;  // panels; chunks of a row

  __device__ __forceinline__ int stages() const { return (end - first) * chunks; }
  __device__ __forceinline__ void find(int stage, int* panel, int* chunk) const {
    const int begin = stage / (kPanels * chunks) * kPanels, rest = stage - begin * chunks;
    const int count = min(kPanels, end - first - begin);
    *chunk = rest / count;
    *panel = first + begin + rest % count;
  }
};

#endif

template <typename T, bool kNested, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    linear_few_rows_sm90_kernel(const __grid_constant__ FewRows problem, const __grid_constant__ Nf4Weight weight) {
#ifdef QLORA_SM90
  using namespace sm90;
  using L = Layout<kTiles>;
  constexpr int kBlocks = L::kBlocks, kChunk = L::kChunk, kPitch = L::kPitch;
  extern __shared__ char dynamic[];
  const uint32_t table = FarTable::constant_address(shared_address(dynamic));
  const uint32_t full = table + uint32_t(L::kBarriers), empty = full + L::kStages * 8, map = table + uint32_t(L::kMap);
  const auto stage_at = [&](int slot) {
    return table + uint32_t(slot < L::kLowStages ? L::kLow + slot * L::kStageBytes
                                                 : L::kHigh + (slot - L::kLowStages) * L::kStageBytes);
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int M = problem.M, N = problem.N, K = problem.K;
  const int panels = (N + kRows - 1) / kRows;
  const Order order{int(int64_t(blockIdx.x) * panels / gridDim.x), int(int64_t(blockIdx.x + 1) * panels / gridDim.x),
                    (K + kChunk - 1) / kChunk};

  if (warp == kWarps) {
    if (lane < L::kStages) {
      barrier_init(full + 8 * lane, 2);  // the copies of W, and the scales
      barrier_init(empty + 8 * lane, kWarps);
    }
    barrier_init_fence();
    __syncthreads();
    uint32_t slot = 0, parity = 1;  // an unused slot passes
    for (int begin = order.first; begin < order.end; begin += kPanels) {
      for (int chunk = 0; chunk < order.chunks; ++chunk) {
        for (int panel = begin; panel < min(begin + kPanels, order.end); ++panel) {
          const int rows = min(kRows, N - panel * kRows);
          const uint32_t bytes = min(kChunk, K - chunk * kChunk) / 2;
          barrier_wait(empty + 8 * slot, parity);
          if (lane == 0) barrier_arrive_expecting(full + 8 * slot, rows * bytes);
          __syncwarp();
          if (lane < rows) {
            const uint8_t* from = weight.packed + (int64_t(panel * kRows + lane) * K + chunk * kChunk) / 2;
            bulk_load(stage_at(slot) + lane * kPitch, from, bytes, full + 8 * slot);
          }
          if (++slot == L::kStages) slot = 0, parity ^= 1;
        }
      }
    }
  } else if (warp > kWarps) {
    const int stages = order.stages(), row_in_panel = lane % kRows;
    int stage = warp - kWarps - 1;
    const float inverse = problem.levels.inverse;
    // A lane has one row's scales of every 16th four blocks: [warp][row][block of the warp]
    const auto quad = [&](int i) { return i * 4 + lane / kRows; };
    const auto store = [&](int i, float a, float b, float c, float d) {
      const int owner = quad(i) * 4 / kBlocks;
      const uint32_t to = FarTable::gap(table, stage % L::kStages * kWarps + owner) + row_in_panel * kBlocks * 4;
      a *= inverse, b *= inverse, c *= inverse, d *= inverse;
      if constexpr (kBlocks == 4) {
        store_shared_128(to, make_uint4(__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)));
      } else {
        store_shared_64(to, make_uint2(__float_as_uint(a), __float_as_uint(b)));
        store_shared_64(to + FarTable::kEntry, make_uint2(__float_as_uint(c), __float_as_uint(d)));
      }
    };
    const auto finish = [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8 * (stage % L::kStages));
    };
    const auto wait = [&] { barrier_wait(empty + 8 * (stage % L::kStages), stage / L::kStages % 2 ^ 1); };
    const auto begin = [&] {  // the barriers are there, the map is, and the table of the others
      constexpr int kEach = 256 / 32 / kScaleWarps + 1;
      float levels[kEach];
      const int first = threadIdx.x - (kWarps + 1) * 32;
      if constexpr (kNested) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) levels[i] = __ldg(kDynamicMap + min(first + i * kScaleWarps * 32, 255));
      }
      __syncthreads();
      if constexpr (kNested) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) store_shared_float(map + min(first + i * kScaleWarps * 32, 255) * 4, levels[i]);
      }
      named_barrier(1, kThreads - 32);
    };
    // rows and columns beyond the end: those of the last, whose products are zero, or never stored
    const float offset = kNested ? __ldg(weight.nested_offset) : 0.f;
    if (problem.whole_scales) {
      constexpr int kAhead = kNested ? 2 : 1;
      RowScales<kNested, 4> ahead[kAhead][kBlocks];
      const auto load = [&](int stage, RowScales<kNested, 4>(&to)[kBlocks]) {
        if (stage >= stages) return;
        int panel, chunk;
        order.find(stage, &panel, &chunk);
        const uint32_t blocks = K / kColumns, row = min(panel * kRows + row_in_panel, N - 1);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const uint32_t block = chunk * (kChunk / kColumns) + quad(i) * 4;
          to[i].load(weight, row * blocks + min(block, blocks - 4));
        }
      };
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(stage + i * kScaleWarps, ahead[i]);
      begin();
      while (stage < stages) {
#pragma unroll
        for (int turn = 0; turn < kAhead; ++turn) {
          if (stage >= stages) break;
          RowScales<kNested, 4> own[kBlocks];
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) own[i] = ahead[turn][i];
          load(stage + kAhead * kScaleWarps, ahead[turn]);
          wait();
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            store(i, own[i].decode(0, map, offset), own[i].decode(1, map, offset), own[i].decode(2, map, offset),
                  own[i].decode(3, map, offset));
          }
          finish();
          stage += kScaleWarps;
        }
      }
    } else {
      begin();
      for (; stage < stages; stage += kScaleWarps) {
        int panel, chunk;
        order.find(stage, &panel, &chunk);
        const int64_t start = int64_t(min(panel * kRows + row_in_panel, N - 1)) * K;
        wait();
        for (int i = 0; i < kBlocks; ++i) {
          const auto scale = [&](int j) {
            const int k = min(chunk * kChunk + (quad(i) * 4 + j) * kColumns, K - kColumns);
            return one_scale<kNested>(weight, (start + k) >> weight.log2_blocksize, map, offset);
          };
          store(i, scale(0), scale(1), scale(2), scale(3));
        }
        finish();
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    const T* x = static_cast<const T*>(problem.x);
    const T* bias = static_cast<const T*>(problem.bias);
    // Lane (g, t) multiplies columns 16 t to 16 t + 15 of each block of its warp, of row g of each tile of x.
    uint32_t own_x[kBlocks][kTiles][8];
    const auto load_x = [&](int chunk) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const int k = chunk * kChunk + (warp * kBlocks + j) * kColumns + t * 16;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const bool inside = i * 8 + g < M && k < K;
          const uint4* p = reinterpret_cast<const uint4*>(x + int64_t(i * 8 + g) * K + k);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 v = inside ? __ldg(p + half) : make_uint4(0, 0, 0, 0);
            own_x[j][i][4 * half] = v.x, own_x[j][i][4 * half + 1] = v.y;
            own_x[j][i][4 * half + 2] = v.z, own_x[j][i][4 * half + 3] = v.w;
          }
        }
      }
    };
    const uint32_t lane_table = table + lane * 4, own_codes = g * kPitch + warp * (kBlocks * kColumns / 2) + t * 8;
    const uint32_t sums = table + L::kSums;  // [warp][row of x][row of W]

    uint32_t slot = 0, parity = 0;
    load_x(0);
    __syncthreads();
    FarTable::fill<kWarps * 32>(table, problem.levels, int(threadIdx.x));
    named_barrier(1, kThreads - 32);
    for (int begin = order.first; begin < order.end; begin += kPanels) {
      const int count = min(kPanels, order.end - begin);
      float sum[kPanels / 2][kTiles][4] = {};
      for (int chunk = 0; chunk < order.chunks; ++chunk) {
        if (order.chunks > 1 && !(begin == order.first && chunk == 0)) load_x(chunk);
        const bool any = chunk * kChunk + warp * (kBlocks * kColumns) < K;
#pragma unroll
        for (int p = 0; p < kPanels; p += 2) {  // two panels are the 16 rows of an operand A
          if (p >= count) break;
          const bool both = p + 1 < count;  // else the second's rows are the first's once more, and are not stored
          const uint32_t slots[2] = {slot, !both ? slot : slot + 1 < L::kStages ? slot + 1 : 0};
          barrier_wait(full + 8 * slots[0], parity);
          if (both) barrier_wait(full + 8 * slots[1], slots[1] == 0 ? parity ^ 1 : parity);
          if (any) {
            const uint32_t codes_at[2] = {stage_at(slots[0]) + own_codes, stage_at(slots[1]) + own_codes};
            float scale[2][kBlocks];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const uint32_t at = FarTable::gap(table, slots[i] * kWarps + warp) + g * kBlocks * 4;
              if constexpr (kBlocks == 4) {
                const uint4 v = load_shared_128(at);
                scale[i][0] = __uint_as_float(v.x), scale[i][1] = __uint_as_float(v.y);
                scale[i][2] = __uint_as_float(v.z), scale[i][3] = __uint_as_float(v.w);
              } else {
                const uint2 v = load_shared_64(at);
                scale[i][0] = __uint_as_float(v.x), scale[i][1] = __uint_as_float(v.y);
              }
            }
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
              const uint2 upper = load_shared_64(codes_at[0] + j * (kColumns / 2));
              const uint2 lower = load_shared_64(codes_at[1] + j * (kColumns / 2));
              float c[kTiles][4] = {};
              const auto multiply = [&](int at, uint32_t upper, uint32_t lower, uint32_t left, uint32_t right) {
                const uint32_t a0 = FarTable::pair(upper, lane_table, left),
                               a1 = FarTable::pair(lower, lane_table, left),
                               a2 = FarTable::pair(upper, lane_table, right),
                               a3 = FarTable::pair(lower, lane_table, right);
#pragma unroll
                for (int i = 0; i < kTiles; ++i) mma(T{}, c[i], a0, a1, a2, a3, own_x[j][i][at], own_x[j][i][at + 1]);
              };
              multiply(0, upper.x, lower.x, 0x7604, 0x7614);
              multiply(2, upper.x, lower.x, 0x7624, 0x7634);
              multiply(4, upper.y, lower.y, 0x7604, 0x7614);
              multiply(6, upper.y, lower.y, 0x7624, 0x7634);
#pragma unroll
              for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[p / 2][i][e] += scale[e / 2][j] * c[i][e];
              }
            }
          }
          __syncwarp();
          if (lane == 0) {
            barrier_arrive(empty + 8 * slots[0]);
            if (both) barrier_arrive(empty + 8 * slots[1]);
          }
          slot += both ? 2 : 1;
          if (slot >= L::kStages) slot -= L::kStages, parity ^= 1;
        }
      }

#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = i * 8 + t * 2 + e % 2;
          if (m >= M) continue;
#pragma unroll
          for (int p = 0; p < kPanels; p += 2) {
            const uint32_t to = sums + ((warp * kTiles * 8 + m) * L::kSumPitch + (p + e / 2) * kRows + g) * 4;
            store_shared_float(to, sum[p / 2][i][e]);
          }
        }
      }
      named_barrier(2, kWarps * 32);
      constexpr int kWide = kPanels * kRows;
      for (int i = threadIdx.x; i < M * kWide; i += kWarps * 32) {
        const int m = i / kWide, r = i % kWide, n = begin * kRows + r;
        if (r >= count * kRows || n >= N) continue;
        float total = bias ? float(bias[n]) : 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          total += load_shared_float(sums + ((w * kTiles * 8 + m) * L::kSumPitch + r) * 4);
        }
        static_cast<T*>(problem.y)[int64_t(m) * N + n] = from_float<T>(total);
      }
      if (begin + kPanels < order.end) named_barrier(2, kWarps * 32);  // before the next sums overwrite these
    }
  }
#endif
}

template <typename T, bool kNested, int kTiles>
cudaError_t launch(const FewRows& problem, const Nf4Weight& weight, cudaStream_t stream) {
  using L = Layout<kTiles>;
  constexpr auto kernel = linear_few_rows_sm90_kernel<T, kNested, kTiles>;
  if (cudaError_t error = allow_shared_memory<kernel>(FarTable::kDynamicBytes)) return error;
  int count = 0;
  if (cudaError_t error = multiprocessors(&count)) return error;
  const int blocks = std::min(count, (problem.N + kRows - 1) / kRows);
  return launch_clusters(kernel, blocks, kThreads, FarTable::kDynamicBytes, 1, stream, problem, weight);
}

template <typename T>
cudaError_t launch_for(FewRows problem, const Nf4Weight& weight, cudaStream_t stream) {
  problem.levels = RoundedLevels::make<T>();
  if (weight.absmax_codes) {
    return problem.M <= 8 ? launch<T, true, 1>(problem, weight, stream) : launch<T, true, 2>(problem, weight, stream);
  }
  return problem.M <= 8 ? launch<T, false, 1>(problem, weight, stream) : launch<T, false, 2>(problem, weight, stream);
}

}  // namespace

cudaError_t linear_nf4_few_rows_sm90(const void* x, const Nf4Weight& weight, const void* bias, Dtype dtype, void* y,
                                     int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
  const auto is_aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const bool whole = weight.log2_blocksize == 6 && K % (4 * kColumns) == 0 && weight.blocks <= UINT32_MAX &&
                     (weight.absmax_codes ? is_aligned(weight.absmax_codes, 4) : is_aligned(weight.absmax, 16));
  const FewRows problem{x, bias, y, int(M), int(N), int(K), {}, whole};
  return dtype == Dtype::kFloat16 ? launch_for<__half>(problem, weight, stream)
                                  : launch_for<__nv_bfloat16>(problem, weight, stream);
}

}  // namespace qlora_engine::cuda
