// Derivatives of reconstruction_loss: its definition in differentiable ATen, the Node, and autocast.
#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sgn.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <iterator>

#include "autoencoder/partial_sums.h"
#include "autoencoder/reconstruction_inputs.h"
#include "common/autograd.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace reconstruction;

// --- the definition in differentiable ATen ------------------------------------------------------------------------

// log(sinh(u) / u) and its derivative. Where u is small, by their series, elsewhere less |u| and 1, as the kernels have
// them; each branch gets an argument at which its own derivatives are finite, of any order.
struct LogSinhc {
  Tensor value, slope, is_small;
};

LogSinhc log_sinhc(const Tensor& u) {
  constexpr double kSmall = 0.5;
  const Tensor is_small = at::abs(u) < kSmall;
  const Tensor near = at::where(is_small, u, at::zeros_like(u)), far = at::where(is_small, at::ones_like(u), u);
  const Tensor z = near * near;
  Tensor value = at::zeros_like(u), slope = value;
  for (int k = std::size(kLogSinhcSeries); k > 0; --k) {
    value = value * z + kLogSinhcSeries[k - 1];
    slope = slope * z + 2 * k * kLogSinhcSeries[k - 1];
  }
  const Tensor y = at::abs(far), e = at::exp(y * -2);
  return {at::where(is_small, value * z, at::log((1 - e) / (y * 2))),
          at::where(is_small, slope * near, at::sgn(far) * e * 2 / (1 - e) - 1 / far), is_small};
}

// Of each element: the loss and its derivatives by input and logvar. That by target is minus the input, or minus that
// by the input.
struct Terms {
  Tensor loss, d_input, d_target, d_logvar;
};

// The operands as they are computed with.
struct Operands {
  Tensor x, t, v;  // input, target, and the logvar if there is one

  explicit Operands(const Inputs& in)
      : x(in.input.to(in.compute_dtype())),
        t(in.target.to(in.compute_dtype())),
        v(in.has_logvar() ? in.logvar->to(in.compute_dtype()) : Tensor()) {}

  template <class F>
  Operands map(F f) const {
    Operands result = *this;
    for (Tensor* tensor : {&result.x, &result.t, &result.v}) {
      if (tensor->defined()) *tensor = f(*tensor);
    }
    return result;
  }
};

Terms terms_of(const Operands& of, const Inputs& in) {
  const auto& [x, t, v] = of;
  switch (in.likelihood) {
    case Likelihood::Bernoulli: {
      // From the side on which the exponential is small, so that a confident logit's digits stay in every derivative.
      const Tensor positive = x > 0, other = 1 - t;
      return {at::where(positive, at::softplus(-x) + x * other, at::softplus(x) - x * t),
              at::where(positive, other - at::sigmoid(-x), at::sigmoid(x) - t), -x, Tensor()};
    }
    case Likelihood::ContinuousBernoulli: {
      const LogSinhc f = log_sinhc(x * 0.5);
      const Tensor limit = at::where(f.is_small, at::full_like(x, 0.5), (x > 0).to(x.scalar_type())) - t;
      return {x * limit + f.value, limit + f.slope * 0.5, -x, Tensor()};
    }
    case Likelihood::Gaussian: {
      const double constant = 0.5 * std::log(2 * M_PI);
      const Tensor d = x - t;
      if (!in.has_logvar()) return {d * d * 0.5 + constant, d, -d, Tensor()};
      const Tensor root = finite_exp(v * -0.5), scaled = d * root, square = scaled * scaled;
      return {(square + v) * 0.5 + constant, scaled * root, -scaled * root, (1 - square) * 0.5};
    }
    case Likelihood::SquaredError: {
      const Tensor d = x - t;
      return {d * d, d * 2, d * -2, Tensor()};
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

// Where the weight is zero an element has a loss, which is the weight's gradient, and all else of it is zero, of any
// order, whatever the operands are: zeros stand for them, since what is merely not selected is multiplied by zero
// later.
Terms terms_of(const Inputs& in, bool wants_loss) {
  const Operands of(in);
  if (!in.has_weight()) return terms_of(of, in);
  const Tensor barred = *in.weight == 0;
  Terms terms = terms_of(of.map([&](const Tensor& x) { return at::where(barred, at::zeros_like(x), x); }), in);
  if (wants_loss) {
    const Tensor loss = terms_of(of.map([](const Tensor& x) { return x.detach(); }), in).loss;
    terms.loss = at::where(barred, loss, terms.loss);
  }
  return terms;
}

// By selection where the weight is zero, as the kernels have it.
Tensor weighted(const Tensor& value, const Inputs& in) {
  if (!in.has_weight()) return value;
  const Tensor w = in.weight->to(in.compute_dtype()), product = w * value;
  return at::where(w == 0, at::zeros_like(product), product);
}

// Only for tangents, which a weight of zero has too.
Tensor composite_forward(const Inputs& in) {
  Tensor loss = terms_of(in, true).loss;
  if (in.has_weight()) loss = in.weight->to(in.compute_dtype()) * loss;
  if (in.reduction == Reduction::None) return loss;
  if (in.reduction == Reduction::Rows) return loss.sum(-1);
  return in.reduction == Reduction::Sum ? loss.sum() : loss.sum() / at::Scalar(batch_of(in.input));
}

Gradients composite_backward(const Tensor& grad, const Inputs& in, std::array<bool, 4> mask) {
  const Terms t = terms_of(in, mask[3]);
  Tensor g = expand_reduced(grad.to(in.compute_dtype()), in.input.sym_sizes(), in.reduction);
  if (in.reduction == Reduction::BatchMean) g = g / at::Scalar(batch_of(in.input));
  const auto finish = [&](bool wanted, const Tensor& value, const Tensor& like) {
    return wanted ? sum_broadcast(value, like.sym_sizes()).to(like.scalar_type()) : Tensor();
  };
  return {finish(mask[0], weighted(g * t.d_input, in), in.input),
          finish(mask[1], weighted(g * t.d_target, in), in.target),
          in.has_logvar() ? finish(mask[2], weighted(g * t.d_logvar, in), *in.logvar) : Tensor(),
          in.has_weight() ? finish(mask[3], g * t.loss, *in.weight) : Tensor()};
}

// --- autograd -----------------------------------------------------------------------------------------------------

Gradients call_backward(const Tensor& grad, RECONSTRUCTION_PARAMETERS, std::array<bool, 4> mask) {
  static const auto op = find_op<BackwardSignature>("lect11ext::reconstruction_loss_backward");
  return op.call(grad, RECONSTRUCTION_ARGUMENTS, mask);
}

struct ReconstructionNode : autograd::Node {
  autograd::SavedVariable input_, target_, logvar_, weight_;
  std::string likelihood_, reduction_;

  std::string name() const override { return "ReconstructionLossBackward"; }

  void release_variables() override {
    for (auto* saved : {&input_, &target_, &logvar_, &weight_}) saved->reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    std::array<bool, 4> mask{};
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(i);
    if (!grads[0].defined()) return autograd::variable_list(mask.size());
    const auto [input, target, logvar, weight] =
        call_backward(grads[0], input_.unpack(), target_.unpack(), autograd::optional_of(logvar_.unpack()),
                      autograd::optional_of(weight_.unpack()), likelihood_, reduction_, mask);
    return {input, target, logvar, weight};
  }
};

Tensor autograd_forward(RECONSTRUCTION_PARAMETERS) {
  Tensor loss;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    loss = call_forward(RECONSTRUCTION_ARGUMENTS);
  }
  if (autograd::needs_grad(input, target, logvar, weight)) {
    auto node = autograd::make_node<ReconstructionNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, target, logvar, weight));
    node->input_ = autograd::SavedVariable(input, false);
    node->target_ = autograd::SavedVariable(target, false);
    node->logvar_ = autograd::SavedVariable(logvar, false);
    node->weight_ = autograd::SavedVariable(weight, false);
    node->likelihood_ = std::string(likelihood);
    node->reduction_ = std::string(reduction);
    torch::autograd::set_history(loss, node);
  }
  if (autograd::has_tangent(input, target, logvar, weight)) {
    autograd::copy_tangent(loss, composite_forward(RECONSTRUCTION_INPUTS));
  }
  return loss;
}

Gradients autograd_backward(const Tensor& grad, RECONSTRUCTION_PARAMETERS, std::array<bool, 4> mask) {
  if (autograd::needs_grad(grad, input, target, logvar, weight) ||
      autograd::has_tangent(grad, input, target, logvar, weight)) {
    return composite_backward(grad, RECONSTRUCTION_INPUTS, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad, RECONSTRUCTION_ARGUMENTS, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("reconstruction_loss", autograd_forward);
  m.impl("reconstruction_loss_backward", autograd_backward);
}

// Autocast changes no type here: the arithmetic is in float32 or better whatever comes in.
static void keep_types(torch::Library& m) { fall_through(m, {"reconstruction_loss", "reconstruction_loss_backward"}); }

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) { keep_types(m); }
TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) { keep_types(m); }

}  // namespace lect11ext
