// A cell's weights as products take them.
#pragma once

#include "common/cpu/dot.h"

namespace lect11ext::CPU_CAPABILITY {

// Rows of one gate of kGates and of a block of kUnits hidden units, plain or packed, times x.
template <class S, int kGates, class Args>
inline RowProduct<S> gate_rows(const Args& args, const void* weight, int64_t weight_stride, const void* x,
                               int64_t x_stride, int64_t size, int64_t block, int gate) {
  const S* w = static_cast<const S*>(weight);
  if (args.packed) w += (block * kGates + gate) * size * kUnits;
  else w += (gate * args.hidden + block * kUnits) * weight_stride;
  return {w, args.packed ? kUnits : weight_stride, static_cast<const S*>(x), x_stride, size, args.packed};
}

}  // namespace lect11ext::CPU_CAPABILITY
