// Argument checks of the compiled operators, once for every device. The pure-PyTorch reference makes the same
// checks with the same words in qlora_engine/ops/checks.py; tests/ops/test_checks.py compares the two.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "nf4.h"

namespace qlora_engine {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_compute_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

inline void check_compute_dtype(const char* op, const char* name, ScalarType t) {
  STD_TORCH_CHECK(is_compute_dtype(t), op, ": ", name, " is ", dtype_name(t),
                  "; expected float16, bfloat16 or float32");
}

inline void check_blocksize(const char* op, int64_t blocksize) {
  bool power_of_two = blocksize > 0 && (blocksize & (blocksize - 1)) == 0;
  STD_TORCH_CHECK(power_of_two && blocksize >= kMinBlocksize && blocksize <= kMaxBlocksize, op, ": blocksize is ",
                  blocksize, "; expected a power of two from 32 to 4096");
}

inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t numel,
                         const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " is ", dtype_name(t.scalar_type()), "; expected ",
                  dtype_name(dtype));
  STD_TORCH_CHECK(t.numel() == numel, op, ": ", name, " has ", t.numel(), " elements; expected ", numel);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " is not contiguous; call .contiguous() on it");
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " is on another device; move all tensors of the weight and the input to one device");
}

// What is to be quantized.
inline void check_weight(const char* op, const Tensor& weight, int64_t blocksize) {
  check_compute_dtype(op, "weight", weight.scalar_type());
  check_blocksize(op, blocksize);
  check_tensor(op, "weight", weight, weight.scalar_type(), weight.numel(), weight);
}

// A checked 4-bit weight: raw pointers, ready for a kernel. The tensors must outlive it.
struct Nf4Pointers {
  const uint8_t* packed;
  const float* absmax;          // single quantization, else nullptr
  const uint8_t* absmax_codes;  // double quantization, else nullptr
  const float* nested_absmax;   // double quantization, else nullptr
  const float* nested_offset;   // double quantization, else nullptr; one float, on the weight's device
  int64_t numel;                // elements of the decoded weight
  int64_t blocksize;            // a power of two
  int64_t blocks;               // ceil(numel / blocksize)
};

inline Nf4Pointers check_nf4(const char* op, const Tensor& packed, const Tensor& absmax,
                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                             int64_t blocksize, int64_t numel, const Tensor& like) {
  check_blocksize(op, blocksize);
  const int64_t blocks = ceil_div(numel, blocksize);
  check_tensor(op, "packed", packed, ScalarType::Byte, ceil_div(numel, 2), like);
  STD_TORCH_CHECK(nested_absmax.has_value() == nested_offset.has_value(), op,
                  ": nested_absmax and nested_offset go together; got only one of them");
  const bool nested = nested_absmax.has_value();
  check_tensor(op, "absmax", absmax, nested ? ScalarType::Byte : ScalarType::Float, blocks, like);
  Nf4Pointers w{static_cast<const uint8_t*>(packed.const_data_ptr()), nullptr, nullptr, nullptr, nullptr,
                numel, blocksize, blocks};
  if (nested) {
    check_tensor(op, "nested_absmax", *nested_absmax, ScalarType::Float, ceil_div(blocks, kNestedBlocksize), like);
    check_tensor(op, "nested_offset", *nested_offset, ScalarType::Float, 1, like);
    w.absmax_codes = static_cast<const uint8_t*>(absmax.const_data_ptr());
    w.nested_absmax = static_cast<const float*>(nested_absmax->const_data_ptr());
    w.nested_offset = static_cast<const float*>(nested_offset->const_data_ptr());
  } else {
    w.absmax = static_cast<const float*>(absmax.const_data_ptr());
  }
  return w;
}

// Checks x [..., K], the weight [out_features, K] and the bias.
inline Nf4Pointers check_linear(const char* op, const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                int64_t blocksize, int64_t out_features, const OptionalTensor& bias) {
  check_compute_dtype(op, "x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() > 0, op, ": x has no dimensions; expected [..., in_features]");
  const Nf4Pointers weight = check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize,
                                       out_features * x.size(x.dim() - 1), x);
  if (bias.has_value()) check_tensor(op, "bias", *bias, x.scalar_type(), out_features, x);
  return weight;
}

// Checks grad [..., out_features] and the weight [out_features, in_features].
inline Nf4Pointers check_backward(const char* op, const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                                  const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                  int64_t blocksize, int64_t in_features) {
  check_compute_dtype(op, "grad", grad.scalar_type());
  STD_TORCH_CHECK(grad.dim() > 0, op, ": grad has no dimensions; expected [..., out_features]");
  return check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize,
                   grad.size(grad.dim() - 1) * in_features, grad);
}

// Checks a low-rank addition to a product of `rows` [..., K] with `columns` columns; returns its rank. Rows of S may be
// strided; B is [columns, rank], or [rank, columns] where not `transposed`.
inline int64_t check_low_rank(const char* op, const char* S_name, const Tensor& S, const char* B_name, const Tensor& B,
                              const Tensor& rows, int64_t columns, bool transposed) {
  STD_TORCH_CHECK(B.dim() == 2, op, ": ", B_name, " has ", B.dim(), " dimensions; expected 2");
  STD_TORCH_CHECK(S.dim() == 2, op, ": ", S_name, " has ", S.dim(), " dimensions; expected 2");
  const int64_t rank = B.size(transposed ? 1 : 0);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < rows.dim(); ++i) M *= rows.size(i);
  check_tensor(op, B_name, B, rows.scalar_type(), columns * rank, rows);
  STD_TORCH_CHECK(S.size(0) == M && S.size(1) == rank, op, ": ", S_name, " is [", S.size(0), ", ", S.size(1),
                  "]; expected [", M, ", ", rank, "]");
  STD_TORCH_CHECK(rank < 2 || S.stride(1) == 1, op, ": the rows of ", S_name,
                  " are not contiguous; call .contiguous() on it");
  STD_TORCH_CHECK(S.scalar_type() == rows.scalar_type(), op, ": ", S_name, " is ", dtype_name(S.scalar_type()),
                  "; expected ", dtype_name(rows.scalar_type()));
  STD_TORCH_CHECK(S.is_cuda() == rows.is_cuda() && S.get_device_index() == rows.get_device_index(), op, ": ", S_name,
                  " is on another device; move the input and the adapter to one device");
  return rank;
}

inline int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t s : shape) n *= s;
  return n;
}

}  // namespace qlora_engine
