// What the parts of lstm_layer and gru_layer on PyTorch's side share: arguments, their checks, and signatures.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/autograd.h"

namespace lect11ext::layer_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a gradient can be asked for: input, h, c, weight_ih, weight_hh, bias_ih, bias_hh. A GRU has no c.
inline constexpr size_t kInputs = 7;
using Gradients = std::array<Tensor, kInputs>;
using Mask = std::array<bool, kInputs>;

struct Inputs {
  const Tensor &input, &h;
  const OptionalTensor& c;  // without: a GRU
  const Tensor &weight_ih, &weight_hh;
  const OptionalTensor &bias_ih, &bias_hh;
  const OptionalTensor& weight_hr;  // LSTM: projects the states
  const OptionalTensor &lengths, &reset;
  c10::string_view candidate;
  std::optional<double> grad_clip;
  bool reverse, batch_first;

  bool is_lstm() const { return autograd::defined(c); }
  bool has_projection() const { return autograd::defined(weight_hr); }
  int64_t gates() const { return is_lstm() ? 4 : 3; }
  bool sigmoid_candidate() const { return candidate == "sigmoid"; }
  double clip() const { return grad_clip.value_or(INFINITY); }
  c10::SymInt steps() const { return input.sym_size(batch_first ? 1 : 0); }
  c10::SymInt batch() const { return input.sym_size(batch_first ? 0 : 1); }
  c10::SymInt hidden() const { return weight_hh.sym_size(0) / gates(); }

  // Two dimensions, in the order that the input has them.
  template <class Int>
  std::array<Int, 2> order(Int time, Int batch) const {
    return batch_first ? std::array<Int, 2>{batch, time} : std::array<Int, 2>{time, batch};
  }

  void check() const;

  // Steps that do not take place, in the order of the input's dimensions; where lengths are given.
  Tensor inactive() const;
};

// What a forward gives. Gates [T, B, 4H] (of the GRU r, z, n and the state's part of n) and, of an LSTM, the cell's
// states [T, B, H], in the order of the input, where they were asked for.
struct Outputs {
  Tensor out, h, c, gates, cells;
};

// Gradients of all of them; undefined for zero.
using OutputGradients = Outputs;

// What the kernels cover; the rest runs step by step.
bool is_fused(const Inputs& in);

// From the fused cells, differentiable by itself. Gives no gates.
Outputs step_by_step(const Inputs& in);

// The ops, through the dispatcher.
Outputs call_forward(const Inputs& in, bool save);
Gradients call_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask);

void check_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept);

// The two schemas' arguments. `INPUTS` makes an Inputs of them.
#define LSTM_LAYER_PARAMETERS                                                                                     \
  const Tensor &input, const Tensor &h, const Tensor &c, const Tensor &weight_ih, const Tensor &weight_hh,        \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, const OptionalTensor &weight_hr,              \
      const OptionalTensor &lengths, const OptionalTensor &reset, c10::string_view candidate,                     \
      std::optional<double> grad_clip, bool reverse, bool batch_first
#define LSTM_LAYER_INPUTS(cell)                                                                                 \
  Inputs {                                                                                                      \
    input, h, cell, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reset, candidate, grad_clip,    \
        reverse, batch_first                                                                                    \
  }
#define GRU_LAYER_PARAMETERS                                                                                     \
  const Tensor &input, const Tensor &h, const Tensor &weight_ih, const Tensor &weight_hh,                        \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, const OptionalTensor &lengths,               \
      const OptionalTensor &reset, std::optional<double> grad_clip, bool reverse, bool batch_first
#define GRU_LAYER_INPUTS(none)                                                                                   \
  Inputs {                                                                                                       \
    input, h, none, weight_ih, weight_hh, bias_ih, bias_hh, none, lengths, reset, "tanh", grad_clip, reverse,    \
        batch_first                                                                                              \
  }

using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

using LstmForward = Tensors5(LSTM_LAYER_PARAMETERS, bool);
using GruForward = Tensors3(GRU_LAYER_PARAMETERS, bool);
using LstmBackward = Tensors7(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, LSTM_LAYER_PARAMETERS, const Tensor&,
                              const Tensor&, const Tensor&, std::array<bool, 7>);
using GruBackward = Tensors6(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, GRU_LAYER_PARAMETERS,
                             const Tensor&, const Tensor&, std::array<bool, 6>);

// --- from bodies that know both cells to the two ops' functions

using ForwardBody = Outputs(const Inputs&, bool save);
using BackwardBody = Gradients(const OutputGradients&, const Inputs&, const Outputs& kept, const Mask&);

template <ForwardBody* body>
Tensors5 lstm_forward(LSTM_LAYER_PARAMETERS, bool save) {
  const OptionalTensor cell(c);
  auto [out, h_n, c_n, gates, cells] = body(LSTM_LAYER_INPUTS(cell), save);
  return {std::move(out), std::move(h_n), std::move(c_n), std::move(gates), std::move(cells)};
}

template <ForwardBody* body>
Tensors3 gru_forward(GRU_LAYER_PARAMETERS, bool save) {
  const OptionalTensor none;
  auto [out, h_n, c_n, gates, cells] = body(GRU_LAYER_INPUTS(none), save);
  return {std::move(out), std::move(h_n), std::move(gates)};
}

template <BackwardBody* body>
Tensors7 lstm_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                       const OptionalTensor& grad_gates, const OptionalTensor& grad_cells, LSTM_LAYER_PARAMETERS,
                       const Tensor& out, const Tensor& gates, const Tensor& cells, std::array<bool, 7> mask) {
  const auto plain = [](const OptionalTensor& t) { return autograd::tensor_or_none(t); };
  const OptionalTensor cell(c);
  const auto g = body({plain(grad_out), plain(grad_h), plain(grad_c), plain(grad_gates), plain(grad_cells)},
                      LSTM_LAYER_INPUTS(cell), {out, {}, {}, gates, cells}, mask);
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6]};
}

template <BackwardBody* body>
Tensors6 gru_backward(const OptionalTensor& grad_out, const OptionalTensor& grad_h, const OptionalTensor& grad_gates,
                      GRU_LAYER_PARAMETERS, const Tensor& out, const Tensor& gates, std::array<bool, 6> mask) {
  const auto plain = [](const OptionalTensor& t) { return autograd::tensor_or_none(t); };
  const OptionalTensor none;
  const auto g = body({plain(grad_out), plain(grad_h), {}, plain(grad_gates), {}}, GRU_LAYER_INPUTS(none),
                      {out, {}, {}, gates, {}}, {mask[0], mask[1], false, mask[2], mask[3], mask[4], mask[5]});
  return {g[0], g[1], g[3], g[4], g[5], g[6]};
}

}  // namespace lect11ext::layer_op
