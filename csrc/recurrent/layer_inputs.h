// What the parts of lstm_layer and gru_layer on PyTorch's side share: arguments, their checks, and what they give.
// What it all means stands in layer.h; the ops' schemas in layer_schema.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <optional>

#include "common/autograd.h"

namespace lect11ext::layer_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a gradient can be asked for, in this order. A GRU has neither c nor peepholes.
// clang-format off
enum Input : size_t {
  kInput, kH, kC, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kPeephole, kNorm, kHiddenMask, kInputs
};
// clang-format on
using Gradients = std::array<Tensor, kInputs>;
using Mask = std::array<bool, kInputs>;

struct Inputs {
  Tensor input, h;
  OptionalTensor c = {};          // without: a GRU
  OptionalTensor weight_ih = {};  // without: input is multiplied already
  Tensor weight_hh;
  OptionalTensor bias_ih = {}, bias_hh = {};
  OptionalTensor weight_hr = {}, weight_peephole = {};  // LSTM only; weight_hr projects the states
  OptionalTensor layer_norm = {}, hidden_mask = {};
  OptionalTensor lengths = {}, reset = {}, zoneout_h = {}, zoneout_c = {};
  c10::string_view candidate = "tanh";  // borrowed
  bool reset_after = true;              // GRU only
  double zoneout_rate_h = 0, zoneout_rate_c = 0;
  std::optional<double> grad_clip = {};
  int64_t truncate = 0, recompute = 0;  // in steps; 0: neither
  bool reverse = false, batch_first = false;
  Tensor factors = {};  // of the recurrence of tangents (layer.h); else undefined

  bool is_lstm() const { return autograd::defined(c); }
  bool has_projection() const { return autograd::defined(weight_hr); }
  bool has_norm() const { return autograd::defined(layer_norm); }
  bool zones_out_h() const { return autograd::defined(zoneout_h) || zoneout_rate_h != 0; }
  bool zones_out_c() const { return is_lstm() && (autograd::defined(zoneout_c) || zoneout_rate_c != 0); }
  bool resets_first() const { return !is_lstm() && !reset_after; }
  int64_t gates() const { return is_lstm() ? 4 : 3; }
  int64_t kept_gates() const { return resets_first() || factors.defined() ? gates() : 4; }
  bool sigmoid_candidate() const { return candidate == "sigmoid"; }
  double clip() const { return grad_clip.value_or(INFINITY); }
  int64_t time_dim() const { return batch_first ? 1 : 0; }
  c10::SymInt steps() const { return input.sym_size(time_dim()); }
  c10::SymInt batch() const { return input.sym_size(1 - time_dim()); }
  c10::SymInt hidden() const { return weight_hh.sym_size(0) / gates(); }

  // Two dimensions, in the order that the input has them.
  template <class Int>
  std::array<Int, 2> order(Int time, Int batch) const {
    return batch_first ? std::array<Int, 2>{batch, time} : std::array<Int, 2>{time, batch};
  }

  // All that has gradients; undefined for none.
  std::array<Tensor, kInputs> tensors() const {
    using autograd::tensor_or_none;
    return {input,
            h,
            tensor_or_none(c),
            tensor_or_none(weight_ih),
            weight_hh,
            tensor_or_none(bias_ih),
            tensor_or_none(bias_hh),
            tensor_or_none(weight_peephole),
            tensor_or_none(layer_norm),
            tensor_or_none(hidden_mask)};
  }

  // The same, with what `f` makes of the tensors that have gradients.
  template <class F>
  Inputs mapped(const F& f) const {
    Inputs in = *this;
    for (Tensor* t : {&in.input, &in.h, &in.weight_hh}) *t = f(*t);
    for (OptionalTensor* t : {&in.c, &in.weight_ih, &in.bias_ih, &in.bias_hh, &in.weight_hr, &in.weight_peephole,
                              &in.layer_norm, &in.hidden_mask}) {
      *t = autograd::mapped(*t, f);
    }
    return in;
  }

  void check() const;
  void check_projection() const;

  // Steps that do not take place, in the order of the input's dimensions; where lengths are given.
  Tensor inactive() const;

  // How many cells are kept where only some are: those before steps recompute, 2·recompute, ….
  c10::SymInt kept_cells() const;

  Inputs without_recompute() const {
    Inputs in = *this;
    in.recompute = 0;
    return in;
  }
};

// What a forward gives: what the user sees, and, where asked for, what its backward needs, over time in the order of
// the input. Gates and cells have derivatives; with `recompute` there are no gates, and cells [·, B, H] without one.
struct Outputs {
  Tensor out, h, c, gates, cells, normed, rstd;
};

struct OutputGradients {  // undefined for zero
  Tensor out, h, c, gates, cells;
};

// What the kernels cover; the rest runs step by step.
bool is_fused(const Inputs& in);

// In differentiable ops, from the fused cells where they have what is asked for. Gives no gates.
Outputs step_by_step(const Inputs& in, bool save);

// The ops, through the dispatcher.
Outputs call_forward(const Inputs& in, bool save);
Gradients call_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask);

void check_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept);

// A backward in differentiable ops, and the tangents of a forward's outputs, given its inputs with theirs.
Gradients composite_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask);
OutputGradients tangents(const Inputs& dual, const Outputs& out);

}  // namespace lect11ext::layer_op
