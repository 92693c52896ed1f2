#include "recurrent/cell_common.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "common/tensors.h"
#include "recurrent/units.h"

namespace lect11ext::recurrent {

void check_matrix(const char* name, const at::Tensor& tensor, int64_t rank) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, name, " must be ", rank, "-D, but got ", tensor.dim(), "-D");
}

namespace {

void check_same_type(const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), name, " must have the type of input, ",
                   input.scalar_type(), ", but got ", tensor.scalar_type());
}

void check_biases(const at::Tensor& input, const std::optional<at::Tensor>& bias_ih,
                  const std::optional<at::Tensor>& bias_hh, const c10::SymInt& size) {
  for (const auto& [name, bias] : {std::pair("bias_ih", &bias_ih), std::pair("bias_hh", &bias_hh)}) {
    if (!bias->has_value() || !(*bias)->defined()) continue;
    check_shape(name, (*bias)->sym_sizes(), {size}, "gates * hidden_size");
    check_same_type(name, **bias, input);
    check_same_device({{"input", &input}, {name, &**bias}});
  }
}

void check_rows(const at::Tensor& input, const at::Tensor& h, int64_t rank = 2) {
  check_dtype("input", input);
  check_matrix("input", input, rank);
  check_matrix("h", h);
  check_shape("h", h.sym_sizes(), {input.sym_size(-2), h.sym_size(1)}, "batch of input, hidden_size");
  check_same_type("h", h, input);
  check_same_device({{"input", &input}, {"h", &h}});
}

}  // namespace

// An LSTM's h may be a projection of another size than c, where c and weight_hh agree on it.
c10::SymInt CellInputs::hidden() const {
  const bool projected = cell_state != nullptr && cell_state->dim() == 2 && weight_hh.dim() == 2 &&
                         weight_hh.sym_size(1) == h.sym_size(1) &&
                         weight_hh.sym_size(0) == cell_state->sym_size(1) * gates;
  return projected ? cell_state->sym_size(1) : h.sym_size(1);
}

void CellInputs::check() const {
  check_rows(input, h, rank);
  check_matrix("weight_hh", weight_hh);
  const c10::SymInt rows = hidden() * gates, state = h.sym_size(1);
  // A weight that fits itself, as a module's does, is not to blame for a state or an input that do not fit it.
  const c10::SymInt columns = weight_hh.sym_size(1);
  TORCH_CHECK_VALUE(columns == state || weight_hh.sym_size(0) != columns * gates,
                    "h must have hidden_size columns, as weight_hh has: ", columns, ", but got ", state);
  check_shape("weight_hh", weight_hh.sym_sizes(), {rows, state}, "gates * hidden_size, size of h");
  check_same_type("weight_hh", weight_hh, input);
  check_same_device({{"input", &input}, {"weight_hh", &weight_hh}});
  if (weight_ih.defined()) {
    check_matrix("weight_ih", weight_ih);
    check_shape("weight_ih", weight_ih.sym_sizes(), {rows, weight_ih.sym_size(1)}, "gates * hidden_size, input_size");
    TORCH_CHECK_VALUE(input.sym_size(-1) == weight_ih.sym_size(1),
                      "input must have input_size columns, as weight_ih has: ", weight_ih.sym_size(1), ", but got ",
                      input.sym_size(-1));
    check_same_type("weight_ih", weight_ih, input);
    check_same_device({{"input", &input}, {"weight_ih", &weight_ih}});
  } else {
    TORCH_CHECK_VALUE(input.sym_size(-1) == rows, "input must have gates * hidden_size columns where there is no ",
                      "weight_ih: ", rows, ", but got ", input.sym_size(-1));
  }
  check_biases(input, bias_ih, bias_hh, rows);
}

void check_packed(const at::Tensor& input, const at::Tensor& h, const at::Tensor& packed_ih,
                  const at::Tensor& packed_hh, const std::optional<at::Tensor>& bias_ih,
                  const std::optional<at::Tensor>& bias_hh, int64_t gates) {
  check_rows(input, h);
  const c10::SymInt hidden = h.sym_size(1), blocks = unit_blocks(hidden);
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble,
                   "input must be float32 or float64 where the weights are packed, but got ", input.scalar_type());
  for (const auto& [name, packed, size] :
       {std::tuple("packed_ih", &packed_ih, input.sym_size(1)), std::tuple("packed_hh", &packed_hh, hidden)}) {
    check_shape(name, packed->sym_sizes(), {blocks, gates, size, kUnits}, "blocks, gates, size, units");
    check_same_type(name, *packed, input);
    TORCH_CHECK_VALUE(packed->is_contiguous(), name, " must be contiguous");
    check_same_device({{"input", &input}, {name, packed}});
  }
  check_biases(input, bias_ih, bias_hh, hidden * gates);
}

void check_state(const char* name, const at::Tensor& state, const CellInputs& in) {
  check_shape(name, state.sym_sizes(), {in.batch(), in.hidden()}, "batch of input, hidden_size");
  check_same_type(name, state, in.input);
  check_same_device({{"input", &in.input}, {name, &state}});
}

void check_rows_of(const char* name, const at::Tensor& tensor, const CellInputs& in, const c10::SymInt& columns,
                   bool any_type) {
  check_shape(name, tensor.sym_sizes(), {in.batch(), columns}, "batch of input, units");
  if (!any_type) check_same_type(name, tensor, in.input);
  check_same_device({{"input", &in.input}, {name, &tensor}});
}

Rows::Rows(const at::Tensor& matrix) : held(with_unit_columns(matrix)) {
  data = held.const_data_ptr();
  stride = held.stride(0);
}

Bias::Bias(const std::optional<at::Tensor>& bias) {
  if (bias.has_value() && bias->defined()) held = bias->contiguous();
}

const void* Bias::data() const { return held.defined() ? held.const_data_ptr() : nullptr; }

at::Tensor dense_gradient(const std::optional<at::Tensor>& grad, at::ScalarType type) {
  return grad.has_value() && grad->defined() ? grad->to(type).contiguous() : at::Tensor();
}

at::ScalarType grad_pre_type(const at::Tensor& like) { return like.is_cpu() ? compute_type(like) : like.scalar_type(); }

at::ScalarType compute_type(const at::Tensor& like) { return c10::promoteTypes(like.scalar_type(), at::kFloat); }

}  // namespace lect11ext::recurrent
