// What TMA is told of a tensor. The driver makes it; it is asked for at run time, so that libcuda is not linked.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/view.h"

namespace lect11ext::cuda {

// Of a [batch, heads, positions, columns] tensor of 16-bit elements, columns dense.
struct MappedTensor {
  DType dtype;
  const void* data;
  int64_t sizes[4];
  int64_t strides[3];  // of the first three, in elements
};

// Has TMA copy boxes of `rows` positions and 64 columns, permuted as matrix_descriptor (hopper.cuh) says. False where
// the tensor is not laid out as TMA needs it, or the driver does not know it.
bool make_tensor_map(CUtensorMap& map, const MappedTensor& tensor, int rows);

}  // namespace lect11ext::cuda
