// dequantize_nf4 and dequantize_absmax on a CPU: checks, allocation, and elements shared out to the cores.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "dynamic_map.h"
#include "operators.h"

namespace qlora_engine::cpu {

constexpr int64_t kGrain = 1 << 16;
// A result that cannot stay in the caches is written around them: no line is read to be overwritten.
constexpr int64_t kStreamedBytes = 8 << 20;

void decode_scales(const uint8_t* codes, const float* nested_absmax, float offset, int nested_shift, int64_t first,
                   int64_t last, float* out) {
  constexpr float map[256] = {QLORA_DYNAMIC_MAP};
  for (int64_t i = first; i < last; ++i) {
    const float product = map[codes[i]] * nested_absmax[i >> nested_shift];
    out[i] = product + offset;  // compiled with -ffp-contract=off: two roundings
  }
}

Nf4Scales::Nf4Scales(const Nf4Pointers& weight, const Tensor& like)
    : view_{weight.packed, weight.absmax, weight.numel, __builtin_ctzll(weight.blocksize)} {
  if (weight.absmax_codes == nullptr) return;
  decoded_ = torch::stable::new_empty(like, {weight.blocks}, ScalarType::Float);
  auto* out = static_cast<float*>(decoded_.mutable_data_ptr());
  const int shift = __builtin_ctzll(kNestedBlocksize);
  torch::stable::parallel_for(0, weight.blocks, kGrain, [&](int64_t first, int64_t last) {
    decode_scales(weight.absmax_codes, weight.nested_absmax, *weight.nested_offset, shift, first, last, out);
  });
  view_.absmax = out;
}

namespace {

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& nested_offset, int64_t blocksize, std::vector<int64_t> shape,
                      ScalarType dtype) {
  const char* op = "dequantize_nf4";
  check_compute_dtype(op, "dtype", dtype);
  const Nf4Pointers weight =
      check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, product(shape), packed);
  Tensor out = torch::stable::new_empty(packed, shape, dtype);
  const Nf4Scales scales(weight, packed);
  const Nf4View view = scales.view();
  const Element element = element_of(dtype);
  const int64_t size = kElementBytes[int(element)], tiles = ceil_div(weight.numel, kGrain);
  auto* bytes = static_cast<char*>(out.mutable_data_ptr());
  advise_huge_pages(bytes, weight.numel * size);
  const bool stream = weight.numel * size >= kStreamedBytes && reinterpret_cast<uintptr_t>(bytes) % 64 == 0;
  const auto run = kernels().dequantize;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kGrain, end = std::min(last * kGrain, weight.numel);
    run(view, begin, end, bytes + begin * size, element, stream);
  });
  return out;
}

Tensor dequantize_absmax(const Tensor& quantized, const Tensor& nested_absmax, const Tensor& nested_offset,
                         int64_t blocksize) {
  const char* op = "dequantize_absmax";
  check_blocksize(op, blocksize);
  check_tensor(op, "quantized", quantized, ScalarType::Byte, quantized.numel(), quantized);
  check_tensor(op, "nested_absmax", nested_absmax, ScalarType::Float, ceil_div(quantized.numel(), blocksize),
               quantized);
  check_tensor(op, "nested_offset", nested_offset, ScalarType::Float, 1, quantized);
  Tensor out = torch::stable::new_empty(quantized, {quantized.numel()}, ScalarType::Float);
  const auto* codes = static_cast<const uint8_t*>(quantized.const_data_ptr());
  const auto* nested = static_cast<const float*>(nested_absmax.const_data_ptr());
  const float offset = *static_cast<const float*>(nested_offset.const_data_ptr());
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, quantized.numel(), kGrain, [&](int64_t first, int64_t last) {
    decode_scales(codes, nested, offset, __builtin_ctzll(blocksize), first, last, values);
  });
  return out;
}

}  // namespace
}  // namespace qlora_engine::cpu

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CPU, m) {
  m.impl("dequantize_nf4", TORCH_BOX(&qlora_engine::cpu::dequantize_nf4));
  m.impl("dequantize_absmax", TORCH_BOX(&qlora_engine::cpu::dequantize_absmax));
}
