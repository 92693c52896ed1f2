// One GRU step. Gates in the order r, z, n; B batch, I input size, H hidden size.
//
//   r, z = σ(input W_iᵀ + b_i + h W_hᵀ + b_h)
//   reset after:   n = tanh(input W_inᵀ + b_in + r ⊙ (h W_hnᵀ + b_hn))          torch.nn's, cuDNN's
//   reset before:  n = tanh(input W_inᵀ + b_in + (r ⊙ h) W_hnᵀ + b_hn)          Cho et al. 2014
//   h' = z ⊙ h + (1 − z) ⊙ n
//
// Types, strides and ownership as in lstm_cell.h. "Reset before" needs r before its second product can begin, so it
// has two stages forward and two backward; "reset after" has one of each.
#pragma once

#include "common/capability.h"
#include "common/view.h"
#include "recurrent/units.h"

namespace lect11ext {

enum class GruStage : int8_t {
  After,   // reset after: everything
  Reset,   // reset before, forward first: r, z and r ⊙ h. Backward first: gradients of n and z, and dh' ⊙ z
  Output,  // reset before, forward second: n and h'.     Backward second: gradients of r, and of h through r ⊙ h
};

// The elementwise half of a stage: CUDA's kernel, after cuBLAS has made the products.
struct GruGates {
  int64_t batch, hidden;
  DType dtype;
  GruStage stage;
  const void* pre_input;   // [B, 3H] dense: input W_ihᵀ
  const void* pre_hidden;  // After: [B, 3H]; Reset: [B, 2H], r and z only; Output: [B, H], (r ⊙ h) W_hnᵀ
  const void* bias_ih;     // [3H] or null
  const void* bias_hh;     // [3H] or null
  const void* h;           // [B, H], rows h_stride apart
  int64_t h_stride;
  void* reset_h;  // Reset: [B, H] dense, written: r ⊙ h
  void* h_out;    // After, Output: [B, H] dense, written
  // [B, G·H] dense: r, z, n after their activations, and for After a fourth, h W_hnᵀ + b_hn. After writes all of them,
  // where it is not null; Reset writes r and z, and Output reads z and writes n (never null in these two).
  void* gates;
};

// From the gradient of h' to those of the pre-activations and of h. CPU and CUDA.
struct GruGatesBackward {
  int64_t batch, hidden;
  DType dtype;
  GruStage stage;
  const void* grad_h;  // [B, H] dense; After, Reset
  double clip;         // it is clamped to [−clip, clip] first; +inf: not at all
  const void* gates;   // as the forward wrote them
  const void* h;       // [B, H], rows h_stride apart
  int64_t h_stride;
  // What follows is of the arithmetic's type on the CPU, of dtype on CUDA.
  const void* grad_reset_h;  // Output: [B, H] dense: gradient of r ⊙ h
  // Written, dense [B, 3H]. `grad_pre_input` holds d r, d z, d n; Reset writes z and n of it,
  // Output r. `grad_pre_hidden` is After's alone: d r, d z, r ⊙ d n.
  void* grad_pre_input;
  void* grad_pre_hidden;
  // [B, H] dense: dh' ⊙ z, written by After and Reset; Output adds grad_reset_h ⊙ r to it. Null:
  // the gradient of h was not asked for.
  void* grad_h_in;
};

// A whole stage: the CPU's kernel. A work item is a block of kUnits hidden units, their gates, all rows.
struct GruCell {
  int64_t batch, input_size, hidden;
  DType dtype;
  GruStage stage;
  const void* input;      // [B, I]
  const void* h;          // [B, H]
  const void* weight_ih;  // [3H, I]
  const void* weight_hh;  // [3H, H]
  int64_t input_stride, h_stride, weight_ih_stride, weight_hh_stride;
  bool packed;          // the weights are [blocks, 3, I or H, 16] dense instead (float and double only)
  const void* bias_ih;  // [3H] or null
  const void* bias_hh;  // [3H] or null
  void* reset_h;        // [B, H] dense: written by Reset, read by Output
  void* h_out;          // [B, H] dense, written by After and Output
  void* gates;          // as in GruGates
};

LECT11EXT_CPU_KERNEL(gru_cell_kernel, GruCell)
LECT11EXT_CPU_KERNEL(gru_gates_backward_kernel, GruGatesBackward)  // a work item is a row

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void gru_gates_forward(const GruGates& args, void* stream);
void gru_gates_backward(const GruGatesBackward& args, void* stream);

}  // namespace lect11ext::cuda
