// What the parts of gru_cell on PyTorch's side share: its arguments, their checks, and the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "recurrent/cell_common.h"

namespace lect11ext::gru_cell_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, OptionalTensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 6>;

struct Inputs : recurrent::CellInputs {
  bool reset_after;
  double clip;

  Inputs(const Tensor& input, const Tensor& h, const Tensor& weight_ih, const Tensor& weight_hh,
         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool reset_after,
         std::optional<double> grad_clip)
      : CellInputs{input, h, weight_ih, weight_hh, bias_ih, bias_hh, /*gates=*/3},
        reset_after(reset_after),
        clip(grad_clip.value_or(INFINITY)) {
    TORCH_CHECK_VALUE(clip >= 0, "grad_clip must be nonnegative, but got ", clip);
  }

  // Blocks of H columns that the forward keeps: r, z, n, and for "reset after" the state's part of n.
  int64_t kept() const { return reset_after ? 4 : 3; }

  // What a backward is given beside the inputs.
  void check_backward(const Tensor& grad_h, const Tensor& gates) const {
    check();
    recurrent::check_rows_of("grad_h", grad_h, *this, hidden(), /*any_type=*/true);
    TORCH_CHECK_VALUE(gates.dim() == 2, "gates must be 2-D (was the forward called with save_gates?), but got ",
                      gates.dim(), "-D");
    recurrent::check_rows_of("gates", gates, *this, hidden() * kept());
  }
};

// The schema's argument list, shared by all registrations of the two ops.
#define GRU_CELL_PARAMETERS                                                                                    \
  const Tensor &input, const Tensor &h, const Tensor &weight_ih, const Tensor &weight_hh,                      \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, bool reset_after, std::optional<double> grad_clip
#define GRU_CELL_ARGUMENTS input, h, weight_ih, weight_hh, bias_ih, bias_hh, reset_after, grad_clip

using ForwardSignature = Outputs(GRU_CELL_PARAMETERS, bool);
using BackwardSignature = Gradients(const Tensor&, GRU_CELL_PARAMETERS, const Tensor&, Mask);

}  // namespace lect11ext::gru_cell_op
