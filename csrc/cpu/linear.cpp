// linear_nf4, its gradient, and both with an adapter on a CPU: checks, allocation, and panels shared out to the cores.
//
// Both are C[M, P] = A[M, R] B[R, P] with B the decoded weight: y = x W^T has P = out, R = in; dX = dY W the reverse.
// Rows of A are packed once, in chunks of kChunk steps of R; each task then takes one panel of columns of C, decodes
// its part of B chunk by chunk, and multiplies it with all rows. W is read once for every kRowBlock rows.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "operators.h"

namespace qlora_engine::cpu {
namespace {

constexpr int64_t kRowBlock = 1536;    // rows of A that are packed at a time: 24 MiB at R = 4096
constexpr int64_t kDotGrain = 1 << 16;  // weights
constexpr int64_t kCombinedSums = 4096;  // float32: half of a first-level cache

struct Product {
  const Kernels& k;
  const Nf4View& weight;
  const char* a;         // [M, R]
  const char* bias;      // [P] or nullptr
  char* c;               // [M, P]
  int64_t M, P, R;
  Element element;
  bool transposed;       // B is W^T
  int64_t size() const { return kElementBytes[int(element)]; }
};

void dot(const Product& p) {
  const Scratch x = scratch(p.M * p.R);
  p.k.widen(p.a, p.element, p.M * p.R, x.get());
  const int64_t grain = std::max<int64_t>(1, kDotGrain / std::max<int64_t>(1, p.R));
  torch::stable::parallel_for(0, p.P, grain, [&](int64_t first, int64_t last) {
    p.k.dot(x.get(), int(p.M), p.R, p.P, p.weight, first, last, p.bias, p.c, p.element);
  });
}

void combine(const Product& p) {
  const Scratch grad = scratch(p.M * p.R);
  p.k.widen(p.a, p.element, p.M * p.R, grad.get());
  // pieces of rows as long as the first-level cache holds their sums and every thread has one
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t width = std::min(kCombinedSums / p.M, ceil_div(ceil_div(p.P, threads), 128) * 128);
  torch::stable::parallel_for(0, ceil_div(p.P, width), 1, [&](int64_t first, int64_t last) {
    const Scratch sums = scratch(p.M * width);
    for (int64_t task = first; task < last; ++task) {
      p.k.combine(grad.get(), int(p.M), p.P, p.R, p.weight, task * width, std::min((task + 1) * width, p.P),
                  sums.get(), p.c, p.element);
    }
  });
}

// Rows [row, row + rows) of C.
void multiply_rows(const Product& p, int64_t row, int64_t rows) {
  const bool paired = p.element == Element::kBFloat16 && p.k.has_bf16_dot;
  const int steps = paired ? 2 : 1;
  const int64_t lanes = ceil_div(p.R, steps), chunks = ceil_div(lanes, kChunk), panels = ceil_div(p.P, p.k.panel);
  const Scratch packed = scratch(chunks * rows * kChunk);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, p.R)), [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const char* from = p.a + (row + m) * p.R * p.size();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t step = chunk * kChunk * steps;
        p.k.pack_a(from, p.element, paired, step, std::min<int64_t>(kChunk * steps, p.R - step),
                   packed.get() + (chunk * rows + m) * kChunk);
      }
    }
  });

  // few panels: rows are shared out as well, and B is decoded once for each share
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t tiles = ceil_div(rows, p.k.tile_rows);
  const int64_t shares = std::min(tiles, ceil_div(threads, panels));
  const int64_t share_rows = ceil_div(tiles, shares) * p.k.tile_rows;
  torch::stable::parallel_for(0, panels * shares, 1, [&](int64_t first, int64_t last) {
    const Scratch b = scratch(int64_t(kChunk) * p.k.panel), c = scratch(share_rows * p.k.panel);
    for (int64_t task = first; task < last; ++task) {
      const int64_t p0 = task % panels * p.k.panel, begin = task / panels * share_rows;
      const int64_t end = std::min(begin + share_rows, rows);
      if (begin >= end) continue;
      if (chunks == 0) std::fill_n(c.get(), (end - begin) * p.k.panel, 0.0f);  // a sum of nothing
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t lane0 = chunk * kChunk;
        const int count = int(std::min<int64_t>(kChunk, lanes - lane0));
        (p.transposed ? p.k.pack_b_transposed : p.k.pack_b)(p.weight, p.P, p.R, p0, lane0, count, p.element, paired,
                                                             b.get());
        for (int64_t m = begin; m < end; m += p.k.tile_rows) {
          p.k.tile(packed.get() + (chunk * rows + m) * kChunk, b.get(),
                   int(std::min<int64_t>(p.k.tile_rows, end - m)), count, paired, chunk > 0,
                   c.get() + (m - begin) * p.k.panel);
        }
      }
      const int columns = int(std::min<int64_t>(p.k.panel, p.P - p0));
      for (int64_t m = begin; m < end; ++m) {
        p.k.store_row(c.get() + (m - begin) * p.k.panel, columns, p.bias ? p.bias + p0 * p.size() : nullptr,
                      p.c + ((row + m) * p.P + p0) * p.size(), p.element);
      }
    }
  });
}

void multiply(const Product& p) {
  if (p.M == 0 || p.P == 0) return;
  if (p.transposed && p.M <= kMaxDotRows) return dot(p);
  if (!p.transposed && p.M <= kMaxCombineRows) return combine(p);
  for (int64_t row = 0; row < p.M; row += kRowBlock) multiply_rows(p, row, std::min(kRowBlock, p.M - row));
}

std::vector<int64_t> with_last(const Tensor& like, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < like.dim(); ++i) shape.push_back(like.size(i));
  shape.push_back(last);
  return shape;
}

// out += a @ b, matrices
void add_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

// y = x W^T (+ bias), checked
Tensor product(const Tensor& x, const Nf4Pointers& weight, int64_t out_features, const OptionalTensor& bias) {
  const int64_t in_features = x.size(x.dim() - 1);
  const Tensor rows = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, with_last(x, out_features), x.scalar_type());
  const Nf4Scales scales(weight, x);
  const Nf4View view = scales.view();
  const int64_t M = in_features ? x.numel() / in_features : (out_features ? y.numel() / out_features : 0);
  multiply({kernels(), view, static_cast<const char*>(rows.const_data_ptr()),
            bias.has_value() ? static_cast<const char*>(bias->const_data_ptr()) : nullptr,
            static_cast<char*>(y.mutable_data_ptr()), M, out_features, in_features, element_of(x.scalar_type()), true});
  return y;
}

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                  const OptionalTensor& nested_offset, int64_t blocksize, int64_t out_features,
                  const OptionalTensor& bias) {
  const Nf4Pointers weight =
      check_linear("linear_nf4", x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias);
  return product(x, weight, out_features, bias);
}

Tensor linear_nf4_lora(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                       const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset, int64_t blocksize,
                       int64_t out_features, const Tensor& S, const Tensor& B, const OptionalTensor& bias) {
  const char* op = "linear_nf4_lora";
  const Nf4Pointers weight =
      check_linear(op, x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias);
  check_low_rank(op, "S", S, "B", B, x, out_features, true);
  const Tensor y = product(x, weight, out_features, bias);
  if (y.numel() > 0) {
    add_product(torch::stable::view(y, {S.size(0), out_features}), S, torch::stable::transpose(B, 0, 1));
  }
  return y;
}

// grad W, checked
Tensor backward_product(const Tensor& grad, const Nf4Pointers& weight, int64_t in_features) {
  const int64_t out_features = grad.size(grad.dim() - 1);
  const Tensor rows = torch::stable::contiguous(grad);
  Tensor dx = torch::stable::new_empty(grad, with_last(grad, in_features), grad.scalar_type());
  const Nf4Scales scales(weight, grad);
  const Nf4View view = scales.view();
  const int64_t M = in_features ? dx.numel() / in_features : 0;
  multiply({kernels(), view, static_cast<const char*>(rows.const_data_ptr()), nullptr,
            static_cast<char*>(dx.mutable_data_ptr()), M, in_features, out_features,
            element_of(grad.scalar_type()), false});
  return dx;
}

void add_to(const Tensor& out, const Tensor& other) {
  AtenTensorHandle sum = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(out.get(), other.get(), 1.0, &sum));
  Tensor target = out;
  torch::stable::copy_(target, Tensor(sum));
}

Tensor linear_nf4_backward(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                           const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                           int64_t blocksize, int64_t in_features) {
  const Nf4Pointers weight = check_backward("linear_nf4_backward", grad, packed, absmax, nested_absmax, nested_offset,
                                            blocksize, in_features);
  return backward_product(grad, weight, in_features);
}

Tensor linear_nf4_backward_lora(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                int64_t blocksize, int64_t in_features, const Tensor& dS, const Tensor& A,
                                const OptionalTensor& addend) {
  const char* op = "linear_nf4_backward_lora";
  const Nf4Pointers weight =
      check_backward(op, grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features);
  check_low_rank(op, "dS", dS, "A", A, grad, in_features, false);
  if (addend.has_value()) check_tensor(op, "addend", *addend, grad.scalar_type(), dS.size(0) * in_features, grad);
  const Tensor dx = backward_product(grad, weight, in_features);
  if (dx.numel() == 0) return dx;
  const Tensor flat = torch::stable::view(dx, {dS.size(0), in_features});
  add_product(flat, dS, A);
  if (addend.has_value()) add_to(flat, torch::stable::view(*addend, {dS.size(0), in_features}));
  return dx;
}

void linear_nf4_backward_add(Tensor dx, const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                             int64_t blocksize) {
  const char* op = "linear_nf4_backward_add";
  STD_TORCH_CHECK(dx.dim() > 0, op, ": dx has no dimensions; expected [..., in_features]");
  const int64_t in_features = dx.size(dx.dim() - 1);
  const Nf4Pointers weight =
      check_backward(op, grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < grad.dim(); ++i) M *= grad.size(i);
  check_tensor(op, "dx", dx, grad.scalar_type(), M * in_features, grad);
  if (dx.numel() == 0) return;
  const Tensor more = backward_product(grad, weight, in_features);
  add_to(torch::stable::view(dx, {M, in_features}), torch::stable::view(more, {M, in_features}));
}

}  // namespace
}  // namespace qlora_engine::cpu

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CPU, m) {
  m.impl("linear_nf4", TORCH_BOX(&qlora_engine::cpu::linear_nf4));
  m.impl("linear_nf4_lora", TORCH_BOX(&qlora_engine::cpu::linear_nf4_lora));
  m.impl("linear_nf4_backward", TORCH_BOX(&qlora_engine::cpu::linear_nf4_backward));
  m.impl("linear_nf4_backward_lora", TORCH_BOX(&qlora_engine::cpu::linear_nf4_backward_lora));
  m.impl("linear_nf4_backward_add", TORCH_BOX(&qlora_engine::cpu::linear_nf4_backward_add));
}
