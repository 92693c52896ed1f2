// The weights of a dot-product attention whose log-sum-exp is known, in a second pass. Equations and operands:
// dot_product.h; values have no part in it.
//
//   w_ij = z_ij · exp(t_ij − lse_i), of each head, or averaged over the H heads
//
// The backward, with g = ∂L/∂w, of each head or, shared by the heads, 1 / H of the average's:
//   ∂L/∂t_ij = w_ij · g_ij,  ∂L/∂lse_i = −Σ_j ∂L/∂t_ij
// and from ∂L/∂t on as there. lse is an input of its own: a lse of −∞ gives a row of zeros without gradients.
#pragma once

#include "attention/dot_product.h"

namespace lect11ext {

struct AttentionWeights : Attention {
  const void* lse;  // C [batch, heads, queries] dense
  bool average;
  void* weights;  // S, written: [batch, queries, keys] of averages, else [batch, heads, queries, keys]; dense
};

// Attention and its weights in one pass: the weights as dropout left them, as the output has them.
struct AttentionWithWeights : AttentionForward {
  bool average;
  void* weights;  // S, written: as AttentionWeights has it
};

// ∂L/∂w over [batch, heads, queries, keys], with any strides: 0 over the heads of averages.
struct AttentionWeightsGradient {
  const void* data;  // S
  int64_t strides[4];
};

}  // namespace lect11ext
