// The four ops of dot-product attention on each device, from checked tensors to kernels.
#pragma once

#include "attention/dot_product_inputs.h"

#define LECT11EXT_ATTENTION_DEVICE(device)                                                                        \
  namespace device {                                                                                              \
  Outputs forward(const Inputs& in);                                                                              \
  Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,         \
                     const Tensor& output, const Tensor& lse, GradientMask mask);                                 \
  Outputs tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Tangents& tangents);           \
  Gradients backward_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Directions& along,  \
                             GradientMask mask);                                                                  \
  }

namespace lect11ext::attention_op {

LECT11EXT_ATTENTION_DEVICE(on_cpu)
LECT11EXT_ATTENTION_DEVICE(on_cuda)

Tensor dropout_mask_cpu(const Tensor& key, c10::SymIntArrayRef size, double p);
Tensor dropout_mask_cuda(const Tensor& key, c10::SymIntArrayRef size, double p);

}  // namespace lect11ext::attention_op
