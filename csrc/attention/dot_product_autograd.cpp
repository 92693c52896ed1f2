// Derivatives of dot-product attention. Four ops are closed under first and second derivatives, all of them tiled:
//
//   forward   —backward→ attention_backward          —tangent→ attention_tangent
//   backward  —tangent→  attention_backward_tangent  —backward→ tangents along the cotangents, by symmetry
//   tangent   —backward→ attention_backward for its directions, attention_backward_tangent for its points
//
// Beyond that the two tangents are composites of ATen. An op that is given output and lse takes them for functions of
// the inputs: all of their derivatives come through the inputs.
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "attention/dot_product_autograd.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace attention_op;

const OptionalTensor kNone;

// The inputs as a node keeps them.
struct SavedInputs {
  std::array<autograd::SavedVariable, 10> tensors;
  double dropout_p = 0;
  std::optional<double> scale, softcap;
  std::optional<int64_t> window_left, window_right;
  bool bottom_right = false;

  SavedInputs() = default;
  SavedInputs(const Inputs& in, const Tensor& output, const Tensor& lse, bool own_outputs)
      : dropout_p(in.dropout_p),
        scale(in.scale),
        softcap(in.softcap),
        window_left(in.window_left),
        window_right(in.window_right),
        bottom_right(in.bottom_right) {
    const Tensor* required[] = {&in.query, &in.key, &in.value};
    for (size_t i = 0; i < 3; ++i) tensors[i] = autograd::SavedVariable(*required[i], false);
    const OptionalTensor* optional[] = {&in.attn_mask, &in.alibi_slopes, &in.cu_seqlens_q, &in.cu_seqlens_k,
                                        &in.dropout_key};
    for (size_t i = 0; i < 5; ++i) {
      tensors[3 + i] = autograd::SavedVariable(autograd::tensor_or_none(*optional[i]), false);
    }
    tensors[8] = autograd::SavedVariable(output, own_outputs);
    tensors[9] = autograd::SavedVariable(lse, own_outputs);
  }

  void release() {
    for (auto& t : tensors) t.reset_data();
  }
};

// SavedInputs taken out again, and an Inputs that refers to them.
struct Unpacked {
  Tensor query, key, value, output, lse;
  OptionalTensor optional[5];
  Inputs in;

  template <class Node>
  Unpacked(const SavedInputs& s, const Node& owner)
      : query(s.tensors[0].unpack()),
        key(s.tensors[1].unpack()),
        value(s.tensors[2].unpack()),
        output(s.tensors[8].unpack(owner)),
        lse(s.tensors[9].unpack(owner)),
        optional{take(s, 3), take(s, 4), take(s, 5), take(s, 6), take(s, 7)},
        in{query,       key,         value,   optional[0],   optional[1],    optional[2],    optional[3],
           optional[4], s.dropout_p, s.scale, s.window_left, s.window_right, s.bottom_right, s.softcap} {}

 private:
  static OptionalTensor take(const SavedInputs& s, size_t i) { return autograd::optional_of(s.tensors[i].unpack()); }
};

// Tensors without the tangents of this level, and an Inputs of them.
Tensor primal(const Tensor& t) { return t.defined() ? t._fw_primal(/*level=*/0) : t; }
OptionalTensor primal(const OptionalTensor& t) { return autograd::optional_of(primal(autograd::tensor_or_none(t))); }

struct Primals {
  Tensor query, key, value;
  OptionalTensor attn_mask;
  Inputs in;

  explicit Primals(const Inputs& dual)
      : query(primal(dual.query)),
        key(primal(dual.key)),
        value(primal(dual.value)),
        attn_mask(primal(dual.attn_mask)),
        in{query,
           key,
           value,
           attn_mask,
           dual.alibi_slopes,
           dual.cu_seqlens_q,
           dual.cu_seqlens_k,
           dual.dropout_key,
           dual.dropout_p,
           dual.scale,
           dual.window_left,
           dual.window_right,
           dual.bottom_right,
           dual.softcap} {}
};

OptionalTensor tangent_of(const Tensor& t) {
  return autograd::has_tangent(t) ? std::optional<Tensor>(t._fw_grad(/*level=*/0)) : std::nullopt;
}
OptionalTensor tangent_of(const OptionalTensor& t) { return t.has_value() ? tangent_of(*t) : std::nullopt; }

// The tangents that the inputs themselves carry.
struct Carried {
  OptionalTensor query, key, value, attn_mask;

  explicit Carried(const Inputs& in)
      : query(tangent_of(in.query)),
        key(tangent_of(in.key)),
        value(tangent_of(in.value)),
        attn_mask(in.has_float_mask() ? tangent_of(*in.attn_mask) : std::nullopt) {}

  Tangents all() const { return {query, key, value, attn_mask}; }
};

bool inputs_need_grad(const Inputs& in) { return autograd::needs_grad(in.query, in.key, in.value, in.attn_mask); }

torch::autograd::edge_list input_edges(const Inputs& in) {
  return {edge(in.query), edge(in.key), edge(in.value), edge(in.has_float_mask() ? in.attn_mask : kNone)};
}

autograd::variable_list list(const Gradients& g) {
  return {std::get<0>(g), std::get<1>(g), std::get<2>(g), std::get<3>(g)};
}

bool any(const GradientMask& mask) { return mask[0] || mask[1] || mask[2] || mask[3]; }

// --- forward ------------------------------------------------------------------------------------------------------

struct AttentionNode : autograd::Node {
  SavedInputs saved_;

  std::string name() const override { return "AttentionBackward"; }
  void release_variables() override { saved_.release(); }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    GradientMask mask{};
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(i);
    if (!any(mask) || (!grads[0].defined() && !grads[1].defined())) return autograd::variable_list(4);
    const Unpacked s(saved_, getptr());
    return list(
        call_backward(autograd::optional_of(grads[0]), autograd::optional_of(grads[1]), s.in, s.output, s.lse, mask));
  }
};

}  // namespace

namespace attention_op {

bool inputs_have_tangents(const Inputs& in) {
  return autograd::has_tangent(in.query, in.key, in.value) ||
         (in.has_float_mask() && autograd::has_tangent(*in.attn_mask));
}

void check_constants(const Inputs& in) {
  const bool active = autograd::needs_grad(in.alibi_slopes) ||
                      (autograd::defined(in.alibi_slopes) && autograd::has_tangent(*in.alibi_slopes));
  TORCH_CHECK_NOT_IMPLEMENTED(!active,
                              "alibi_slopes have no derivative here: give -slope * distance as an additive attn_mask, "
                              "as functional.scaled_dot_product_attention does");
}

void record_attention(const Inputs& in, const Tensor& output, const Tensor& lse) {
  decltype(autograd::make_node<AttentionNode>()) node;
  if (inputs_need_grad(in)) {
    node = autograd::make_node<AttentionNode>();
    node->set_next_edges(input_edges(in));
    torch::autograd::set_history(output, node);
    torch::autograd::set_history(lse, node);
  }
  if (inputs_have_tangents(in)) {
    const Primals primals(in);
    const Carried t(in);
    const auto [output_t, lse_t] = call_tangent(primals.in, output, lse, t.all());
    output._set_fw_grad(output_t, /*level=*/0, /*is_inplace_op=*/false);
    lse._set_fw_grad(lse_t, /*level=*/0, /*is_inplace_op=*/false);
  }
  if (node != nullptr) node->saved_ = SavedInputs(in, output, lse, /*own_outputs=*/true);
}

}  // namespace attention_op

namespace {

Outputs autograd_forward(ATTENTION_PARAMETERS) {
  const Inputs in = ATTENTION_INPUTS;
  check_constants(in);
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_forward(in);
  }
  record_attention(in, std::get<0>(out), std::get<1>(out));
  return out;
}

// --- backward -----------------------------------------------------------------------------------------------------

// The backward's outputs are linear in grad_output and grad_lse, with what the inputs' cotangents say as directions.
struct DoubleBackwardNode : autograd::Node {
  SavedInputs saved_;
  autograd::SavedVariable grad_output_, grad_lse_;

  std::string name() const override { return "AttentionBackwardBackward"; }
  void release_variables() override {
    saved_.release();
    grad_output_.reset_data();
    grad_lse_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    autograd::variable_list result(6);
    const OptionalTensor along[] = {autograd::optional_of(grads[0]), autograd::optional_of(grads[1]),
                                    autograd::optional_of(grads[2]), autograd::optional_of(grads[3])};
    if (!along[0] && !along[1] && !along[2] && !along[3]) return result;
    const Tangents tangents{along[0], along[1], along[2], along[3]};
    const Unpacked s(saved_, nullptr);
    const auto [output_t, lse_t] = call_tangent(s.in, s.output, s.lse, tangents);
    const Tensor grad_output = grad_output_.unpack(), grad_lse = grad_lse_.unpack();
    if (grad_output.defined() && task_should_compute_output(0)) result[0] = output_t;
    if (grad_lse.defined() && task_should_compute_output(1)) result[1] = lse_t;
    GradientMask mask{};
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(2 + i);
    if (any(mask)) {
      const OptionalTensor g = autograd::optional_of(grad_output), gl = autograd::optional_of(grad_lse);
      const auto points =
          list(call_backward_tangent(s.in, s.output, s.lse, {g, gl, kNone, kNone, tangents, output_t, lse_t}, mask));
      for (size_t i = 0; i < points.size(); ++i) result[2 + i] = points[i];
    }
    return result;
  }
};

Gradients autograd_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, ATTENTION_PARAMETERS,
                            const Tensor& output, const Tensor& lse, GradientMask mask) {
  const Inputs in = ATTENTION_INPUTS;
  check_constants(in);
  Gradients out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_backward(grad_output, grad_lse, in, output, lse, mask);
  }
  if (autograd::needs_grad(grad_output, grad_lse) || inputs_need_grad(in)) {
    auto node = autograd::make_node<DoubleBackwardNode>();
    torch::autograd::edge_list edges = {edge(grad_output), edge(grad_lse)};
    for (auto& e : input_edges(in)) edges.push_back(std::move(e));
    node->set_next_edges(std::move(edges));
    node->saved_ = SavedInputs(in, output, lse, /*own_outputs=*/false);
    node->grad_output_ = autograd::SavedVariable(autograd::tensor_or_none(grad_output), false);
    node->grad_lse_ = autograd::SavedVariable(autograd::tensor_or_none(grad_lse), false);
    for (const Tensor& g : list(out)) {
      if (g.defined()) torch::autograd::set_history(g, node);
      else node->add_input_metadata(torch::autograd::Node::undefined_input());
    }
  }
  const OptionalTensor grad_output_t = tangent_of(grad_output), grad_lse_t = tangent_of(grad_lse);
  if (inputs_have_tangents(in) || grad_output_t || grad_lse_t) {
    const Primals primals(in);
    const Carried t(in);
    const Tensor kept = primal(output), kept_lse = primal(lse);
    const OptionalTensor g = primal(grad_output), gl = primal(grad_lse);
    const auto [output_t, lse_t] = call_tangent(primals.in, kept, kept_lse, t.all());
    const auto tangents = list(call_backward_tangent(
        primals.in, kept, kept_lse, {g, gl, grad_output_t, grad_lse_t, t.all(), output_t, lse_t}, mask));
    const auto results = list(out);
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].defined()) results[i]._set_fw_grad(tangents[i], /*level=*/0, /*is_inplace_op=*/false);
    }
  }
  return out;
}

// --- tangents -----------------------------------------------------------------------------------------------------

struct TangentNode : autograd::Node {
  SavedInputs saved_;
  std::array<autograd::SavedVariable, 4> tangents_;
  autograd::SavedVariable output_t_, lse_t_;

  std::string name() const override { return "AttentionTangentBackward"; }
  void release_variables() override {
    saved_.release();
    for (auto& t : tangents_) t.reset_data();
    output_t_.reset_data();
    lse_t_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    autograd::variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const OptionalTensor g = autograd::optional_of(grads[0]), gl = autograd::optional_of(grads[1]);
    const Unpacked s(saved_, nullptr);
    GradientMask points{}, directions{};
    OptionalTensor along[4];
    for (size_t i = 0; i < 4; ++i) {
      along[i] = autograd::optional_of(tangents_[i].unpack());
      points[i] = task_should_compute_output(i);
      directions[i] = along[i].has_value() && task_should_compute_output(4 + i);
    }
    if (any(directions)) {
      const auto grad = list(call_backward(g, gl, s.in, s.output, s.lse, directions));
      for (size_t i = 0; i < 4; ++i) result[4 + i] = grad[i];
    }
    if (any(points)) {
      const Tensor output_t = output_t_.unpack(getptr()), lse_t = lse_t_.unpack(getptr());
      const auto grad = list(call_backward_tangent(
          s.in, s.output, s.lse, {g, gl, kNone, kNone, {along[0], along[1], along[2], along[3]}, output_t, lse_t},
          points));
      for (size_t i = 0; i < 4; ++i) result[i] = grad[i];
    }
    return result;
  }
};

Outputs autograd_tangent(ATTENTION_PARAMETERS, const Tensor& output, const Tensor& lse, ATTENTION_TANGENT_PARAMETERS) {
  const Inputs in = ATTENTION_INPUTS;
  const Tangents t = ATTENTION_TANGENTS;
  check_constants(in);
  if (inputs_have_tangents(in) || autograd::has_tangent(query_t, key_t, value_t, attn_mask_t)) {
    return composite_tangent(in, t);
  }
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_tangent(in, output, lse, t);
  }
  if (inputs_need_grad(in) || autograd::needs_grad(query_t, key_t, value_t, attn_mask_t)) {
    auto node = autograd::make_node<TangentNode>();
    torch::autograd::edge_list edges = input_edges(in);
    for (const OptionalTensor* tangent : {&query_t, &key_t, &value_t, &attn_mask_t}) edges.push_back(edge(*tangent));
    node->set_next_edges(std::move(edges));
    node->saved_ = SavedInputs(in, output, lse, /*own_outputs=*/false);
    size_t i = 0;
    for (const OptionalTensor* tangent : {&query_t, &key_t, &value_t, &attn_mask_t}) {
      node->tangents_[i++] = autograd::SavedVariable(autograd::tensor_or_none(*tangent), false);
    }
    torch::autograd::set_history(std::get<0>(out), node);
    torch::autograd::set_history(std::get<1>(out), node);
    node->output_t_ = autograd::SavedVariable(std::get<0>(out), true);
    node->lse_t_ = autograd::SavedVariable(std::get<1>(out), true);
  }
  return out;
}

Gradients autograd_backward_tangent(
    const OptionalTensor& grad_output, const OptionalTensor& grad_lse, ATTENTION_PARAMETERS, const Tensor& output,
    const Tensor& lse, const OptionalTensor& grad_output_t, const OptionalTensor& grad_lse_t,
    ATTENTION_TANGENT_PARAMETERS, const Tensor& output_t, const Tensor& lse_t, GradientMask mask) {
  const Inputs in = ATTENTION_INPUTS;
  const Directions along{grad_output, grad_lse, grad_output_t, grad_lse_t, ATTENTION_TANGENTS, output_t, lse_t};
  check_constants(in);
  const bool active =
      inputs_need_grad(in) || inputs_have_tangents(in) ||
      autograd::needs_grad(grad_output, grad_lse, grad_output_t, grad_lse_t, query_t, key_t, value_t, attn_mask_t) ||
      autograd::has_tangent(grad_output, grad_lse, grad_output_t, grad_lse_t, query_t, key_t, value_t, attn_mask_t);
  if (active) return composite_backward_tangent(in, along, mask);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward_tangent(in, output, lse, along, mask);
}

// --- autocast -----------------------------------------------------------------------------------------------------

template <c10::DispatchKey dispatch_key, c10::DeviceType device>
Outputs autocast_forward(ATTENTION_PARAMETERS) {
  const c10::impl::ExcludeDispatchKeyGuard without(dispatch_key);
  return call_forward(CastInputs(ATTENTION_INPUTS, device).in);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("attention", autograd_forward);
  m.impl("attention_backward", autograd_backward);
  m.impl("attention_tangent", autograd_tangent);
  m.impl("attention_backward_tangent", autograd_backward_tangent);
  fall_through(m, {"attention_dropout_mask"});
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("attention", autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("attention", autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace lect11ext
