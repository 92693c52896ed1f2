// PyTorch side of lstm_cell: schema, checks, autograd, autocast. Equations and kernels: lstm_cell.h.
#include "recurrent/lstm_cell.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/autograd.h"
#include "common/dispatch.h"
#include "common/tensors.h"
#include "recurrent/cell_common.h"
#include "recurrent/cells_ops.h"

#ifdef LECT11EXT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace lect11ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 7>;

struct Inputs : recurrent::CellInputs {
  const Tensor& c;
  bool sigmoid_candidate;
  double clip;

  Inputs(const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, c10::string_view candidate,
         std::optional<double> grad_clip)
      : CellInputs{input, h, weight_ih, weight_hh, bias_ih, bias_hh, /*gates=*/4},
        c(c),
        sigmoid_candidate(candidate == "sigmoid"),
        clip(grad_clip.value_or(INFINITY)) {
    TORCH_CHECK_VALUE(candidate == "tanh" || candidate == "sigmoid", "candidate must be 'tanh' or 'sigmoid', but got '",
                      candidate, "'");
    TORCH_CHECK_VALUE(clip >= 0, "grad_clip must be nonnegative, but got ", clip);
  }

  void check() const {
    CellInputs::check();
    recurrent::check_state("c", c, *this);
  }
};

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
  const auto when = [](bool wanted, auto make) { return wanted ? make() : Tensor(); };
  const auto bias = [&] { return pre.sum(0); };
  return {when(mask[0], [&] { return pre.mm(in.weight_ih); }),
          when(mask[1], [&] { return pre.mm(in.weight_hh); }),
          when(mask[2], [&] { return dc * f; }),
          when(mask[3], [&] { return pre.t().mm(in.input); }),
          when(mask[4], [&] { return pre.t().mm(in.h); }),
          when(mask[5] && autograd::defined(in.bias_ih), bias),
          when(mask[6] && autograd::defined(in.bias_hh), bias)};
}

// --- meta ---------------------------------------------------------------------------------------------------------

Outputs meta_forward(const Inputs& in, bool save_gates) {
  in.check();
  const c10::SymDimVector size{in.batch(), in.hidden()};
  const auto options = in.input.options();
  return {at::empty_symint(size, options), at::empty_symint(size, options),
          save_gates ? at::empty_symint({in.batch(), in.hidden() * 4}, options) : Tensor()};
}

Gradients meta_backward(const OptionalTensor&, const OptionalTensor&, const Inputs& in, const Tensor&, const Tensor&,
                        const Mask& mask) {
  const auto like = [&](bool wanted, const OptionalTensor& t) {
    return wanted && autograd::defined(t) ? at::empty_symint(t->sym_sizes(), t->options()) : Tensor();
  };
  return {like(mask[0], in.input),     like(mask[1], in.h),       like(mask[2], in.c),      like(mask[3], in.weight_ih),
          like(mask[4], in.weight_hh), like(mask[5], in.bias_ih), like(mask[6], in.bias_hh)};
}

// --- CPU ----------------------------------------------------------------------------------------------------------

// Rows at their stride, or packed blocks.
struct Weights {
  const void *ih, *hh;
  int64_t ih_stride, hh_stride;
  bool packed;
};

Outputs run_cpu(const Tensor& input, const Tensor& h, const Tensor& c, const Weights& weights,
                const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool sigmoid_candidate, bool save_gates) {
  const int64_t batch = input.size(0), hidden = h.size(1);
  const auto options = input.options();
  Tensor h_out = at::empty({batch, hidden}, options), c_out = at::empty({batch, hidden}, options);
  Tensor gates = save_gates ? at::empty({batch, 4 * hidden}, options) : Tensor();
  const recurrent::Rows x(input), state(h), cell(c);
  const recurrent::Bias b_ih(bias_ih), b_hh(bias_hh);
  const LstmCell args{batch,
                      input.size(1),
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
    const int64_t blocks = (hidden + kLstmUnits - 1) / kLstmUnits;
    // 4 gates; 32 multiply-adds take about a nanosecond, and reading the weights once as long as two rows of a batch.
    const int64_t cost = (batch + 2) * 4 * kLstmUnits * (args.input_size + hidden) / 32;
    run_parallel(lstm_cell_kernel, args, blocks, cost);
  }
  return {h_out, c_out, gates};
}

Outputs cpu_forward(const Inputs& in, bool save_gates) {
  in.check();
  const recurrent::Rows ih(in.weight_ih), hh(in.weight_hh);
  return run_cpu(in.input, in.h, in.c, {ih.data, hh.data, ih.stride, hh.stride, /*packed=*/false}, in.bias_ih,
                 in.bias_hh, in.sigmoid_candidate, save_gates);
}

std::tuple<Tensor, Tensor> cpu_packed(const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& packed_ih,
                                      const Tensor& packed_hh, const OptionalTensor& bias_ih,
                                      const OptionalTensor& bias_hh, c10::string_view candidate) {
  recurrent::check_packed(input, h, packed_ih, packed_hh, bias_ih, bias_hh, /*gates=*/4);
  check_shape("c", c.sym_sizes(), h.sym_sizes(), "that of h");
  TORCH_CHECK_TYPE(c.scalar_type() == input.scalar_type(), "c must have the type of input, ", input.scalar_type(),
                   ", but got ", c.scalar_type());
  auto [h_out, c_out, gates] =
      run_cpu(input, h, c, {packed_ih.const_data_ptr(), packed_hh.const_data_ptr(), 0, 0, /*packed=*/true}, bias_ih,
              bias_hh, candidate == "sigmoid", /*save_gates=*/false);
  return {h_out, c_out};
}

std::tuple<Tensor, Tensor> meta_packed(const Tensor& input, const Tensor& h, const Tensor& c, const Tensor&,
                                       const Tensor&, const OptionalTensor&, const OptionalTensor&, c10::string_view) {
  return {at::empty_symint(h.sym_sizes(), input.options()), at::empty_symint(h.sym_sizes(), input.options())};
}

struct Pointwise {
  Tensor grad_pre, grad_c_in;
};

template <class Launch>
Pointwise gates_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                         const Tensor& gates, const Tensor& c_out, bool needs_c, Launch launch) {
  in.check();
  TORCH_CHECK_VALUE(gates.dim() == 2, "gates must be 2-D (was the forward called with save_gates?), but got ",
                    gates.dim(), "-D");
  const int64_t batch = in.input.size(0), hidden = in.h.size(1);
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
                               dtype_of(out.grad_pre, "grad_pre"),
                               needs_c ? out.grad_c_in.mutable_data_ptr() : nullptr};
  if (batch > 0) launch(args);
  return out;
}

Gradients products(const Pointwise& pointwise, const Inputs& in, const Mask& mask) {
  const auto& pre = pointwise.grad_pre;
  const auto type = in.input.scalar_type();
  const auto when = [](bool wanted, auto make) { return wanted ? make() : Tensor(); };
  return {when(mask[0], [&] { return recurrent::input_gradient(pre, in.weight_ih); }),
          when(mask[1], [&] { return recurrent::input_gradient(pre, in.weight_hh); }),
          pointwise.grad_c_in,
          when(mask[3], [&] { return recurrent::weight_gradient(pre, in.input); }),
          when(mask[4], [&] { return recurrent::weight_gradient(pre, in.h); }),
          when(mask[5] && autograd::defined(in.bias_ih), [&] { return recurrent::bias_gradient(pre, type); }),
          when(mask[6] && autograd::defined(in.bias_hh), [&] { return recurrent::bias_gradient(pre, type); })};
}

Gradients cpu_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                       const Tensor& gates, const Tensor& c_out, const Mask& mask) {
  const auto launch = [](const LstmGatesBackward& args) {
    run_parallel(lstm_gates_backward_kernel, args, args.batch, args.hidden * 4);
  };
  return products(gates_backward(grad_h, grad_c, in, gates, c_out, mask[2], launch), in, mask);
}

// --- CUDA ---------------------------------------------------------------------------------------------------------

#ifdef LECT11EXT_WITH_CUDA
void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

Outputs cuda_forward(const Inputs& in, bool save_gates) {
  in.check();
  const c10::cuda::CUDAGuard guard(in.input.device());
  const int64_t batch = in.input.size(0), hidden = in.h.size(1);
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
  return {h_out, c_out, save_gates ? pre : Tensor()};
}

Gradients cuda_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Inputs& in,
                        const Tensor& gates, const Tensor& c_out, const Mask& mask) {
  const c10::cuda::CUDAGuard guard(in.input.device());
  const auto launch = [](const LstmGatesBackward& args) { cuda::lstm_gates_backward(args, current_stream()); };
  return products(gates_backward(grad_h, grad_c, in, gates, c_out, mask[2], launch), in, mask);
}
#endif

// --- registration -------------------------------------------------------------------------------------------------

#define LSTM_CELL_PARAMETERS                                                                                     \
  const Tensor &input, const Tensor &h, const Tensor &c, const Tensor &weight_ih, const Tensor &weight_hh,       \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, c10::string_view candidate,                  \
      std::optional<double> grad_clip
#define LSTM_CELL_ARGUMENTS input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, candidate, grad_clip

using ForwardSignature = Outputs(LSTM_CELL_PARAMETERS, bool);
using BackwardSignature = Gradients(const OptionalTensor&, const OptionalTensor&, LSTM_CELL_PARAMETERS, const Tensor&,
                                    const Tensor&, Mask);

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

Gradients call_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, LSTM_CELL_PARAMETERS,
                        const Tensor& gates, const Tensor& c_out, Mask mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::lstm_cell_backward", "").typed<BackwardSignature>();
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
    node->gates_ = autograd::SavedVariable(gates, /*is_output=*/false);
    node->c_out_ = autograd::SavedVariable(c_out, /*is_output=*/true);
  }
  if (autograd::has_tangent(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)) {
    const Gates composite = composite_gates(Inputs(LSTM_CELL_ARGUMENTS));
    autograd::copy_tangent(h_out, composite.o * composite.c_out.tanh());
    autograd::copy_tangent(c_out, composite.c_out);
  }
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
  const auto cast_optional = [&](const OptionalTensor& t) {
    return autograd::defined(t) ? OptionalTensor(cast(*t)) : std::nullopt;
  };
  return lstm_cell(cast(input), cast(h), cast(c), cast(weight_ih), cast(weight_hh), cast_optional(bias_ih),
                   cast_optional(bias_hh), candidate, grad_clip, save_gates);
}

}  // namespace

Outputs lstm_cell(LSTM_CELL_PARAMETERS, bool save_gates) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::lstm_cell", "").typed<ForwardSignature>();
  return op.call(LSTM_CELL_ARGUMENTS, save_gates);
}

std::tuple<Tensor, Tensor> lstm_cell_packed(
    const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& packed_ih, const Tensor& packed_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, c10::string_view candidate) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::lstm_cell_packed", "").typed<decltype(cpu_packed)>();
  return op.call(input, h, c, packed_ih, packed_hh, bias_ih, bias_hh, candidate);
}

#define LSTM_CELL_SCHEMA                                                                                         \
  "Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "     \
  "str candidate, float? grad_clip"

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("lstm_cell(" LSTM_CELL_SCHEMA ", bool save_gates=False) -> (Tensor h_out, Tensor c_out, Tensor gates)",
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
