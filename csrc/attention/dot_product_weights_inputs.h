// What the parts of attention_weights and its backward on PyTorch's side share: arguments, checks, the ops' signatures.
#pragma once

#include "attention/dot_product_inputs.h"

namespace lect11ext::attention_op {

// The arguments of the op. Equations: dot_product_weights.h.
struct WeightsInputs {
  Inputs in;  // the key stands for the value too, and there are no starts
  const Tensor& lse;
  bool average;

  // Throws where an argument does not fit, and names it.
  void check() const;
  void check_gradient(const Tensor& grad) const;
  c10::SymDimVector shape() const;
};

// What attention_weights and attention_with_weights are given beside three tensors.
#define WEIGHTS_OPTIONS_SCHEMA \
  "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? dropout_key, float dropout_p, float? scale, int? window_left, " \
  "int? window_right, bool bottom_right, float? softcap, bool average_heads"
#define WEIGHTS_OPTIONS \
  const OptionalTensor &attn_mask, const OptionalTensor &alibi_slopes, const OptionalTensor &dropout_key, \
      double dropout_p, std::optional<double> scale, std::optional<int64_t> window_left, \
      std::optional<int64_t> window_right, bool bottom_right, std::optional<double> softcap, bool average_heads

#define ATTENTION_WEIGHTS_SCHEMA "Tensor query, Tensor key, Tensor lse, " WEIGHTS_OPTIONS_SCHEMA
#define ATTENTION_WEIGHTS_PARAMETERS const Tensor &query, const Tensor &key, const Tensor &lse, WEIGHTS_OPTIONS
// `none` is an OptionalTensor without a tensor.
#define ATTENTION_WEIGHTS_INPUTS(none)                                                                              \
  WeightsInputs {                                                                                                   \
    {query, key, key, attn_mask, alibi_slopes, none, none, dropout_key, dropout_p, scale, window_left, window_right, \
     bottom_right, softcap},                                                                                        \
        lse, average_heads                                                                                          \
  }
#define ATTENTION_WEIGHTS_ARGUMENTS_OF(w)                                                                           \
  w.in.query, w.in.key, w.lse, w.in.attn_mask, w.in.alibi_slopes, w.in.dropout_key, w.in.dropout_p, w.in.scale,     \
      w.in.window_left, w.in.window_right, w.in.bottom_right, w.in.softcap, w.average

// Of attention and its weights in one op.
using OutputsAndWeights = std::tuple<Tensor, Tensor, Tensor>;  // output, lse, weights
#define WITH_WEIGHTS_SCHEMA "Tensor query, Tensor key, Tensor value, " WEIGHTS_OPTIONS_SCHEMA
#define WITH_WEIGHTS_PARAMETERS const Tensor &query, const Tensor &key, const Tensor &value, WEIGHTS_OPTIONS
#define WITH_WEIGHTS_INPUTS(none)                                                                                   \
  Inputs {                                                                                                          \
    query, key, value, attn_mask, alibi_slopes, none, none, dropout_key, dropout_p, scale, window_left, window_right, \
        bottom_right, softcap                                                                                       \
  }

using WithWeightsSignature = OutputsAndWeights(WITH_WEIGHTS_PARAMETERS);
using WeightsSignature = Tensor(ATTENTION_WEIGHTS_PARAMETERS);
// The gradients of query, key, lse and attn_mask.
using WeightsBackwardSignature = Gradients(const Tensor& grad, ATTENTION_WEIGHTS_PARAMETERS, GradientMask mask);

// The ops through the dispatcher.
Tensor call_weights(const WeightsInputs& w);
OutputsAndWeights call_with_weights(const Inputs& in, bool average);
Gradients call_weights_backward(const Tensor& grad, const WeightsInputs& w, GradientMask mask);

// The ops' definitions in differentiable ATen. They hold [B, H, L, S].
Tensor composite_weights(const WeightsInputs& w);
Gradients composite_weights_backward(const Tensor& grad, const WeightsInputs& w, GradientMask mask);

namespace on_cpu {
Tensor weights(const WeightsInputs& w);
Gradients weights_backward(const Tensor& grad, const WeightsInputs& w, GradientMask mask);
}  // namespace on_cpu

}  // namespace lect11ext::attention_op
