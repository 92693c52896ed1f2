// What the parts of lstm_cell on PyTorch's side share: its arguments, their checks, and the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "recurrent/cell_common.h"

namespace lect11ext::lstm_cell_op {

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
