#include "kernels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace qlora_engine::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

const Kernels& choose() {
  // fastest first
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Choice choices[] = {{&kAvx512Bf16Kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
                            {&kAvx512Kernels, avx512},
                            {&kAvx2Kernels, avx2},
                            {&kBaselineKernels, true}};
#else
  const Choice choices[] = {{&kBaselineKernels, true}};
#endif
  const char* wanted = std::getenv("QLORA_ENGINE_CPU");
  for (const Choice& choice : choices) {
    if (wanted == nullptr || *wanted == '\0') {
      if (choice.supported) return *choice.kernels;
    } else if (std::strcmp(wanted, choice.kernels->name) == 0) {
      STD_TORCH_CHECK(choice.supported, "QLORA_ENGINE_CPU=", wanted,
                      ": this processor lacks the instructions; unset it to choose automatically");
      return *choice.kernels;
    }
  }
  STD_TORCH_CHECK(false, "QLORA_ENGINE_CPU=", wanted,
                  "; expected avx512bf16, avx512, avx2 (each on x86-64 only) or baseline");
  return kBaselineKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace qlora_engine::cpu

// For Python, by way of ctypes: the name of the table in use, nullptr where QLORA_ENGINE_CPU names none that can be used
// (every operator raises then, and says why).
extern "C" __attribute__((visibility("default"))) const char* qlora_engine_cpu_kernels() noexcept {
  try {
    return qlora_engine::cpu::kernels().name;
  } catch (...) {
    return nullptr;
  }
}
