// What the bindings of the CUDA operators share.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"
#include "kernels.h"
#include "libtorch_cuda.h"

namespace qlora_engine::cuda {

inline Dtype to_dtype(ScalarType t) {
  return t == ScalarType::Float ? Dtype::kFloat32 : t == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

inline Nf4Weight to_weight(const Nf4Pointers& w) {
  return {w.packed, w.absmax, w.absmax_codes, w.nested_absmax, w.nested_offset, w.numel, w.blocks,
          __builtin_ctzll(uint64_t(w.blocksize))};
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// The whole weight in one 16- or 32-bit tensor. The caller has checked it and set the device.
inline Tensor decoded(const char* op, const Nf4Pointers& weight, const Tensor& like,
                      const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor out = empty(like, shape, dtype);
  check_launch(op, dequantize_nf4(to_weight(weight), to_dtype(dtype), out.mutable_data_ptr(),
                                  current_stream(like.get_device_index())));
  return out;
}

}  // namespace qlora_engine::cuda
