#include "recurrent/cpu/layer_cells.h"
#include "recurrent/cpu/layer_norm.h"
#include "recurrent/cpu/layer_share.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// One share's run through all steps, of the layer or of its tangents.
template <class S, LayerCell kCell, class Cell = CellBlock<S, kCell>>
class Recurrence : LayerShare<S, kCell> {
  using Share = LayerShare<S, kCell>;
  using Share::args_, Share::schedule_, Share::blocks_;
  using Share::kLstm, Share::kResetAfter, Share::kGates, Share::kWidth, Share::kDeep;
  using Share::packed, Share::first_unit, Share::units, Share::even, Share::deep, Share::pre, Share::panel;
  using typename Share::C, typename Share::P;
  static constexpr int kKept = Cell::kKept;

 public:
  Recurrence(const Layer& args, int64_t begin, int64_t end)
      : Share(args, begin, end),
        parties_(end - begin),
        parts_(args, parties_, args.norm != nullptr || kResetFirst, is_multiplied_by_amx<P>()) {
    for (auto& sums : sums_at_) sums = sums_ + (&sums - sums_at_) * kWidth;
  }

  void run() {
    start();
    for (int64_t s = 0; s < args_.steps; ++s) {
      if (s % args_.chunk == 0) this->multiply_inputs(s, std::min(s + args_.chunk, args_.steps));
      for (BatchPart& part : parts_) {
        part.barrier->wait(part.due);
        if constexpr (kResetFirst) {
          step_reset_first(s, part);
        } else if constexpr (Cell::kLinear) {
          step(s, part);
        } else {
          args_.norm == nullptr ? step(s, part) : step_normed(s, part);
        }
        part.due = part.barrier->arrive(parties_);
      }
    }
    finish();
  }

 private:
  static constexpr bool kResetFirst = kCell == LayerCell::GruResetFirst;

  P* exchange(int64_t s, int64_t row) const {
    return static_cast<P*>(args_.exchange[s % 2]) + row * even(args_.hidden);
  }
  P* masked(int64_t s, int64_t row) const { return static_cast<P*>(args_.masked[s % 2]) + row * even(args_.hidden); }
  P* reset_state(int64_t row) const { return static_cast<P*>(args_.reset_state) + row * even(args_.hidden); }
  // What step s multiplies.
  P* operand(int64_t s, int64_t row) const { return args_.hidden_mask == nullptr ? exchange(s, row) : masked(s, row); }
  C* cell_state(int64_t block, int64_t row) const {
    return static_cast<C*>(args_.cell_states) + (block * args_.batch + row) * kUnits;
  }
  C* waiting_sums(int64_t block, int64_t row) const {
    return static_cast<C*>(args_.sums) + (block * args_.batch + row) * kWidth;
  }
  C* moments(int64_t block, int64_t row) const { return block_moments<C>(args_.moments, block, args_.batch, row); }
  const C* pre_of(int64_t s, int64_t block, int64_t b) const {
    const int64_t begin = s / args_.chunk * args_.chunk, end = std::min(begin + args_.chunk, args_.steps);
    return pre(block, this->row_of_chunk(s, begin, end, b));
  }

  // --- before the first step

  void start() {
    this->pack_weights();
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      const int64_t at = first_unit(block);
      for (int64_t b = 0; b < args_.batch; ++b) {
        const int64_t from = b * args_.hidden + at;
        convert(static_cast<const S*>(args_.h) + from, exchange(0, b) + at, units(block));
        if constexpr (kLstm) convert(static_cast<const S*>(args_.c) + from, cell_state(block, b), units(block));
        if (args_.steps > 0 && schedule_.restarts(schedule_.time(0), b)) clear(0, block, b);
        mask_state(0, block, b);
      }
    }
    const bool owns_last = blocks_.last == (args_.hidden + kUnits - 1) / kUnits;
    for (int64_t b = 0; owns_last && args_.hidden % 2 != 0 && b < args_.batch; ++b) {
      for (int64_t s : {0, 1}) {
        exchange(s, b)[args_.hidden] = P(0);
        operand(s, b)[args_.hidden] = P(0);
      }
      if (args_.reset_state != nullptr) reset_state(b)[args_.hidden] = P(0);
    }
    for (BatchPart& part : parts_) part.due = part.barrier->arrive(parties_);
  }

  void clear(int64_t s, int64_t block, int64_t b) {
    P* h = exchange(s, b) + first_unit(block);
    std::fill(h, h + units(block), P(0));
    if constexpr (kLstm) std::fill(cell_state(block, b), cell_state(block, b) + kUnits, C(0));
  }

  void mask_state(int64_t s, int64_t block, int64_t b) {
    if (args_.hidden_mask == nullptr) return;
    alignas(64) C state[kUnits] = {}, mask[kUnits] = {};
    const int64_t at = first_unit(block), n = units(block);
    move_units(exchange(s, b) + at, state, n);
    move_units(static_cast<const S*>(args_.hidden_mask) + b * args_.hidden + at, mask, n);
    for (int64_t u = 0; u < kUnits; ++u) state[u] *= mask[u];
    move_units(state, masked(s, b) + at, n);
  }

  // --- steps

  void step(int64_t s, const BatchPart& part) {
    const int64_t t = schedule_.time(s);
    each_group(s, t, part, [&](const int64_t* rows, int64_t n) {
      // With few rows the products of several blocks come first: their activations are then independent of one another,
      // and fill one another's waiting times.
      const int64_t together = n == 0 ? 1 : kLayerRows / n;
      for (int64_t first = 0; first < blocks_.count(); first += together) {
        const int64_t last = std::min(first + together, blocks_.count());
        for (int64_t i = first; i < last; ++i) multiply_states(s, swept(i), rows, n, sums_at_ + (i - first) * n);
        for (int64_t i = first; i < last; ++i) {
          Cell cell(args_, swept(i));
          for (int64_t row = 0; row < n; ++row) {
            if (!packed() && !schedule_.active(t, rows[row])) continue;
            activate(s, t, swept(i), rows[row], sums_at_[(i - first) * n + row], cell);
          }
        }
      }
      sweep_.turn();
    });
  }

  // The i-th block whose product is due.
  int64_t swept(int64_t i) const { return blocks_.first + sweep_.at(i, blocks_.count()); }

  // Calls back with every block.
  template <class Call>
  void each_swept(const Call& call) {
    for (int64_t i = 0; i < blocks_.count(); ++i) call(swept(i));
    sweep_.turn();
  }

  // Calls back for groups of rows whose products go together: of those that take part, or, where the weights are read
  // in place, of neighbours.
  template <class Call>
  void each_group(int64_t s, int64_t t, const BatchPart& part, const Call& call) {
    int64_t rows[kLayerRows];
    for (int64_t b = part.first; b < part.last;) {
      int64_t n = 0;
      const int64_t most = packed() ? kLayerRows : next_rows_of_x(part.last - b);
      for (; b < part.last && n < most; ++b) {
        const bool active = schedule_.active(t, b);
        if (!active) keep(s, t, b);
        if (active || !packed()) rows[n++] = b;
      }
      call(rows, n);
    }
  }

  // The same in the second part of a step.
  template <class Call>
  void each_active_group(int64_t t, const BatchPart& part, const Call& call) const {
    int64_t rows[kLayerRows];
    for (int64_t b = part.first; b < part.last;) {
      int64_t n = 0;
      for (; b < part.last && n < kLayerRows; ++b) {
        if (schedule_.active(t, b)) rows[n++] = b;
      }
      call(rows, n);
    }
  }

  void multiply_states(int64_t s, int64_t block, const int64_t* rows, int64_t n, C* const* sums) {
    const int64_t size = args_.hidden;
    if (packed()) {
      const P* from[kLayerRows];
      for (int64_t i = 0; i < n; ++i) from[i] = operand(s, rows[i]);
      panel_product<kWidth>(from, n, deep(size), panel(args_.panels_hh, block, size), kWidth * kDeep, sums, false);
    } else if constexpr (std::is_same_v<S, P>) {
      for (int g = 0; g < kGates; ++g) {
        const S* weight = static_cast<const S*>(args_.weight_hh);
        weight += (g * size + first_unit(block)) * args_.weight_hh_stride;
        const RowProduct<S> product{weight, args_.weight_hh_stride, operand(s, 0), even(size), size};
        dot_block<kUnits>(&product, 1, units(block), rows[0], n, sums[0] + g * kUnits, kWidth);
      }
    }
  }

  // The norm's statistics are over the units of all shares.
  void step_normed(int64_t s, const BatchPart& part) {
    const int64_t t = schedule_.time(s);
    each_group(s, t, part, [&](const int64_t* rows, int64_t n) {
      C* sums[kLayerRows];
      each_swept([&](int64_t block) {
        for (int64_t i = 0; i < n; ++i) sums[i] = waiting_sums(block, rows[i]);
        multiply_states(s, block, rows, n, sums);
        for (int64_t i = 0; i < n; ++i) measure_block<kGates>(sums[i], units(block), moments(block, rows[i]));
      });
    });
    part.barrier->arrive_and_wait(parties_);
    each_active_group(t, part, [&](const int64_t* rows, int64_t n) {
      Statistics<C> statistics[kLayerRows];
      for (int64_t i = 0; i < n; ++i) {
        statistics[i] = row_statistics<kGates, C>(args_.moments, args_.hidden, args_.batch, rows[i]);
        save_rstd(t, rows[i], statistics[i].rstd);
      }
      for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
        Cell cell(args_, block);
        for (int64_t i = 0; i < n; ++i) {
          normalize(t, block, rows[i], statistics[i], cell);
          activate(s, t, block, rows[i], waiting_sums(block, rows[i]), cell);
        }
      }
    });
  }

  void step_reset_first(int64_t s, const BatchPart& part) {
    const int64_t t = schedule_.time(s);
    constexpr int64_t kFirst = 2 * kUnits;  // columns of r and z, before those of n
    const auto columns = [&](int64_t block, int64_t first) {
      return panel(args_.panels_hh, block, args_.hidden) + first * kDeep;
    };
    each_group(s, t, part, [&](const int64_t* rows, int64_t n) {
      C* sums[kLayerRows];
      const P* from[kLayerRows];
      for (int64_t i = 0; i < n; ++i) from[i] = operand(s, rows[i]);
      each_swept([&](int64_t block) {
        for (int64_t i = 0; i < n; ++i) sums[i] = waiting_sums(block, rows[i]);
        panel_product<kFirst>(from, n, deep(args_.hidden), columns(block, 0), kWidth * kDeep, sums, false);
        for (int64_t i = 0; i < n; ++i) reset(s, block, rows[i], sums[i]);
      });
    });
    part.barrier->arrive_and_wait(parties_);
    each_active_group(t, part, [&](const int64_t* rows, int64_t n) {
      C* sums[kLayerRows];
      const P* from[kLayerRows];
      for (int64_t i = 0; i < n; ++i) from[i] = reset_state(rows[i]);
      each_swept([&](int64_t block) {
        Cell cell(args_, block);
        for (int64_t i = 0; i < n; ++i) sums[i] = waiting_sums(block, rows[i]) + kFirst;
        panel_product<kUnits>(from, n, deep(args_.hidden), columns(block, kFirst), kWidth * kDeep, sums, false);
        for (int64_t i = 0; i < n; ++i) activate(s, t, block, rows[i], sums[i] - kFirst, cell);
      });
    });
  }

  // r and z, in place of their sums, and r ⊙ u.
  void reset(int64_t s, int64_t block, int64_t b, C* sums) {
    const C* pre = pre_of(s, block, b);
    alignas(64) C state[kUnits] = {};
    move_units(operand(s, b) + first_unit(block), state, units(block));
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      const Vec<C> r = sigmoid(Vec<C>::loadu(pre + u) + Vec<C>::loadu(sums + u));
      r.store(sums + u);
      sigmoid(Vec<C>::loadu(pre + kUnits + u) + Vec<C>::loadu(sums + kUnits + u)).store(sums + kUnits + u);
      (r * Vec<C>::loadu(state + u)).store(state + u);
    }
    move_units(state, reset_state(b) + first_unit(block), units(block));
  }

  // A row whose step does not take place.
  void keep(int64_t s, int64_t t, int64_t b) {
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      const int64_t at = first_unit(block), n = units(block);
      move_units(exchange(s, b) + at, exchange(s + 1, b) + at, n);
      const auto zero = [&](void* tensor, TimeStrides strides, int parts) {
        S* row = over_time(static_cast<S*>(tensor), strides, t, b);
        for (int g = 0; row != nullptr && g < parts; ++g) std::fill_n(row + g * args_.hidden + at, n, S(0));
      };
      zero(args_.out, args_.out_strides, 1);
      zero(args_.gates, args_.gates_strides, kKept);
      zero(args_.normed, args_.normed_strides, kGates);
      if (args_.cells_every == 0) zero(args_.cells, args_.out_strides, 1);
      save_cell(s, block, b);
      begin_next(s, block, b);
    }
    save_rstd(t, b, C(0));
  }

  void save_rstd(int64_t t, int64_t b, C rstd) {
    if (args_.rstd == nullptr || blocks_.first != 0) return;  // one share is enough
    *over_time(static_cast<C*>(args_.rstd), args_.rstd_strides, t, b) = rstd;
  }

  // Of the states that only every so many steps are kept, the one after step s.
  void save_cell(int64_t s, int64_t block, int64_t b) {
    if (args_.cells_every == 0 || args_.cells == nullptr) return;
    if ((s + 1) % args_.cells_every != 0 || s + 1 == args_.steps) return;
    const int64_t row = ((s + 1) / args_.cells_every - 1) * args_.batch + b;
    move_units(cell_state(block, b), static_cast<S*>(args_.cells) + row * args_.hidden + first_unit(block),
               units(block));
  }

  void begin_next(int64_t s, int64_t block, int64_t b) {
    const int64_t t = schedule_.time(s + 1);
    bool clears = s + 1 < args_.steps && schedule_.restarts(t, b);
    if constexpr (Cell::kLinear) {
      const bool is_cut = args_.truncate > 0 && (s + 1) % args_.truncate == 0 && s + 1 < args_.steps;
      clears = clears || (is_cut && schedule_.active(t, b));
    }
    if (clears) clear(s + 1, block, b);
    mask_state(s + 1, block, b);
  }

  void normalize(int64_t t, int64_t block, int64_t b, Statistics<C> row, const Cell& cell) {
    C* sums = waiting_sums(block, b);
    S* normed = over_time(static_cast<S*>(args_.normed), args_.normed_strides, t, b);
    for (int g = 0; g < kGates; ++g) {
      S* to = normed == nullptr ? nullptr : normed + g * args_.hidden + first_unit(block);
      normalize_units(sums + g * kUnits, row, cell.norm(g), to, units(block));
    }
  }

  void activate(int64_t s, int64_t t, int64_t block, int64_t b, const C* sums, Cell& cell) {
    const int64_t at = first_unit(block), n = units(block);
    cell.begin(t, b);
    alignas(64) C h[kUnits], kept[kKept][kUnits], before[kUnits] = {};
    const C* pre = pre_of(s, block, b);
    if (!kLstm || args_.zoneout_h.acts()) move_units(exchange(s, b) + at, before, n);
    if constexpr (kLstm) {
      C* c = cell_state(block, b);
      alignas(64) C c_before[kUnits];
      if (args_.zoneout_c.acts()) std::copy_n(c, kUnits, c_before);
      cell.lstm(c, pre, sums, h, kept);
      zone_out(args_.zoneout_c, t, block, b, c_before, c);
    } else {
      cell.gru(before, pre, sums, h, kept);
    }
    zone_out(args_.zoneout_h, t, block, b, before, h);
    S* out = over_time(static_cast<S*>(args_.out), args_.out_strides, t, b) + at;
    move_units(h, out, n);
    move_units(out, exchange(s + 1, b) + at, n);  // of half precision the next step sees what was written
    if (args_.gates != nullptr) {
      S* gates = over_time(static_cast<S*>(args_.gates), args_.gates_strides, t, b) + at;
      for (int g = 0; g < kKept; ++g) move_units(kept[g], gates + g * args_.hidden, n);
    }
    if constexpr (kLstm) {
      if (args_.cells != nullptr && args_.cells_every == 0) {
        move_units(cell_state(block, b), over_time(static_cast<S*>(args_.cells), args_.out_strides, t, b) + at, n);
      }
      save_cell(s, block, b);
    }
    begin_next(s, block, b);
  }

  void zone_out(const Zoneout& zoneout, int64_t t, int64_t block, int64_t b, const C* before, C* state) const {
    if (!zoneout.acts()) return;
    const int64_t at = first_unit(block), n = units(block);
    if (zoneout.mask == nullptr) {
      for (int64_t u = 0; u < kUnits; ++u) state[u] += C(zoneout.rate) * (before[u] - state[u]);
      return;
    }
    const uint8_t* mask = over_time(zoneout.mask, zoneout.strides, t, b) + at;
    for (int64_t u = 0; u < n; ++u) state[u] = mask[u] != 0 ? before[u] : state[u];
  }

  // --- after the last step

  void finish() {
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      for (int64_t b = 0; b < args_.batch; ++b) {
        const int64_t at = b * args_.hidden + first_unit(block);
        convert(exchange(args_.steps, b) + first_unit(block), static_cast<S*>(args_.h_out) + at, units(block));
        if constexpr (kLstm) convert(cell_state(block, b), static_cast<S*>(args_.c_out) + at, units(block));
      }
    }
  }

  const int64_t parties_;
  BatchParts parts_;
  Sweep sweep_;
  C* sums_at_[kLayerRows];
  alignas(64) C sums_[kLayerRows * kWidth] = {};
};

}  // namespace

void layer_kernel(const Layer& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr LayerCell kLstm = LayerCell::Lstm, kGru = LayerCell::Gru, kResetFirst = LayerCell::GruResetFirst;
    const bool linear = args.factors != nullptr;
    switch (args.cell) {
      case kLstm:
        return linear ? Recurrence<S, kLstm, LinearCell<S, kLstm>>(args, begin, end).run()
                      : Recurrence<S, kLstm>(args, begin, end).run();
      case kGru:
        return linear ? Recurrence<S, kGru, LinearCell<S, kGru>>(args, begin, end).run()
                      : Recurrence<S, kGru>(args, begin, end).run();
      case kResetFirst: return Recurrence<S, kResetFirst>(args, begin, end).run();
    }
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
