// Adds up what tiles and blocks have left: in order and in double on the CPU, where at::sum's order depends on the
// number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "autoencoder/row_tiles.h"

namespace lect11ext {

// [rows · tiles_per_row] → size
at::Tensor sum_tiles(const at::Tensor& partials, at::IntArrayRef size, const RowTiles& tiles);

// [runs, cols] → [cols]
at::Tensor sum_runs(const at::Tensor& partials);

// at::sum_to: what is left of a broadcast operand's gradient. Differentiable. Only a sum to a single element is one whose
// order in at::sum depends on the number of threads.
at::Tensor sum_broadcast(const at::Tensor& tensor, c10::SymIntArrayRef size);

}  // namespace lect11ext
