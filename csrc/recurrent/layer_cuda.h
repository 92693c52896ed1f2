// A layer's recurrence on CUDA: one kernel for all steps, forward, and one backward. What they compute: layer.h.
//
// A block of threads owns some tiles of eight hidden units, and holds these units' rows of the weights (backward: their
// columns) in registers or in shared memory for all steps; what does not fit is read from the L2 cache in every step. A
// team is as many blocks as own all units. It works at some rows of the batch, apart from all other teams. All blocks
// of a team run at the same time: the launch is a cooperative one.
//
// In the plain case they read one another's steps where these are written (cuda/layer_dataflow.cuh); else they write
// what is multiplied next to `exchange`, and meet at a counter after every step (cuda/layer_team.cuh).
//
// A step's product is cut along its depth among the warps of a block, and their sums are added in a fixed order: the
// results are the same bits in every run, but may differ between devices.
#pragma once

#include "recurrent/layer.h"

namespace lect11ext {

inline constexpr int64_t kCudaTileUnits = 8;
// What a lane reads of a row of the product at a time, and the four of them that do so side by side. Rows of panels and
// of exchange are padded with zeros to whole chunks.
inline constexpr int64_t kCudaChunkBytes = 64;

constexpr int64_t cuda_tiles(int64_t hidden) { return (hidden + kCudaTileUnits - 1) / kCudaTileUnits; }

// Blocks of rows of the weights.
constexpr int gates_of(LayerCell cell) { return cell == LayerCell::Lstm ? 4 : 3; }

// `size` elements of `bytes` each, rounded up to whole chunks.
constexpr int64_t cuda_depth(int64_t size, int64_t bytes) {
  const int64_t chunk = kCudaChunkBytes / bytes;
  return (size + chunk - 1) / chunk * chunk;
}

// A team's counter has a line of the caches to itself: in 64-bit words. There is a team for every eight rows begun, at
// most.
inline constexpr int64_t kCudaArrivals = 16;
constexpr int64_t cuda_arrivals(int64_t batch) { return (batch + 7) / 8 * kCudaArrivals; }

struct LayerCuda : LayerOutputs {
  // --- read
  const void* pre;  // [T, B, G·H]: the input's part of the sums, with bias_ih
  TimeStrides pre_strides;
  const void* bias_hh;  // [G·H]; null for none
  bool tensor_cores;    // of float: whether factors are rounded to TF32. Types of 16 bits use them always

  // --- scratch
  void* panels;       // [tiles, G, 8, depth of H] of S
  void* exchange[2];  // [B, depth of H] of S, zero at first: step s multiplies one, and fills the other
  void* reset_state;  // the same: r ⊙ u of a GRU that resets first; else null
  void* state_h;      // [B, H] of S
  void* state_c;      // [B, H] of C; LSTM only
  void* sums;         // [B, G, H] of C: what waits in mid-step; null where nothing does
  void* moments;      // [tiles, B, 2] of C: mean and sum of squares about it, of a tile's v; with a norm
  void* arrivals;     // [cuda_arrivals(B)] of 64 bits, zero at first
};

struct LayerCudaBackward : LayerGradients {
  bool tensor_cores;

  // --- scratch
  void* panels;             // [tiles, 8, G · depth of H] of S: of weight_hh, columns of a tile
  void* exchange[2];        // [B, G · depth of H] of S, zero at first: gradients of a step's product
  void *carry_h, *carry_c;  // [B, H] of C; c for the LSTM only
  void* product;            // the same, of a GRU that resets first
  void* carry_mask;         // the same: the mask's gradient so far
  void* moments;            // [tiles, B, 2] of C: sums of a norm's gradient
  void* arrivals;           // [cuda_arrivals(B)] of 64 bits, zero at first
};

namespace cuda {

void layer_forward(const LayerCuda& args, void* stream);
void layer_backward(const LayerCudaBackward& args, void* stream);

// The plain case, without barriers (cuda/layer_dataflow.cuh). False, and nothing is done, where it is not that.
bool layer_forward_dataflow(const LayerCuda& args, void* stream);
bool layer_backward_dataflow(const LayerCudaBackward& args, void* stream);

}  // namespace cuda
}  // namespace lect11ext
