// adamw_step and gradient_norm as torch sees them on CUDA: checks, and the table that a launch reads. The table is
// uploaded only where it differs from the previous call's, from ordinary memory, which the runtime copies before it
// returns: nothing synchronises. A call whose table is unchanged can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

#include "adamw_checks.h"
#include "adamw_kernels.h"
#include "libtorch_cuda.h"

namespace qlora_engine::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

int16_t dtype_code(ScalarType t) {
  return int16_t(t == ScalarType::Float ? Dtype::kFloat32 : t == ScalarType::Half ? Dtype::kFloat16
                                                                                  : Dtype::kBFloat16);
}

// What is written on the host: the first three parts of AdamWTable.
class TableWriter {
 public:
  TableWriter(const char* op, const TensorList& memory, int64_t groups, int64_t tensors, int64_t slabs)
      : layout_(nullptr, groups, tensors, slabs), bytes_(size_t(layout_.uploaded_bytes)),
        fresh_(bytes_.data(), groups, tensors, slabs), memory_(memory), groups_(groups), tensors_(tensors),
        slabs_(slabs) {
    STD_TORCH_CHECK(memory.size() == 2 && !memory[0].is_cuda() && memory[1].is_cuda() &&
                        memory[0].numel() >= layout_.uploaded_bytes && memory[1].numel() >= layout_.bytes,
                    op, ": table is too small for ", tensors, " parameters, ", groups, " groups and ", slabs,
                    " slabs; make it with launch_table");
  }

  AdamWTable& fresh() { return fresh_; }

  // The table on the device, up to date.
  AdamWTable upload(const char* op, cudaStream_t stream) {
    void* host = memory_[0].mutable_data_ptr();
    void* device = memory_[1].mutable_data_ptr();
    if (std::memcmp(host, bytes_.data(), bytes_.size()) != 0) {
      std::memcpy(host, bytes_.data(), bytes_.size());
      check_launch(op, cudaMemcpyAsync(device, host, bytes_.size(), cudaMemcpyHostToDevice, stream));
    }
    return AdamWTable(device, groups_, tensors_, slabs_);
  }

 private:
  AdamWTable layout_;
  std::vector<char> bytes_;
  AdamWTable fresh_;
  const TensorList& memory_;
  int64_t groups_, tensors_, slabs_;
};

void adamw_step_cuda(TensorList params, OptionalTensorList grads, const Tensor& steps, TensorList memory,
                     const Tensor& pages, int64_t cold_pages, TensorList table, const OptionalTensor& multiplier,
                     const OptionalTensor& skip, std::vector<double> hyper, std::vector<int64_t> groups,
                     std::vector<int64_t> layouts, int64_t seed) {
  const char* op = "adamw_step";
  check_adamw_step(params, grads, steps, memory, pages, cold_pages, multiplier, skip, hyper, groups, layouts);
  const int32_t device = params[0].get_device_index();
  for (const Tensor& param : params) {
    STD_TORCH_CHECK(same_device(param, params[0]), op,
                    ": parameters are on several devices; step each device's by themselves");
  }
  const DeviceGuard guard(device);
  const int64_t count = int64_t(params.size());
  TableWriter writer(op, table, int64_t(hyper.size()) / kHyperparameters, count, int64_t(memory.size()));
  std::memcpy(writer.fresh().hyper, hyper.data(), hyper.size() * sizeof(double));
  bool eight_bit = false;
  for (int64_t i = 0; i < count; ++i) {
    AdamWTensor& tensor = writer.fresh().tensors[i];
    tensor.param = params[i].mutable_data_ptr();
    tensor.grad = grads[i].has_value() ? grads[i]->const_data_ptr() : nullptr;
    tensor.group = int32_t(groups[i]);
    tensor.dtype = dtype_code(params[i].scalar_type());
    tensor.layout = int16_t(layouts[i]);
    tensor.numel = params[i].numel();
    eight_bit = eight_bit || (layouts[i] & kEightBitState);
  }
  for (size_t i = 0; i < memory.size(); ++i) {
    writer.fresh().slabs[i] = static_cast<uint8_t*>(memory[i].mutable_data_ptr());
  }
  AdamWLaunch launch;
  launch.pages = static_cast<const AdamWPage*>(pages.const_data_ptr());
  launch.hot_pages = pages.size(0) - cold_pages;
  launch.cold_pages = cold_pages;
  launch.tensors = count;
  launch.multiplier = multiplier ? static_cast<const float*>(multiplier->const_data_ptr()) : nullptr;
  launch.skip = skip ? static_cast<const float*>(skip->const_data_ptr()) : nullptr;
  launch.steps = static_cast<float*>(steps.mutable_data_ptr());
  launch.seed = uint32_t(seed);
  launch.eight_bit = eight_bit;
  const cudaStream_t stream = current_stream(device);
  const AdamWTable on_device = writer.upload(op, stream);
  check_launch(op, adamw_step(launch, on_device, stream));
}

Tensor gradient_norm_cuda(OptionalTensorList grads, const Tensor& pages, TensorList table) {
  const char* op = "gradient_norm";
  check_gradients(op, grads);
  const int32_t device = pages.get_device_index();
  const DeviceGuard guard(device);
  TableWriter writer(op, table, 0, int64_t(grads.size()), 0);
  for (size_t i = 0; i < grads.size(); ++i) {
    AdamWTensor& tensor = writer.fresh().tensors[i];
    if (!grads[i].has_value()) continue;
    STD_TORCH_CHECK(grads[i]->is_contiguous(), "gradient_norm: a gradient is not contiguous; pass views that are");
    STD_TORCH_CHECK(same_device(*grads[i], pages), op, ": a gradient is on another device than pages");
    tensor.grad = grads[i]->const_data_ptr();
    tensor.dtype = dtype_code(grads[i]->scalar_type());
    tensor.numel = grads[i]->numel();
  }
  Tensor norm = torch::stable::new_empty(pages, {}, ScalarType::Float);
  const cudaStream_t stream = current_stream(device);
  const AdamWTable on_device = writer.upload(op, stream);
  check_launch(op, gradient_norm(on_device, int64_t(grads.size()), static_cast<float*>(norm.mutable_data_ptr()),
                                 stream));
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qlora_engine, CUDA, m) {
  m.impl("adamw_step", TORCH_BOX(&adamw_step_cuda));
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm_cuda));
}

}  // namespace qlora_engine::cuda
