// The weights of dot-product attention and their backward as ops: schemas, checks, shapes. Equations:
// dot_product_weights.h; derivatives: dot_product_weights_autograd.cpp.
#include "attention/dot_product_weights.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention/dot_product_describe.h"
#include "attention/dot_product_weights_inputs.h"
#include "common/ops.h"
#include "common/tensors.h"

namespace lect11ext {
namespace attention_op {

void WeightsInputs::check() const {
  in.check();
  in.check_lse_like("lse", lse);
}

void WeightsInputs::check_gradient(const Tensor& grad) const {
  check_same_device({{"query", &in.query}, {"grad", &grad}});
  TORCH_CHECK_TYPE(grad.scalar_type() == in.query.scalar_type(), "grad must have the type of query, ",
                   in.query.scalar_type(), ", but got ", grad.scalar_type());
  const auto expected = shape();
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(expected), "grad must have the weights' shape, ",
                    c10::SymIntArrayRef(expected), ", but got ", grad.sym_sizes());
}

c10::SymDimVector WeightsInputs::shape() const {
  if (average) return {in.batch(), in.queries(), in.keys()};
  return {in.batch(), in.heads(), in.queries(), in.keys()};
}

Tensor call_weights(const WeightsInputs& w) {
  static const auto op = find_op<WeightsSignature>("lect11ext::attention_weights");
  return op.call(ATTENTION_WEIGHTS_ARGUMENTS_OF(w));
}

Gradients call_weights_backward(const Tensor& grad, const WeightsInputs& w, GradientMask mask) {
  static const auto op = find_op<WeightsBackwardSignature>("lect11ext::attention_weights_backward");
  return op.call(grad, ATTENTION_WEIGHTS_ARGUMENTS_OF(w), mask);
}

}  // namespace attention_op

namespace {

using namespace attention_op;

const OptionalTensor kNone;

template <Tensor (*kernel)(const WeightsInputs&)>
Tensor weights(ATTENTION_WEIGHTS_PARAMETERS) {
  const WeightsInputs w = ATTENTION_WEIGHTS_INPUTS(kNone);
  w.check();
  return kernel(w);
}

template <Gradients (*kernel)(const Tensor&, const WeightsInputs&, GradientMask)>
Gradients weights_backward(const Tensor& grad, ATTENTION_WEIGHTS_PARAMETERS, GradientMask mask) {
  const WeightsInputs w = ATTENTION_WEIGHTS_INPUTS(kNone);
  w.check();
  w.check_gradient(grad);
  return kernel(grad, w, mask);
}

Tensor meta_weights(ATTENTION_WEIGHTS_PARAMETERS) {
  const WeightsInputs w = ATTENTION_WEIGHTS_INPUTS(kNone);
  w.check();
  return at::empty_symint(w.shape(), query.options());
}

Gradients meta_weights_backward(const Tensor& grad, ATTENTION_WEIGHTS_PARAMETERS, GradientMask mask) {
  const WeightsInputs w = ATTENTION_WEIGHTS_INPUTS(kNone);
  w.check();
  w.check_gradient(grad);
  Gradients result;
  if (mask[0]) std::get<0>(result) = empty_gradient(query);
  if (mask[1]) std::get<1>(result) = empty_gradient(key);
  if (mask[2]) std::get<2>(result) = empty_lse(w.in);
  if (mask[3] && w.in.has_float_mask()) {
    std::get<3>(result) = at::empty_symint(attn_mask->sym_sizes(), attn_mask->options());
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("attention_weights(" ATTENTION_WEIGHTS_SCHEMA ") -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("attention_weights_backward(Tensor grad, " ATTENTION_WEIGHTS_SCHEMA
        ", bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("attention_weights", weights<on_cpu::weights>);
  m.impl("attention_weights_backward", weights_backward<on_cpu::weights_backward>);
}

#ifdef LECT11EXT_WITH_CUDA
// For who calls the op itself: lect11ext.functional has weights in parts there, which hold no more than a part.
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("attention_weights", weights<composite_weights>);
  m.impl("attention_weights_backward", weights_backward<composite_weights_backward>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("attention_weights", meta_weights);
  m.impl("attention_weights_backward", meta_weights_backward);
}

}  // namespace lect11ext
