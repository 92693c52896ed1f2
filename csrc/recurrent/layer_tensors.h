// From a layer's tensors to the structs of layer.h, for every device.
#pragma once

#include "recurrent/cell_common.h"
#include "recurrent/layer.h"
#include "recurrent/layer_inputs.h"

namespace lect11ext::layer_op {

inline const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// Strides of time and rows, wherever the input has them.
TimeStrides strides_of(const Inputs& in, const Tensor& t);

// What forward and backward are given alike, with the tensors that their pointers borrow from.
struct Common {
  recurrent::Rows hh;
  Tensor h, c, peephole, norm, hidden_mask, lengths, reset, zoneout_h, zoneout_c;

  explicit Common(const Inputs& in);
  void describe(const Inputs& in, LayerCommon& args) const;
};

// What a forward is to write, described in `args`, whose sizes are known.
Outputs empty_outputs(const Inputs& in, bool save, LayerOutputs& args);

// What differs from device to device: a forward, and the recurrence of its backward.
struct Device {
  Outputs (*forward)(const Inputs& in, bool save);
  void (*run_backward)(const LayerGradients& args, const at::TensorOptions& options);
};

// The ops' kernels.
Outputs cpu_forward(const Inputs& in, bool save);
Gradients cpu_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask);
Outputs cuda_forward(const Inputs& in, bool save);
Gradients cuda_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask);

// A backward that is the same on all devices but for what `device` does.
Gradients fused_backward(const Device& device, const OutputGradients& grads, const Inputs& in, const Outputs& kept,
                         const Mask& mask);

}  // namespace lect11ext::layer_op
