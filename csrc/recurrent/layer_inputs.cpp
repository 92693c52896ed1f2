// Checks of the arguments of lstm_layer, gru_layer and their backwards.
#include "recurrent/layer_inputs.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>

#include <utility>

#include "common/tensors.h"
#include "recurrent/cell_common.h"

namespace lect11ext::layer_op {
namespace {

void check_type(const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), name, " must have the type of input, ",
                   input.scalar_type(), ", but got ", tensor.scalar_type());
}

void check_rate(const char* name, double rate) {
  TORCH_CHECK_VALUE(rate >= 0 && rate <= 1, name, " must be a probability, from 0 to 1, but got ", rate);
}

// An optional argument of the input's type.
void check_parameter(const Inputs& in, const char* name, const OptionalTensor& tensor, c10::SymIntArrayRef size,
                     const char* meaning) {
  if (!autograd::defined(tensor)) return;
  check_shape(name, tensor->sym_sizes(), size, meaning);
  check_type(name, *tensor, in.input);
  check_same_device({{"input", &in.input}, {name, &*tensor}});
}

void check_bools(const Inputs& in, const char* name, const OptionalTensor& mask, c10::SymIntArrayRef size,
                 const char* meaning) {
  if (!autograd::defined(mask)) return;
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, name, " must be bool, but got ", mask->scalar_type());
  check_shape(name, mask->sym_sizes(), size, meaning);
  check_same_device({{"input", &in.input}, {name, &*mask}});
}

}  // namespace

// Before the checks of a cell's, which would speak of weight_hh. Of h, weight_hh and weight_hr, and of c, weight_hh and
// weight_hr, the one is to blame that does not have the size that the other two have.
void Inputs::check_projection() const {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>("h", &h), std::pair("c", &*c),
                                     std::pair("weight_hh", &weight_hh), std::pair("weight_hr", &*weight_hr)}) {
    recurrent::check_matrix(name, *tensor);
  }
  const c10::SymInt of_c = c->sym_size(1), of_h = h.sym_size(1);
  const c10::SymInt state = weight_hh.sym_size(1) == weight_hr->sym_size(0) ? weight_hh.sym_size(1) : of_h;
  const c10::SymInt size = weight_hh.sym_size(0) == of_c * gates() ? of_c : weight_hr->sym_size(1);
  check_shape("h", h.sym_sizes(), {batch(), state}, "batch of input, size of weight_hr");
  check_shape("weight_hr", weight_hr->sym_sizes(), {state, size}, "size of h, hidden_size");
  check_shape("weight_hh", weight_hh.sym_sizes(), {size * gates(), state}, "gates * hidden_size, size of h");
  check_shape("c", c->sym_sizes(), {batch(), size}, "batch of input, hidden_size");
}

void Inputs::check() const {
  TORCH_CHECK_VALUE(candidate == "tanh" || candidate == "sigmoid", "candidate must be 'tanh' or 'sigmoid', but got '",
                    candidate, "'");
  TORCH_CHECK_VALUE(clip() >= 0, "grad_clip must be nonnegative, but got ", clip());
  TORCH_CHECK_VALUE(truncate >= 0, "truncate must be a number of steps, or 0 for none, but got ", truncate);
  TORCH_CHECK_VALUE(recompute >= 0, "recompute must be a number of steps, or 0 for none, but got ", recompute);
  check_rate("zoneout_rate_h", zoneout_rate_h);
  check_rate("zoneout_rate_c", zoneout_rate_c);
  TORCH_CHECK_VALUE(input.dim() == 3, "input must be 3-D, but got ", input.dim(), "-D");
  const Tensor by_time = batch_first ? input.transpose(0, 1) : input;
  const Tensor* cell = is_lstm() ? &*c : nullptr;
  const Tensor ih = autograd::tensor_or_none(weight_ih);
  const recurrent::CellInputs as_cell{by_time, h, ih, weight_hh, bias_ih, bias_hh, gates(), /*rank=*/3, cell};
  if (has_projection()) check_projection();
  as_cell.check();
  if (is_lstm()) recurrent::check_state("c", *c, as_cell);
  const c10::SymInt size = as_cell.hidden(), state = h.sym_size(1);
  TORCH_CHECK_VALUE(has_projection() || state == size,
                    "h must have hidden_size columns where there is no weight_hr: ", size, ", but got ", state);
  TORCH_CHECK_VALUE(!has_norm() || !resets_first(),
                    "layer_norm must be None where reset_after is False: the norm is over the sums of all gates");
  check_parameter(*this, "weight_hr", weight_hr, {state, size}, "size of h, hidden_size");
  check_parameter(*this, "weight_peephole", weight_peephole, {c10::SymInt(3), size}, "i f o, hidden_size");
  check_parameter(*this, "layer_norm", layer_norm, {size * gates()}, "gates * hidden_size");
  if (factors.defined()) {
    check_parameter(*this, "factors", factors, {steps(), batch(), size * (is_lstm() ? 6 : 5)},
                    "steps, batch, factors * hidden_size");
  }
  check_parameter(*this, "hidden_mask", hidden_mask, {batch(), state}, "batch, size of h");
  if (autograd::defined(lengths)) {
    TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong, "lengths must be int64, but got ", lengths->scalar_type());
    check_shape("lengths", lengths->sym_sizes(), {batch()}, "batch");
    check_same_device({{"input", &input}, {"lengths", &*lengths}});
  }
  const auto [first, second] = order(steps(), batch());
  check_bools(*this, "reset", reset, {first, second}, batch_first ? "batch, steps" : "steps, batch");
  const char* over_time = batch_first ? "batch, steps, size" : "steps, batch, size";
  check_bools(*this, "zoneout_h", zoneout_h, {first, second, state}, over_time);
  check_bools(*this, "zoneout_c", zoneout_c, {first, second, size}, over_time);
}

Tensor Inputs::inactive() const {
  const Tensor t = at::arange(steps(), lengths->options());
  return batch_first ? t.unsqueeze(0) >= lengths->unsqueeze(1) : t.unsqueeze(1) >= lengths->unsqueeze(0);
}

c10::SymInt Inputs::kept_cells() const { return (steps() - 1).max(0) / recompute; }

bool is_fused(const Inputs& in) { return !in.has_projection(); }

void check_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept) {
  in.check();
  const auto [first, second] = in.order(in.steps(), in.batch());
  const auto check = [&](const char* name, const Tensor& tensor, c10::SymIntArrayRef size, bool any_type = false) {
    if (!tensor.defined()) return;
    check_shape(name, tensor.sym_sizes(), size, "as the forward's");
    if (!any_type) check_type(name, tensor, in.input);
    check_same_device({{"input", &in.input}, {name, &tensor}});
  };
  const auto over_time = [&, first = first, second = second](int64_t parts) {
    return std::array<c10::SymInt, 3>{first, second, in.hidden() * parts};
  };
  const bool recomputes = in.recompute > 0;
  TORCH_CHECK_VALUE(kept.out.defined() && kept.gates.defined() != recomputes && kept.cells.defined() == in.is_lstm() &&
                        kept.normed.defined() == (in.has_norm() && !recomputes) &&
                        kept.rstd.defined() == kept.normed.defined(),
                    "output, gates, cells, normed and rstd must be those of a forward with save=True");
  TORCH_CHECK_VALUE(!recomputes || (!grads.gates.defined() && !grads.cells.defined()),
                    "grad_gates and grad_cells must be None where recompute is positive: the forward gives neither");
  check("grad_output", grads.out, over_time(1), true);
  check("grad_gates", grads.gates, over_time(in.kept_gates()), true);
  check("grad_cells", grads.cells, over_time(1), true);
  check("grad_h", grads.h, {in.batch(), in.hidden()}, true);
  check("grad_c", grads.c, {in.batch(), in.hidden()}, true);
  check("output", kept.out, over_time(1));
  check("gates", kept.gates, over_time(in.kept_gates()));
  if (recomputes) check("cells", kept.cells, {in.kept_cells(), in.batch(), in.hidden()});
  else check("cells", kept.cells, over_time(1));
  check("normed", kept.normed, over_time(in.gates()));
  check("rstd", kept.rstd, {first, second}, true);
}

}  // namespace lect11ext::layer_op
