// Derivatives of attention_weights: a gradient by attention_weights_backward; tangents, and whatever differentiates the
// backward, by the definitions in ATen.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "attention/dot_product_autograd.h"

namespace lect11ext {
namespace {

using namespace attention_op;

const OptionalTensor kNone;

bool is_differentiated(const WeightsInputs& w) {
  return autograd::needs_grad(w.in.query, w.in.key, w.lse, w.in.attn_mask);
}
bool has_tangents(const WeightsInputs& w) {
  return autograd::has_tangent(w.in.query, w.in.key, w.lse) ||
         (w.in.has_float_mask() && autograd::has_tangent(*w.in.attn_mask));
}

struct WeightsNode : autograd::Node {
  std::array<autograd::SavedVariable, 6> saved_;
  double dropout_p_ = 0;
  std::optional<double> scale_, softcap_;
  std::optional<int64_t> window_left_, window_right_;
  bool bottom_right_ = false, average_ = false;

  void keep(const WeightsInputs& w) {
    const Tensor tensors[] = {w.in.query,
                              w.in.key,
                              w.lse,
                              autograd::tensor_or_none(w.in.attn_mask),
                              autograd::tensor_or_none(w.in.alibi_slopes),
                              autograd::tensor_or_none(w.in.dropout_key)};
    for (size_t i = 0; i < saved_.size(); ++i) saved_[i] = autograd::SavedVariable(tensors[i], false);
    dropout_p_ = w.in.dropout_p;
    scale_ = w.in.scale;
    softcap_ = w.in.softcap;
    window_left_ = w.in.window_left;
    window_right_ = w.in.window_right;
    bottom_right_ = w.in.bottom_right;
    average_ = w.average;
  }

  std::string name() const override { return "AttentionWeightsBackward"; }
  void release_variables() override {
    for (auto& t : saved_) t.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    GradientMask mask{};
    bool any = false;
    for (size_t i = 0; i < mask.size(); ++i) any = (mask[i] = task_should_compute_output(i)) || any;
    if (!any || !grads[0].defined()) return autograd::variable_list(4);
    const Tensor query = saved_[0].unpack(), key = saved_[1].unpack(), lse = saved_[2].unpack();
    const OptionalTensor attn_mask = autograd::optional_of(saved_[3].unpack());
    const OptionalTensor slopes = autograd::optional_of(saved_[4].unpack());
    const OptionalTensor dropout_key = autograd::optional_of(saved_[5].unpack());
    const WeightsInputs w{{query, key, key, attn_mask, slopes, kNone, kNone, dropout_key, dropout_p_, scale_,
                           window_left_, window_right_, bottom_right_, softcap_},
                          lse,
                          average_};
    const auto [q, k, l, m] = call_weights_backward(grads[0], w, mask);
    return {q, k, l, m};
  }
};

}  // namespace

namespace attention_op {

void record_weights(const WeightsInputs& w, const Tensor& weights) {
  if (!is_differentiated(w)) return;
  auto node = autograd::make_node<WeightsNode>();
  const Tensor mask = w.in.has_float_mask() ? *w.in.attn_mask : Tensor();
  node->set_next_edges({edge(w.in.query), edge(w.in.key), edge(w.lse), edge(mask)});
  node->keep(w);
  torch::autograd::set_history(weights, node);
}

}  // namespace attention_op

namespace {

Tensor autograd_weights(ATTENTION_WEIGHTS_PARAMETERS) {
  const WeightsInputs w = ATTENTION_WEIGHTS_INPUTS(kNone);
  check_constants(w.in);
  if (has_tangents(w)) {
    w.check();
    return composite_weights(w);
  }
  Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_weights(w);
  }
  record_weights(w, out);
  return out;
}

Gradients autograd_weights_backward(const Tensor& grad, ATTENTION_WEIGHTS_PARAMETERS, GradientMask mask) {
  const WeightsInputs w = ATTENTION_WEIGHTS_INPUTS(kNone);
  check_constants(w.in);
  if (is_differentiated(w) || has_tangents(w) || autograd::needs_grad(grad) || autograd::has_tangent(grad)) {
    w.check();
    w.check_gradient(grad);
    return composite_weights_backward(grad, w, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_weights_backward(grad, w, mask);
}

// Weights stay in the query's type; what attention made of operands of several types is converted here too.
template <c10::DispatchKey dispatch_key>
Tensor autocast_weights(ATTENTION_WEIGHTS_PARAMETERS) {
  const c10::impl::ExcludeDispatchKeyGuard without(dispatch_key);
  const auto type = query.scalar_type();
  const Tensor same = key.to(type), wide = lse.to(type == at::kDouble ? at::kDouble : at::kFloat);
  const bool casts_mask =
      autograd::defined(attn_mask) && attn_mask->scalar_type() != at::kBool && attn_mask->scalar_type() != at::kFloat;
  const OptionalTensor mask = casts_mask ? OptionalTensor(attn_mask->to(type)) : attn_mask;
  return call_weights({{query, same, same, mask, alibi_slopes, kNone, kNone, dropout_key, dropout_p, scale, window_left,
                        window_right, bottom_right, softcap},
                       wide,
                       average_heads});
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("attention_weights", autograd_weights);
  m.impl("attention_weights_backward", autograd_weights_backward);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("attention_weights", autocast_weights<c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("attention_weights", autocast_weights<c10::DispatchKey::AutocastCUDA>);
}

}  // namespace lect11ext
