// Derivatives of gru_cell: its definition in differentiable ATen, the Node, and autocast.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "common/autograd.h"
#include "common/ops.h"
#include "recurrent/cells_ops.h"
#include "recurrent/gru_cell_inputs.h"

namespace lect11ext {
namespace {

using namespace gru_cell_op;

// --- the definition in differentiable ATen ------------------------------------------------------------------------

struct Gates {
  Tensor r, z, n;
  Tensor hidden_n;  // what r multiplies (reset after), or W_hn (r ⊙ h) + b_hn
};

Gates composite_gates(const Inputs& in) {
  const c10::SymInt H = in.hidden();
  const auto rows = [&](const Tensor& t, int64_t from, int64_t to) { return t.slice_symint(0, H * from, H * to); };
  const auto bias_rows = [&](const OptionalTensor& t, int64_t from, int64_t to) {
    return autograd::defined(t) ? OptionalTensor(rows(*t, from, to)) : std::nullopt;
  };
  const auto x = at::linear(in.input, in.weight_ih, in.bias_ih).chunk(3, 1);
  const auto s = at::linear(in.h, rows(in.weight_hh, 0, 2), bias_rows(in.bias_hh, 0, 2)).chunk(2, 1);
  Gates gates{(x[0] + s[0]).sigmoid(), (x[1] + s[1]).sigmoid(), {}, {}};
  const Tensor state = in.reset_after ? in.h : gates.r * in.h;
  gates.hidden_n = at::linear(state, rows(in.weight_hh, 2, 3), bias_rows(in.bias_hh, 2, 3));
  gates.n = (x[2] + (in.reset_after ? gates.r * gates.hidden_n : gates.hidden_n)).tanh();
  return gates;
}

Gradients composite_backward(const Tensor& grad_h, const Inputs& in, const Mask& mask) {
  const auto [r, z, n, hidden_n] = composite_gates(in);
  const c10::SymInt H = in.hidden();
  const Tensor w_gates = in.weight_hh.slice_symint(0, 0, H * 2), w_n = in.weight_hh.slice_symint(0, H * 2, H * 3);
  const Tensor dh = std::isinf(in.clip) ? grad_h : at::clamp(grad_h, -in.clip, in.clip);
  const Tensor dn = dh * (1 - z) * (1 - n * n), dz = dh * (in.h - n) * z * (1 - z);
  const Tensor d_state = in.reset_after ? Tensor() : dn.mm(w_n);  // gradient of r ⊙ h
  const Tensor dr = (in.reset_after ? dn * hidden_n : d_state * in.h) * r * (1 - r);
  const Tensor dn_hidden = in.reset_after ? dn * r : dn;
  const Tensor pre = at::cat({dr, dz, dn}, 1), gates = at::cat({dr, dz}, 1);
  using recurrent::when;
  return {when(mask[0], [&] { return pre.mm(in.weight_ih); }),
          when(mask[1],
               [&] { return dh * z + gates.mm(w_gates) + (in.reset_after ? dn_hidden.mm(w_n) : d_state * r); }),
          when(mask[2], [&] { return pre.t().mm(in.input); }),
          when(mask[3],
               [&] { return at::cat({gates.t().mm(in.h), dn_hidden.t().mm(in.reset_after ? in.h : r * in.h)}, 0); }),
          when(mask[4] && autograd::defined(in.bias_ih), [&] { return pre.sum(0); }),
          when(mask[5] && autograd::defined(in.bias_hh), [&] { return at::cat({dr, dz, dn_hidden}, 1).sum(0); })};
}

// --- autograd ---------------------------------------------------------------------------------------------------

Gradients call_backward(const Tensor& grad_h, GRU_CELL_PARAMETERS, const Tensor& gates, Mask mask) {
  static const auto op = find_op<BackwardSignature>("lect11ext::gru_cell_backward");
  return op.call(grad_h, GRU_CELL_ARGUMENTS, gates, mask);
}

struct GruCellNode : autograd::Node {
  // input, h, weight_ih, weight_hh, bias_ih, bias_hh; then what the forward kept
  std::array<autograd::SavedVariable, 6> inputs_;
  autograd::SavedVariable gates_;
  bool reset_after_ = true;
  std::optional<double> grad_clip_;

  std::string name() const override { return "GruCellBackward"; }

  void release_variables() override {
    for (auto& saved : inputs_) saved.reset_data();
    gates_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    if (!grads[0].defined()) return autograd::variable_list(inputs_.size());
    Mask mask;
    std::array<Tensor, 6> in;
    for (size_t i = 0; i < mask.size(); ++i) {
      mask[i] = task_should_compute_output(i);
      in[i] = inputs_[i].unpack();
    }
    auto [input, h, weight_ih, weight_hh, bias_ih, bias_hh] =
        call_backward(grads[0], in[0], in[1], in[2], in[3], autograd::optional_of(in[4]), autograd::optional_of(in[5]),
                      reset_after_, grad_clip_, gates_.unpack(), mask);
    return {input, h, weight_ih, weight_hh, bias_ih, bias_hh};
  }
};

Outputs autograd_forward(GRU_CELL_PARAMETERS, bool save_gates) {
  const bool differentiable = autograd::needs_grad(input, h, weight_ih, weight_hh, bias_ih, bias_hh);
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = gru_cell(GRU_CELL_ARGUMENTS, save_gates || differentiable);
  }
  const auto& [h_out, gates] = out;
  if (differentiable) {
    auto node = autograd::make_node<GruCellNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, h, weight_ih, weight_hh, bias_ih, bias_hh));
    const auto save = [](const OptionalTensor& t) {
      return autograd::SavedVariable(autograd::tensor_or_none(t), /*is_output=*/false);
    };
    node->inputs_ = {save(input), save(h), save(weight_ih), save(weight_hh), save(bias_ih), save(bias_hh)};
    node->gates_ = autograd::SavedVariable(autograd::tensor_or_none(gates), /*is_output=*/false);
    node->reset_after_ = reset_after;
    node->grad_clip_ = grad_clip;
    torch::autograd::set_history(h_out, node);
  }
  if (autograd::has_tangent(input, h, weight_ih, weight_hh, bias_ih, bias_hh)) {
    const Gates composite = composite_gates(Inputs(GRU_CELL_ARGUMENTS));
    autograd::copy_tangent(h_out, composite.n + composite.z * (h - composite.n));
  }
  if (!save_gates) std::get<1>(out).reset();  // as of the LSTM
  return out;
}

Gradients autograd_backward(const Tensor& grad_h, GRU_CELL_PARAMETERS, const Tensor& gates, Mask mask) {
  if (autograd::needs_grad(grad_h, input, h, weight_ih, weight_hh, bias_ih, bias_hh) ||
      autograd::has_tangent(grad_h, input, h, weight_ih, weight_hh, bias_ih, bias_hh)) {
    return composite_backward(grad_h, Inputs(GRU_CELL_ARGUMENTS), mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_h, GRU_CELL_ARGUMENTS, gates, mask);
}

template <c10::DispatchKey key, c10::DeviceType device>
Outputs autocast_forward(GRU_CELL_PARAMETERS, bool save_gates) {
  const c10::impl::ExcludeDispatchKeyGuard without(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return gru_cell(cast(input), cast(h), cast(weight_ih), cast(weight_hh), autograd::mapped(bias_ih, cast),
                  autograd::mapped(bias_hh, cast), reset_after, grad_clip, save_gates);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("gru_cell", autograd_forward);
  m.impl("gru_cell_backward", autograd_backward);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("gru_cell", autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("gru_cell", autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace lect11ext
