// Schemas of lstm_layer and gru_layer and of their backwards, their signatures, and the way between those and functions
// that know both cells.
#pragma once

#include <string>
#include <tuple>

#include "recurrent/layer_inputs.h"

// clang-format off
#define LSTM_LAYER_SCHEMA \
  "Tensor input, Tensor h, Tensor c, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih=None, Tensor? " \
  "bias_hh=None, Tensor? weight_hr=None, Tensor? weight_peephole=None, Tensor? layer_norm=None, " \
  "Tensor? hidden_mask=None, Tensor? lengths=None, Tensor? reset=None, Tensor? zoneout_h=None, Tensor? " \
  "zoneout_c=None, str candidate='tanh', float zoneout_rate_h=0., float zoneout_rate_c=0., float? " \
  "grad_clip=None, int truncate=0, int recompute=0, bool reverse=False, bool batch_first=False"
#define GRU_LAYER_SCHEMA \
  "Tensor input, Tensor h, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih=None, Tensor? " \
  "bias_hh=None, Tensor? layer_norm=None, Tensor? hidden_mask=None, Tensor? lengths=None, Tensor? " \
  "reset=None, Tensor? zoneout_h=None, bool reset_after=True, float zoneout_rate_h=0., float? " \
  "grad_clip=None, int truncate=0, int recompute=0, bool reverse=False, bool batch_first=False"
// The same arguments in a backward, where nothing is left out.
#define LSTM_LAYER_BACKWARD_SCHEMA \
  "Tensor input, Tensor h, Tensor c, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? " \
  "bias_hh, Tensor? weight_hr, Tensor? weight_peephole, Tensor? layer_norm, Tensor? hidden_mask, " \
  "Tensor? lengths, Tensor? reset, Tensor? zoneout_h, Tensor? zoneout_c, str candidate, float " \
  "zoneout_rate_h, float zoneout_rate_c, float? grad_clip, int truncate, int recompute, bool reverse, " \
  "bool batch_first"
#define GRU_LAYER_BACKWARD_SCHEMA \
  "Tensor input, Tensor h, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, " \
  "Tensor? layer_norm, Tensor? hidden_mask, Tensor? lengths, Tensor? reset, Tensor? zoneout_h, bool " \
  "reset_after, float zoneout_rate_h, float? grad_clip, int truncate, int recompute, bool reverse, bool " \
  "batch_first"

// The arguments in C++, and an Inputs made of them.
#define LSTM_LAYER_PARAMETERS \
  const Tensor& input, const Tensor& h, const Tensor& c, const OptionalTensor& weight_ih, const Tensor& \
  weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& \
  weight_hr, const OptionalTensor& weight_peephole, const OptionalTensor& layer_norm, const \
  OptionalTensor& hidden_mask, const OptionalTensor& lengths, const OptionalTensor& reset, const \
  OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c, c10::string_view candidate, double \
  zoneout_rate_h, double zoneout_rate_c, std::optional<double> grad_clip, int64_t truncate, int64_t \
  recompute, bool reverse, bool batch_first
#define GRU_LAYER_PARAMETERS \
  const Tensor& input, const Tensor& h, const OptionalTensor& weight_ih, const Tensor& weight_hh, const \
  OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& layer_norm, const \
  OptionalTensor& hidden_mask, const OptionalTensor& lengths, const OptionalTensor& reset, const \
  OptionalTensor& zoneout_h, bool reset_after, double zoneout_rate_h, std::optional<double> grad_clip, \
  int64_t truncate, int64_t recompute, bool reverse, bool batch_first
#define LSTM_LAYER_INPUTS \
  Inputs{.input = input, .h = h, .c = c, .weight_ih = weight_ih, .weight_hh = weight_hh, .bias_ih = bias_ih, \
  .bias_hh = bias_hh, .weight_hr = weight_hr, .weight_peephole = weight_peephole, .layer_norm = layer_norm, \
  .hidden_mask = hidden_mask, .lengths = lengths, .reset = reset, .zoneout_h = zoneout_h, .zoneout_c = zoneout_c, \
  .candidate = candidate, .zoneout_rate_h = zoneout_rate_h, .zoneout_rate_c = zoneout_rate_c, \
  .grad_clip = grad_clip, .truncate = truncate, .recompute = recompute, .reverse = reverse, \
  .batch_first = batch_first}
#define GRU_LAYER_INPUTS \
  Inputs{.input = input, .h = h, .weight_ih = weight_ih, .weight_hh = weight_hh, .bias_ih = bias_ih, \
  .bias_hh = bias_hh, .layer_norm = layer_norm, .hidden_mask = hidden_mask, .lengths = lengths, .reset = reset, \
  .zoneout_h = zoneout_h, .reset_after = reset_after, .zoneout_rate_h = zoneout_rate_h, .grad_clip = grad_clip, \
  .truncate = truncate, .recompute = recompute, .reverse = reverse, .batch_first = batch_first}
// clang-format on

namespace lect11ext::layer_op {

// What only a forward that saves gives is optional in the schema too: an undefined tensor is none to AOTInductor.
using LstmOutputs = std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
using GruOutputs = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors10 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

using LstmForward = LstmOutputs(LSTM_LAYER_PARAMETERS, bool save);
using GruForward = GruOutputs(GRU_LAYER_PARAMETERS, bool save);

#define LSTM_LAYER_BACKWARD_PARAMETERS                                                                             \
  const OptionalTensor &grad_out, const OptionalTensor &grad_h, const OptionalTensor &grad_c,                      \
      const OptionalTensor &grad_gates, const OptionalTensor &grad_cells, LSTM_LAYER_PARAMETERS, const Tensor &out, \
      const OptionalTensor &gates, const OptionalTensor &cells, const OptionalTensor &normed,                      \
      const OptionalTensor &rstd, std::array<bool, 10> mask
#define GRU_LAYER_BACKWARD_PARAMETERS                                                                         \
  const OptionalTensor &grad_out, const OptionalTensor &grad_h, const OptionalTensor &grad_gates,             \
      GRU_LAYER_PARAMETERS, const Tensor &out, const OptionalTensor &gates, const OptionalTensor &normed,     \
      const OptionalTensor &rstd, std::array<bool, 8> mask

using LstmBackward = Tensors10(LSTM_LAYER_BACKWARD_PARAMETERS);
using GruBackward = Tensors8(GRU_LAYER_BACKWARD_PARAMETERS);

using ForwardBody = Outputs(const Inputs&, bool save);
using BackwardBody = Gradients(const OutputGradients&, const Inputs&, const Outputs& kept, const Mask&);

template <ForwardBody* body>
LstmOutputs lstm_forward(LSTM_LAYER_PARAMETERS, bool save) {
  using autograd::optional_of;
  const Outputs out = body(LSTM_LAYER_INPUTS, save);
  return {out.out,
          out.h,
          out.c,
          optional_of(out.gates),
          optional_of(out.cells),
          optional_of(out.normed),
          optional_of(out.rstd)};
}

template <ForwardBody* body>
GruOutputs gru_forward(GRU_LAYER_PARAMETERS, bool save) {
  using autograd::optional_of;
  const Outputs out = body(GRU_LAYER_INPUTS, save);
  return {out.out, out.h, optional_of(out.gates), optional_of(out.normed), optional_of(out.rstd)};
}

template <BackwardBody* body>
Tensors10 lstm_backward(LSTM_LAYER_BACKWARD_PARAMETERS) {
  using autograd::tensor_or_none;
  const OutputGradients grads{tensor_or_none(grad_out), tensor_or_none(grad_h), tensor_or_none(grad_c),
                              tensor_or_none(grad_gates), tensor_or_none(grad_cells)};
  const Outputs kept{
      out, {}, {}, tensor_or_none(gates), tensor_or_none(cells), tensor_or_none(normed), tensor_or_none(rstd)};
  const auto g = body(grads, LSTM_LAYER_INPUTS, kept, mask);
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]};
}

template <BackwardBody* body>
Tensors8 gru_backward(GRU_LAYER_BACKWARD_PARAMETERS) {
  using autograd::tensor_or_none;
  const OutputGradients grads{tensor_or_none(grad_out), tensor_or_none(grad_h), {}, tensor_or_none(grad_gates), {}};
  const Outputs kept{out, {}, {}, tensor_or_none(gates), {}, tensor_or_none(normed), tensor_or_none(rstd)};
  const auto g = body(grads, GRU_LAYER_INPUTS, kept,
                      {mask[0], mask[1], false, mask[2], mask[3], mask[4], mask[5], false, mask[6], mask[7]});
  return {g[kInput], g[kH], g[kWeightIh], g[kWeightHh], g[kBiasIh], g[kBiasHh], g[kNorm], g[kHiddenMask]};
}

}  // namespace lect11ext::layer_op
