// The kernels for AVX-512 and its bfloat16 dot product.
#if defined(__x86_64__)
#include <cstdint>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define QLORA_AVX512_BF16  // g++ does not define __AVX512BF16__ after a pragma
#include "simd_avx512.h"
//
#include "linear_kernels.h"

namespace qlora_engine::cpu {
const Kernels kAvx512Bf16Kernels = QLORA_KERNELS("avx512bf16");
}
#endif
