// One layer of an LSTM or a GRU (reset after the product) in one direction: the recurrence over all steps.
//
//   step s is at time t = s, or T − 1 − s where `reverse`
//   sums = input[t] · weight_ihᵀ + h · weight_hhᵀ + biases; gates and new state as in lstm_cell.h and gru_cell.h
//   rows with t ≥ lengths[b] keep their state; what they give is zero
//   rows with reset[t][b] start the step from a state of zero
//
// All threads stay in one parallel region for all steps. Each owns a share of the hidden units, whose rows of the
// weights stay in its caches; after a step they wait for one another at a barrier.
//
// Tensors over time have rows of dense elements: row (t, b) lies at t·step + b·row. All have one storage type S;
// arithmetic is in C, float, or double for double. Pointers are borrowed; no output overlaps anything.
#pragma once

#include "common/capability.h"
#include "common/view.h"
#include "recurrent/units.h"

namespace lect11ext {

class Barrier;

enum class LayerCell : int8_t { Lstm, Gru };

// Of a tensor over time, in elements; equal for all of the same order of dimensions but for the length of a row.
struct TimeStrides {
  int64_t step, row;
};

struct Layer {
  LayerCell cell;
  int64_t steps, batch, input_size, hidden;
  DType dtype;
  bool sigmoid_candidate, reverse;

  // --- read
  const void* input;
  TimeStrides input_strides;
  const void *weight_ih, *weight_hh;  // [G·H, I] and [G·H, H], G = 4 or 3, rows a stride apart
  int64_t weight_ih_stride, weight_hh_stride;
  const void *bias_ih, *bias_hh;  // [G·H]; null for none
  const void *h, *c;              // [B, H] dense; c for the LSTM only
  const int64_t* lengths;         // [B]; null: all T
  const uint8_t* reset;           // [T, B] over time; null for none
  TimeStrides reset_strides;

  // --- written
  void* out;  // [T, B, H]
  TimeStrides out_strides;
  void *h_out, *c_out;  // [B, H] dense
  // For the backward; null where none follows. Gates [T, B, 4H], of the GRU r, z, n and the state's part of n; of the
  // LSTM the cell's states too, [T, B, H], at out_strides.
  void *gates, *cells;
  TimeStrides gates_strides;

  // --- scratch, every block of units its own part
  // Weights laid out as panels of S, or of C where the machine does not multiply S. Null: they are read in place.
  void *panels_ih, *panels_hh;  // [blocks, I or H rounded up to even, 16·G]
  void* exchange[2];            // [B, H rounded up to even], as the panels: step s reads h in one, writes the other
  void* cell_states;            // [blocks, B, 16] of C; LSTM only
  void* pre;                    // [blocks, chunk·B, 16·G] of C: the input's sums of `chunk` steps
  void* staged;                 // [shares, kLayerRows, I rounded up to even], as the panels: converted rows of input
  int64_t chunk;
  int64_t shares;    // how many parts the blocks are cut into
  Barrier* barrier;  // for `shares` arrivals
};

// Rows that a product takes at a time; a multiple of every tile's.
inline constexpr int64_t kLayerRows = 48;

// Work items are shares. All of them must be running at the same time, or in one call.
LECT11EXT_CPU_KERNEL(layer_kernel, Layer)

// From the gradients of all that Layer writes, to those of the sums and of the states at the start. Rows whose step
// does not take place have gradients of zero. Sums run over the same units in the same order for any shares.
struct LayerBackward {
  LayerCell cell;
  int64_t steps, batch, hidden;
  DType dtype;
  bool sigmoid_candidate, reverse;
  double clip;  // gradients of a step's h' and c' are clamped to ±clip, which may be infinite

  // --- read; gradients may be null for zero
  const void *grad_out, *grad_h_out, *grad_c_out, *grad_gates, *grad_cells;
  const void* weight_hh;
  int64_t weight_hh_stride;
  const void *h, *c;  // as in Layer
  const int64_t* lengths;
  const uint8_t* reset;
  TimeStrides reset_strides;
  const void *out, *gates, *cells;
  TimeStrides out_strides, gates_strides;  // also of the gradients; those of grad_pre are gates_strides / 4 · G

  // --- written
  void* grad_pre;         // [T, B, G·H] of C: of the sums
  void* grad_pre_hidden;  // GRU: the same, but of n that of the state's part
  TimeStrides grad_pre_strides;
  void *grad_h, *grad_c;  // [B, H]; null where not wanted

  // --- scratch
  void* panels;   // [blocks, G·H, 16] of C: of weight_hh, columns of a block
  void* carry_h;  // [B, blocks·16] of C
  void* carry_c;  // the same; LSTM only
  int64_t shares;
  Barrier* barrier;
};

LECT11EXT_CPU_KERNEL(layer_backward_kernel, LayerBackward)

}  // namespace lect11ext
