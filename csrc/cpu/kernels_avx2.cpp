// The kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <cstdint>

#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
//
#include "linear_kernels.h"

namespace qlora_engine::cpu {
const Kernels kAvx2Kernels = QLORA_KERNELS("avx2");
}
#endif
