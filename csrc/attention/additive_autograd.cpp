// Derivatives of additive_attention: its definition in differentiable ATen, the Node, and autocast.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>

#include "attention/additive_inputs.h"
#include "attention/additive_ops.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace additive_op;

// --- the definition in differentiable ATen: tangents, derivatives of the backward ---------------------------------

// It holds [..., L, S, H], as plain torch does.
struct Terms {
  Tensor weight, value;  // in the type of the arithmetic; rows of values that no query may attend to are zero
  Tensor tanh, attention;
  Tensor sees;  // [..., L, 1], whether a query may attend to any key; undefined without a mask
};

Tensor or_zero(const Tensor& condition, const Tensor& x) { return at::where(condition, x, at::zeros_like(x)); }

Terms composite_terms(const Inputs& in) {
  const auto type = in.compute_dtype();
  Terms t{in.score_weight.to(type), in.value.to(type), {}, {}, {}};
  Tensor sum = in.query.to(type).unsqueeze(-2) + in.key.to(type).unsqueeze(-3);
  if (!in.masked()) {
    t.tanh = at::tanh(sum);
    t.attention = at::matmul(t.tanh, t.weight).softmax(-1);
    return t;
  }
  constexpr double kBarred = -std::numeric_limits<double>::infinity();
  const auto size = in.weights_size();
  const Tensor mask = in.attn_mask->expand_symint(size);
  const Tensor open = in.additive() ? mask != kBarred : mask;
  // By selection everywhere, before and after: what is barred may be NaN, and so would its product with zero.
  t.tanh = at::tanh(or_zero(open.unsqueeze(-1), sum));
  t.value = or_zero(open.any(-2).unsqueeze(-1), t.value);
  Tensor scores = at::matmul(t.tanh, t.weight);
  if (in.additive()) scores = scores + or_zero(open, mask.to(type));
  // The scores of a query without keys are zeros, so that its softmax is finite; its weights are selected away.
  t.sees = open.any(-1, /*keepdim=*/true);
  const Tensor closed = open.logical_not().logical_and(t.sees);
  t.attention = or_zero(open, scores.masked_fill(closed, kBarred).softmax(-1));
  return t;
}

Tensor composite_forward(const Inputs& in) {
  const Terms t = composite_terms(in);
  return at::matmul(t.attention, t.value).to(in.query.scalar_type());
}

Gradients composite_backward(const Tensor& grad_output, const Inputs& in, const Wanted& wanted) {
  const Terms t = composite_terms(in);
  Tensor grad = grad_output.to(in.compute_dtype());
  if (t.sees.defined()) grad = or_zero(t.sees, grad);
  const Tensor to_attention = at::matmul(grad, t.value.mT());
  const Tensor scores = t.attention * (to_attention - (t.attention * to_attention).sum(-1, /*keepdim=*/true));
  const Tensor each = scores.unsqueeze(-1);
  const auto finish = [](bool asked, const Tensor& like, auto make) {
    return asked ? at::sum_to(make(), like.sym_sizes()).to(like.scalar_type()) : Tensor();
  };
  const bool through_tanh = wanted[0] || wanted[1];
  const Tensor sums = through_tanh ? each * (1 - t.tanh * t.tanh) * t.weight : Tensor();
  return {finish(wanted[0], in.query, [&] { return sums.sum(-2); }),
          finish(wanted[1], in.key, [&] { return sums.sum(-3); }),
          finish(wanted[2], in.value, [&] { return at::matmul(t.attention.mT(), grad); }),
          finish(wanted[3], in.score_weight, [&] { return each * t.tanh; }),
          in.additive() ? finish(wanted[4], *in.attn_mask, [&] { return scores; }) : Tensor()};
}

// --- autograd ---------------------------------------------------------------------------------------------------

Gradients call_backward(const Tensor& grad_output, ADDITIVE_PARAMETERS, const Tensor& weights, Wanted wanted) {
  static const auto op = find_op<BackwardSignature>("lect11ext::additive_attention_backward");
  return op.call(grad_output, ADDITIVE_ARGUMENTS, weights, wanted);
}

struct AdditiveAttentionNode : autograd::Node {
  std::array<autograd::SavedVariable, 5> inputs_;  // query, key, value, score_weight, attn_mask
  autograd::SavedVariable weights_;

  std::string name() const override { return "AdditiveAttentionBackward"; }

  void release_variables() override {
    for (auto& saved : inputs_) saved.reset_data();
    weights_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    if (!grads[0].defined()) return autograd::variable_list(inputs_.size());
    Wanted wanted;
    std::array<Tensor, 5> in;
    for (size_t i = 0; i < wanted.size(); ++i) {
      wanted[i] = task_should_compute_output(i);
      in[i] = inputs_[i].unpack();
    }
    auto [query, key, value, score_weight, attn_mask] =
        call_backward(grads[0], in[0], in[1], in[2], in[3], autograd::optional_of(in[4]), weights_.unpack(), wanted);
    return {query, key, value, score_weight, attn_mask};
  }
};

Outputs autograd_forward(ADDITIVE_PARAMETERS, bool save_weights) {
  const bool differentiable = autograd::needs_grad(ADDITIVE_ARGUMENTS);
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = additive_attention(ADDITIVE_ARGUMENTS, save_weights || differentiable);
  }
  const auto& [output, weights] = out;
  if (differentiable) {
    auto node = autograd::make_node<AdditiveAttentionNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(ADDITIVE_ARGUMENTS));
    const auto save = [](const OptionalTensor& t) {
      return autograd::SavedVariable(autograd::tensor_or_none(t), /*is_output=*/false);
    };
    node->inputs_ = {save(query), save(key), save(value), save(score_weight), save(attn_mask)};
    node->weights_ = autograd::SavedVariable(autograd::tensor_or_none(weights), /*is_output=*/false);
    torch::autograd::set_history(output, node);
  }
  if (autograd::has_tangent(ADDITIVE_ARGUMENTS)) {
    autograd::copy_tangent(output, composite_forward(Inputs{ADDITIVE_ARGUMENTS}));
  }
  // Not what the Node alone keeps (common/autograd.h).
  if (!save_weights) std::get<1>(out).reset();
  return out;
}

Gradients autograd_backward(const Tensor& grad_output, ADDITIVE_PARAMETERS, const Tensor& weights, Wanted wanted) {
  if (autograd::needs_grad(grad_output, ADDITIVE_ARGUMENTS) || autograd::has_tangent(grad_output, ADDITIVE_ARGUMENTS)) {
    return composite_backward(grad_output, Inputs{ADDITIVE_ARGUMENTS}, wanted);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_output, ADDITIVE_ARGUMENTS, weights, wanted);
}

// Everything in autocast's type but a mask, which may have more digits.
template <c10::DispatchKey autocast_key, c10::DeviceType device>
Outputs autocast_forward(ADDITIVE_PARAMETERS, bool save_weights) {
  const c10::impl::ExcludeDispatchKeyGuard without(autocast_key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  const bool casts_mask = autograd::defined(attn_mask) && attn_mask->scalar_type() != at::kFloat;
  return additive_attention(cast(query), cast(key), cast(value), cast(score_weight),
                            casts_mask ? OptionalTensor(cast(*attn_mask)) : attn_mask, save_weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("additive_attention", autograd_forward);
  m.impl("additive_attention_backward", autograd_backward);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("additive_attention", autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("additive_attention", autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace lect11ext
