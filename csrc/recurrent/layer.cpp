// lstm_layer and gru_layer: one layer, one direction, all steps. The recurrence: layer.h; devices: layer_cpu.cpp and
// layer_cuda.cpp; derivatives: layer_autograd.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "recurrent/cell_common.h"
#include "recurrent/layer_schema.h"
#include "recurrent/layer_tensors.h"

namespace lect11ext {
namespace {

using namespace layer_op;

// --- meta ---------------------------------------------------------------------------------------------------------

Outputs meta_forward(const Inputs& in, bool save) {
  in.check();
  const auto options = in.input.options();
  const auto [first, second] = in.order(in.steps(), in.batch());
  const auto over_time = [&, first = first, second = second](bool wanted, const c10::SymInt& size) {
    return wanted ? at::empty_symint({first, second, size}, options) : Tensor();
  };
  const bool fused = is_fused(in), recomputes = fused && in.recompute > 0, keeps = save && fused && !recomputes;
  Outputs out;
  out.out = over_time(true, in.h.sym_size(1));
  out.h = at::empty_symint(in.h.sym_sizes(), options);
  if (in.is_lstm()) out.c = at::empty_symint(in.c->sym_sizes(), options);
  out.gates = over_time(keeps, in.hidden() * in.kept_gates());
  out.cells = over_time(save && in.is_lstm() && !recomputes, in.hidden());
  if (save && in.is_lstm() && recomputes) {
    out.cells = at::empty_symint({in.kept_cells(), in.batch(), in.hidden()}, options);
  }
  out.normed = over_time(keeps && in.has_norm(), in.hidden() * in.gates());
  if (out.normed.defined()) {
    out.rstd = at::empty_symint({first, second}, options.dtype(recurrent::compute_type(in.input)));
  }
  return out;
}

Gradients meta_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  check_backward(grads, in, kept);
  Gradients result;
  const auto tensors = in.tensors();
  for (size_t i = 0; i < kInputs; ++i) {
    if (mask[i] && tensors[i].defined()) result[i] = at::empty_symint(tensors[i].sym_sizes(), tensors[i].options());
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("lstm_layer(" LSTM_LAYER_SCHEMA
        ", bool save=False)"
        " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor? gates, Tensor? cells, Tensor? normed, Tensor? rstd)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "lstm_layer_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor? grad_gates, "
      "Tensor? grad_cells, " LSTM_LAYER_BACKWARD_SCHEMA
      ", Tensor output, Tensor? gates, Tensor? cells, Tensor? normed, Tensor? rstd, bool[10] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("gru_layer(" GRU_LAYER_SCHEMA
        ", bool save=False) -> (Tensor output, Tensor h_n, Tensor? gates, Tensor? normed, Tensor? rstd)",
        {at::Tag::pt2_compliant_tag});
  m.def("gru_layer_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_gates, " GRU_LAYER_BACKWARD_SCHEMA
        ", Tensor output, Tensor? gates, Tensor? normed, Tensor? rstd, bool[8] output_mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("lstm_layer", lstm_forward<cpu_forward>);
  m.impl("lstm_layer_backward", lstm_backward<cpu_backward>);
  m.impl("gru_layer", gru_forward<cpu_forward>);
  m.impl("gru_layer_backward", gru_backward<cpu_backward>);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("lstm_layer", lstm_forward<cuda_forward>);
  m.impl("lstm_layer_backward", lstm_backward<cuda_backward>);
  m.impl("gru_layer", gru_forward<cuda_forward>);
  m.impl("gru_layer_backward", gru_backward<cuda_backward>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("lstm_layer", lstm_forward<meta_forward>);
  m.impl("lstm_layer_backward", lstm_backward<meta_backward>);
  m.impl("gru_layer", gru_forward<meta_forward>);
  m.impl("gru_layer_backward", gru_backward<meta_backward>);
}

}  // namespace lect11ext
