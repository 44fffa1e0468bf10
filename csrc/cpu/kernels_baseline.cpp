// The kernels for any processor.
#include <cstdint>

#include "simd_baseline.h"
//
#include "linear_kernels.h"

namespace qlora_engine::cpu {
const Kernels kBaselineKernels = QLORA_KERNELS("baseline");
}
