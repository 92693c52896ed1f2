// Derivatives for what an op computed below autograd, and inputs as autocast has them.
#pragma once

#include <ATen/autocast_mode.h>

#include "attention/dot_product_weights_inputs.h"

namespace lect11ext::attention_op {

inline torch::autograd::Edge edge(const Tensor& t) {
  return t.defined() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge();
}
inline torch::autograd::Edge edge(const OptionalTensor& t) { return edge(autograd::tensor_or_none(t)); }

// The inputs in autocast's type, and an Inputs that refers to them.
struct CastInputs {
  Tensor query, key, value;
  OptionalTensor attn_mask;
  Inputs in;

  CastInputs(const Inputs& given, c10::DeviceType device)
      : query(cast(given.query, device)),
        key(cast(given.key, device)),
        value(cast(given.value, device)),
        attn_mask(given.has_float_mask() ? OptionalTensor(cast(*given.attn_mask, device)) : given.attn_mask),
        in{query,
           key,
           value,
           attn_mask,
           given.alibi_slopes,
           given.cu_seqlens_q,
           given.cu_seqlens_k,
           given.dropout_key,
           given.dropout_p,
           given.scale,
           given.window_left,
           given.window_right,
           given.bottom_right,
           given.softcap} {}

 private:
  static Tensor cast(const Tensor& t, c10::DeviceType device) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  }
};

// Throws where a constant has a derivative.
void check_constants(const Inputs& in);
bool inputs_have_tangents(const Inputs& in);

// Output and lse become functions of the inputs: nodes of the graph, and tangents where the inputs carry any.
void record_attention(const Inputs& in, const Tensor& output, const Tensor& lse);
// Weights become a function of query, key, lse and mask: a node of the graph.
void record_weights(const WeightsInputs& w, const Tensor& weights);

}  // namespace lect11ext::attention_op
