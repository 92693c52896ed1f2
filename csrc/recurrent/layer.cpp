// PyTorch side of lstm_layer and gru_layer: one layer, one direction, all steps. The recurrence: layer.h. What has
// derivatives runs step by step, from the fused cells.
#include "recurrent/layer.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>

#include "common/autograd.h"
#include "common/barrier.h"
#include "common/dispatch.h"
#include "common/tensors.h"
#include "recurrent/cells_ops.h"
#include "recurrent/layer_inputs.h"

namespace lect11ext {
namespace {

using namespace layer_op;

// --- step by step -------------------------------------------------------------------------------------------------

// In differentiable ATen and the fused cells: any device, type and derivative.
Outputs step_by_step(const Inputs& in) {
  const int64_t steps = in.input.size(0);
  Tensor h = in.h, c = in.is_lstm() ? *in.c : Tensor();
  std::vector<Tensor> outputs(steps);
  const auto choose = [](const Tensor& where, const Tensor& a, const Tensor& b) { return at::where(where, a, b); };
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = in.reverse ? steps - 1 - s : s;
    const Tensor active = autograd::defined(in.lengths) ? in.lengths->gt(t).unsqueeze(-1) : Tensor();
    if (autograd::defined(in.reset)) {
      Tensor restart = in.reset->select(0, t).unsqueeze(-1);
      if (active.defined()) restart = restart & active;
      h = choose(restart, at::zeros_like(h), h);
      if (c.defined()) c = choose(restart, at::zeros_like(c), c);
    }
    Tensor h_new, c_new;
    if (in.is_lstm()) {
      Tensor gates;
      std::tie(h_new, c_new, gates) = lstm_cell(in.input.select(0, t), h, c, in.weight_ih, in.weight_hh, in.bias_ih,
                                                in.bias_hh, in.candidate, in.grad_clip, false);
    } else {
      h_new = std::get<0>(gru_cell(in.input.select(0, t), h, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh,
                                   /*reset_after=*/true, in.grad_clip, false));
    }
    outputs[t] = active.defined() ? choose(active, h_new, at::zeros_like(h_new)) : h_new;
    h = active.defined() ? choose(active, h_new, h) : h_new;
    if (c.defined()) c = active.defined() ? choose(active, c_new, c) : c_new;
  }
  if (steps == 0) {
    const Tensor none = at::empty_symint({0, in.batch(), in.hidden()}, in.input.options());
    return {none, h.clone(), c.defined() ? c.clone() : c};
  }
  const Tensor output = in.batch_first() ? at::stack(outputs, 1).transpose(0, 1) : at::stack(outputs);
  return {output, h, c};
}

// --- CPU ----------------------------------------------------------------------------------------------------------

bool has_kernel(const Inputs& in) {
  return in.input.is_cpu() && (in.input.scalar_type() == at::kFloat || in.input.scalar_type() == at::kDouble);
}

// The biases of the input product: both, but for the state's of the GRU's n, which the reset gate multiplies.
Tensor input_bias(const Inputs& in) {
  const int64_t H = in.h.size(1);
  const bool ih = autograd::defined(in.bias_ih), hh = autograd::defined(in.bias_hh);
  if (!hh) return ih ? *in.bias_ih : Tensor();
  const Tensor state = in.is_lstm()
                           ? *in.bias_hh
                           : at::cat({in.bias_hh->narrow(0, 0, 2 * H), at::zeros_like(in.bias_hh->narrow(0, 0, H))});
  return ih ? *in.bias_ih + state : state;
}

Outputs run_cpu(const Inputs& in) {
  const int64_t T = in.input.size(0), B = in.input.size(1), H = in.h.size(1), gates = in.is_lstm() ? 4 : 3;
  const auto options = in.input.options();
  const bool batch_first = in.batch_first();
  const Tensor rows = (batch_first ? in.input.transpose(0, 1) : in.input).reshape({T * B, in.input.size(2)});
  const Tensor bias = input_bias(in);
  const Tensor pre = bias.defined() ? at::addmm(bias, rows, in.weight_ih.t()) : at::mm(rows, in.weight_ih.t());
  Tensor output = batch_first ? empty_output({B, T, H}, options).transpose(0, 1) : empty_output({T, B, H}, options);
  Tensor h[2] = {at::empty({B, H}, options), at::empty({B, H}, options)};
  Tensor c = in.is_lstm() ? at::empty({B, H}, options) : Tensor();
  h[0].copy_(in.h);
  if (c.defined()) c.copy_(*in.c);
  const Tensor lengths = autograd::defined(in.lengths) ? in.lengths->contiguous() : Tensor();
  const Tensor reset = autograd::defined(in.reset) ? in.reset->contiguous() : Tensor();
  if (reset.defined() && T > 0) {
    const int64_t t = in.reverse ? T - 1 : 0;
    Tensor restart = reset.select(0, t).unsqueeze(-1);
    if (lengths.defined()) restart = restart & lengths.gt(t).unsqueeze(-1);
    h[0].masked_fill_(restart, 0);
    if (c.defined()) c.masked_fill_(restart, 0);
  }
  const recurrent::Rows weight(in.weight_hh);
  const bool state_bias = !in.is_lstm() && autograd::defined(in.bias_hh);
  const Tensor bias_hidden = state_bias ? in.bias_hh->narrow(0, 2 * H, H).contiguous() : Tensor();

  // A step's multiply-adds, of which a core does about 32 a nanosecond; below some microseconds a step, waiting for
  // other threads costs more than they bring.
  constexpr int64_t kMultiplyAddsWorthAShare = 32 * 3000;
  const int64_t blocks = unit_blocks(H);
#if AT_PARALLEL_OPENMP
  const int64_t most = std::min<int64_t>(blocks, at::in_parallel_region() ? 1 : at::get_num_threads());
#else
  const int64_t most = 1;  // nothing else promises that all shares run at the same time
#endif
  const int64_t shares =
      std::clamp<int64_t>(B * gates * H * H / kMultiplyAddsWorthAShare, 1, std::max<int64_t>(most, 1));
  Barrier barrier(shares);
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const Layer args{in.is_lstm() ? LayerCell::Lstm : LayerCell::Gru,
                   T,
                   B,
                   H,
                   dtype_of(in.input, "input"),
                   in.candidate == "sigmoid",
                   in.reverse,
                   pre.const_data_ptr(),
                   batch_first ? gates * H : B * gates * H,
                   batch_first ? T * gates * H : gates * H,
                   weight.data,
                   weight.stride,
                   pointer(bias_hidden),
                   static_cast<const int64_t*>(pointer(lengths)),
                   static_cast<const uint8_t*>(pointer(reset)),
                   {h[0].mutable_data_ptr(), h[1].mutable_data_ptr()},
                   c.defined() ? c.mutable_data_ptr() : nullptr,
                   output.mutable_data_ptr(),
                   output.stride(0),
                   output.stride(1),
                   shares,
                   &barrier};
  if (B > 0 && H > 0 && T > 0) {
    const auto run = [&](int64_t begin, int64_t end) { layer_kernel(args, begin, end); };
    shares == 1 ? run(0, 1) : at::parallel_for(0, shares, 1, run);
  }
  return {output, h[T % 2], c};
}

Outputs kernel_forward(const Inputs& in) {
  in.check();
  return has_kernel(in) ? run_cpu(in) : step_by_step(in);
}

Outputs meta_forward(const Inputs& in) {
  in.check();
  const auto options = in.input.options();
  const auto state = [&] { return at::empty_symint({in.batch(), in.hidden()}, options); };
  const auto T = in.input.sym_size(0), B = in.batch(), H = in.hidden();
  Tensor output =
      in.batch_first() ? at::empty_symint({B, T, H}, options).transpose(0, 1) : at::empty_symint({T, B, H}, options);
  return {output, state(), in.is_lstm() ? state() : Tensor()};
}

// --- autograd -----------------------------------------------------------------------------------------------------

Outputs call(const Inputs& in) {
  if (in.is_lstm()) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::lstm_layer", "").typed<LstmSignature>();
    return op.call(in.input, in.h, *in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.lengths, in.reset,
                   in.candidate, in.grad_clip, in.reverse);
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::gru_layer", "").typed<GruSignature>();
  const auto [output, h_n] = op.call(in.input, in.h, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.lengths,
                                     in.reset, in.grad_clip, in.reverse);
  return {output, h_n, Tensor()};
}

Outputs autograd_forward(const Inputs& in) {
  if (autograd::needs_grad(in.input, in.h, in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh) ||
      autograd::has_tangent(in.input, in.h, in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh)) {
    in.check();
    return step_by_step(in);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call(in);
}

// --- registration -------------------------------------------------------------------------------------------------

template <Outputs (*body)(const Inputs&)>
Outputs lstm_entry(LSTM_LAYER_PARAMETERS) {
  const OptionalTensor cell(c);
  return body(
      Inputs{input, h, cell, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reset, candidate, grad_clip, reverse});
}

template <Outputs (*body)(const Inputs&)>
std::tuple<Tensor, Tensor> gru_entry(GRU_LAYER_PARAMETERS) {
  const OptionalTensor none;
  const auto [output, h_n, unused] =
      body(Inputs{input, h, none, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reset, "tanh", grad_clip, reverse});
  return {output, h_n};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def(
      "lstm_layer(Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, Tensor? lengths=None, Tensor? reset=None, str candidate='tanh', float? grad_clip=None, "
      "bool reverse=False) -> (Tensor output, Tensor h_n, Tensor c_n)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "gru_layer(Tensor input, Tensor h, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? lengths=None, Tensor? reset=None, float? grad_clip=None, bool reverse=False) -> (Tensor output, "
      "Tensor h_n)",
      {at::Tag::pt2_compliant_tag});
}

#define LECT11EXT_LAYERS(body)              \
  m.impl("lstm_layer", lstm_entry<body>); \
  m.impl("gru_layer", gru_entry<body>)

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { LECT11EXT_LAYERS(kernel_forward); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { LECT11EXT_LAYERS(kernel_forward); }
#endif
TORCH_LIBRARY_IMPL(lect11ext, Meta, m) { LECT11EXT_LAYERS(meta_forward); }
TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) { LECT11EXT_LAYERS(autograd_forward); }

}  // namespace lect11ext
