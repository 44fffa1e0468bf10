// quantize_nf4, quantize_nf4_search, quantize_absmax and quantize_nf4_double on a CPU: checks, allocation, and blocks
// shared out to the cores.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "dynamic_map.h"
#include "operators.h"

namespace qlora_engine::cpu {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements: about 10 us of work

// run(weight, element, numel, blocksize, first, last, packed, absmax) quantizes blocks [first, last).
template <typename Run>
std::tuple<Tensor, Tensor> quantize_blocks(const char* op, const Tensor& weight, int64_t blocksize, int64_t grain,
                                           Run run) {
  check_weight(op, weight, blocksize);
  const int64_t numel = weight.numel(), blocks = ceil_div(numel, blocksize);
  Tensor packed = torch::stable::new_empty(weight, {ceil_div(numel, 2)}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(weight, {blocks}, ScalarType::Float);
  const void* in = weight.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  auto* scales = static_cast<float*>(absmax.mutable_data_ptr());
  const Element element = element_of(weight.scalar_type());
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, grain / blocksize), [&](int64_t first, int64_t last) {
    run(in, element, numel, blocksize, first, last, codes, scales);
  });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t blocksize) {
  return quantize_blocks("quantize_nf4", weight, blocksize, kGrain, kernels().quantize);
}

std::tuple<Tensor, Tensor> quantize_nf4_search(const Tensor& weight, int64_t blocksize, bool signed_scales) {
  const auto search = kernels().quantize_search;
  return quantize_blocks("quantize_nf4_search", weight, blocksize, kGrain / 32,
                         [&](const void* in, Element element, int64_t numel, int64_t size, int64_t first, int64_t last,
                             uint8_t* packed, float* absmax) {
                           search(in, element, numel, size, first, last, signed_scales, packed, absmax);
                         });
}

// The nearest value of the dynamic map for each of 65,536 steps of [-1, 1]: the grid that bitsandbytes' CPU backend
// searches (its codes are those of the step, not of the number itself).
constexpr int kSteps = 65536;

const uint8_t* nearest_codes() {
  static const std::vector<uint8_t> table = [] {
    constexpr float map[256] = {QLORA_DYNAMIC_MAP};
    std::vector<uint8_t> codes(kSteps);
    int code = 0;
    for (int i = 0; i < kSteps; ++i) {
      const float value = -1.0f + (2.0f * float(i)) / float(kSteps - 1);
      while (code < 255 && (map[code] + map[code + 1]) / 2.0f < value) ++code;
      codes[i] = uint8_t(code);
    }
    return codes;
  }();
  return table.data();
}

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& offset, int64_t blocksize) {
  const char* op = "quantize_absmax";
  check_blocksize(op, blocksize);
  check_tensor(op, "absmax", absmax, ScalarType::Float, absmax.numel(), absmax);
  check_tensor(op, "offset", offset, ScalarType::Float, 1, absmax);
  const int64_t numel = absmax.numel(), groups = ceil_div(numel, blocksize);
  Tensor quantized = torch::stable::new_empty(absmax, {numel}, ScalarType::Byte);
  Tensor nested = torch::stable::new_empty(absmax, {groups}, ScalarType::Float);
  const auto* in = static_cast<const float*>(absmax.const_data_ptr());
  const float mean = *static_cast<const float*>(offset.const_data_ptr());
  auto* codes = static_cast<uint8_t*>(quantized.mutable_data_ptr());
  auto* scales = static_cast<float*>(nested.mutable_data_ptr());
  const uint8_t* nearest = nearest_codes();
  torch::stable::parallel_for(0, groups, std::max<int64_t>(1, kGrain / 4 / blocksize), [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      const int64_t begin = group * blocksize, end = std::min(begin + blocksize, numel);
      float largest = 0;
      for (int64_t i = begin; i < end; ++i) {
        const float magnitude = std::fabs(in[i] - mean);
        if (magnitude > largest) largest = magnitude;  // NaN is passed over, as bitsandbytes' CPU backend does
      }
      scales[group] = largest;
      const float reciprocal = 1.0f / largest;
      for (int64_t i = begin; i < end; ++i) {
        const float scaled = std::clamp((in[i] - mean) * reciprocal, -1.0f, 1.0f);
        const float step = (scaled + 1.0f) * 0.5f * float(kSteps - 1) + 0.5f;
        codes[i] = largest == 0 || !(step >= 0) ? 0 : nearest[int(step)];
      }
    }
  });
  return {quantized, nested};
}

// torch's own mean: bitsandbytes' CPU backend calls it too.
Tensor mean(const Tensor& absmax) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(absmax), torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mean", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_nf4_double(const Tensor& weight, int64_t blocksize) {
  const auto [packed, absmax] =
      quantize_blocks("quantize_nf4_double", weight, blocksize, kGrain, kernels().quantize);
  const Tensor offset = absmax.numel() > 0 ? mean(absmax) : torch::stable::new_zeros(absmax, {});
  const auto [codes, nested] = quantize_absmax(absmax, offset, kNestedBlocksize);
  return {packed, codes, nested, offset};
}

}  // namespace
}  // namespace qlora_engine::cpu

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CPU, m) {
  m.impl("quantize_nf4", TORCH_BOX(&qlora_engine::cpu::quantize_nf4));
  m.impl("quantize_nf4_search", TORCH_BOX(&qlora_engine::cpu::quantize_nf4_search));
  m.impl("quantize_nf4_double", TORCH_BOX(&qlora_engine::cpu::quantize_nf4_double));
  m.impl("quantize_absmax", TORCH_BOX(&qlora_engine::cpu::quantize_absmax));
}
