// Dot-product attention and its derivatives, tile by tile: no tensor of queries × keys is ever held.
//
//   s_ij = scale · q_i · k_j
//   u_ij = softcap · tanh(s_ij / softcap)                       where there is a softcap; else u = s
//   t_ij = u_ij − slope_h · |i + diagonal − j| + mask_ij        ALiBi and mask, where there are
//   p_ij = exp(t_ij − lse_i),  lse_i = ln Σ_j exp(t_ij)         over the keys that query i may see
//   out_i = Σ_j z_ij · p_ij · v_j                               z: 0 or dropout_factor; 1 without dropout
//
// Query i may see key j where i + diagonal − window_left ≤ j ≤ i + diagonal + window_right, and the mask is not false
// or −∞ there; diagonal is 0, or keys − queries with `bottom_right`. A causal attention has window_right 0. A query
// that sees no key has out 0, lse −∞ and no gradient. A key or value that no query of its sequence may see is never
// used, be it NaN.
//
// The backward, D_i = Σ_d grad_out_id · out_id − grad_lse_i, g = grad_out:
//   ∂L/∂t_ij = p_ij · (z_ij · g_i·v_j − D_i),  ∂L/∂s = ∂L/∂t · (1 − (u / softcap)²)
//   ∂L/∂q_i = scale · Σ_j ∂L/∂s_ij · k_j,  ∂L/∂k_j = scale · Σ_i ∂L/∂s_ij · q_i,  ∂L/∂v_j = Σ_i z_ij · p_ij · g_i
//   ∂L/∂mask = ∂L/∂t, summed over the dimensions that were broadcast
//
// Tangents, with a dot for each: ṫ_ij = (scale · (q̇_i·k_j + q_i·k̇_j)) · (1 − (u / softcap)²) + mask˙_ij
//   lsė_i = Σ_j p_ij · ṫ_ij,  out˙_i = Σ_j z_ij · p_ij · (ṫ_ij · v_j + v̇_j) − lsė_i · out_i
// and the backward's own, which are its equations above differentiated once; they are the double backward too, since
// second derivatives are symmetric.
//
// Sequences lie in [batch, heads, positions, columns] with any strides but a unit last one; or, where there are starts,
// one behind the other along the positions of a batch of one. Neighbouring heads / kv_heads heads of the queries share
// a head of the keys and values. One storage type S for all; C is float, or double for double. Pointers are borrowed;
// no output overlaps anything.
#pragma once

#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

// Of halves of 32-bit words. Half of what dropout drew from whole words, which took longer than all else of attention:
// dropout_p counts to 2⁻¹⁶.
inline constexpr int kDropoutBlock = 8;  // keys that take the halves of one Philox block
constexpr uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 0x1p16 + 0.5); }
// What a kept weight is multiplied by: by what is dropped indeed, so that the mean stays.
constexpr double dropout_factor(double p) {
  const uint32_t threshold = dropout_threshold(p);
  return threshold < 0x10000 ? 0x1p16 / (0x10000 - threshold) : 0;
}

// Of a [batch, heads, positions, columns] tensor, in elements; the stride of the columns is 1.
struct AttentionStrides {
  int64_t batch, head, position;
};

struct AttentionOperand {
  const void* data;  // S; null where there is none
  AttentionStrides strides;
};

enum class MaskType : int8_t { None, Bool, Storage, Float };  // Float: with a 16-bit S

// Over [batch, heads, queries, keys], stride 0 where it is broadcast, any stride in the last dimension too.
struct AttentionMask {
  const void* data;
  MaskType type;
  int64_t strides[4];
};

struct Attention {
  int64_t batch, heads, kv_heads;
  int64_t queries, keys;  // of a sequence; with starts, of all together
  int64_t head_dim, value_dim;
  DType dtype;
  AttentionOperand query, key, value;
  AttentionMask mask;         // never with starts
  const float* alibi_slopes;  // [batch, heads]; null for none
  int64_t alibi_strides[2];
  // Sequence n has queries query_starts[n] … query_starts[n + 1] − 1, and keys alike; null: `batch` sequences of equal
  // length. Ascending, from 0 on, on the kernel's device; values are checked on the CPU alone.
  const int64_t *query_starts, *key_starts;
  int64_t sequences;  // with starts their number, else batch
  double scale;
  double softcap;                     // 0 for none
  int64_t window_left, window_right;  // kOpen: no bound
  bool bottom_right;
  // Dropout keeps (i, j) where half word number j of its row's stream, of a word the lower one first, is ≥
  // dropout_threshold; the row of query i of head h of batch b begins at block offset + ((b · heads + h) · queries + i)
  // · ceil(keys / 8) of the key, positions counted within their tensors, as everywhere with starts: query_starts[n] +
  // i, and j within its sequence.
  double dropout_p;            // 0 for none
  const int64_t* dropout_key;  // [seed, offset] on the kernel's device; read only where dropout_p > 0
};

inline constexpr int64_t kOpen = INT64_MAX / 4;

struct AttentionForward : Attention {
  void* out;  // S, written
  AttentionStrides out_strides;
  void* lse;  // C [batch, heads, queries] dense, written
};

// What a forward left, and derivatives are given.
struct AttentionSaved : Attention {
  AttentionOperand out;
  const void* lse;  // C [batch, heads, queries] dense
};

struct AttentionBackward : AttentionSaved {
  AttentionOperand grad_out;                 // data null where undefined: zero
  const void* grad_lse;                      // C [batch, heads, queries] dense; null where undefined
  void *grad_query, *grad_key, *grad_value;  // S, written; null: not asked for
  AttentionStrides grad_query_strides, grad_key_strides, grad_value_strides;
  void* grad_mask;  // C, over the mask's own [batch or 1, heads or 1, queries or 1, keys or 1], dense; null: not asked
  int64_t grad_mask_strides[4];  // 0 where it is broadcast
};

struct AttentionTangent : AttentionSaved {
  AttentionOperand query_t, key_t, value_t;  // data null where there is no tangent
  AttentionMask mask_t;                      // of the mask's type; type None where there is no tangent
  void* out_t;                               // S, written
  AttentionStrides out_t_strides;
  void* lse_t;  // C [batch, heads, queries] dense, written
};

struct AttentionBackwardTangent : AttentionBackward {
  AttentionOperand query_t, key_t, value_t, out_t, grad_out_t;  // data null: zero; out_t is given
  AttentionMask mask_t;
  const void *lse_t, *grad_lse_t;  // as lse; lse_t is given
};

// Which weights dropout keeps, for what takes attention through ATen: row r, a query's, begins at block
// offset + r · ⌈columns / kDropoutBlock⌉.
struct DropoutMask {
  bool* kept;          // [rows, columns]
  const int64_t* key;  // [seed, offset]
  int64_t rows, columns;
  double p;
};

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

// Bytes of scratch, aligned as the allocator aligns it, that a call is to be given.
int64_t attention_scratch(const AttentionForward& args);
int64_t attention_scratch(const AttentionBackward& args);
int64_t attention_scratch(const AttentionTangent& args);
int64_t attention_scratch(const AttentionBackwardTangent& args);

void attention_forward(const AttentionForward& args, void* scratch, void* stream);
void attention_backward(const AttentionBackward& args, void* scratch, void* stream);
void attention_tangent(const AttentionTangent& args, void* scratch, void* stream);
// Writes the tangents of the gradients to grad_query and so on.
void attention_backward_tangent(const AttentionBackwardTangent& args, void* scratch, void* stream);
void attention_dropout_mask(const DropoutMask& args, void* stream);

}  // namespace lect11ext::cuda
