// One step of a cell for one row and a block of its units, from the sums of both products on.
#pragma once

#include "recurrent/cpu/layer_common.h"

namespace lect11ext::CPU_CAPABILITY {

// With the block's parameters, in arithmetic's type; what is not there is zero. Parts of sums are kUnits apart.
template <class S, LayerCell kCell>
class CellBlock {
  using C = Compute<S>;
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr bool kResetAfter = kCell == LayerCell::Gru;
  static constexpr int kGates = kLstm ? 4 : 3;

 public:
  static constexpr int kKept = kCell == LayerCell::GruResetFirst ? 3 : 4;  // parts of Layer::gates
  static constexpr bool kLinear = false;

  CellBlock(const Layer& args, int64_t block)
      : sigmoid_candidate_(args.sigmoid_candidate), has_peephole_(args.peephole != nullptr) {
    const int64_t at = block * kUnits, n = std::min(kUnits, args.hidden - at);
    const auto load = [&](const void* from, int64_t part, C* to) {
      if (from != nullptr) convert(static_cast<const S*>(from) + part * args.hidden + at, to, n);
    };
    if constexpr (kResetAfter) load(args.bias_hh, 2, bias_);
    if constexpr (kLstm) {
      for (int g = 0; g < 3; ++g) load(args.peephole, g, peephole_[g]);
    }
    for (int g = 0; g < kGates; ++g) load(args.norm, g, norm_[g]);
  }

  const C* norm(int gate) const { return norm_[gate]; }

  void begin(int64_t /*t*/, int64_t /*b*/) {}

  void lstm(C* c, const C* pre, const C* sums, C* h, C (&kept)[kKept][kUnits]) const {
    has_peephole_ ? lstm_units<true>(c, pre, sums, h, kept) : lstm_units<false>(c, pre, sums, h, kept);
  }

  // Where the reset came first, sums hold r and z themselves.
  void gru(const C* before, const C* pre, const C* sums, C* h, C (&kept)[kKept][kUnits]) const {
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      const auto load = [&](const C* from, int g) { return Vec<C>::loadu(from + g * kUnits + u); };
      const auto gate = [&](int g) { return kResetAfter ? sigmoid(load(pre, g) + load(sums, g)) : load(sums, g); };
      const Vec<C> r = gate(0), z = gate(1), hidden = load(sums, 2) + load(bias_, 0);
      const Vec<C> candidate = tanh(kResetAfter ? at::vec::fmadd(r, hidden, load(pre, 2)) : load(pre, 2) + hidden);
      at::vec::fmadd(z, load(before, 0) - candidate, candidate).store(h + u);
      r.store(kept[0] + u);
      z.store(kept[1] + u);
      candidate.store(kept[2] + u);
      if constexpr (kResetAfter) hidden.store(kept[3] + u);
    }
  }

 private:
  template <bool kPeephole>
  void lstm_units(C* c, const C* pre, const C* sums, C* h, C (&kept)[kKept][kUnits]) const {
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      const Vec<C> before = Vec<C>::loadu(c + u);
      const auto gate = [&](int g) {
        return Vec<C>::loadu(pre + g * kUnits + u) + Vec<C>::loadu(sums + g * kUnits + u);
      };
      const auto peep = [&](int part, Vec<C> cell, Vec<C> sum) {
        if constexpr (!kPeephole) return sum;
        else return at::vec::fmadd(Vec<C>::loadu(peephole_[part] + u), cell, sum);
      };
      const Vec<C> i = sigmoid(peep(0, before, gate(0))), f = sigmoid(peep(1, before, gate(1)));
      const Vec<C> g = sigmoid_candidate_ ? sigmoid(gate(2)) : tanh(gate(2));
      const Vec<C> state = at::vec::fmadd(f, before, i * g);
      const Vec<C> o = sigmoid(peep(2, state, gate(3)));
      state.store(c + u);
      (o * tanh(state)).store(h + u);
      i.store(kept[0] + u);
      f.store(kept[1] + u);
      g.store(kept[2] + u);
      o.store(kept[3] + u);
    }
  }

  const bool sigmoid_candidate_, has_peephole_;
  alignas(64) C bias_[kUnits] = {};  // of the state's part of n, where the reset gate multiplies it
  alignas(64) C peephole_[3][kUnits] = {};
  alignas(64) C norm_[kGates][kUnits] = {};
};

// The same of the tangents, by the factors of a step and row.
template <class S, LayerCell kCell>
class LinearCell {
  using C = Compute<S>;
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr int kGates = kLstm ? 4 : 3;
  static constexpr int kFactors = kLstm ? 6 : 5;

 public:
  static constexpr int kKept = kGates;
  static constexpr bool kLinear = true;

  LinearCell(const Layer& args, int64_t block)
      : args_(args), at_(block * kUnits), units_(std::min(kUnits, args.hidden - at_)) {}

  void begin(int64_t t, int64_t b) {
    const S* factors = over_time(static_cast<const S*>(args_.factors), args_.factors_strides, t, b) + at_;
    for (int k = 0; k < kFactors; ++k) move_units(factors + k * args_.hidden, factors_[k], units_);
  }

  void lstm(C* c, const C* pre, const C* sums, C* h, C (&kept)[kKept][kUnits]) const {
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      Vec<C> state = factor(4, u) * Vec<C>::loadu(c + u);
      for (int g = 0; g < 3; ++g) state = at::vec::fmadd(factor(g, u), sum(g, u, pre, sums, kept), state);
      state.store(c + u);
      at::vec::fmadd(factor(3, u), sum(3, u, pre, sums, kept), factor(5, u) * state).store(h + u);
    }
  }

  void gru(const C* before, const C* pre, const C* sums, C* h, C (&kept)[kKept][kUnits]) const {
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      Vec<C> state = at::vec::fmadd(factor(4, u), Vec<C>::loadu(before + u), factor(3, u));
      for (int g = 0; g < 3; ++g) state = at::vec::fmadd(factor(g, u), sum(g, u, pre, sums, kept), state);
      state.store(h + u);
    }
  }

 private:
  Vec<C> factor(int k, int64_t u) const { return Vec<C>::loadu(factors_[k] + u); }

  static Vec<C> sum(int g, int64_t u, const C* pre, const C* sums, C (&kept)[kKept][kUnits]) {
    const Vec<C> s = Vec<C>::loadu(pre + g * kUnits + u) + Vec<C>::loadu(sums + g * kUnits + u);
    s.store(kept[g] + u);
    return s;
  }

  const Layer& args_;
  const int64_t at_, units_;
  alignas(64) C factors_[kFactors][kUnits] = {};
};

}  // namespace lect11ext::CPU_CAPABILITY
