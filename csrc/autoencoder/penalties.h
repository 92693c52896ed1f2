// A code's activation together with what a penalty on the code needs, in one pass.
//
//   output = φ(input)
//   l1           a sum over each row,    Σ_i scale_i · |φ(a_i)|
//   contractive  a sum over each row,    Σ_i scale_i · φ'(a_i)²     of a linear layer ‖∂h/∂x‖² if scale_i = ‖W_i‖²
//   mean         a sum over each column, Σ_b φ(a_bi)                the mean is what KL sparsity compares
//
// scale is a vector over the columns.
#pragma once

#include "autoencoder/activation.h"
#include "autoencoder/row_tiles.h"
#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

enum class Penalty : int8_t { L1, Contractive, Mean };

struct PenalizedActivation {
  Shape shape;
  View input, scale;    // read; any type and strides; scale over `shape`, data null for ones
  bool compute_double;  // arithmetic in double, else in float
  Activation activation;
  Penalty penalty;
  bool streams;  // whether the output is too large to stay in a CPU's caches
};

struct PenaltyForward : PenalizedActivation {
  RowTiles tiles;       // of a sum over rows, else
  ColumnBlocks blocks;  // of a sum over columns
  void* output;         // written: dense, over `shape`
  DType output_dtype;
  void* sums;  // written, float or double: one a row where tiles_per_row is 1, else one a tile; or [runs, cols]
};

// grad_input = grad_output · φ' + w · scale · ψ', where ψ is |φ|, φ'² or φ, and w grad_penalty · grad_penalty_scale.
struct PenaltyBackward : PenalizedActivation {
  ColumnBlocks blocks;
  View grad_output,
      grad_penalty;  // read, over `shape`, grad_penalty repeated over what was summed; data null: undefined
  double grad_penalty_scale;
  void* grad_input;  // written: dense, over `shape`; null: not asked for
  DType grad_input_dtype;
  void* grad_scale;  // written, float or double: [runs, cols] sums of w · ψ; null: not asked for
};

LECT11EXT_CPU_KERNEL(penalty_forward_kernel, PenaltyForward)    // work items: tiles, or blocks where penalty is Mean
LECT11EXT_CPU_KERNEL(penalty_backward_kernel, PenaltyBackward)  // work items: blocks

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void penalty_forward(const PenaltyForward& args, void* stream);
void penalty_backward(const PenaltyBackward& args, void* stream);

}  // namespace lect11ext::cuda
