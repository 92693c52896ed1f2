// Additive attention (Bahdanau et al. 2014), without a tensor of queries × keys × hidden units.
//
//   e_ij = Σ_h w_h · tanh(q_ih + k_jh) + mask_ij        α_i = softmax_j(e_ij)        out_i = Σ_j α_ij · v_j
//
// With dα_ij = ⟨dout_i, v_j⟩ and de_ij = α_ij · (dα_ij − Σ_j' α_ij' dα_ij') the gradients are
//
//   dq_ih = w_h Σ_j de_ij (1 − tanh²)    dk_jh = w_h Σ_i de_ij (1 − tanh²)    dw_h = Σ_ij de_ij tanh
//   dv_j = Σ_i α_ij dout_i               dmask_ij = de_ij
//
// The forward keeps α, [L, S]; tanh is computed once more. A query that may attend to no key has α = 0, and so no
// output and no gradients. Keys and values of pairs that the mask bars are not looked at: they may be NaN.
#pragma once

#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

// A batch of matrices with unit stride in their rows. `strides` are over the dimensions of `Additive::batches`.
struct Matrices {
  const void* data = nullptr;
  int64_t row = 0;  // stride
  int64_t strides[kMaxDims] = {};
};

enum class MaskKind : int8_t { None, Bool, Additive };

// [L, S] for every element of the batch; stride 0 where it is broadcast.
struct PairMask {
  MaskKind kind = MaskKind::None;
  DType dtype = DType::Float;  // of an additive one
  const void* data = nullptr;
  int64_t row = 0, column = 0;
  int64_t strides[kMaxDims] = {};
};

// Everything that is "dense" lies in row-major order behind the batch's number. "Of the arithmetic" is float, or double
// where `dtype` is.
struct Additive {
  int64_t queries, keys, hidden, columns;  // L, S, H, and of the values
  DType dtype;                             // of query, key, value, score_weight and output
  Shape batches;                           // numel is B; at least one dimension
  Matrices query, key, value;
  const void* score_weight;  // [H], dense
  PairMask mask;
};

// Keys are taken in blocks. A panel holds one block of rows, in groups of as many columns as a vector has lanes; the
// extra row keeps the groups from falling onto the same lines of a cache.
inline constexpr int64_t kKeyBlock = 64, kPanelRow = kKeyBlock + 1, kWidestVector = 16;
inline int64_t key_blocks(int64_t keys) { return (keys + kKeyBlock - 1) / kKeyBlock; }
inline int64_t padded_columns(int64_t columns) { return (columns + kWidestVector - 1) / kWidestVector * kWidestVector; }
inline int64_t panel_size(int64_t columns) { return kPanelRow * padded_columns(columns); }

// What the CPU kernels share: they take some elements of the batch at a time, so that their memory stays small.
struct AdditivePanels : Additive {
  int64_t first, count;  // elements of the batch: first … first + count − 1
  // Prepared keys: [count, blocks, panel_size(hidden)], of the arithmetic, and what a panel holds, a KeyForm, [count,
  // blocks]. Null where one work item alone has a use for them, which then prepares them itself.
  void* key_panels;
  int8_t* forms;
  // Rows of values: [count, S, padded_columns(columns)], of the arithmetic. Null where `value` itself is such.
  void* value_rows;
};

// Queries that a work item of the forward takes; of the backward, at a time.
inline constexpr int64_t kForwardRows = 8, kBackwardRows = 16;

struct AdditiveForward : AdditivePanels {
  void* weights;  // written: α, [B, L, S], dense, of the arithmetic; null where nobody wants them (CPU only)
  void* output;   // written: [B, L, columns], dense
};

// A work item of the backward is a part of the queries of one element of the batch. It leaves sums over its queries,
// which are added in order. Parts depend on the shape alone.
struct AdditiveBackward : AdditivePanels {
  int64_t parts, part_rows;  // per element of the batch; rows are a multiple of kBackwardRows
  const void* weights;       // α as the forward wrote it
  Matrices grad_output;
  // Written, dense; null where not asked for. The first three in grad_dtypes, as a broadcast operand's are summed yet.
  void *grad_query, *grad_key, *grad_value;  // [B, L, H], [B, S, H], [B, S, columns]
  DType grad_query_dtype, grad_key_dtype, grad_value_dtype;
  void* grad_scores;        // [B, L, S], of the arithmetic: the mask's gradient. On CUDA never null
  void* grad_score_weight;  // sums of tanh·de, of the arithmetic: [B·parts, H]. On CUDA [weight_rows, H]
  // CPU only: the parts' sums, [count, parts, S, padded_columns], of the arithmetic, written. Null where there is one
  // part and the gradient can be written at once.
  void *key_sums, *value_sums;
};

// out[n] = Σ_m a[m][n], m in order and in double: a gradient's sum over dimensions that were broadcast.
struct AdditiveSum {
  int64_t m, n;
  DType dtype;  // of both: float or double
  const void* a;
  void* out;
};
inline constexpr int64_t kAdditiveSumColumns = 256;  // a work item

LECT11EXT_CPU_KERNEL(additive_prepare_kernel, AdditivePanels)     // an item: a block of keys
LECT11EXT_CPU_KERNEL(additive_forward_kernel, AdditiveForward)    // an item: kForwardRows queries
LECT11EXT_CPU_KERNEL(additive_backward_kernel, AdditiveBackward)  // an item: a part
LECT11EXT_CPU_KERNEL(additive_finish_kernel, AdditiveBackward)    // an item: a block of keys
LECT11EXT_CPU_KERNEL(additive_sum_kernel, AdditiveSum)

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

// Rows of grad_score_weight, which are then to be summed.
int64_t additive_weight_rows(const Additive& args);

void additive_forward(const AdditiveForward& args, void* stream);
void additive_backward(const AdditiveBackward& args, void* stream);

}  // namespace lect11ext::cuda
