// In the place of csrc/cuda/dependent_launch.cuh: emulated kernels run one after another.
#pragma once
#include "cuda_on_cpu.h"

namespace qlora_engine::cuda {

inline void let_dependent_start() {}
inline void wait_for_previous_kernel() {}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), unsigned grid, unsigned threads, cudaStream_t,
                             Arguments... arguments) {
  emulated::launch(grid, threads, [=] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace qlora_engine::cuda
