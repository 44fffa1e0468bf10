// Launch functions of the AdamW kernels; see kernels.h for the rules they keep.
#pragma once
#include <cuda_runtime_api.h>

#include "../adamw.h"
#include "kernels.h"

namespace qlora_engine::cuda {

// One parameter, as a launch finds it. No gradient: it is left alone.
struct AdamWTensor {
  void* param;
  const void* grad;
  int32_t group;
  int16_t dtype;  // Dtype
  int16_t layout;
  int64_t numel;
};
static_assert(sizeof(AdamWTensor) == 32);

// What this step does to one parameter; made on the device, where the number of its steps is.
struct AdamWRecord {
  AdamWConstants constants;
  uint32_t key;     // of stochastic rounding
  uint32_t active;  // 0: changes nothing
  uint32_t padding[2];
};
static_assert(sizeof(AdamWRecord) == 48);

constexpr int kNormBlocks = 4096;  // at most

// The parts of a launch table, one behind the other. The first three are written by the host and uploaded where they
// changed; qlora_engine/ops/adamw.py allocates.
struct AdamWTable {
  double* hyper;         // [groups][kHyperparameters]
  AdamWTensor* tensors;  // [tensors]
  uint8_t** slabs;       // [slabs], padded to an even number
  AdamWRecord* records;  // [tensors]
  double* partial_sums;  // [kNormBlocks]
  int64_t uploaded_bytes, bytes;

  AdamWTable(void* base, int64_t groups, int64_t tensor_count, int64_t slab_count) {
    char* at = static_cast<char*>(base);
    auto take = [&](int64_t size) {
      char* part = at;
      at += size;
      return part;
    };
    hyper = reinterpret_cast<double*>(take(groups * kHyperparameters * int64_t(sizeof(double))));
    tensors = reinterpret_cast<AdamWTensor*>(take(tensor_count * int64_t(sizeof(AdamWTensor))));
    slabs = reinterpret_cast<uint8_t**>(take(ceil_div(slab_count, 2) * 16));
    uploaded_bytes = at - static_cast<char*>(base);
    records = reinterpret_cast<AdamWRecord*>(take(tensor_count * int64_t(sizeof(AdamWRecord))));
    partial_sums = reinterpret_cast<double*>(take(kNormBlocks * int64_t(sizeof(double))));
    bytes = at - static_cast<char*>(base);
  }
};

struct AdamWLaunch {
  const AdamWPage* pages;  // those in device memory, then those in host memory
  int64_t hot_pages, cold_pages;
  int64_t tensors;
  const float* multiplier;  // or nullptr: 1
  const float* skip;        // or nullptr: 0
  float* steps;             // [tensors]
  uint32_t seed;
  bool eight_bit;  // some layout is
};

cudaError_t adamw_step(const AdamWLaunch& launch, const AdamWTable& table, cudaStream_t stream);

// The root of the sum of all squared gradients to *norm.
cudaError_t gradient_norm(const AdamWTable& table, int64_t tensors, float* norm, cudaStream_t stream);

}  // namespace qlora_engine::cuda
