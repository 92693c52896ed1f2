// Adds up what tiles and blocks have left: in order and in double on the CPU, where at::sum's order depends on the
// number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "autoencoder/row_tiles.h"

namespace lect11ext {

// [rows · tiles_per_row] → size
at::Tensor sum_tiles(const at::Tensor& partials, at::IntArrayRef size, const RowTiles& tiles);

// [runs, cols] → [cols], times scale
at::Tensor sum_runs(const at::Tensor& partials, double scale = 1);

// at::sum_to, in an order that does not depend on the number of threads, as at::sum's of all elements to one does: what
// is left of a broadcast operand's gradient. Differentiable.
at::Tensor sum_broadcast(const at::Tensor& tensor, c10::SymIntArrayRef size);

}  // namespace lect11ext
