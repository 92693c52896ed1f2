// From the arguments of dot-product attention to the structs that its kernels take.
#pragma once

#include "attention/dot_product.h"
#include "attention/dot_product_inputs.h"

namespace lect11ext::attention_op {

// Tensors that a struct borrows from; they live as long as it does.
class Describer {
 public:
  Describer(const Inputs& in, Attention& args);

  // Tensors of the query's type, with dense columns: copied where they have not.
  AttentionOperand operand(const Tensor& tensor);
  AttentionOperand operand(const OptionalTensor& tensor);
  AttentionMask mask(const OptionalTensor& tensor);
  // [batch, heads, queries] of the type of the sums.
  const void* dense(const OptionalTensor& tensor);

  // What derivatives are given beside the inputs.
  void saved(const Tensor& output, const Tensor& lse, AttentionSaved& args);
  void gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, AttentionBackward& args);
  template <class Args>
  void tangents(const Tangents& t, Args& args) {
    args.query_t = operand(t.query);
    args.key_t = operand(t.key);
    args.value_t = operand(t.value);
    args.mask_t = mask(t.attn_mask);
  }
  void directions(const Directions& along, AttentionBackwardTangent& args);

 private:
  Tensor& keep(Tensor tensor);

  c10::SmallVector<Tensor, 16> kept_;
};

AttentionStrides strides_of(const Tensor& tensor);

// What a forward gives, uninitialised.
Tensor empty_output(const Inputs& in);
Tensor empty_lse(const Inputs& in);
// A gradient, with the strides of what it is the gradient of where those are dense and their columns innermost.
Tensor empty_gradient(const Tensor& like);

// The struct of a backward, with its outputs.
struct GradientTensors {
  Gradients grads;
  Tensor mask;  // of mask_type

  GradientTensors(const Inputs& in, GradientMask wanted, AttentionBackward& args, at::ScalarType mask_type);
  Gradients finish(const Inputs& in) const;
};

}  // namespace lect11ext::attention_op
