// adamw_step and gradient_norm on a CPU: pages are shared out to the cores, and a page is worked through in blocks of
// 256 elements that stay in the first-level cache. Bound: bytes of parameter, gradient and state.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "adamw_checks.h"
#include "dynamic_code.h"
#include "operators.h"

#if defined(__x86_64__) && !defined(__clang__)
#define QLORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define QLORA_CLONES
#endif

namespace qlora_engine::cpu {
namespace {

struct Job {  // one page
  void* param;
  const void* grad;
  Element element;
  int64_t layout;
  uint8_t* state;
  int64_t first, count;
  uint32_t key;
  AdamWConstants constants;
};

QLORA_CLONES void update_block(float* __restrict p, const float* __restrict g, float* __restrict m,
                               float* __restrict v, int64_t n, const AdamWConstants& constants) {
  const AdamWConstants c = constants;
  for (int64_t i = 0; i < n; ++i) adamw_update(p[i], g[i] * c.gradient_multiplier, m[i], v[i], c);
}

QLORA_CLONES void narrow_bfloat16(const float* __restrict in, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = nearest_bfloat16(std::bit_cast<uint32_t>(in[i]));
}

QLORA_CLONES void narrow_bfloat16_stochastic(const float* __restrict in, int64_t n, uint32_t key, uint32_t first,
                                             uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = stochastic_bfloat16(std::bit_cast<uint32_t>(in[i]), random_bits(key, first + uint32_t(i)));
  }
}

QLORA_CLONES float largest_magnitude(const float* x, int64_t n) {
  int32_t largest = 0;  // the bits of a magnitude rise with it
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  return std::bit_cast<float>(largest);
}

QLORA_CLONES double sum_of_squares(const float* x, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) lanes[j] += double(x[i + j]) * double(x[i + j]);
  }
  double sum = 0;
  for (; i < n; ++i) sum += double(x[i]) * double(x[i]);
  for (double lane : lanes) sum += lane;
  return sum;
}

void narrow(const float* in, int64_t n, const Job& job, int64_t at) {
  if (job.element == Element::kFloat32) {
    std::memcpy(static_cast<float*>(job.param) + at, in, size_t(n) * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(job.param) + at;
  if (job.element == Element::kBFloat16) {
    if (job.layout & kStochasticRounding) {
      narrow_bfloat16_stochastic(in, n, job.key, uint32_t(at), out);
    } else {
      narrow_bfloat16(in, n, out);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const torch::headeronly::Half half(in[i]);
    out[i] = half.x;
  }
}

void widen(const void* in, Element element, int64_t at, int64_t n, float* out) {
  kernels().widen(static_cast<const char*>(in) + at * kElementBytes[int(element)], element, n, out);
}

// The cells of csrc/dynamic_code.h as 32-bit numbers, which loops over 32-bit lanes read without widening.
struct Cells {
  int32_t magnitude[kCells], positive[kCells];
};

const Cells& cells() {
  static const Cells filled = [] {
    Cells cells;
    std::copy(kDynamicTables.magnitude.cells, kDynamicTables.magnitude.cells + kCells, cells.magnitude);
    std::copy(kDynamicTables.positive.cells, kDynamicTables.positive.cells + kCells, cells.positive);
    return cells;
  }();
  return filled;
}

QLORA_CLONES void decode_block(const uint8_t* __restrict codes, float scale, const float* __restrict map,
                               float* __restrict out) {
  for (int64_t i = 0; i < kStateBlock; ++i) out[i] = map[codes[i]] * scale;
}

// signed_code and unsigned_code of a block, in loops without branches: five times as fast as one element at a time.
QLORA_CLONES void nearest_levels(const float* __restrict values, float reciprocal, const int32_t* __restrict cells,
                                 const float* __restrict midpoints, int32_t* __restrict levels) {
  constexpr int32_t kFirst = int32_t(kFirstCell), kLast = kFirst + kCells - 1;
  for (int64_t i = 0; i < kStateBlock; ++i) {
    const float magnitude = std::fabs(values[i] * reciprocal);
    const int32_t cell = std::bit_cast<int32_t>(magnitude) >> 16;
    const int32_t lower = cells[std::clamp(cell, kFirst, kLast) - kFirst];
    levels[i] = lower + (magnitude > midpoints[lower] ? 1 : 0);
  }
}

QLORA_CLONES void signed_codes(const float* __restrict values, const int32_t* __restrict levels,
                               uint8_t* __restrict codes) {
  for (int64_t i = 0; i < kStateBlock; ++i) {
    codes[i] = uint8_t(values[i] < 0 ? kSignedZero - std::min(levels[i], kSignedZero) : kSignedZero + levels[i]);
  }
}

QLORA_CLONES void unsigned_codes(const float* __restrict values, float reciprocal, const int32_t* __restrict levels,
                                 uint8_t* __restrict codes) {
  for (int64_t i = 0; i < kStateBlock; ++i) {
    codes[i] = uint8_t(levels[i] == 0 && values[i] * reciprocal > 0 ? 1 : levels[i]);
  }
}

float encode_block(const float* values, bool is_signed, uint8_t* codes) {
  float scale = largest_magnitude(values, kStateBlock);
  if (scale < std::numeric_limits<float>::min()) scale = 0;
  if (scale == 0) {
    std::memset(codes, is_signed ? kSignedZero : 0, kStateBlock);
    return scale;
  }
  const float reciprocal = 1.0f / scale;
  alignas(64) int32_t levels[kStateBlock];
  if (is_signed) {
    nearest_levels(values, reciprocal, cells().magnitude, kDynamicTables.magnitude.midpoints, levels);
    signed_codes(values, levels, codes);
  } else {
    nearest_levels(values, reciprocal, cells().positive, kDynamicTables.positive.midpoints, levels);
    unsigned_codes(values, reciprocal, levels, codes);
  }
  return scale;
}

void run_page(const Job& job) {
  const int64_t room = ceil_div(job.count, kStateBlock) * kStateBlock, blocks = room / kStateBlock;
  const bool eight = job.layout & kEightBitState, has_master = job.layout & kMasterCopy;
  const bool direct = !eight && !has_master && job.element == Element::kFloat32;
  float* state = reinterpret_cast<float*>(job.state);
  if (direct) {
    update_block(static_cast<float*>(job.param) + job.first, static_cast<const float*>(job.grad) + job.first, state,
                 state + room, job.count, job.constants);
    return;
  }
  uint8_t *codes_m = job.state, *codes_v = job.state + room;
  float* master = eight ? reinterpret_cast<float*>(job.state + 2 * room) : state + 2 * room;
  float* scales = master + (has_master ? room : 0);
  alignas(64) float p[kStateBlock], g[kStateBlock], m[kStateBlock], v[kStateBlock];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kStateBlock, n = std::min(kStateBlock, job.count - begin), at = job.first + begin;
    float* block_p = has_master ? master + begin : p;
    float *block_m = eight ? m : state + begin, *block_v = eight ? v : state + room + begin;
    widen(job.grad, job.element, at, n, g);
    if (!has_master) widen(job.param, job.element, at, n, p);
    if (eight) {
      decode_block(codes_m + begin, scales[block], kDynamicTables.signed_levels, m);
      decode_block(codes_v + begin, scales[blocks + block], kDynamicTables.unsigned_levels, v);
    }
    update_block(block_p, g, block_m, block_v, n, job.constants);
    if (eight) {
      std::fill(m + n, m + kStateBlock, 0.0f);
      std::fill(v + n, v + kStateBlock, 0.0f);
      scales[block] = encode_block(m, true, codes_m + begin);
      scales[blocks + block] = encode_block(v, false, codes_v + begin);
    }
    narrow(block_p, n, job, at);
  }
}

void adamw_step(TensorList params, OptionalTensorList grads, const Tensor& steps, TensorList memory,
                const Tensor& pages, int64_t cold_pages, TensorList, const OptionalTensor& multiplier,
                const OptionalTensor& skip, std::vector<double> hyper, std::vector<int64_t> groups,
                std::vector<int64_t> layouts, int64_t seed) {
  check_adamw_step(params, grads, steps, memory, pages, cold_pages, multiplier, skip, hyper, groups, layouts);
  if (skip && *static_cast<const float*>(skip->const_data_ptr()) != 0) return;
  const float factor = multiplier ? *static_cast<const float*>(multiplier->const_data_ptr()) : 1.0f;

  // every row is checked before anything changes
  const auto* rows = static_cast<const AdamWPage*>(pages.const_data_ptr());
  const int64_t row_count = pages.size(0);
  for (int64_t i = 0; i < row_count; ++i) {
    const AdamWPage& page = rows[i];
    const bool known = 0 <= page.parameter && page.parameter < int64_t(params.size()) && 0 <= page.slab &&
                       page.slab < int64_t(memory.size());
    STD_TORCH_CHECK(known, "adamw_step: pages[", i, "] names a parameter or a slab that does not exist");
    const int64_t room = ceil_div(page.count, kStateBlock) * kStateBlock, layout = layouts[size_t(page.parameter)];
    const int64_t state = layout & kEightBitState ? 2 * room + 8 * (room / kStateBlock) : 8 * room;
    const int64_t bytes = state + (layout & kMasterCopy ? 4 * room : 0);
    const bool fits = page.count > 0 && page.first >= 0 &&
                      page.first + page.count <= params[size_t(page.parameter)].numel() && page.offset >= 0 &&
                      page.offset % 4 == 0 && page.offset + bytes <= memory[size_t(page.slab)].numel();
    STD_TORCH_CHECK(fits, "adamw_step: pages[", i, "] reaches beyond its parameter or its slab");
  }

  auto* step = static_cast<float*>(steps.mutable_data_ptr());
  std::vector<Job> by_parameter(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (!grads[i].has_value()) continue;
    step[i] += 1;
    Job& job = by_parameter[i];
    job.param = params[i].mutable_data_ptr();
    job.grad = grads[i]->const_data_ptr();
    job.element = element_of(params[i].scalar_type());
    job.layout = layouts[i];
    job.key = random_key(uint32_t(seed), uint32_t(step[i]), uint32_t(i));
    job.constants = adamw_constants(hyper.data() + groups[i] * kHyperparameters, step[i], factor);
  }
  std::vector<uint8_t*> slabs;
  for (const Tensor& slab : memory) slabs.push_back(static_cast<uint8_t*>(slab.mutable_data_ptr()));
  torch::stable::parallel_for(0, row_count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Job job = by_parameter[size_t(rows[i].parameter)];
      if (job.grad == nullptr) continue;
      job.state = slabs[size_t(rows[i].slab)] + rows[i].offset;
      job.first = rows[i].first;
      job.count = rows[i].count;
      run_page(job);
    }
  });
}

Tensor gradient_norm(OptionalTensorList grads, const Tensor& pages, TensorList) {
  check_gradients("gradient_norm", grads);
  struct Part {
    const Tensor* grad;
    int64_t first, count;
  };
  std::vector<Part> parts;
  for (const OptionalTensor& grad : grads) {
    if (!grad.has_value()) continue;
    STD_TORCH_CHECK(grad->is_contiguous(), "gradient_norm: a gradient is not contiguous; pass views that are");
    for (int64_t first = 0; first < grad->numel(); first += kPageElements) {
      parts.push_back({&*grad, first, std::min(kPageElements, grad->numel() - first)});
    }
  }
  std::vector<double> sums(parts.size());
  torch::stable::parallel_for(0, int64_t(parts.size()), 1, [&](int64_t first, int64_t last) {
    alignas(64) float wide[kStateBlock];
    for (int64_t i = first; i < last; ++i) {
      const Part& part = parts[size_t(i)];
      const Element element = element_of(part.grad->scalar_type());
      for (int64_t at = 0; at < part.count; at += kStateBlock) {
        const int64_t n = std::min(kStateBlock, part.count - at);
        widen(part.grad->const_data_ptr(), element, part.first + at, n, wide);
        sums[size_t(i)] += sum_of_squares(wide, n);
      }
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  Tensor norm = torch::stable::new_empty(pages, {}, ScalarType::Float);
  *static_cast<float*>(norm.mutable_data_ptr()) = float(std::sqrt(total));
  return norm;
}

}  // namespace
}  // namespace qlora_engine::cpu

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CPU, m) {
  m.impl("adamw_step", TORCH_BOX(&qlora_engine::cpu::adamw_step));
  m.impl("gradient_norm", TORCH_BOX(&qlora_engine::cpu::gradient_norm));
}
