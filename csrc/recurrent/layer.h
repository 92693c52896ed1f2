// One layer of an LSTM or a GRU (reset after the product) in one direction: the recurrence over all steps.
//
//   step s is at time t = s, or T − 1 − s where `reverse`
//   sums = pre[t] + h · weight_hhᵀ; gates and new state as in lstm_cell.h and gru_cell.h
//   rows with t ≥ lengths[b] keep their state, and their output is zero
//   rows with reset[t][b] start the step from a state of zero
//
// All threads stay in one parallel region for all steps. Each owns a share of the hidden units, whose rows of weight_hh
// stay in its caches; after a step they wait for one another at a barrier.
#pragma once

#include "common/capability.h"
#include "common/view.h"
#include "recurrent/units.h"

namespace lect11ext {

class Barrier;

enum class LayerCell : int8_t { Lstm, Gru };

struct Layer {
  LayerCell cell;
  int64_t steps, batch, hidden;
  DType dtype;  // of everything: Float or Double
  bool sigmoid_candidate, reverse;
  const void* pre;  // read: input product with the biases (for the GRU without the state's of n), rows of G·H dense:
  int64_t pre_step, pre_row;  // row (t, b) at t·pre_step + b·pre_row
  const void* weight_hh;      // read: [G·H, H], rows weight_stride apart
  int64_t weight_stride;
  const void* bias_hidden;  // read: [H], the state's bias of the GRU's n; null for none
  const int64_t* lengths;   // read: [B]; null: all T
  const uint8_t* reset;     // read: [T, B] dense; null for none. The first step's must have been applied to h and c
  void* h[2];               // [B, H] dense: the first holds h at entry; step s reads h[s % 2] and writes the other
  void* c;                  // [B, H] dense, updated in place; LSTM only
  void* out;                // written: element (t, b, u) at t·out_step + b·out_row + u
  int64_t out_step, out_row;
  int64_t shares;    // how many parts the units are cut into
  Barrier* barrier;  // for `shares` arrivals
};

// Work items are shares. Every share must be running at the same time, or in one call.
LECT11EXT_CPU_KERNEL(layer_kernel, Layer)

}  // namespace lect11ext
