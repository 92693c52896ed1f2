// What the forward and the backward of a layer share: which rows take part, and blocks of 16 units of any type.
#pragma once

#include <cstring>

#include "common/barrier.h"
#include "common/cpu/math.h"
#include "common/cpu/panel.h"
#include "recurrent/layer.h"

namespace lect11ext::CPU_CAPABILITY {

// A block's elements between storage and arithmetic: whole blocks in registers.
template <class From, class To>
inline void move_units(const From* from, To* to, int64_t units) {
  if (units != kUnits) return convert(from, to, units);
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, kUnits * sizeof(From));
  } else if constexpr (std::is_same_v<From, float> && kIsHalf<To>) {
    for (int64_t u = 0; u < kUnits; u += kLanes<float>) store_floats(Vec<float>::loadu(from + u), to + u);
  } else if constexpr (kIsHalf<From> && std::is_same_v<To, float>) {
    for (int64_t u = 0; u < kUnits; u += kLanes<float>) load_floats(from + u).store(to + u);
  } else {
    convert(from, to, kUnits);
  }
}

// kLanes elements of S, of which n exist, in arithmetic's type, and back.
template <class S>
inline Vec<Compute<S>> load_units(const S* from, int64_t n) {
  using C = Compute<S>;
  if constexpr (std::is_same_v<S, C>) {
    return n >= kLanes<C> ? Vec<C>::loadu(from) : Vec<C>::loadu(from, n);
  } else {
    if (n >= kLanes<C>) return load_floats(from);
    C buffer[kLanes<C>];
    convert(from, buffer, n);
    return Vec<C>::loadu(buffer);
  }
}

template <class C, class S>
inline void store_units(Vec<C> v, S* to, int64_t n) {
  n = std::min<int64_t>(n, kLanes<C>);
  if constexpr (std::is_same_v<S, C>) v.store(to, n);
  else store_floats(v, to, n);
}

// Row (t, b) of a tensor over time; null of null.
template <class T>
inline T* over_time(T* tensor, TimeStrides strides, int64_t t, int64_t b) {
  return tensor == nullptr ? nullptr : tensor + t * strides.step + b * strides.row;
}

// Time and rows.
struct Schedule {
  const LayerCommon& args;

  int64_t time(int64_t step) const { return args.reverse ? args.steps - 1 - step : step; }

  bool active(int64_t t, int64_t row) const { return args.lengths == nullptr || t < args.lengths[row]; }

  // Whether the row's state is set to zero before the step at time t.
  bool restarts(int64_t t, int64_t row) const {
    return args.reset != nullptr && active(t, row) && *over_time(args.reset, args.reset_strides, t, row) != 0;
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

  int64_t count() const { return last - first; }
};

// Rows of a batch that all shares take through a step before the next part.
struct BatchPart {
  int64_t first, last;
  Barrier* barrier;
  int64_t due = 0;  // what its next step waits for
};

// Two, where threads do not wait in mid-step and both parts are worth their reading of the weights; else one.
class BatchParts {
 public:
  template <class Args>
  BatchParts(const Args& args, int64_t parties, bool halts, bool by_amx) {
    constexpr int64_t kTwoTiles = 12, kTwoTilesOfAmx = 32;  // rows
    const int64_t least = by_amx ? kTwoTilesOfAmx : kTwoTiles;
    const bool cut = parties < args.shares && !halts && args.batch >= kBatchParts * least;
    const int64_t middle = cut ? (args.batch + 1) / 2 : args.batch;
    parts_[0] = {0, middle, args.barriers};
    parts_[1] = {middle, args.batch, args.barriers + 1};
    count_ = cut ? kBatchParts : 1;
  }

  BatchPart* begin() { return parts_; }
  BatchPart* end() { return parts_ + count_; }

 private:
  BatchPart parts_[kBatchParts];
  int count_;
};

template <class P>
inline bool is_multiplied_by_amx() {
  return std::is_same_v<P, at::BFloat16> && capability() == Capability::AMX;
}

// An order of panels that are all read in every step: from the first to the last, then back. Where a share's weights
// are more than its cache holds, what was read last is found there again; always from the first, nothing would be.
class Sweep {
 public:
  // The i-th of `count` in this sweep.
  int64_t at(int64_t i, int64_t count) const { return back_ ? count - 1 - i : i; }
  void turn() { back_ = !back_; }

 private:
  bool back_ = false;
};

// How much of the state is kept, of units u … u + kLanes − 1 of row (t, b), of which n exist.
template <class C>
inline Vec<C> kept_share(const Zoneout& zoneout, int64_t t, int64_t b, int64_t u, int64_t n) {
  const uint8_t* mask = over_time(zoneout.mask, zoneout.strides, t, b);
  if (mask == nullptr) return Vec<C>(C(zoneout.rate));
  C shares[kLanes<C>] = {};
  for (int64_t i = 0; i < std::min<int64_t>(n, kLanes<C>); ++i) shares[i] = C(mask[u + i] != 0);
  return Vec<C>::loadu(shares);
}

}  // namespace lect11ext::CPU_CAPABILITY
