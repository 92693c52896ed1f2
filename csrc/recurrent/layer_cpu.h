// The CPU's implementations of the layers' ops, from tensors to the kernels of layer.h.
#pragma once

#include "recurrent/layer_inputs.h"

namespace lect11ext::layer_op {

Outputs cpu_forward(const Inputs& in, bool save);
Gradients cpu_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask);

}  // namespace lect11ext::layer_op
