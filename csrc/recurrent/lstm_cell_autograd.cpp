// Derivatives of lstm_cell: its definition in differentiable ATen, the Node, and autocast.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/autograd.h"
#include "common/ops.h"
#include "recurrent/cells_ops.h"
#include "recurrent/lstm_cell_inputs.h"

namespace lect11ext {
namespace {

using namespace lstm_cell_op;

// --- the definition in differentiable ATen ------------------------------------------------------------------------

struct Gates {
  Tensor i, f, g, o, c_out;
};

Gates composite_gates(const Inputs& in) {
  const Tensor pre = at::linear(in.input, in.weight_ih, in.bias_ih) + at::linear(in.h, in.weight_hh, in.bias_hh);
  const auto parts = pre.chunk(4, 1);
  Gates gates{parts[0].sigmoid(),
              parts[1].sigmoid(),
              in.sigmoid_candidate ? parts[2].sigmoid() : parts[2].tanh(),
              parts[3].sigmoid(),
              {}};
  gates.c_out = gates.f * in.c + gates.i * gates.g;
  return gates;
}

Gradients composite_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                             const Mask& mask) {
  const auto [i, f, g, o, c_out] = composite_gates(in);
  const auto incoming = [&](const OptionalTensor& grad) {
    if (!autograd::defined(grad)) return at::zeros_like(c_out);
    return std::isinf(in.clip) ? *grad : at::clamp(*grad, -in.clip, in.clip);
  };
  const Tensor dh = incoming(grad_h), t = c_out.tanh();
  const Tensor dc = incoming(grad_c) + dh * o * (1 - t * t);
  const Tensor slope = in.sigmoid_candidate ? g * (1 - g) : 1 - g * g;
  const Tensor pre = at::cat({dc * g * i * (1 - i), dc * in.c * f * (1 - f), dc * i * slope, dh * t * o * (1 - o)}, 1);
  using recurrent::when;
  const auto bias = [&] { return pre.sum(0); };
  return {when(mask[0], [&] { return pre.mm(in.weight_ih); }),
          when(mask[1], [&] { return pre.mm(in.weight_hh); }),
          when(mask[2], [&] { return dc * f; }),
          when(mask[3], [&] { return pre.t().mm(in.input); }),
          when(mask[4], [&] { return pre.t().mm(in.h); }),
          when(mask[5] && autograd::defined(in.bias_ih), bias),
          when(mask[6] && autograd::defined(in.bias_hh), bias)};
}

// --- autograd ---------------------------------------------------------------------------------------------------

Gradients call_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, LSTM_CELL_PARAMETERS,
                        const Tensor& gates, const Tensor& c_out, Mask mask) {
  static const auto op = find_op<BackwardSignature>("lect11ext::lstm_cell_backward");
  return op.call(grad_h, grad_c, LSTM_CELL_ARGUMENTS, gates, c_out, mask);
}

struct LstmCellNode : autograd::Node {
  // input, h, c, weight_ih, weight_hh, bias_ih, bias_hh; then what the forward kept
  std::array<autograd::SavedVariable, 7> inputs_;
  autograd::SavedVariable gates_, c_out_;
  std::string candidate_;
  std::optional<double> grad_clip_;

  std::string name() const override { return "LstmCellBackward"; }

  void release_variables() override {
    for (auto& saved : inputs_) saved.reset_data();
    gates_.reset_data();
    c_out_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    if (!grads[0].defined() && !grads[1].defined()) return autograd::variable_list(inputs_.size());
    Mask mask;
    std::array<Tensor, 7> in;
    for (size_t i = 0; i < mask.size(); ++i) {
      mask[i] = task_should_compute_output(i);
      in[i] = inputs_[i].unpack();
    }
    auto [input, h, c, weight_ih, weight_hh, bias_ih, bias_hh] =
        call_backward(autograd::optional_of(grads[0]), autograd::optional_of(grads[1]), in[0], in[1], in[2], in[3],
                      in[4], autograd::optional_of(in[5]), autograd::optional_of(in[6]), candidate_, grad_clip_,
                      gates_.unpack(), c_out_.unpack(getptr()), mask);
    return {input, h, c, weight_ih, weight_hh, bias_ih, bias_hh};
  }
};

Outputs autograd_forward(LSTM_CELL_PARAMETERS, bool save_gates) {
  const bool differentiable = autograd::needs_grad(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = lstm_cell(LSTM_CELL_ARGUMENTS, save_gates || differentiable);
  }
  const auto& [h_out, c_out, gates] = out;
  if (differentiable) {
    auto node = autograd::make_node<LstmCellNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh));
    const auto save = [](const OptionalTensor& t) {
      return autograd::SavedVariable(autograd::tensor_or_none(t), /*is_output=*/false);
    };
    node->inputs_ = {save(input), save(h), save(c), save(weight_ih), save(weight_hh), save(bias_ih), save(bias_hh)};
    node->candidate_ = std::string(candidate);
    node->grad_clip_ = grad_clip;
    torch::autograd::set_history(h_out, node);
    torch::autograd::set_history(c_out, node);
    node->gates_ = autograd::SavedVariable(autograd::tensor_or_none(gates), /*is_output=*/false);
    node->c_out_ = autograd::SavedVariable(c_out, /*is_output=*/true);
  }
  if (autograd::has_tangent(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)) {
    const Gates composite = composite_gates(Inputs(LSTM_CELL_ARGUMENTS));
    autograd::copy_tangent(h_out, composite.o * composite.c_out.tanh());
    autograd::copy_tangent(c_out, composite.c_out);
  }
  // Not what the Node alone keeps (common/autograd.h).
  if (!save_gates) std::get<2>(out).reset();
  return out;
}

Gradients autograd_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, LSTM_CELL_PARAMETERS,
                            const Tensor& gates, const Tensor& c_out, Mask mask) {
  if (autograd::needs_grad(grad_h, grad_c, input, h, c, weight_ih, weight_hh, bias_ih, bias_hh) ||
      autograd::has_tangent(grad_h, grad_c, input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)) {
    return composite_backward(grad_h, grad_c, Inputs(LSTM_CELL_ARGUMENTS), mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_h, grad_c, LSTM_CELL_ARGUMENTS, gates, c_out, mask);
}

template <c10::DispatchKey key, c10::DeviceType device>
Outputs autocast_forward(LSTM_CELL_PARAMETERS, bool save_gates) {
  const c10::impl::ExcludeDispatchKeyGuard without(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return lstm_cell(cast(input), cast(h), cast(c), cast(weight_ih), cast(weight_hh), autograd::mapped(bias_ih, cast),
                   autograd::mapped(bias_hh, cast), candidate, grad_clip, save_gates);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("lstm_cell", autograd_forward);
  m.impl("lstm_cell_backward", autograd_backward);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("lstm_cell", autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("lstm_cell", autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace lect11ext
