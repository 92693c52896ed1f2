// How the hidden units of a layer are cut into blocks.
#pragma once

#include <cstdint>

namespace lect11ext {

// A cache line of floats, and four tiles of four rows of weights (common/cpu/dot.h). Packed weights have this width
// too.
inline constexpr int64_t kUnits = 16;

template <class Int>  // for ops; kernels call nothing inline from outside their capability's namespace
Int unit_blocks(const Int& hidden) {
  return (hidden + kUnits - 1) / kUnits;
}

}  // namespace lect11ext
