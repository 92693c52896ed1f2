// A layer's weights as the backward's panels, and the products with them.
#pragma once

#include "recurrent/cpu/layer_common.h"

namespace lect11ext::CPU_CAPABILITY {

// What the backward's parts know of a share: where its units, panels and rows lie. Gradients of sums are kept as Sum.
template <class S, LayerCell kCell, class Sum>
class BackwardShare {
 protected:
  using C = Compute<S>;
  using P = Operand<S>;
  static constexpr int64_t kDeep = PanelStep<P>::kDeep;
  // Whether sums' gradients are multiplied in another type than they are kept in.
  static constexpr bool kRounds = !std::is_same_v<P, Sum>;
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr bool kResetFirst = kCell == LayerCell::GruResetFirst;
  static constexpr int kGates = kLstm ? 4 : 3;
  static constexpr int64_t kPanel = 4;  // blocks of a panel: 64 columns

  BackwardShare(const LayerBackward& args, int64_t begin, int64_t end)
      : args_(args),
        schedule_{args},
        blocks_(args, begin, end),
        carry_row_((args.hidden + kUnits - 1) / kUnits * kUnits),
        first_(first_unit(blocks_.first)),
        end_(std::min(first_unit(blocks_.last), args.hidden)) {}

  static int64_t first_unit(int64_t block) { return block * kUnits; }
  static int64_t deep(int64_t size) { return (size + kDeep - 1) / kDeep * kDeep; }
  int64_t columns() const { return kGates * args_.hidden; }  // of the state's product
  int64_t units(int64_t block) const { return std::min(kUnits, args_.hidden - first_unit(block)); }

  C* scratch_row(void* scratch, int64_t b) const { return static_cast<C*>(scratch) + b * carry_row_; }
  C* carry_h(int64_t b) const { return scratch_row(args_.carry_h, b); }
  C* carry_c(int64_t b) const { return scratch_row(args_.carry_c, b); }
  const S* at(const void* tensor, TimeStrides strides, int64_t t, int64_t b) const {
    return over_time(static_cast<const S*>(tensor), strides, t, b);
  }
  Sum* sums_at(void* tensor, int64_t t, int64_t b) const {
    return over_time(static_cast<Sum*>(tensor), args_.grad_pre_strides, t, b);
  }
  // What the state's product was made of.
  void* product_grad() const { return args_.grad_hidden == nullptr ? args_.grad_pre : args_.grad_hidden; }
  // Of what a norm gave.
  void* normed_grad() const { return args_.grad_normed == nullptr ? args_.grad_pre : args_.grad_normed; }

  void pack_weights() {
    for (int64_t block = blocks_.first; block < blocks_.last; block += kPanel) {
      const int64_t width = std::min(kPanel, blocks_.last - block) * kUnits;
      const int64_t first = first_unit(block), n = std::min(width, args_.hidden - first);
      P* panel = static_cast<P*>(args_.panels) + first * deep(columns());
      for (int64_t k = 0; k < columns(); k += kDeep, panel += width * kDeep) {
        pack_rows(k, first, n, panel);
        std::fill(panel + n * kDeep, panel + width * kDeep, P(0));
      }
    }
  }

  // Rounds this share's units of gates first … last − 1, for all to multiply. Another share may still be reading what
  // the step after this one has given: hence two buffers.
  void publish(int64_t s, int64_t t, const BatchPart& part, int first, int last) const {
    if constexpr (kRounds) {
      for (int64_t b = part.first; b < part.last; ++b) {
        if (!schedule_.active(t, b)) continue;
        for (int64_t at = first * args_.hidden + first_; at < last * args_.hidden; at += args_.hidden) {
          convert(sums_at(product_grad(), t, b) + at, exchange(s, b) + at, end_ - first_);
        }
        if (last == kGates && end_ == args_.hidden && columns() % kDeep != 0) exchange(s, b)[columns()] = P(0);
      }
    }
  }

  // Rows `rows` of the gradient of columns k … k + depth − 1 of the state's product, times those rows of the weights.
  void multiply(int64_t s, int64_t t, const int64_t* rows, int64_t n, int64_t k, int64_t depth, void* scratch,
                bool add) {
    const P* from[kLayerRows];
    C* to[kLayerRows];
    for (int64_t i = 0; i < n; ++i) from[i] = operand(s, t, rows[i]) + k;
    const int64_t panels = (blocks_.count() + kPanel - 1) / kPanel;
    for (int64_t turn = 0; turn < panels; ++turn) {
      const int64_t block = blocks_.first + sweep_.at(turn, panels) * kPanel;
      const int64_t blocks = std::min(kPanel, blocks_.last - block);
      const P* panel = static_cast<const P*>(args_.panels) + first_unit(block) * deep(columns()) + k * blocks * kUnits;
      for (int64_t i = 0; i < n; ++i) to[i] = scratch_row(scratch, rows[i]) + first_unit(block);
      const auto run = [&]<int64_t kBlocks>() {
        constexpr int64_t kColumns = kBlocks * kUnits;
        panel_product<kColumns>(from, n, deep(depth), panel, kColumns * kDeep, to, add);
      };
      switch (blocks) {
        case 1: run.template operator()<1>(); break;
        case 2: run.template operator()<2>(); break;
        case 3: run.template operator()<3>(); break;
        default: run.template operator()<kPanel>(); break;
      }
    }
    sweep_.turn();
  }

  // Calls back for groups of a part's rows that `wanted` holds for.
  template <class Wanted, class Call>
  void each_group(const BatchPart& part, const Wanted& wanted, const Call& call) const {
    int64_t rows[kLayerRows];
    for (int64_t b = part.first; b < part.last;) {
      int64_t n = 0;
      for (; b < part.last && n < kLayerRows; ++b) {
        if (wanted(b)) rows[n++] = b;
      }
      call(rows, n);
    }
  }

  const LayerBackward& args_;
  const Schedule schedule_;
  const Blocks blocks_;
  const int64_t carry_row_;
  const int64_t first_, end_;  // units of this share

 private:
  // Columns first … first + n − 1 of rows k … k + kDeep − 1 of the weights, rows side by side.
  void pack_rows(int64_t k, int64_t first, int64_t n, P* to) const {
    const S* row = static_cast<const S*>(args_.weight_hh) + k * args_.weight_hh_stride + first;
    if constexpr (kDeep == 1) {
      convert(row, to, n);
    } else {
      const S* next = k + 1 < columns() ? row + args_.weight_hh_stride : nullptr;
      for (int64_t i = 0; i < n; ++i) {
        to[2 * i] = row[i];
        to[2 * i + 1] = next == nullptr ? S(0) : next[i];
      }
    }
  }

  P* exchange(int64_t s, int64_t b) const { return static_cast<P*>(args_.exchange[s % 2]) + b * deep(columns()); }

  // A row of what step s multiplies.
  const P* operand(int64_t s, int64_t t, int64_t b) const {
    if constexpr (kRounds) return exchange(s, b);
    else return sums_at(product_grad(), t, b);
  }

  Sweep sweep_;
};

}  // namespace lect11ext::CPU_CAPABILITY
