// The norm of a layer's gates, a block of units at a time.
//
// What a row needs of all its G·H columns are sums over blocks, each by the share that owns it, then added up in the
// order of the blocks by every share: the same bits for any number of shares.
#pragma once

#include <cmath>

#include "common/cpu/math.h"
#include "recurrent/cpu/layer_common.h"

namespace lect11ext::CPU_CAPABILITY {

// The first `left` lanes; the others, beyond the units, are zero.
template <class C>
inline Vec<C> first_lanes(Vec<C> v, int64_t left) {
  return left >= kLanes<C> ? v : Vec<C>::set(Vec<C>(C(0)), v, left);
}

// A block's two sums, of which every row has one: [blocks, B, 2].
template <class C>
inline C* block_moments(void* moments, int64_t block, int64_t batch, int64_t row) {
  return static_cast<C*>(moments) + (block * batch + row) * 2;
}

// --- forward, where the sums of a block are [kGates][kUnits]

// Mean, and sum of squares about it: no digits are lost where the mean is far from zero.
template <int kGates, class C>
inline void measure_block(const C* sums, int64_t units, C* moments) {
  Vec<C> total(C(0)), squares(C(0));
  const auto each = [&](const auto& call) {
    for (int64_t u = 0; u < units; u += kLanes<C>) {
      for (int g = 0; g < kGates; ++g) call(Vec<C>::loadu(sums + g * kUnits + u), units - u);
    }
  };
  each([&](Vec<C> v, int64_t left) { total = total + first_lanes(v, left); });
  const C mean = sum_of_lanes(total) / C(kGates * units);
  each([&](Vec<C> v, int64_t left) {
    const Vec<C> from_mean = first_lanes(v - Vec<C>(mean), left);
    squares = at::vec::fmadd(from_mean, from_mean, squares);
  });
  moments[0] = mean;
  moments[1] = sum_of_lanes(squares);
}

template <class C>
struct Statistics {
  C mean, rstd;
};

template <int kGates, class C>
inline Statistics<C> row_statistics(void* moments, int64_t hidden, int64_t batch, int64_t row) {
  const auto each = [&](const auto& call) {
    for (int64_t first = 0; first < hidden; first += kUnits) {
      call(block_moments<C>(moments, first / kUnits, batch, row), C(std::min(kUnits, hidden - first)));
    }
  };
  C mean = 0, squares = 0;
  each([&](const C* of_block, C units) { mean += of_block[0] * units; });
  mean /= C(hidden);
  each([&](const C* of_block, C units) {
    const C from_mean = of_block[0] - mean;
    squares += of_block[1] + from_mean * from_mean * (C(kGates) * units);
  });
  return {mean, C(1) / std::sqrt(squares / C(kGates * hidden) + C(kLayerNormEpsilon))};
}

// One gate's units of a block: in place, times `scale`; before that to `normed`, where it is wanted.
template <class S, class C>
inline void normalize_units(C* sums, Statistics<C> row, const C* scale, S* normed, int64_t units) {
  alignas(64) C values[kUnits];
  for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
    const Vec<C> v = (Vec<C>::loadu(sums + u) - Vec<C>(row.mean)) * Vec<C>(row.rstd);
    v.store(values + u);
    (v * Vec<C>::loadu(scale + u)).store(sums + u);
  }
  if (normed != nullptr) move_units(values, normed, units);
}

}  // namespace lect11ext::CPU_CAPABILITY
