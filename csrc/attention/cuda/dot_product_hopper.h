// The kernels of sm_90a: the plain case of dot-product attention with 16-bit types, which is what large models train
// with. Whatever they do not take, the kernels for all devices do (dot_product_forward.cuh,
// dot_product_derivative.cuh).
#pragma once

#include "attention/dot_product.h"

namespace lect11ext::cuda {

// True where they have done the work; false: nothing was started.
bool hopper_forward(const AttentionForward& args, void* stream);

// Gradients of query, key and value, with so many bytes of scratch.
int64_t hopper_scratch(const AttentionBackward& args);
bool hopper_backward(const AttentionBackward& args, void* scratch, void* stream);

}  // namespace lect11ext::cuda
