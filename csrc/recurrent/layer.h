// One layer of an LSTM or a GRU in one direction: the recurrence over all steps.
//
//   step s is at time t = s, or T − 1 − s where `reverse`
//   x = input[t] · weight_ihᵀ, or input[t] itself where there is no weight_ih
//   u = m ⊙ h                                       (hidden_mask; else u = h)
//   v = u · weight_hhᵀ, then v ← norm ⊙ (v − mean v) / √(var v + ε) over all G·H columns, where there is a norm
//   sums = x + v + biases; gates and the new states h̃, c̃ as in lstm_cell.h and gru_cell.h; a GRU that resets first has
//   r ⊙ u in the product of n
//   of an LSTM with peepholes p: i and f see p_i ⊙ c and p_f ⊙ c, o sees p_o ⊙ c̃
//   h' = k ⊙ h + (1 − k) ⊙ h̃, c' alike               (zoneout: k is a mask, or a rate)
//   rows with t ≥ lengths[b] keep their state; what they give is zero
//   rows with reset[t][b] start the step from a state of zero
//
// All threads stay in one parallel region for all steps. Each owns a share of the hidden units, whose rows of the
// weights stay in its caches; after a step they wait for one another at a barrier: of large batches half by half, so
// that what others do late of one half is not waited for before the other half is done. A norm, and a GRU that resets
// first, need what all of them have computed in mid-step, and wait twice.
//
// Tensors over time have rows of dense elements: row (t, b) lies at t·step + b·row. All have one storage type S;
// arithmetic is in C, float, or double for double. Pointers are borrowed; no output overlaps anything.
#pragma once

#include "common/capability.h"
#include "common/view.h"
#include "recurrent/units.h"

namespace lect11ext {

class Barrier;

enum class LayerCell : int8_t { Lstm, Gru, GruResetFirst };

// Of a tensor over time, in elements; equal for all of the same order of dimensions but for the length of a row.
struct TimeStrides {
  int64_t step, row;
};

// Of h or of c.
struct Zoneout {
  const uint8_t* mask;  // [T, B, H] over time: true where the state is kept; null: `rate` of it is, everywhere
  TimeStrides strides;
  double rate;

  bool acts() const { return mask != nullptr || rate != 0; }
};

inline constexpr double kLayerNormEpsilon = 1e-5;

// What forward and backward are given alike.
struct LayerCommon {
  LayerCell cell;
  int64_t steps, batch, hidden;
  DType dtype;
  bool sigmoid_candidate, reverse;
  const void* weight_hh;  // [G·H, H], G = 4 or 3, rows a stride apart
  int64_t weight_hh_stride;
  const void *h, *c;        // [B, H] dense; c for the LSTM only
  const void* peephole;     // [3, H] of i, f, o; LSTM only. Null for none, as all that follow
  const void* norm;         // [G·H]
  const void* hidden_mask;  // [B, H] dense
  const int64_t* lengths;   // [B]; null: all T
  const uint8_t* reset;     // [T, B] over time
  TimeStrides reset_strides;
  Zoneout zoneout_h, zoneout_c;
};

// What a forward writes.
struct LayerOutputs : LayerCommon {
  void* out;  // [T, B, H]
  TimeStrides out_strides;
  void *h_out, *c_out;  // [B, H] dense
  // For the backward; null where none follows. Gates, of the LSTM [T, B, 4H], of the GRU r, z, n and the state's part
  // of n, [T, B, 4H], or r, z, n alone where it resets first. Of the LSTM the cell's states too, [T, B, H], at
  // out_strides.
  void *gates, *cells;
  TimeStrides gates_strides;
  // Where positive, cells has only the states before steps cells_every, 2·cells_every, …: [·, B, H] dense.
  int64_t cells_every;
  void* normed;  // where there is a norm: (v − mean) / √(var + ε), [T, B, G·H]
  TimeStrides normed_strides;
  void* rstd;  // and 1 / √(var + ε), [T, B] of C
  TimeStrides rstd_strides;
};

struct Layer : LayerOutputs {
  // --- read
  int64_t input_size;
  const void* input;  // [T, B, I]; I = G·H where it is multiplied already
  TimeStrides input_strides;
  bool is_multiplied;     // input is x itself; else
  const void* weight_ih;  // [G·H, I], rows a stride apart
  int64_t weight_ih_stride;
  const void *bias_ih, *bias_hh;  // [G·H]; null for none

  // Not null: the recurrence of a layer's tangents, [T, B, K·H] over time, whose input is multiplied already. A step is
  // linear in the tangents of its sums, s = x + v, and of the states; the factors are
  //   LSTM, K = 6: c' = f₀·s_i + f₁·s_f + f₂·s_g + f₄·c, h' = f₃·s_o + f₅·c'
  //   GRU, K = 5: h' = f₀·s_r + f₁·s_z + f₂·s_n + f₃ + f₄·h
  // with s in the place of the gates, [T, B, G·H], and neither a norm nor a GRU that resets first.
  const void* factors;
  TimeStrides factors_strides;
  int64_t truncate;  // of the tangents, as LayerGradients has it of the gradients

  // --- scratch, every block of units its own part
  // Weights laid out as panels of S, or of C where the machine does not multiply S. Null: they are read in place.
  void *panels_ih, *panels_hh;  // [blocks, I or H rounded up to even, 16·G]
  void* exchange[2];            // [B, H rounded up to even], as the panels: step s reads h in one, writes the other
  void* masked[2];              // the same of hidden_mask ⊙ h; null without a mask
  void* reset_state;            // [B, H rounded up to even], as the panels: r ⊙ u of a GRU that resets first
  void* cell_states;            // [blocks, B, 16] of C; LSTM only
  void* pre;                    // [blocks, chunk·B, 16·G] of C: the input's sums of `chunk` steps
  void* staged;                 // [shares, kLayerRows, I rounded up to even], as the panels: converted rows of input
  void* sums;                   // [blocks, B, 16·G] of C: what waits in mid-step; null where nothing does
  void* moments;                // [blocks, B, 2] of C: mean and sum of squares about it, of a block's v
  int64_t chunk;
  int64_t shares;     // how many parts the blocks are cut into
  Barrier* barriers;  // kBatchParts, for `shares` arrivals each
};

// Parts that a batch may be cut into, with a barrier each.
inline constexpr int kBatchParts = 2;

// Rows that a product takes at a time; a multiple of every tile's.
inline constexpr int64_t kLayerRows = 48;

// Work items are shares. All of them must be running at the same time, or in one call.
LECT11EXT_CPU_KERNEL(layer_kernel, Layer)

// From the gradients of all that Layer writes, to those of the sums and of the states at the start. Rows whose step
// does not take place have gradients of zero. Sums run over the same units in the same order for any shares.
struct LayerGradients : LayerCommon {
  double clip;  // gradients of a step's h' and c' are clamped to ±clip, which may be infinite
  // Where positive: none passes from step s, of rows that take it, to those before it where s is a multiple, but for 0.
  // Steps count from first_step where these are a part of a longer sequence.
  int64_t truncate, first_step;

  // --- read; gradients may be null for zero
  const void *grad_out, *grad_h_out, *grad_c_out, *grad_gates, *grad_cells;
  const void *out, *gates, *cells, *normed, *rstd;
  TimeStrides out_strides, gates_strides, normed_strides, rstd_strides;  // out's and gates' also of their gradients

  // --- written
  // Whether the three of the sums are of S, as on CUDA; else of C. On the CPU only where G·H is even, the machine
  // multiplies S, and there is neither a norm nor a GRU that resets first.
  bool rounds;
  void* grad_pre;     // [T, B, G·H]: of the sums
  void* grad_hidden;  // of v before its norm, where that differs (a GRU's n, a norm); else null
  void* grad_normed;  // of v after it, where the cell is a GRU with a norm; else null
  TimeStrides grad_pre_strides;
  void *grad_h, *grad_c, *grad_mask;  // [B, H]; null where not wanted
};

struct LayerBackward : LayerGradients {
  // --- scratch
  // Columns of weight_hh, laid out as panels of S, or of C where the machine does not multiply S.
  void* panels;  // [blocks, G·H rounded up to even, 16]
  // [B, G·H rounded up to even] of S: what steps multiply. Null where panels are of C, or gradients of S already.
  void* exchange[2];
  void* carry_h;     // [B, blocks·16] of C
  void* carry_c;     // the same; LSTM only
  void* product;     // the same: what a mask or r multiplies before it is part of the carry; null where nothing does
  void* carry_mask;  // the same: the mask's gradient so far; null without
  void* moments;     // [blocks, B, 2] of C: sums of a norm's gradient
  int64_t shares;
  Barrier* barriers;  // as Layer's
};

LECT11EXT_CPU_KERNEL(layer_backward_kernel, LayerBackward)

}  // namespace lect11ext
