// PyTorch side of lstm_cell: schema, kernels' arguments. Derivatives: lstm_cell_autograd.cpp. Equations and kernels:
// lstm_cell.h.
#include "recurrent/lstm_cell.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "common/autograd.h"
#include "common/dispatch.h"
#include "common/ops.h"
#include "common/tensors.h"
#include "recurrent/cell_common.h"
#include "recurrent/cells_ops.h"
#include "recurrent/lstm_cell_inputs.h"
#include "recurrent/products.h"

#ifdef LECT11EXT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#endif

namespace lect11ext {
namespace {

using namespace lstm_cell_op;

// --- meta ---------------------------------------------------------------------------------------------------------

Outputs meta_forward(const Inputs& in, bool save_gates) {
  in.check();
  const c10::SymDimVector size{in.batch(), in.hidden()};
  const auto options = in.input.options();
  return {at::empty_symint(size, options), at::empty_symint(size, options),
          save_gates ? OptionalTensor(at::empty_symint({in.batch(), in.hidden() * 4}, options)) : std::nullopt};
}

Gradients meta_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                        const Tensor& gates, const Tensor& c_out, const Mask& mask) {
  in.check_backward(grad_h, grad_c, gates, c_out);
  using recurrent::empty_gradient;
  return {empty_gradient(mask[0], in.input),     empty_gradient(mask[1], in.h),
          empty_gradient(mask[2], in.c),         empty_gradient(mask[3], in.weight_ih),
          empty_gradient(mask[4], in.weight_hh), empty_gradient(mask[5], in.bias_ih),
          empty_gradient(mask[6], in.bias_hh)};
}

// --- CPU ----------------------------------------------------------------------------------------------------------

Outputs run_cpu(const Tensor& input, const Tensor& h, const Tensor& c, const recurrent::Weights& weights,
                const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool sigmoid_candidate, bool save_gates) {
  const int64_t batch = input.size(0), hidden = c.size(1);
  const auto options = input.options();
  Tensor h_out = at::empty({batch, hidden}, options), c_out = at::empty({batch, hidden}, options);
  Tensor gates = save_gates ? at::empty({batch, 4 * hidden}, options) : Tensor();
  const recurrent::Rows x(input), state(h), cell(c);
  const recurrent::Bias b_ih(bias_ih), b_hh(bias_hh);
  const LstmCell args{batch,
                      input.size(1),
                      h.size(1),
                      hidden,
                      dtype_of(input, "input"),
                      sigmoid_candidate,
                      x.data,
                      state.data,
                      cell.data,
                      weights.ih,
                      weights.hh,
                      x.stride,
                      state.stride,
                      cell.stride,
                      weights.ih_stride,
                      weights.hh_stride,
                      weights.packed,
                      b_ih.data(),
                      b_hh.data(),
                      h_out.mutable_data_ptr(),
                      c_out.mutable_data_ptr(),
                      save_gates ? gates.mutable_data_ptr() : nullptr};
  if (batch > 0) {
    const int64_t blocks = unit_blocks(hidden);
    // 4 gates; 32 multiply-adds take about a nanosecond, and reading the weights once as long as two rows of a batch.
    const int64_t cost = (batch + 2) * 4 * kUnits * (args.input_size + args.state_size) / 32;
    run_parallel(lstm_cell_kernel, args, blocks, cost);
  }
  return {h_out, c_out, autograd::optional_of(gates)};
}

Outputs cpu_forward(const Inputs& in, bool save_gates) {
  in.check();
  const recurrent::Rows ih(in.weight_ih), hh(in.weight_hh);
  return run_cpu(in.input, in.h, in.c, {ih.data, hh.data, ih.stride, hh.stride, /*packed=*/false}, in.bias_ih,
                 in.bias_hh, in.sigmoid_candidate, save_gates);
}

void check_packed(const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& packed_ih,
                  const Tensor& packed_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                  c10::string_view candidate) {
  recurrent::check_packed(input, h, packed_ih, packed_hh, bias_ih, bias_hh, /*gates=*/4);
  check_shape("c", c.sym_sizes(), h.sym_sizes(), "that of h");
  TORCH_CHECK_TYPE(c.scalar_type() == input.scalar_type(), "c must have the type of input, ", input.scalar_type(),
                   ", but got ", c.scalar_type());
  check_same_device({{"input", &input}, {"c", &c}});
  check_candidate(candidate);
}

std::tuple<Tensor, Tensor> cpu_packed(const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& packed_ih,
                                      const Tensor& packed_hh, const OptionalTensor& bias_ih,
                                      const OptionalTensor& bias_hh, c10::string_view candidate) {
  check_packed(input, h, c, packed_ih, packed_hh, bias_ih, bias_hh, candidate);
  auto [h_out, c_out, gates] =
      run_cpu(input, h, c, {packed_ih.const_data_ptr(), packed_hh.const_data_ptr(), 0, 0, /*packed=*/true}, bias_ih,
              bias_hh, candidate == "sigmoid", /*save_gates=*/false);
  return {h_out, c_out};
}

std::tuple<Tensor, Tensor> meta_packed(const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& packed_ih,
                                       const Tensor& packed_hh, const OptionalTensor& bias_ih,
                                       const OptionalTensor& bias_hh, c10::string_view candidate) {
  check_packed(input, h, c, packed_ih, packed_hh, bias_ih, bias_hh, candidate);
  return {at::empty_symint(h.sym_sizes(), input.options()), at::empty_symint(h.sym_sizes(), input.options())};
}

struct Pointwise {
  Tensor grad_pre, grad_c_in;
};

template <class Launch>
Pointwise gates_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                         const Tensor& gates, const Tensor& c_out, bool needs_c, Launch launch) {
  in.check_backward(grad_h, grad_c, gates, c_out);
  const int64_t batch = in.input.size(0), hidden = in.c.size(1);
  const auto options = in.input.options();
  const auto type = recurrent::grad_pre_type(in.input);
  Pointwise out{at::empty({batch, 4 * hidden}, options.dtype(type)),
                needs_c ? at::empty({batch, hidden}, options) : Tensor()};
  const Tensor dh = recurrent::dense_gradient(grad_h, in.input.scalar_type());
  const Tensor dc = recurrent::dense_gradient(grad_c, in.input.scalar_type());
  const Tensor kept = gates.contiguous(), cell = c_out.contiguous();
  const recurrent::Rows c(in.c);
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const LstmGatesBackward args{batch,
                               hidden,
                               dtype_of(in.input, "input"),
                               in.sigmoid_candidate,
                               pointer(dh),
                               pointer(dc),
                               in.clip,
                               kept.const_data_ptr(),
                               c.data,
                               c.stride,
                               cell.const_data_ptr(),
                               out.grad_pre.mutable_data_ptr(),
                               needs_c ? out.grad_c_in.mutable_data_ptr() : nullptr};
  if (batch > 0) launch(args);
  return out;
}

Gradients multiply(const Pointwise& pointwise, const Inputs& in, const Mask& mask) {
  const auto& pre = pointwise.grad_pre;
  const auto type = in.input.scalar_type();
  using recurrent::when;
  recurrent::Products products;
  Gradients gradients{when(mask[0], [&] { return products.input_gradient(pre, in.weight_ih); }),
                      when(mask[1], [&] { return products.input_gradient(pre, in.weight_hh); }),
                      pointwise.grad_c_in,
                      when(mask[3], [&] { return products.weight_gradient(pre, in.input); }),
                      when(mask[4], [&] { return products.weight_gradient(pre, in.h); }),
                      when(mask[5] && autograd::defined(in.bias_ih), [&] { return products.bias_gradient(pre, type); }),
                      when(mask[6] && autograd::defined(in.bias_hh),
                           [&] { return products.bias_gradient(pre, type); })};
  products.run();
  return gradients;
}

Gradients cpu_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                       const Tensor& gates, const Tensor& c_out, const Mask& mask) {
  const auto launch = [](const LstmGatesBackward& args) {
    run_parallel(lstm_gates_backward_kernel, args, args.batch, args.hidden * 4);
  };
  return multiply(gates_backward(grad_h, grad_c, in, gates, c_out, mask[2], launch), in, mask);
}

// --- CUDA ---------------------------------------------------------------------------------------------------------

#ifdef LECT11EXT_WITH_CUDA
Outputs cuda_forward(const Inputs& in, bool save_gates) {
  in.check();
  const c10::cuda::CUDAGuard guard(in.input.device());
  const int64_t batch = in.input.size(0), hidden = in.c.size(1);
  const auto options = in.input.options();
  Tensor h_out = at::empty({batch, hidden}, options), c_out = at::empty({batch, hidden}, options);
  Tensor pre = at::mm(in.input, in.weight_ih.t());
  pre = at::addmm_out(pre, pre, in.h, in.weight_hh.t());
  const recurrent::Rows c(in.c);
  const recurrent::Bias bias_ih(in.bias_ih), bias_hh(in.bias_hh);
  // The activated gates take the place of the sums.
  const LstmGates args{batch,
                       hidden,
                       dtype_of(in.input, "input"),
                       in.sigmoid_candidate,
                       pre.const_data_ptr(),
                       bias_ih.data(),
                       bias_hh.data(),
                       c.data,
                       c.stride,
                       h_out.mutable_data_ptr(),
                       c_out.mutable_data_ptr(),
                       save_gates ? pre.mutable_data_ptr() : nullptr};
  if (batch > 0) cuda::lstm_gates_forward(args, current_stream());
  return {h_out, c_out, save_gates ? OptionalTensor(pre) : std::nullopt};
}

Gradients cuda_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                        const Tensor& gates, const Tensor& c_out, const Mask& mask) {
  const c10::cuda::CUDAGuard guard(in.input.device());
  const auto launch = [](const LstmGatesBackward& args) { cuda::lstm_gates_backward(args, current_stream()); };
  return multiply(gates_backward(grad_h, grad_c, in, gates, c_out, mask[2], launch), in, mask);
}
#endif

// --- registration -------------------------------------------------------------------------------------------------

template <Outputs (*body)(const Inputs&, bool)>
Outputs forward_entry(LSTM_CELL_PARAMETERS, bool save_gates) {
  return body(Inputs(LSTM_CELL_ARGUMENTS), save_gates);
}

template <Gradients (*body)(const OptionalTensor&, const OptionalTensor&, const Inputs&, const Tensor&, const Tensor&,
                            const Mask&)>
Gradients backward_entry(const OptionalTensor& grad_h, const OptionalTensor& grad_c, LSTM_CELL_PARAMETERS,
                         const Tensor& gates, const Tensor& c_out, Mask mask) {
  return body(grad_h, grad_c, Inputs(LSTM_CELL_ARGUMENTS), gates, c_out, mask);
}

}  // namespace

Outputs lstm_cell(LSTM_CELL_PARAMETERS, bool save_gates) {
  static const auto op = find_op<ForwardSignature>("lect11ext::lstm_cell");
  return op.call(LSTM_CELL_ARGUMENTS, save_gates);
}

std::tuple<Tensor, Tensor> lstm_cell_packed(
    const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& packed_ih, const Tensor& packed_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, c10::string_view candidate) {
  static const auto op = find_op<decltype(cpu_packed)>("lect11ext::lstm_cell_packed");
  return op.call(input, h, c, packed_ih, packed_hh, bias_ih, bias_hh, candidate);
}

#define LSTM_CELL_SCHEMA                                                                                         \
  "Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "     \
  "str candidate, float? grad_clip"

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("lstm_cell(" LSTM_CELL_SCHEMA ", bool save_gates=False) -> (Tensor h_out, Tensor c_out, Tensor? gates)",
        {at::Tag::pt2_compliant_tag});
  m.def("lstm_cell_backward(Tensor? grad_h, Tensor? grad_c, " LSTM_CELL_SCHEMA
        ", Tensor gates, Tensor c_out, bool[7] output_mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  // Inference over weights that a module's prepack() laid out; no derivative.
  m.def(
      "lstm_cell_packed(Tensor input, Tensor h, Tensor c, Tensor packed_ih, Tensor packed_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, str candidate) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("lstm_cell", forward_entry<cpu_forward>);
  m.impl("lstm_cell_backward", backward_entry<cpu_backward>);
  m.impl("lstm_cell_packed", cpu_packed);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("lstm_cell", forward_entry<cuda_forward>);
  m.impl("lstm_cell_backward", backward_entry<cuda_backward>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("lstm_cell", forward_entry<meta_forward>);
  m.impl("lstm_cell_backward", backward_entry<meta_backward>);
  m.impl("lstm_cell_packed", meta_packed);
}

}  // namespace lect11ext
