// One LSTM step. Gates in the order i, f, g, o; B batch, I input size, H hidden size; φ is tanh, or σ on request.
//
//   i, f, o = σ(…)   g = φ(…)   of   input W_ihᵀ + b_ih + h W_hhᵀ + b_hh
//   c' = f ⊙ c + i ⊙ g          h' = o ⊙ tanh(c')
//
// All tensors of a step have one storage type; arithmetic is in float, or double for double. Matrices have unit column
// stride; a row stride stands beside each that may be a slice. Pointers are borrowed; no two outputs may overlap, nor
// an output an input, unless it says so.
#pragma once

#include "common/capability.h"
#include "common/view.h"
#include "recurrent/units.h"

namespace lect11ext {

// The elementwise half of the step: CUDA's kernel, after cuBLAS has made the products.
struct LstmGates {
  int64_t batch, hidden;
  DType dtype;
  bool sigmoid_candidate;
  const void* pre;      // [B, 4H] dense: both products, without biases
  const void* bias_ih;  // [4H] or null
  const void* bias_hh;  // [4H] or null
  const void* c;        // [B, H], rows c_stride apart
  int64_t c_stride;
  void* h_out;  // [B, H] dense, written
  void* c_out;  // [B, H] dense, written
  void* gates;  // [B, 4H] dense, written: i, f, g, o after their activations; may be `pre`; null: not kept
};

// From the gradients of h' and c' to those of the pre-activations and of c. CPU and CUDA.
struct LstmGatesBackward {
  int64_t batch, hidden;
  DType dtype;
  bool sigmoid_candidate;
  const void* grad_h;  // [B, H] dense, or null for zero
  const void* grad_c;  // [B, H] dense, or null for zero
  double clip;         // both are clamped to [−clip, clip] first; +inf: not at all
  const void* gates;   // [B, 4H] dense, as the forward wrote them
  const void* c;       // [B, H], rows c_stride apart
  int64_t c_stride;
  const void* c_out;  // [B, H] dense: tanh of it is computed again, which is cheaper than to read it
  void* grad_pre;     // [B, 4H] dense, written; of the arithmetic's type on the CPU, of dtype on CUDA
  void* grad_c_in;    // [B, H] dense, written; null: not asked
};

// The whole step: the CPU's kernel. A work item is a block of kUnits hidden units, all their gates, all rows.
struct LstmCell {
  int64_t batch, input_size, state_size, hidden;  // state_size R is H, unless h is a projection
  DType dtype;
  bool sigmoid_candidate;
  const void* input;      // [B, I]
  const void* h;          // [B, R]
  const void* c;          // [B, H]
  const void* weight_ih;  // [4H, I]
  const void* weight_hh;  // [4H, R]
  int64_t input_stride, h_stride, c_stride, weight_ih_stride, weight_hh_stride;
  bool packed;          // the weights are [blocks, 4, I or H, 16] dense instead (float and double only)
  const void* bias_ih;  // [4H] or null
  const void* bias_hh;  // [4H] or null
  void* h_out;          // [B, H] dense, written
  void* c_out;          // [B, H] dense, written
  void* gates;          // [B, 4H] dense, written; null: not kept
};

LECT11EXT_CPU_KERNEL(lstm_cell_kernel, LstmCell)
LECT11EXT_CPU_KERNEL(lstm_gates_backward_kernel, LstmGatesBackward)  // a work item is a row

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void lstm_gates_forward(const LstmGates& args, void* stream);
void lstm_gates_backward(const LstmGatesBackward& args, void* stream);

}  // namespace lect11ext::cuda
