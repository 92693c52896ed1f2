// The arguments of lstm_layer and gru_layer, and their checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/autograd.h"
#include "common/tensors.h"
#include "recurrent/cell_common.h"

namespace lect11ext::layer_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

struct Inputs {
  const Tensor &input, &h;
  const OptionalTensor& c;  // without: a GRU
  const Tensor &weight_ih, &weight_hh;
  const OptionalTensor &bias_ih, &bias_hh, &lengths, &reset;
  c10::string_view candidate;
  std::optional<double> grad_clip;
  bool reverse;

  bool is_lstm() const { return autograd::defined(c); }
  // In whichever of both orders the input lies, it is one matrix, and the output lies in the same.
  bool batch_first() const { return !input.is_contiguous() && input.transpose(0, 1).is_contiguous(); }
  c10::SymInt batch() const { return input.sym_size(1); }
  c10::SymInt hidden() const { return h.sym_size(1); }

  void check() const {
    TORCH_CHECK_VALUE(candidate == "tanh" || candidate == "sigmoid", "candidate must be 'tanh' or 'sigmoid', but got '",
                      candidate, "'");
    TORCH_CHECK_VALUE(grad_clip.value_or(0) >= 0, "grad_clip must be nonnegative, but got ", grad_clip.value_or(0));
    recurrent::CellInputs{input, h, weight_ih, weight_hh, bias_ih, bias_hh, is_lstm() ? 4 : 3, /*rank=*/3}.check();
    if (is_lstm()) {
      check_shape("c", c->sym_sizes(), h.sym_sizes(), "that of h");
      TORCH_CHECK_TYPE(c->scalar_type() == input.scalar_type(), "c must have the type of input, ", input.scalar_type(),
                       ", but got ", c->scalar_type());
      check_same_device({{"input", &input}, {"c", &*c}});
    }
    if (autograd::defined(lengths)) {
      TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong, "lengths must be int64, but got ", lengths->scalar_type());
      check_shape("lengths", lengths->sym_sizes(), {batch()}, "batch");
      check_same_device({{"input", &input}, {"lengths", &*lengths}});
    }
    if (autograd::defined(reset)) {
      TORCH_CHECK_TYPE(reset->scalar_type() == at::kBool, "reset must be bool, but got ", reset->scalar_type());
      check_shape("reset", reset->sym_sizes(), {input.sym_size(0), batch()}, "steps, batch");
      check_same_device({{"input", &input}, {"reset", &*reset}});
    }
  }
};

#define LSTM_LAYER_PARAMETERS                                                                                 \
  const Tensor &input, const Tensor &h, const Tensor &c, const Tensor &weight_ih, const Tensor &weight_hh,    \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, const OptionalTensor &lengths,            \
      const OptionalTensor &reset, c10::string_view candidate, std::optional<double> grad_clip, bool reverse
#define GRU_LAYER_PARAMETERS                                                                            \
  const Tensor &input, const Tensor &h, const Tensor &weight_ih, const Tensor &weight_hh,               \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, const OptionalTensor &lengths,      \
      const OptionalTensor &reset, std::optional<double> grad_clip, bool reverse

using LstmSignature = Outputs(LSTM_LAYER_PARAMETERS);
using GruSignature = std::tuple<Tensor, Tensor>(GRU_LAYER_PARAMETERS);

}  // namespace lect11ext::layer_op
