// Derivatives of gaussian_rsample_kl: its definition in differentiable ATen, the Node, and autocast.
#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autoencoder/partial_sums.h"
#include "autoencoder/variational.h"
#include "autoencoder/variational_inputs.h"
#include "autoencoder/variational_ops.h"
#include "common/autograd.h"
#include "common/ops.h"
#include "common/random_ops.h"
namespace lect11ext {
namespace {

using namespace gaussian;

// --- the definition in differentiable ATen: tangents, derivatives of the backward ---------------------------------

struct Terms {
  Tensor mean, logvar, root;    // in the type of the arithmetic; logvar clamped; e^(logvar/2)
  Tensor u, precision_root, d;  // mean − prior_mean, e^(−prior_logvar/2), logvar − prior_logvar
  Tensor scaled;                // u · precision_root
  Tensor kl;                    // per element, before free bits
};

// `clamped`, with a slope of one where it equals x and of zero elsewhere. at::clamp's slope at its bounds was one up to
// torch 2.13 and is zero since; types of few bits often lie on a bound.
Tensor inside_or(const Tensor& x, const Tensor& clamped) { return at::where(x == clamped, x, clamped.detach()); }

// e^d − 1 − d, by its series where that is a difference of nearly equal numbers, and its derivative another.
Tensor exponential_remainder(const Tensor& d) {
  const Tensor is_small = at::abs(d) < kSmallRemainder, near = at::where(is_small, d, at::zeros_like(d));
  Tensor series = at::ones_like(d);
  for (int k = kRemainderTerms; k > 2; --k) series = series * near / k + 1;
  return at::where(is_small, series * near * near * 0.5, at::expm1(d) - d);
}

Terms composite_terms(const Inputs& in) {
  const auto type = in.compute_dtype();
  Terms t;
  t.mean = in.mean.to(type);
  t.logvar = in.logvar.to(type);
  if (in.clamps()) {
    const auto bound = [](std::optional<double> b) { return b ? std::optional<at::Scalar>(*b) : std::nullopt; };
    t.logvar = inside_or(t.logvar, at::clamp(t.logvar, bound(in.logvar_min), bound(in.logvar_max)));
  }
  t.root = at::exp(t.logvar * 0.5);
  t.u = t.mean;
  t.d = t.logvar;
  t.scaled = t.u;
  if (in.has_prior()) {
    const Tensor prior_logvar = in.prior_logvar->to(type);
    t.u = t.mean - in.prior_mean->to(type);
    t.d = t.logvar - prior_logvar;
    t.precision_root = finite_exp(prior_logvar * -0.5);
    t.scaled = t.u * t.precision_root;
  }
  t.kl = (t.scaled * t.scaled + exponential_remainder(t.d)) * 0.5;
  return t;
}

Tensor composite_noise(const Inputs& in) { return philox_normal(in.key, in.z_size(), in.compute_dtype()); }

std::tuple<Tensor, Tensor> composite_forward(const Inputs& in) {
  const Terms t = composite_terms(in);
  const Tensor z = (t.mean + t.root * composite_noise(in)).to(in.z_dtype());
  Tensor kl = in.free_bits > 0 ? inside_or(t.kl, at::clamp(t.kl, in.free_bits)) : t.kl;
  if (in.reduction == Reduction::Rows) kl = kl.sum(-1);
  if (in.reduction == Reduction::Sum || in.reduction == Reduction::BatchMean) kl = kl.sum();
  if (in.reduction == Reduction::BatchMean) kl = kl / at::Scalar(batch_of(in.mean));
  return {z, kl};
}

Gradients composite_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Inputs& in,
                             std::array<bool, 4> mask) {
  const auto type = in.compute_dtype();
  const Terms t = composite_terms(in);
  Tensor mean, logvar, prior_mean, prior_logvar;
  const auto add = [](const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; };
  if (autograd::defined(grad_z)) {
    const Tensor g = grad_z->to(type), noisy = g * composite_noise(in);
    const bool many = in.num_samples.has_value();
    mean = many ? g.sum(0) : g;
    logvar = t.root * (many ? noisy.sum(0) : noisy) * 0.5;
  }
  if (autograd::defined(grad_kl)) {
    Tensor w = expand_grad_kl(grad_kl->to(type), in);
    if (in.reduction == Reduction::BatchMean) w = w / at::Scalar(batch_of(in.mean));
    // By selection, as torch.clamp has it: a product with zero would be NaN where a factor is infinite.
    const auto active = [&](const Tensor& grad) {
      return in.free_bits > 0 ? at::where(t.kl >= in.free_bits, grad, at::zeros_like(grad)) : grad;
    };
    const Tensor d_mean = active(in.has_prior() ? w * t.scaled * t.precision_root : w * t.u);
    const Tensor d_logvar = active(w * at::expm1(t.d) * 0.5);
    mean = add(mean, d_mean);
    logvar = add(logvar, d_logvar);
    if (in.has_prior()) {
      prior_mean = -d_mean;
      prior_logvar = -(d_logvar + active(w * t.scaled * t.scaled * 0.5));
    }
  }
  if (in.clamps() && logvar.defined()) {
    logvar = at::where(in.logvar.to(type) == t.logvar, logvar, at::zeros_like(logvar));
  }
  const auto finish = [](bool wanted, const Tensor& grad, const Tensor& like) {
    if (!wanted) return Tensor();
    return grad.defined() ? sum_broadcast(grad, like.sym_sizes()).to(like.scalar_type()) : at::zeros_like(like);
  };
  return {finish(mask[0], mean, in.mean), finish(mask[1], logvar, in.logvar),
          in.has_prior() ? finish(mask[2], prior_mean, *in.prior_mean) : Tensor(),
          in.has_prior() ? finish(mask[3], prior_logvar, *in.prior_logvar) : Tensor()};
}

// --- autograd ---------------------------------------------------------------------------------------------------

Gradients call_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, GAUSSIAN_PARAMETERS,
                        std::array<bool, 4> mask) {
  static const auto op = find_op<BackwardSignature>("lect11ext::gaussian_rsample_kl_backward");
  return op.call(grad_z, grad_kl, GAUSSIAN_ARGUMENTS, mask);
}

struct GaussianNode : autograd::Node {
  autograd::SavedVariable mean_, logvar_, prior_mean_, prior_logvar_, key_;
  std::optional<c10::SymInt> num_samples_;
  double free_bits_ = 0;
  std::optional<double> logvar_min_, logvar_max_;
  std::string reduction_;

  std::string name() const override { return "GaussianRsampleKlBackward"; }

  void release_variables() override {
    for (auto* saved : {&mean_, &logvar_, &prior_mean_, &prior_logvar_, &key_}) saved->reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    std::array<bool, 4> mask{};
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(i);
    if (!grads[0].defined() && !grads[1].defined()) return autograd::variable_list(mask.size());
    const auto [mean, logvar, prior_mean, prior_logvar] = call_backward(
        autograd::optional_of(grads[0]), autograd::optional_of(grads[1]), mean_.unpack(), logvar_.unpack(),
        autograd::optional_of(prior_mean_.unpack()), autograd::optional_of(prior_logvar_.unpack()), key_.unpack(),
        num_samples_, free_bits_, logvar_min_, logvar_max_, reduction_, mask);
    return {mean, logvar, prior_mean, prior_logvar};
  }
};

std::tuple<Tensor, Tensor> autograd_forward(GAUSSIAN_PARAMETERS) {
  std::tuple<Tensor, Tensor> out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = gaussian_rsample_kl(GAUSSIAN_ARGUMENTS);
  }
  const auto& [z, kl] = out;
  if (autograd::needs_grad(mean, logvar, prior_mean, prior_logvar)) {
    auto node = autograd::make_node<GaussianNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(mean, logvar, prior_mean, prior_logvar));
    node->mean_ = autograd::SavedVariable(mean, false);
    node->logvar_ = autograd::SavedVariable(logvar, false);
    node->prior_mean_ = autograd::SavedVariable(prior_mean, false);
    node->prior_logvar_ = autograd::SavedVariable(prior_logvar, false);
    node->key_ = autograd::SavedVariable(key, false);
    node->num_samples_ = num_samples;
    node->free_bits_ = free_bits;
    node->logvar_min_ = logvar_min;
    node->logvar_max_ = logvar_max;
    node->reduction_ = std::string(reduction);
    torch::autograd::set_history(z, node);
    torch::autograd::set_history(kl, node);
  }
  if (autograd::has_tangent(mean, logvar, prior_mean, prior_logvar)) {
    const auto [composite_z, composite_kl] = composite_forward(GAUSSIAN_INPUTS);
    autograd::copy_tangent(z, composite_z);
    autograd::copy_tangent(kl, composite_kl);
  }
  return out;
}

Gradients autograd_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, GAUSSIAN_PARAMETERS,
                            std::array<bool, 4> mask) {
  if (autograd::needs_grad(grad_z, grad_kl, mean, logvar, prior_mean, prior_logvar) ||
      autograd::has_tangent(grad_z, grad_kl, mean, logvar, prior_mean, prior_logvar)) {
    return composite_backward(grad_z, grad_kl, GAUSSIAN_INPUTS, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_z, grad_kl, GAUSSIAN_ARGUMENTS, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("gaussian_rsample_kl", autograd_forward);
  m.impl("gaussian_rsample_kl_backward", autograd_backward);
}

// Autocast changes no type here: the arithmetic is in float32 or better whatever comes in.
static void keep_types(torch::Library& m) { fall_through(m, {"gaussian_rsample_kl", "gaussian_rsample_kl_backward"}); }

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) { keep_types(m); }
TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) { keep_types(m); }

}  // namespace lect11ext
