// The kernels of sm_90a: dot-product attention with 16-bit types, as large models train with it. Whatever they do not
// take, the kernels for all devices do (dot_product_forward.cuh, dot_product_derivative.cuh).
#pragma once

#include "attention/dot_product.h"

namespace lect11ext::cuda {

// What has been started: nothing; all of the work; or all of it as if what a mask bars were finite, and *flag says on
// the device whether it is not, so that it is to be done once more (dot_product_finite.cuh).
struct HopperRun {
  bool started;
  const int* flag;  // at the beginning of scratch; null without a mask
};

// With so many bytes of scratch.
int64_t hopper_scratch(const AttentionForward& args);
HopperRun hopper_forward(const AttentionForward& args, void* scratch, void* stream);

// Gradients of query, key and value.
int64_t hopper_scratch(const AttentionBackward& args);
HopperRun hopper_backward(const AttentionBackward& args, void* scratch, void* stream);

}  // namespace lect11ext::cuda
