// The NF4 format: the one definition that host and device code share.
//
// A weight of n elements (row-major, flat) is cut into blocks of `blocksize`; block b keeps
// absmax[b] = max|w|, and every element the index of one of 16 levels of w / absmax[b]. Two indices share a
// byte, the first element in the high nibble. With double quantization absmax is itself stored in 8 bits:
// absmax[b] = dynamic_map[q8[b]] * nested_absmax[b / 256] + nested_offset.
// Source: Dettmers et al. 2023, "QLoRA", section 3; layout of bitsandbytes >= 0.39, byte for byte.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define QLORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QLORA_HOST_DEVICE inline
#endif

namespace qlora_engine {

inline constexpr int64_t kNestedBlocksize = 256;
inline constexpr int64_t kMinBlocksize = 32;
inline constexpr int64_t kMaxBlocksize = 4096;

// Quantiles of N(0, 1), normalised to [-1, 1]; derived in qlora_engine/quantization/codebook.py.
#define QLORA_NF4_LEVELS                                                                              \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,          \
      0.7229568362236023f, 1.0f

// Midpoints between neighbouring levels, (a + b) / 2 in float32; a value belongs to the number of midpoints that lie
// below it. bitsandbytes' CPU backend computes these (backends/default/ops.py).
#define QLORA_NF4_MIDPOINTS \
  -0.8480964f, -0.6106329f, -0.45999527f, -0.33967942f, -0.2346074f, \
      -0.13791174f, -0.045525018f, 0.03979015f, 0.12025525f, 0.20352125f, \
      0.29201376f, 0.38931254f, 0.50166345f, 0.6427869f, 0.86147845f

// The same midpoints as bitsandbytes' CUDA kernels write them (csrc/kernels.cu, dQuantizeNF4). Four of these numbers
// (the first, ninth, thirteenth and last) lie just beside the middle of two float32 values: a compiler rounds them the
// other way than the sum above, so that codes of exact ties differ between its CPU and its CUDA backend, and here.
#define QLORA_NF4_THRESHOLDS                                                                               \
  -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f,                 \
      -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,          \
      0.1202552504837513f, 0.2035212516784668f, 0.2920137718319893f, 0.3893125355243683f,                  \
      0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f

QLORA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace qlora_engine
