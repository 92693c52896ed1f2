// What the parts of lstm_cell on PyTorch's side share: its arguments, their checks, and the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "common/autograd.h"
#include "recurrent/cell_common.h"

namespace lect11ext::lstm_cell_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, OptionalTensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 7>;

inline void check_candidate(c10::string_view candidate) {
  TORCH_CHECK_VALUE(candidate == "tanh" || candidate == "sigmoid", "candidate must be 'tanh' or 'sigmoid', but got '",
                    candidate, "'");
}

struct Inputs : recurrent::CellInputs {
  const Tensor& c;
  bool sigmoid_candidate;
  double clip;

  Inputs(const Tensor& input, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, c10::string_view candidate,
         std::optional<double> grad_clip)
      : CellInputs{input, h, weight_ih, weight_hh, bias_ih, bias_hh, /*gates=*/4, /*rank=*/2, &c},
        c(c),
        sigmoid_candidate(candidate == "sigmoid"),
        clip(grad_clip.value_or(INFINITY)) {
    check_candidate(candidate);
    TORCH_CHECK_VALUE(clip >= 0, "grad_clip must be nonnegative, but got ", clip);
  }

  void check() const {
    CellInputs::check();
    recurrent::check_state("c", c, *this);
  }

  // What a backward is given beside the inputs.
  void check_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                      const Tensor& c_out) const {
    check();
    for (const auto& [name, grad] : {std::pair("grad_h", &grad_h), std::pair("grad_c", &grad_c)}) {
      if (autograd::defined(*grad)) recurrent::check_rows_of(name, **grad, *this, hidden(), /*any_type=*/true);
    }
    TORCH_CHECK_VALUE(gates.dim() == 2, "gates must be 2-D (was the forward called with save_gates?), but got ",
                      gates.dim(), "-D");
    recurrent::check_rows_of("gates", gates, *this, hidden() * 4);
    recurrent::check_rows_of("c_out", c_out, *this, hidden());
  }
};

// The schema's argument list, shared by all registrations of the two ops.
#define LSTM_CELL_PARAMETERS                                                                                     \
  const Tensor &input, const Tensor &h, const Tensor &c, const Tensor &weight_ih, const Tensor &weight_hh,       \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, c10::string_view candidate,                  \
      std::optional<double> grad_clip
#define LSTM_CELL_ARGUMENTS input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, candidate, grad_clip

using ForwardSignature = Outputs(LSTM_CELL_PARAMETERS, bool);
using BackwardSignature = Gradients(const OptionalTensor&, const OptionalTensor&, LSTM_CELL_PARAMETERS, const Tensor&,
                                    const Tensor&, Mask);

}  // namespace lect11ext::lstm_cell_op
