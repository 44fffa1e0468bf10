// The kernels for AVX-512.
#if defined(__x86_64__)
#include <cstdint>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
//
#include "linear_kernels.h"

namespace qlora_engine::cpu {
const Kernels kAvx512Kernels = QLORA_KERNELS("avx512");
}
#endif
