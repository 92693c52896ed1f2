// The kernels of sm_90a: the plain case of dot-product attention with 16-bit types, which is what large models train
// with. Whatever they do not take, the kernels for all devices do (dot_product_forward.cuh,
// dot_product_derivative.cuh).
#pragma once

#include "attention/dot_product.h"

namespace lect11ext::cuda {

// True where they have done the work; false: nothing was started.
bool hopper_forward(const AttentionForward& args, void* stream);

// Gradients of query, key and value, from D of every query: float [batch, heads, queries].
bool hopper_backward(const AttentionBackward& args, const float* correction, void* stream);

}  // namespace lect11ext::cuda
