// Derivatives for what an op computed below autograd.
#pragma once

#include "attention/dot_product_weights_inputs.h"

namespace lect11ext::attention_op {

// Throws where a constant has a derivative.
void check_constants(const Inputs& in);
bool inputs_have_tangents(const Inputs& in);

// Output and lse become functions of the inputs: nodes of the graph, and tangents where the inputs carry any.
void record_attention(const Inputs& in, const Tensor& output, const Tensor& lse);
// Weights become a function of query, key, lse and mask: a node of the graph.
void record_weights(const WeightsInputs& w, const Tensor& weights);

}  // namespace lect11ext::attention_op
