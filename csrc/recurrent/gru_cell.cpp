// PyTorch side of gru_cell: schema, kernels' arguments. Derivatives: gru_cell_autograd.cpp. Equations and kernels:
// gru_cell.h.
#include "recurrent/gru_cell.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "common/autograd.h"
#include "common/dispatch.h"
#include "common/ops.h"
#include "common/tensors.h"
#include "recurrent/cell_common.h"
#include "recurrent/cells_ops.h"
#include "recurrent/gru_cell_inputs.h"
#include "recurrent/products.h"

#ifdef LECT11EXT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#endif

namespace lect11ext {
namespace {

using namespace gru_cell_op;

// --- meta ---------------------------------------------------------------------------------------------------------

Outputs meta_forward(const Inputs& in, bool save_gates) {
  in.check();
  const c10::SymDimVector size{in.batch(), in.hidden()};
  const auto options = in.input.options();
  return {at::empty_symint(size, options),
          save_gates ? OptionalTensor(at::empty_symint({in.batch(), in.hidden() * in.kept()}, options)) : std::nullopt};
}

Gradients meta_backward(const Tensor& grad_h, const Inputs& in, const Tensor& gates, const Mask& mask) {
  in.check_backward(grad_h, gates);
  using recurrent::empty_gradient;
  return {empty_gradient(mask[0], in.input),     empty_gradient(mask[1], in.h),
          empty_gradient(mask[2], in.weight_ih), empty_gradient(mask[3], in.weight_hh),
          empty_gradient(mask[4], in.bias_ih),   empty_gradient(mask[5], in.bias_hh)};
}

// --- CPU ----------------------------------------------------------------------------------------------------------

Outputs run_cpu(const Tensor& input, const Tensor& h, const recurrent::Weights& weights, const OptionalTensor& bias_ih,
                const OptionalTensor& bias_hh, bool reset_after, bool save_gates) {
  const int64_t batch = input.size(0), hidden = h.size(1);
  const auto options = input.options();
  const recurrent::Rows x(input), state(h);
  const recurrent::Bias b_ih(bias_ih), b_hh(bias_hh);
  const bool keeps = save_gates || !reset_after;  // the second stage of "reset before" reads z
  Tensor h_out = at::empty({batch, hidden}, options);
  Tensor gates = keeps ? at::empty({batch, (reset_after ? 4 : 3) * hidden}, options) : Tensor();
  Tensor reset_h = reset_after ? Tensor() : at::empty({batch, hidden}, options);
  GruCell args{batch,
               input.size(1),
               hidden,
               dtype_of(input, "input"),
               GruStage::After,
               x.data,
               state.data,
               weights.ih,
               weights.hh,
               x.stride,
               state.stride,
               weights.ih_stride,
               weights.hh_stride,
               weights.packed,
               b_ih.data(),
               b_hh.data(),
               reset_after ? nullptr : reset_h.mutable_data_ptr(),
               h_out.mutable_data_ptr(),
               keeps ? gates.mutable_data_ptr() : nullptr};
  const int64_t blocks = unit_blocks(hidden);
  const int64_t cost = (batch + 2) * 3 * kUnits * (args.input_size + hidden) / 32;
  const auto run = [&](GruStage stage, int64_t share) {
    args.stage = stage;
    if (batch > 0) run_parallel(gru_cell_kernel, args, blocks, cost / share);
  };
  if (reset_after) {
    run(GruStage::After, 1);
  } else {
    run(GruStage::Reset, 2);
    run(GruStage::Output, 2);
  }
  return {h_out, save_gates ? OptionalTensor(gates) : std::nullopt};
}

Outputs cpu_forward(const Inputs& in, bool save_gates) {
  in.check();
  const recurrent::Rows ih(in.weight_ih), hh(in.weight_hh);
  return run_cpu(in.input, in.h, {ih.data, hh.data, ih.stride, hh.stride, /*packed=*/false}, in.bias_ih, in.bias_hh,
                 in.reset_after, save_gates);
}

Tensor cpu_packed(const Tensor& input, const Tensor& h, const Tensor& packed_ih, const Tensor& packed_hh,
                  const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool reset_after) {
  recurrent::check_packed(input, h, packed_ih, packed_hh, bias_ih, bias_hh, /*gates=*/3);
  return std::get<0>(run_cpu(input, h, {packed_ih.const_data_ptr(), packed_hh.const_data_ptr(), 0, 0, /*packed=*/true},
                             bias_ih, bias_hh, reset_after, /*save_gates=*/false));
}

Tensor meta_packed(const Tensor& input, const Tensor& h, const Tensor& packed_ih, const Tensor& packed_hh,
                   const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool) {
  recurrent::check_packed(input, h, packed_ih, packed_hh, bias_ih, bias_hh, /*gates=*/3);
  return at::empty_symint(h.sym_sizes(), input.options());
}

// The backward is the same on both devices, but for how its elementwise stages are launched.
template <class Launch>
Gradients backward(const Tensor& grad_h, const Inputs& in, const Tensor& gates, const Mask& mask, Launch launch) {
  in.check_backward(grad_h, gates);
  const int64_t batch = in.input.size(0), H = in.h.size(1);
  const auto storage = in.input.scalar_type();
  const auto options = in.input.options().dtype(recurrent::grad_pre_type(in.input));
  Tensor pre = at::empty({batch, 3 * H}, options);
  Tensor pre_hidden = in.reset_after ? at::empty({batch, 3 * H}, options) : pre;
  Tensor grad_h_in = mask[1] ? at::empty({batch, H}, options) : Tensor();
  const Tensor dh = recurrent::dense_gradient(grad_h, storage), kept = gates.contiguous();
  const recurrent::Rows h(in.h);
  GruGatesBackward args{batch,
                        H,
                        dtype_of(in.input, "input"),
                        in.reset_after ? GruStage::After : GruStage::Reset,
                        dh.const_data_ptr(),
                        in.clip,
                        kept.const_data_ptr(),
                        h.data,
                        h.stride,
                        nullptr,
                        pre.mutable_data_ptr(),
                        in.reset_after ? pre_hidden.mutable_data_ptr() : nullptr,
                        mask[1] ? grad_h_in.mutable_data_ptr() : nullptr};
  if (batch > 0) launch(args);
  if (!in.reset_after && batch > 0) {
    recurrent::Products first;
    const Tensor through = first.input_gradient(pre.narrow(1, 2 * H, H), in.weight_hh.narrow(0, 2 * H, H));
    first.run();
    const Tensor grad_reset_h = through.to(pre.scalar_type());
    args.stage = GruStage::Output;
    args.grad_reset_h = grad_reset_h.const_data_ptr();
    launch(args);
  }

  using recurrent::when;
  recurrent::Products products;
  const auto state_gradient = [&] {
    const Tensor direct = grad_h_in.to(storage);
    return in.reset_after ? products.input_gradient(pre_hidden, in.weight_hh, direct)
                          : products.input_gradient(pre.narrow(1, 0, 2 * H), in.weight_hh.narrow(0, 0, 2 * H), direct);
  };
  const auto recurrent_weight_gradient = [&] {
    if (in.reset_after) return products.weight_gradient(pre_hidden, in.h);
    Tensor out = empty_output({3 * H, H}, in.input.options());
    const Tensor reset_h = kept.narrow(1, 0, H) * in.h;
    products.weight_gradient(pre.narrow(1, 0, 2 * H), in.h, out.narrow(0, 0, 2 * H));
    products.weight_gradient(pre.narrow(1, 2 * H, H), reset_h, out.narrow(0, 2 * H, H));
    return out;
  };
  Gradients gradients{
      when(mask[0], [&] { return products.input_gradient(pre, in.weight_ih); }),
      when(mask[1], state_gradient),
      when(mask[2], [&] { return products.weight_gradient(pre, in.input); }),
      when(mask[3], recurrent_weight_gradient),
      when(mask[4] && autograd::defined(in.bias_ih), [&] { return products.bias_gradient(pre, storage); }),
      when(mask[5] && autograd::defined(in.bias_hh), [&] { return products.bias_gradient(pre_hidden, storage); })};
  products.run();
  return gradients;
}

Gradients cpu_backward(const Tensor& grad_h, const Inputs& in, const Tensor& gates, const Mask& mask) {
  return backward(grad_h, in, gates, mask, [](const GruGatesBackward& args) {
    run_parallel(gru_gates_backward_kernel, args, args.batch, args.hidden * 3);
  });
}

// --- CUDA ---------------------------------------------------------------------------------------------------------

#ifdef LECT11EXT_WITH_CUDA
Outputs cuda_forward(const Inputs& in, bool save_gates) {
  in.check();
  const c10::cuda::CUDAGuard guard(in.input.device());
  const int64_t batch = in.input.size(0), H = in.h.size(1);
  const auto options = in.input.options();
  const recurrent::Rows h(in.h);
  const recurrent::Bias bias_ih(in.bias_ih), bias_hh(in.bias_hh);
  const bool keeps = save_gates || !in.reset_after;
  Tensor h_out = at::empty({batch, H}, options);
  Tensor gates = keeps ? at::empty({batch, in.kept() * H}, options) : Tensor();
  const Tensor pre_input = at::mm(in.input, in.weight_ih.t());
  Tensor pre_hidden = at::mm(in.h, (in.reset_after ? in.weight_hh : in.weight_hh.narrow(0, 0, 2 * H)).t());
  Tensor reset_h = in.reset_after ? Tensor() : at::empty({batch, H}, options);
  GruGates args{batch,
                H,
                dtype_of(in.input, "input"),
                in.reset_after ? GruStage::After : GruStage::Reset,
                pre_input.const_data_ptr(),
                pre_hidden.const_data_ptr(),
                bias_ih.data(),
                bias_hh.data(),
                h.data,
                h.stride,
                in.reset_after ? nullptr : reset_h.mutable_data_ptr(),
                h_out.mutable_data_ptr(),
                keeps ? gates.mutable_data_ptr() : nullptr};
  if (batch > 0) cuda::gru_gates_forward(args, current_stream());
  if (!in.reset_after && batch > 0) {
    pre_hidden = at::mm(reset_h, in.weight_hh.narrow(0, 2 * H, H).t());
    args.stage = GruStage::Output;
    args.pre_hidden = pre_hidden.const_data_ptr();
    cuda::gru_gates_forward(args, current_stream());
  }
  return {h_out, save_gates ? OptionalTensor(gates) : std::nullopt};
}

Gradients cuda_backward(const Tensor& grad_h, const Inputs& in, const Tensor& gates, const Mask& mask) {
  const c10::cuda::CUDAGuard guard(in.input.device());
  return backward(grad_h, in, gates, mask,
                  [](const GruGatesBackward& args) { cuda::gru_gates_backward(args, current_stream()); });
}
#endif

// --- registration -------------------------------------------------------------------------------------------------

template <Outputs (*body)(const Inputs&, bool)>
Outputs forward_entry(GRU_CELL_PARAMETERS, bool save_gates) {
  return body(Inputs(GRU_CELL_ARGUMENTS), save_gates);
}

template <Gradients (*body)(const Tensor&, const Inputs&, const Tensor&, const Mask&)>
Gradients backward_entry(const Tensor& grad_h, GRU_CELL_PARAMETERS, const Tensor& gates, Mask mask) {
  return body(grad_h, Inputs(GRU_CELL_ARGUMENTS), gates, mask);
}

}  // namespace

Outputs gru_cell(GRU_CELL_PARAMETERS, bool save_gates) {
  static const auto op = find_op<ForwardSignature>("lect11ext::gru_cell");
  return op.call(GRU_CELL_ARGUMENTS, save_gates);
}

Tensor gru_cell_packed(const Tensor& input, const Tensor& h, const Tensor& packed_ih, const Tensor& packed_hh,
                       const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool reset_after) {
  static const auto op = find_op<decltype(cpu_packed)>("lect11ext::gru_cell_packed");
  return op.call(input, h, packed_ih, packed_hh, bias_ih, bias_hh, reset_after);
}

#define GRU_CELL_SCHEMA                                                                                       \
  "Tensor input, Tensor h, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "            \
  "bool reset_after, float? grad_clip"

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("gru_cell(" GRU_CELL_SCHEMA ", bool save_gates=False) -> (Tensor h_out, Tensor? gates)",
        {at::Tag::pt2_compliant_tag});
  m.def("gru_cell_backward(Tensor grad_h, " GRU_CELL_SCHEMA
        ", Tensor gates, bool[6] output_mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  // Inference over weights that a module's prepack() laid out; no derivative.
  m.def(
      "gru_cell_packed(Tensor input, Tensor h, Tensor packed_ih, Tensor packed_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, bool reset_after) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("gru_cell", forward_entry<cpu_forward>);
  m.impl("gru_cell_backward", backward_entry<cpu_backward>);
  m.impl("gru_cell_packed", cpu_packed);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("gru_cell", forward_entry<cuda_forward>);
  m.impl("gru_cell_backward", backward_entry<cuda_backward>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("gru_cell", forward_entry<meta_forward>);
  m.impl("gru_cell_backward", backward_entry<meta_backward>);
  m.impl("gru_cell_packed", meta_packed);
}

}  // namespace lect11ext
