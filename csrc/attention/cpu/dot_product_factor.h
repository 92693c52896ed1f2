// What the backwards share: which heads a work item has, and a tile's rows of queries, or of gradients of its outputs,
// as they are multiplied from both sides.
#pragma once

#include "attention/cpu/dot_product_tile.h"

namespace lect11ext::CPU_CAPABILITY {

template <class P>
struct Factor {
  Matrix<const P> rows{nullptr, 0};
  Matrix<const P> panel{nullptr, 0};  // [rows / kDeep][columns rounded to kColumnStep][kDeep]
};

// Rows of queries that see nothing are zero in the panel, be they NaN, and so are those up to whole steps of kDeep.
template <class C, class P>
inline void pack_rows(const Matrix<const P>& from, int64_t columns, int64_t count, int64_t padded, const C* lse,
                      P* panel) {
  constexpr int64_t kDeep = PanelStep<P>::kDeep;
  for (int64_t r = 0; r < round_up(count, kDeep); ++r) {
    const bool seen = r < count && lse[r] != kMinusInfinity<C>;
    P* to = panel + r / kDeep * padded * kDeep + r % kDeep;
    for (int64_t c = 0; c < (seen ? columns : 0); ++c) to[c * kDeep] = from.row(r)[c];
    for (int64_t c = seen ? columns : 0; c < padded; ++c) to[c * kDeep] = P(0);
  }
}

// Queries i … i + count − 1 of a sequence, whose lse is given: in place where that serves, else in the buffers.
template <class S, class P>
inline Factor<P> load_factor(const AttentionOperand& t, int64_t columns, const AttentionSequence& s, int64_t head,
                             int64_t i, int64_t count, const Compute<S>* lse, P* buffer, P* panel) {
  if (t.data == nullptr) return {};
  constexpr int64_t kDeep = PanelStep<P>::kDeep;
  const int64_t padded = round_up(columns, kColumnStep);
  Factor<P> factor;
  factor.rows = operand_rows<S, P>(t, columns, s.batch, head, s.query_start + i, count, buffer);
  const bool all_see = std::none_of(lse, lse + count, [](auto v) { return v == kMinusInfinity<Compute<S>>; });
  if (kDeep == 1 && columns == padded && all_see) {
    factor.panel = factor.rows;
  } else {
    pack_rows(factor.rows, columns, count, padded, lse, panel);
    factor.panel = {panel, padded * kDeep};
  }
  return factor;
}

// sums += weights of a tile, transposed, · the factor's rows: what a tile of queries gives to `width` keys.
template <class P>
inline void add_across(const PanelRows& seen, int64_t count, const Matrix<const P>& weights, const Factor<P>& factor,
                       int64_t width, const Matrix<Compute<P>>& sums, int64_t columns) {
  constexpr int64_t kDeep = PanelStep<P>::kDeep;
  if (factor.panel.data == nullptr) return;
  const int64_t step = seen.whole ? width : kPanelKeys;
  for (int64_t p = 0; p < width; p += step) {
    const int64_t first = seen.whole ? 0 : seen.first[p / kPanelKeys] / kDeep;  // in steps of kDeep rows
    const int64_t last = seen.whole ? count : seen.last[p / kPanelKeys];
    if (first * kDeep >= last) continue;
    multiply<Order::Across, P>({weights.row(first) + p * kDeep, weights.stride}, std::min(step, width - p),
                               round_up(last, kDeep) - first * kDeep, {factor.panel.row(first), factor.panel.stride},
                               {sums.row(p), sums.stride}, columns, true);
  }
}

// Calls run_head(sequence, head of the keys, part) for all that a work item has.
template <class F>
inline void each_head(const AttentionBackwardCpu& args, int64_t item, F run_head) {
  const int64_t groups = args.kv_heads / args.head_group, part = item % args.parts;
  const int64_t head = item / args.parts % groups * args.head_group;
  const int64_t sequence = item / args.parts / groups * args.sequence_group;
  for (int64_t n = sequence; n < sequence + args.sequence_group; ++n) {
    for (int64_t h = head; h < head + args.head_group; ++h) run_head(n, h, part);
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
