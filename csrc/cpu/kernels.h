// The inner loops of the CPU operators, compiled once for each instruction set and chosen at run time.
//
// kernels_{avx512bf16,avx512,avx2,baseline}.cpp compile the same text (codec_kernels.h,
// search_kernels.h, linear_kernels.h) over three sets of vector primitives (simd_*.h) and each fill one table. Nothing here
// knows torch: an instruction-set file must not instantiate inline functions of other headers, because the
// linker may keep that copy for callers on machines that lack the instructions.
#pragma once
#include <cstdint>

namespace qlora_engine::cpu {

enum class Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline constexpr int64_t kElementBytes[] = {4, 2, 2};

// A 4-bit weight with float32 scales, flat and row-major.
struct Nf4View {
  const uint8_t* packed;
  const float* absmax;
  int64_t numel;
  int block_shift;  // log2(blocksize)
};

// Reduction steps that are multiplied at a time: one chunk of B stays in the first-level cache.
inline constexpr int kChunk = 256;

struct Kernels {
  const char* name;

  // Blocks [first, last) of a flat weight. The byte that an odd numel leaves half empty gets the code of zero.
  void (*quantize)(const void* weight, Element element, int64_t numel, int64_t blocksize, int64_t first,
                   int64_t last, uint8_t* packed, float* absmax);

  // The same with scales that are searched for (csrc/scale_search.h), of either sign with signed_scales.
  void (*quantize_search)(const void* weight, Element element, int64_t numel, int64_t blocksize, int64_t first,
                          int64_t last, bool signed_scales, uint8_t* packed, float* absmax);

  // Elements [first, last) to out[0 ...]. `stream` writes around the caches.
  void (*dequantize)(const Nf4View& weight, int64_t first, int64_t last, void* out, Element element, bool stream);

  // n elements of x to float32.
  void (*widen)(const void* x, Element element, int64_t n, float* out);

  // y[m, n] = sum_k x[m, k] W[n, k] + bias[n] for rows [first, last) of W, at most kMaxDotRows rows of x.
  // x float32 [rows, K]; W is rounded to `element`; y and bias are of that type.
  void (*dot)(const float* x, int rows, int64_t K, int64_t N, const Nf4View& weight, int64_t first, int64_t last,
              const void* bias, void* y, Element element);

  // dx[m, k] = sum_n grad[m, n] W[n, k] for columns [first, last) of W, at most kMaxCombineRows rows of grad.
  // grad float32 [rows, N]; acc is scratch for rows * (last - first) sums; dx has a stride of K.
  void (*combine)(const float* grad, int rows, int64_t K, int64_t N, const Nf4View& weight, int64_t first,
                  int64_t last, float* acc, void* dx, Element element);

  // The matrix product C[M, P] = A[M, R] B[R, P] works on 32-bit lanes: a float32 each, or two neighbouring steps
  // of R in bfloat16 (`paired`, only where `has_bf16_dot`). `panel` columns of B are packed at a time.
  bool has_bf16_dot;
  int panel;      // columns of a packed panel of B
  int tile_rows;  // rows of A that a tile holds in registers

  // Row m of A, steps [step, step + steps), to lanes out[kChunk]; the rest of the chunk is zero.
  void (*pack_a)(const void* row, Element element, bool paired, int64_t step, int64_t steps, float* out);

  // B[r, p] = W[p, r] (a forward product) for r in [r0, r0 + lanes), p in [p0, p0 + panel); lanes counts pairs where
  // `paired`. Columns beyond P and steps beyond R are zero.
  void (*pack_b_transposed)(const Nf4View& weight, int64_t P, int64_t R, int64_t p0, int64_t lane0, int lanes,
                            Element element, bool paired, float* out);
  // B[r, p] = W[r, p] (the gradient of x).
  void (*pack_b)(const Nf4View& weight, int64_t P, int64_t R, int64_t p0, int64_t lane0, int lanes, Element element,
                 bool paired, float* out);

  // c[rows, panel] (+)= a[rows, lanes] b[lanes, panel], rows <= tile_rows; a has a stride of kChunk lanes.
  void (*tile)(const float* a, const float* b, int rows, int lanes, bool paired, bool accumulate, float* c);

  // columns of c[panel] plus bias to y.
  void (*store_row)(const float* c, int columns, const void* bias, void* y, Element element);
};

inline constexpr int kMaxDotRows = 4;
inline constexpr int kMaxCombineRows = 2;  // with three, packed panels of W are as fast

// The fastest table that this processor runs. QLORA_ENGINE_CPU=avx512bf16|avx512|avx2|baseline forces one; read once.
// Raises through STD_TORCH_CHECK where the name is unknown or the processor lacks the instructions.
const Kernels& kernels();

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace qlora_engine::cpu
