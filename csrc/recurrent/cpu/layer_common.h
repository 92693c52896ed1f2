// What the forward and the backward of a layer share: which rows take part, and blocks of 16 units of any type.
#pragma once

#include <cstring>

#include "common/barrier.h"
#include "common/cpu/math.h"
#include "common/cpu/panel.h"
#include "recurrent/layer.h"

namespace lect11ext::CPU_CAPABILITY {

// A block's elements between storage and arithmetic: whole blocks by a number of bytes known in advance.
template <class From, class To>
inline void move_units(const From* from, To* to, int64_t units) {
  if constexpr (std::is_same_v<From, To>) {
    if (units == kUnits) {
      std::memcpy(to, from, kUnits * sizeof(From));
      return;
    }
  }
  convert(from, to, units);
}

// Time and rows, for the forward's and the backward's arguments alike.
template <class Args>
struct Schedule {
  const Args& args;

  int64_t time(int64_t step) const { return args.reverse ? args.steps - 1 - step : step; }

  bool active(int64_t t, int64_t row) const { return args.lengths == nullptr || t < args.lengths[row]; }

  // Whether the row's state is set to zero before the step at time t.
  bool restarts(int64_t t, int64_t row) const {
    return args.reset != nullptr && active(t, row) &&
           args.reset[t * args.reset_strides.step + row * args.reset_strides.row];
  }
};

// The share of blocks that the work items begin … end − 1 own.
struct Blocks {
  int64_t first, last;

  template <class Args>
  Blocks(const Args& args, int64_t begin, int64_t end) {
    const int64_t blocks = (args.hidden + kUnits - 1) / kUnits;
    first = blocks * begin / args.shares;
    last = blocks * end / args.shares;
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
