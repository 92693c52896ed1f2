// The derivatives of lstm_layer and gru_layer: the Node, and autocast. What the derivatives of a backward and the
// tangents are made of stands in layer_composite_backward.cpp and layer_tangents.cpp.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <string>

#include "common/ops.h"
#include "recurrent/layer_schema.h"

namespace lect11ext {
namespace {

using namespace layer_op;

// --- autograd -----------------------------------------------------------------------------------------------------

struct LayerNode : autograd::Node {
  std::array<autograd::SavedVariable, kInputs> inputs_;
  autograd::SavedVariable lengths_, reset_, zoneout_h_, zoneout_c_, out_, gates_, cells_, normed_, rstd_;
  std::string candidate_;
  bool is_lstm_, reset_after_, reverse_, batch_first_;
  double zoneout_rate_h_, zoneout_rate_c_;
  std::optional<double> grad_clip_;
  int64_t truncate_, recompute_;

  std::string name() const override { return is_lstm_ ? "LstmLayerBackward" : "GruLayerBackward"; }

  void release_variables() override {
    for (auto& saved : inputs_) saved.reset_data();
    for (auto* saved : {&lengths_, &reset_, &zoneout_h_, &zoneout_c_, &out_, &gates_, &cells_, &normed_, &rstd_}) {
      saved->reset_data();
    }
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    // In the order of the op's outputs that have derivatives; with `recompute` there are neither gates nor cells.
    const auto grad = [&](size_t i) { return i < grads.size() ? grads[i] : Tensor(); };
    const OutputGradients outer = is_lstm_ ? OutputGradients{grad(0), grad(1), grad(2), grad(3), grad(4)}
                                           : OutputGradients{grad(0), grad(1), {}, grad(2), {}};
    bool any = false;
    for (const auto& given : grads) any = any || given.defined();
    if (!any) return autograd::variable_list(kInputs);
    Mask mask;
    std::array<Tensor, kInputs> in;
    for (size_t i = 0; i < kInputs; ++i) {
      mask[i] = task_should_compute_output(i);
      in[i] = inputs_[i].unpack();
    }
    const auto self = getptr();
    const bool recomputes = recompute_ > 0;  // cells are no output with a derivative then
    const Outputs kept{out_.unpack(self),
                       {},
                       {},
                       gates_.unpack(self),
                       recomputes ? cells_.unpack() : cells_.unpack(self),
                       normed_.unpack(),
                       rstd_.unpack()};
    using autograd::optional_of;
    const auto result = call_backward(outer,
                                      {.input = in[kInput],
                                       .h = in[kH],
                                       .c = optional_of(in[kC]),
                                       .weight_ih = optional_of(in[kWeightIh]),
                                       .weight_hh = in[kWeightHh],
                                       .bias_ih = optional_of(in[kBiasIh]),
                                       .bias_hh = optional_of(in[kBiasHh]),
                                       .weight_peephole = optional_of(in[kPeephole]),
                                       .layer_norm = optional_of(in[kNorm]),
                                       .hidden_mask = optional_of(in[kHiddenMask]),
                                       .lengths = optional_of(lengths_.unpack()),
                                       .reset = optional_of(reset_.unpack()),
                                       .zoneout_h = optional_of(zoneout_h_.unpack()),
                                       .zoneout_c = optional_of(zoneout_c_.unpack()),
                                       .candidate = candidate_,
                                       .reset_after = reset_after_,
                                       .zoneout_rate_h = zoneout_rate_h_,
                                       .zoneout_rate_c = zoneout_rate_c_,
                                       .grad_clip = grad_clip_,
                                       .truncate = truncate_,
                                       .recompute = recompute_,
                                       .reverse = reverse_,
                                       .batch_first = batch_first_},
                                      kept, mask);
    return {result.begin(), result.end()};
  }
};

void save_for_backward(LayerNode& node, const Inputs& in, const Outputs& out, bool recomputes) {
  const auto keep = [](const Tensor& t) { return autograd::SavedVariable(t, /*is_output=*/false); };
  const auto keep_optional = [&](const OptionalTensor& t) { return keep(autograd::tensor_or_none(t)); };
  const auto keep_output = [](const Tensor& t) {
    return t.defined() ? autograd::SavedVariable(t, /*is_output=*/true) : autograd::SavedVariable();
  };
  const auto tensors = in.tensors();
  for (size_t i = 0; i < kInputs; ++i) node.inputs_[i] = keep(tensors[i]);
  node.lengths_ = keep_optional(in.lengths);
  node.reset_ = keep_optional(in.reset);
  node.zoneout_h_ = keep_optional(in.zoneout_h);
  node.zoneout_c_ = keep_optional(in.zoneout_c);
  node.out_ = keep_output(out.out);
  node.gates_ = keep_output(out.gates);
  node.cells_ = recomputes ? keep(out.cells) : keep_output(out.cells);
  node.normed_ = keep(out.normed);
  node.rstd_ = keep(out.rstd);
}

Outputs autograd_forward(const Inputs& in, bool save) {
  const auto tensors = in.tensors();
  const Tensor hr = autograd::tensor_or_none(in.weight_hr);
  bool differentiable = autograd::needs_grad(hr), dual = autograd::has_tangent(hr);
  for (const Tensor& t : tensors) {
    differentiable = differentiable || autograd::needs_grad(t);
    dual = dual || autograd::has_tangent(t);
  }
  if ((differentiable || dual) && !is_fused(in)) {
    in.check();
    return step_by_step(in, save);
  }
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = dual ? call_forward(in.without_recompute(), /*save=*/true) : call_forward(in, save || differentiable);
  }
  // Tangents are made of gates, so that these are kept all the same where there are some, on this level or below.
  const bool recomputes = in.recompute > 0 && !out.gates.defined();
  decltype(autograd::make_node<LayerNode>()) saves;
  if (differentiable) {
    auto node = autograd::make_node<LayerNode>();
    torch::autograd::edge_list edges;
    for (const Tensor& t : tensors) {
      edges.push_back(t.defined() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge());
    }
    node->set_next_edges(std::move(edges));
    node->candidate_ = std::string(in.candidate);
    node->is_lstm_ = in.is_lstm();
    node->reset_after_ = in.reset_after;
    node->zoneout_rate_h_ = in.zoneout_rate_h;
    node->zoneout_rate_c_ = in.zoneout_rate_c;
    node->grad_clip_ = in.grad_clip;
    node->truncate_ = in.truncate;
    node->recompute_ = recomputes ? in.recompute : 0;
    node->reverse_ = in.reverse;
    node->batch_first_ = in.batch_first;
    for (const Tensor* output : {&out.out, &out.h, &out.c, &out.gates, &out.cells}) {
      if (output->defined() && !(recomputes && output == &out.cells)) torch::autograd::set_history(*output, node);
    }
    saves = std::move(node);
  }
  if (dual) {
    const OutputGradients d = tangents(in, out);
    const auto set = [](const Tensor& output, const Tensor& t) {
      if (output.defined()) output._set_fw_grad(t, /*level=*/0, /*is_inplace_op=*/false);
    };
    set(out.out, d.out);
    set(out.h, d.h);
    set(out.c, d.c);
    set(out.gates, d.gates);
    set(out.cells, d.cells);
  }
  if (saves != nullptr) save_for_backward(*saves, in, out, recomputes);  // tangents too
  // Not what the Node alone keeps (common/autograd.h).
  return save ? out : Outputs{out.out, out.h, out.c, {}, {}, {}, {}};
}

Gradients autograd_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  bool differentiable =
      autograd::needs_grad(grads.out, grads.h, grads.c, grads.gates, grads.cells, kept.out, kept.gates);
  bool dual = autograd::has_tangent(grads.out, grads.h, grads.c, grads.gates, grads.cells, kept.out, kept.gates);
  for (const Tensor& t : in.tensors()) {
    differentiable = differentiable || autograd::needs_grad(t);
    dual = dual || autograd::has_tangent(t);
  }
  if (differentiable || dual) {
    check_backward(grads, in, kept);
    return composite_backward(grads, in, kept, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grads, in, kept, mask);
}

template <c10::DispatchKey key, c10::DeviceType device>
Outputs autocast_forward(const Inputs& in, bool save) {
  const c10::impl::ExcludeDispatchKeyGuard without(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return call_forward(in.mapped(cast), save);
}

}  // namespace

namespace layer_op {

Outputs call_forward(const Inputs& in, bool save) {
  const auto plain = [](const OptionalTensor& t) { return autograd::tensor_or_none(t); };
  if (in.is_lstm()) {
    static const auto op = find_op<LstmForward>("lect11ext::lstm_layer");
    auto [out, h, c, gates, cells, normed, rstd] =
        op.call(in.input, in.h, *in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.weight_hr,
                in.weight_peephole, in.layer_norm, in.hidden_mask, in.lengths, in.reset, in.zoneout_h, in.zoneout_c,
                in.candidate, in.zoneout_rate_h, in.zoneout_rate_c, in.grad_clip, in.truncate, in.recompute, in.reverse,
                in.batch_first, save);
    return {out, h, c, plain(gates), plain(cells), plain(normed), plain(rstd)};
  }
  static const auto op = find_op<GruForward>("lect11ext::gru_layer");
  auto [out, h, gates, normed, rstd] =
      op.call(in.input, in.h, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.layer_norm, in.hidden_mask,
              in.lengths, in.reset, in.zoneout_h, in.reset_after, in.zoneout_rate_h, in.grad_clip, in.truncate,
              in.recompute, in.reverse, in.batch_first, save);
  return {out, h, {}, plain(gates), {}, plain(normed), plain(rstd)};
}

Gradients call_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  const auto optional = [](const Tensor& t) { return autograd::optional_of(t); };
  if (in.is_lstm()) {
    static const auto op = find_op<LstmBackward>("lect11ext::lstm_layer_backward");
    auto [x, h, c, ih, hh, b_ih, b_hh, peephole, norm, hidden_mask] = op.call(
        optional(grads.out), optional(grads.h), optional(grads.c), optional(grads.gates), optional(grads.cells),
        in.input, in.h, *in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.weight_hr, in.weight_peephole,
        in.layer_norm, in.hidden_mask, in.lengths, in.reset, in.zoneout_h, in.zoneout_c, in.candidate,
        in.zoneout_rate_h, in.zoneout_rate_c, in.grad_clip, in.truncate, in.recompute, in.reverse, in.batch_first,
        kept.out, optional(kept.gates), optional(kept.cells), optional(kept.normed), optional(kept.rstd), mask);
    return {x, h, c, ih, hh, b_ih, b_hh, peephole, norm, hidden_mask};
  }
  static const auto op = find_op<GruBackward>("lect11ext::gru_layer_backward");
  auto [x, h, ih, hh, b_ih, b_hh, norm, hidden_mask] =
      op.call(optional(grads.out), optional(grads.h), optional(grads.gates), in.input, in.h, in.weight_ih, in.weight_hh,
              in.bias_ih, in.bias_hh, in.layer_norm, in.hidden_mask, in.lengths, in.reset, in.zoneout_h, in.reset_after,
              in.zoneout_rate_h, in.grad_clip, in.truncate, in.recompute, in.reverse, in.batch_first, kept.out,
              optional(kept.gates), optional(kept.normed), optional(kept.rstd),
              {mask[kInput], mask[kH], mask[kWeightIh], mask[kWeightHh], mask[kBiasIh], mask[kBiasHh], mask[kNorm],
               mask[kHiddenMask]});
  return {x, h, {}, ih, hh, b_ih, b_hh, {}, norm, hidden_mask};
}

}  // namespace layer_op

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("lstm_layer", lstm_forward<autograd_forward>);
  m.impl("lstm_layer_backward", lstm_backward<autograd_backward>);
  m.impl("gru_layer", gru_forward<autograd_forward>);
  m.impl("gru_layer_backward", gru_backward<autograd_backward>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("lstm_layer", lstm_forward<autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>>);
  m.impl("gru_layer", gru_forward<autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("lstm_layer", lstm_forward<autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>>);
  m.impl("gru_layer", gru_forward<autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>>);
}

}  // namespace lect11ext
