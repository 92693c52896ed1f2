// Derivatives of penalized_activation: its definition in differentiable ATen, the Node, and autocast.
#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sgn.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autoencoder/partial_sums.h"
#include "autoencoder/penalties_inputs.h"
#include "common/autograd.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace penalties;

// --- the definition in differentiable ATen ------------------------------------------------------------------------

// φ, φ' and φ''; a slope of Tensor() is one, a curvature of Tensor() zero.
struct Terms {
  Tensor value, slope, curvature;
};

Terms terms_of(const Inputs& in) {
  const Tensor a = in.input.to(in.compute_dtype());
  switch (in.activation) {
    case Activation::Identity: return {a, Tensor(), Tensor()};
    case Activation::Relu: return {at::relu(a), (a <= 0).logical_not().to(a.scalar_type()), Tensor()};
    case Activation::Sigmoid: {
      // σ(−a) for 1 − σ(a), which has no digits where σ is saturated.
      const Tensor s = at::sigmoid(a), other = at::sigmoid(-a), slope = s * other;
      return {s, slope, slope * (other - s)};
    }
    case Activation::Softplus: {
      constexpr double kThreshold = 40;  // beyond it log(1 + e^a) is a, in float64 too
      // For the derivatives of σ too: at::sigmoid's own, σ(1 − σ), has no digits where σ is saturated.
      const Tensor other = at::sigmoid(-a), s = at::where(a > 0, 1 - other, at::sigmoid(a));
      return {at::softplus(a, 1, kThreshold), s, s * other};
    }
    case Activation::Tanh: {
      const Tensor t = at::tanh(a), slope = at::sigmoid(a * 2) * at::sigmoid(a * -2) * 4;
      return {t, slope, t * slope * -2};
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor times(const Tensor& grad, const Terms& t, const Inputs& in) {
  if (!t.slope.defined()) return grad;
  // By selection for relu, as the kernels have it.
  if (in.activation == Activation::Relu) return at::where(t.slope > 0, grad, at::zeros_like(grad));
  return grad * t.slope;
}

Tensor summand_of(const Terms& t, const Inputs& in) {
  if (in.penalty == Penalty::L1) return at::abs(t.value);
  if (in.penalty == Penalty::Mean) return t.value;
  return t.slope.defined() ? t.slope * t.slope : at::ones_like(t.value);
}

Tensor scale_of(const Inputs& in) { return in.scale->to(in.compute_dtype()); }

Pair composite_forward(const Inputs& in) {
  const Terms t = terms_of(in);
  Tensor sums = summand_of(t, in);
  if (in.penalty == Penalty::Mean) {
    sums = sum_broadcast(sums, {in.cols()}) / at::Scalar(in.rows());
  } else {
    if (in.is_scaled()) sums = sums * scale_of(in);
    sums = sums.sum(-1);
  }
  return {t.value.to(in.input.scalar_type()), sums};
}

Pair composite_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_penalty, const Inputs& in,
                        std::array<bool, 2> mask) {
  const Terms t = terms_of(in);
  Tensor grad_input, grad_scale;
  const auto add = [](const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; };
  if (autograd::defined(grad_output)) grad_input = times(grad_output->to(in.compute_dtype()), t, in);
  if (autograd::defined(grad_penalty)) {
    Tensor w = in.expand_grad(grad_penalty->to(in.compute_dtype()));
    if (in.penalty == Penalty::Mean) w = w / at::Scalar(in.rows());
    if (mask[1] && in.is_scaled()) {
      grad_scale = sum_broadcast(w * summand_of(t, in), {in.cols()}).to(in.scale->scalar_type());
    }
    if (in.is_scaled()) w = w * scale_of(in);
    if (in.penalty == Penalty::Contractive) {
      if (t.curvature.defined()) grad_input = add(grad_input, w * t.slope * t.curvature * 2);
    } else {
      if (in.penalty == Penalty::L1) w = w * at::sgn(t.value.detach());
      grad_input = add(grad_input, times(w, t, in));
    }
  }
  const auto finish = [](bool wanted, const Tensor& grad, const Tensor& like) {
    if (!wanted) return Tensor();
    return grad.defined() ? grad.to(like.scalar_type()) : at::zeros_like(like);
  };
  return {finish(mask[0], grad_input, in.input), in.is_scaled() ? finish(mask[1], grad_scale, *in.scale) : Tensor()};
}

// --- autograd -----------------------------------------------------------------------------------------------------

Pair call_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_penalty, PENALTY_PARAMETERS,
                   std::array<bool, 2> mask) {
  static const auto op = find_op<BackwardSignature>("lect11ext::penalized_activation_backward");
  return op.call(grad_output, grad_penalty, PENALTY_ARGUMENTS, mask);
}

struct PenaltyNode : autograd::Node {
  autograd::SavedVariable input_, scale_;
  std::string activation_, penalty_;

  std::string name() const override { return "PenalizedActivationBackward"; }

  void release_variables() override {
    input_.reset_data();
    scale_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    const std::array<bool, 2> mask{task_should_compute_output(0), task_should_compute_output(1)};
    if (!grads[0].defined() && !grads[1].defined()) return autograd::variable_list(mask.size());
    const auto [input, scale] =
        call_backward(autograd::optional_of(grads[0]), autograd::optional_of(grads[1]), input_.unpack(),
                      autograd::optional_of(scale_.unpack()), activation_, penalty_, mask);
    return {input, scale};
  }
};

Pair autograd_forward(PENALTY_PARAMETERS) {
  Pair out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_forward(PENALTY_ARGUMENTS);
  }
  const auto& [output, sums] = out;
  if (autograd::needs_grad(input, scale)) {
    auto node = autograd::make_node<PenaltyNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, scale));
    node->input_ = autograd::SavedVariable(input, false);
    node->scale_ = autograd::SavedVariable(scale, false);
    node->activation_ = std::string(activation);
    node->penalty_ = std::string(penalty);
    torch::autograd::set_history(output, node);
    torch::autograd::set_history(sums, node);
  }
  if (autograd::has_tangent(input, scale)) {
    const auto [composite_output, composite_sums] = composite_forward(PENALTY_INPUTS);
    autograd::copy_tangent(output, composite_output);
    autograd::copy_tangent(sums, composite_sums);
  }
  return out;
}

Pair autograd_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_penalty, PENALTY_PARAMETERS,
                       std::array<bool, 2> mask) {
  if (autograd::needs_grad(grad_output, grad_penalty, input, scale) ||
      autograd::has_tangent(grad_output, grad_penalty, input, scale)) {
    return composite_backward(grad_output, grad_penalty, PENALTY_INPUTS, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_output, grad_penalty, PENALTY_ARGUMENTS, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("penalized_activation", autograd_forward);
  m.impl("penalized_activation_backward", autograd_backward);
}

// Autocast changes no type here: the arithmetic is in float32 or better whatever comes in.
static void keep_types(torch::Library& m) {
  fall_through(m, {"penalized_activation", "penalized_activation_backward"});
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) { keep_types(m); }
TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) { keep_types(m); }

}  // namespace lect11ext
