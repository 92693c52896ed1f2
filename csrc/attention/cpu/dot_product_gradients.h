// The backward of dot-product attention and its tangent: 128 keys at a time meet all queries that see them, a tile after
// the other. What keys and values gain stays in the cache meanwhile; what queries gain is added up in memory.
//
// With a tangent every quantity has a dot: the products are those of the backward differentiated once.
#pragma once

#include "attention/cpu/dot_product_tile.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {

// Rows of a scratch matrix, as products take them.
template <class T, int64_t kRows>
struct ScratchRows {
  T* row[kRows];

  void place(T* data, int64_t stride) {
    for (int64_t r = 0; r < kRows; ++r) row[r] = data + r * stride;
  }
};

template <class S, class P, bool kTangent>
class Gradients {
  using C = Compute<S>;
  static constexpr int64_t kRows = kTileQueries, kKeys = kBackwardKeys;
  static constexpr int64_t kWeightRows = round_up(kRows, kDeepStep);  // of transposed weights, zeros at the end
  using Tile = ScratchRows<C, kRows>;

 public:
  explicit Gradients(const AttentionBackwardCpu& args)
      : args_(args),
        factor_(static_cast<C>(args.scale) * kLogBase<C>),
        biased_(args.mask.type != MaskType::None || args.alibi_slopes != nullptr || args.softcap != 0),
        columns_(round_up(args.head_dim, kColumnStep)),
        value_columns_(round_up(args.value_dim, kColumnStep)),
        dropout_(args) {
    for (int pass = 0; pass < 2; ++pass) {  // reserve, then place
      place_ = pass == 1;
      next_ = 0;
      tile(scores_), tile(inner_);
      if (kTangent) tile(scores_t_), tile(inner_t_);
      if (biased_) tile(bias_), tile(mask_grads_);
      if (args.mask_t.type != MaskType::None) tile(bias_t_);
      for (int d = 0; d < (kTangent ? 2 : 1); ++d) {
        rows(weights_[d], kKeys, kWeightRows), rows(score_grads_[d], kKeys, kWeightRows);
        rows(query_grads_[d], kRows, kKeys);
        memory(query_buffer_[d], kRows * round_up(args.head_dim, kDeepStep));
        memory(grad_buffer_[d], kRows * round_up(args.value_dim, kDeepStep));
        memory(query_panel_[d], kWeightRows * columns_), memory(grad_panel_[d], kWeightRows * value_columns_);
        memory(scrubbed_[d], kKeys * columns_);
      }
      rows(key_sums_, kKeys, columns_), rows(value_sums_, kKeys, value_columns_);
      const int64_t group = args.heads / args.kv_heads;
      memory(delta_, group * args.queries);
      if (kTangent) memory(delta_t_, group * args.queries);
    }
  }

  void run(int64_t item) {
    const int64_t groups = args_.kv_heads / args_.head_group, part = item % args_.parts;
    const int64_t head = item / args_.parts % groups * args_.head_group;
    const int64_t sequence = item / args_.parts / groups * args_.sequence_group;
    for (int64_t n = sequence; n < sequence + args_.sequence_group; ++n) {
      for (int64_t h = head; h < head + args_.head_group; ++h) run_head(n, h, part);
    }
  }

 private:
  // --- scratch

  template <class T>
  void memory(T*& pointer, int64_t count) {
    if (!place_) parts_[next_++] = space_.reserve(count * sizeof(T));
    else pointer = static_cast<T*>(space_.at(parts_[next_++]));
  }
  template <class T, int64_t kCount>
  void rows(ScratchRows<T, kCount>& to, int64_t count, int64_t stride) {
    T* data = nullptr;
    memory(data, count * stride);
    if (place_) to.place(data, stride);
  }
  void tile(Tile& to) { rows(to, kRows, kKeys); }

  // --- a part of the keys of one head

  void run_head(int64_t n, int64_t kv_head, int64_t part) {
    const AttentionSequence s(args_, n);
    const Band band(args_, s);
    const int64_t panels = args_.plan.panels[n + 1] - args_.plan.panels[n], group = args_.heads / args_.kv_heads;
    first_panel_ = args_.plan.panels[n] * args_.kv_heads + kv_head * panels;
    const int64_t blocks = (s.keys + kKeys - 1) / kKeys;
    const int64_t begin = blocks * part / args_.parts, end = blocks * (part + 1) / args_.parts;
    if (begin == end) return;
    for (int64_t g = 0; g < group; ++g) find_deltas(s, kv_head * group + g, delta_ + g * args_.queries, delta_t_ + g * args_.queries);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t j = b * kKeys, width = std::min(kKeys, round_up(s.keys - j, kPanelKeys));
      for (int64_t k = 0; k < kKeys; ++k) {
        std::fill_n(key_sums_.row[k], columns_, C(0));
        std::fill_n(value_sums_.row[k], value_columns_, C(0));
      }
      const int64_t most = tile_rows(s.queries);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t head = kv_head * group + g;
        for (int64_t i = 0; i < s.queries; i += most) {
          const int64_t count = std::min(most, s.queries - i);
          if (band.first_row(i, count, j) >= band.end_row(i, count, j, width)) continue;
          meet(s, band, head, g, i, count, j, width, part);
        }
      }
      store(args_.grad_key, args_.grad_key_strides, args_.head_dim, s, kv_head, j, key_sums_, args_.scale);
      store(args_.grad_value, args_.grad_value_strides, args_.value_dim, s, kv_head, j, value_sums_, 1);
    }
  }

  template <int64_t kCount>
  void store(void* grad, const AttentionStrides& strides, int64_t columns, const AttentionSequence& s, int64_t head,
             int64_t j, ScratchRows<C, kCount>& sums, double scale) const {
    if (grad == nullptr) return;
    for (int64_t k = 0; k < std::min(kKeys, s.keys - j); ++k) {
      for (int64_t c = 0; c < columns; ++c) sums.row[k][c] *= static_cast<C>(scale);
      convert(sums.row[k], row_of<S>(grad, strides, s.batch, head, s.key_start + j + k), columns);
    }
  }

  // D and its tangent, of all queries of a head.
  void find_deltas(const AttentionSequence& s, int64_t head, C* delta, C* delta_t) {
    const C *grad_lse = static_cast<const C*>(args_.grad_lse), *grad_lse_t = static_cast<const C*>(args_.grad_lse_t);
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t at = lse_row(args_, s.batch, head, s.query_start + i);
      const auto dot = [&](const AttentionOperand& a, const AttentionOperand& b) {
        if (a.data == nullptr || b.data == nullptr) return C(0);
        const S *x = row_of<S>(a, s.batch, head, s.query_start + i), *y = row_of<S>(b, s.batch, head, s.query_start + i);
        C sum = 0, u[kColumnStep], v[kColumnStep];
        for (int64_t c = 0; c < args_.value_dim; c += kColumnStep) {
          const int64_t count = std::min(kColumnStep, args_.value_dim - c);
          convert(x + c, u, count);
          convert(y + c, v, count);
          for (int64_t e = 0; e < count; ++e) sum += u[e] * v[e];
        }
        return sum;
      };
      delta[i] = dot(args_.grad_out, args_.out) - (grad_lse != nullptr ? grad_lse[at] : C(0));
      if constexpr (kTangent) {
        delta_t[i] = dot(args_.grad_out_t, args_.out) + dot(args_.grad_out, args_.out_t) -
                     (grad_lse_t != nullptr ? grad_lse_t[at] : C(0));
      }
    }
  }

  // --- a tile of queries meets a block of keys

  void meet(const AttentionSequence& s, const Band& band, int64_t head, int64_t g, int64_t i, int64_t count, int64_t j,
            int64_t width, int64_t part) {
    if (biased_ && !load_biases(s, band, head, i, count, j)) return;
    const C* lse = static_cast<const C*>(args_.lse) + lse_row(args_, s.batch, head, s.query_start + i);
    const int64_t at = s.query_start + i, padded = round_up(count, PanelStep<P>::kDeep);
    operand_rows<S, P>(args_.query, args_.head_dim, s.batch, head, at, count, query_buffer_[0], query_[0]);
    pack_rows(args_.query, args_.head_dim, s.batch, head, at, count, columns_, lse, query_panel_[0]);
    const bool has_grad = args_.grad_out.data != nullptr;
    if (has_grad) {
      operand_rows<S, P>(args_.grad_out, args_.value_dim, s.batch, head, at, count, grad_buffer_[0], grad_[0]);
      pack_rows(args_.grad_out, args_.value_dim, s.batch, head, at, count, value_columns_, lse, grad_panel_[0]);
    }
    const bool has_query_t = kTangent && args_.query_t.data != nullptr;
    const bool has_grad_t = kTangent && args_.grad_out_t.data != nullptr;
    if (has_query_t) {
      operand_rows<S, P>(args_.query_t, args_.head_dim, s.batch, head, at, count, query_buffer_[1], query_[1]);
      pack_rows(args_.query_t, args_.head_dim, s.batch, head, at, count, columns_, lse, query_panel_[1]);
    }
    if (has_grad_t) {
      operand_rows<S, P>(args_.grad_out_t, args_.value_dim, s.batch, head, at, count, grad_buffer_[1], grad_[1]);
      pack_rows(args_.grad_out_t, args_.value_dim, s.batch, head, at, count, value_columns_, lse, grad_panel_[1]);
    }

    const auto against = [&](const P* const* a, const PackedOperand& b, Tile& out, bool add) {
      by_panels(band, a, b, i, count, j, width, out, add);
    };
    against(query_[0], args_.packed_key, scores_, false);
    if (has_grad) against(grad_[0], args_.packed_value, inner_, false);
    if constexpr (kTangent) {
      if (has_query_t) against(query_[1], args_.packed_key, scores_t_, false);
      if (args_.packed_key_t.transposed != nullptr) against(query_[0], args_.packed_key_t, scores_t_, has_query_t);
      if (has_grad_t) against(grad_[1], args_.packed_value, inner_t_, false);
      if (has_grad && args_.packed_value_t.transposed != nullptr) {
        against(grad_[0], args_.packed_value_t, inner_t_, has_grad_t);
      }
    }
    for (int64_t r = 0; r < count; ++r) weigh(s, band, head, g, i, r, j, width, lse[r]);
    for (int d = 0; d < (kTangent ? 2 : 1); ++d) {
      transpose(d == 0 ? scores_ : scores_t_, count, padded, width, weights_[d]);
      transpose(d == 0 ? inner_ : inner_t_, count, padded, width, score_grads_[d]);
      if constexpr (!std::is_same_v<C, P>) {
        for (int64_t r = 0; r < count; ++r) convert((d == 0 ? inner_ : inner_t_).row[r], query_grads_[d].row[r], width);
      }
    }
    add_products(s, head, part, i, count, padded, j, width, has_grad, has_query_t, has_grad_t);
  }

  // What the tile adds to the gradients; scores_ are weights by now, and inner_ gradients of scores.
  void add_products(const AttentionSequence& s, int64_t head, int64_t part, int64_t i, int64_t count, int64_t padded,
                    int64_t j, int64_t width, bool has_grad, bool has_query_t, bool has_grad_t) {
    constexpr int64_t kDeep = PanelStep<P>::kDeep;
    constexpr int kLast = kTangent ? 1 : 0;  // what the gradients themselves, or their tangents, are made of
    const int64_t row = columns_ * kDeep, value_row = value_columns_ * kDeep;
    if (args_.grad_value != nullptr) {
      if (has_grad) multiply<P>(weights_[kLast].row, width, padded, grad_panel_[0], value_row, value_sums_.row, value_columns_, true);
      if (has_grad_t) multiply<P>(weights_[0].row, width, padded, grad_panel_[1], value_row, value_sums_.row, value_columns_, true);
    }
    if (args_.grad_key != nullptr) {
      multiply<P>(score_grads_[kLast].row, width, padded, query_panel_[0], row, key_sums_.row, columns_, true);
      if (has_query_t) multiply<P>(score_grads_[0].row, width, padded, query_panel_[1], row, key_sums_.row, columns_, true);
    }
    if (args_.grad_query == nullptr) return;
    C* sums[kRows];
    const int64_t first = (part * args_.batch * args_.heads * args_.queries + lse_row(args_, s.batch, head, s.query_start + i));
    for (int64_t r = 0; r < count; ++r) sums[r] = static_cast<C*>(args_.query_sums) + (first + r) * columns_;
    const auto add = [&](int d, const PackedOperand& keys, P* scrubbed) {
      if (keys.rows == nullptr) return;
      const P* panel = static_cast<const P*>(keys.rows) + (first_panel_ + j / kPanelKeys) * rows_panel(args_.head_dim);
      multiply<P>(grad_rows(d), count, width, without_unused(panel, keys, d, count, j, width, scrubbed), row, sums, columns_, true);
    };
    add(kLast, args_.packed_key, scrubbed_[0]);
    if (kTangent) add(0, args_.packed_key_t, scrubbed_[kLast]);
  }

  const P* const* grad_rows(int d) const {
    if constexpr (std::is_same_v<C, P>) return (d == 0 ? inner_ : inner_t_).row;
    else return query_grads_[d].row;
  }

  // A copy of the panels in which keys that no query of the tile sees are zero, where one of them is not finite.
  const P* without_unused(const P* panel, const PackedOperand& keys, int d, int64_t count, int64_t j, int64_t width,
                          P* scrubbed) const {
    constexpr int64_t kDeep = PanelStep<P>::kDeep;
    const bool* finite = keys.finite + first_panel_ + j / kPanelKeys;
    if (std::all_of(finite, finite + width / kPanelKeys, [](bool f) { return f; })) return panel;
    std::copy_n(panel, width * columns_, scrubbed);
    for (int64_t k = 0; k < width; ++k) {
      bool used = false;
      for (int64_t r = 0; r < count && !used; ++r) used = static_cast<float>(grad_rows(d)[r][k]) != 0;
      for (int64_t c = 0; c < columns_ && !used; ++c) scrubbed[(k / kDeep * columns_ + c) * kDeep + k % kDeep] = P(0);
    }
    return scrubbed;
  }

  // Rows of a tensor as a panel: [rows / kDeep][columns][kDeep]. Those of queries that see nothing are zero, and so are
  // those up to whole steps.
  void pack_rows(const AttentionOperand& t, int64_t columns, int64_t batch, int64_t head, int64_t position, int64_t count,
                 int64_t padded, const C* lse, P* panel) const {
    constexpr int64_t kDeep = PanelStep<P>::kDeep;
    P line[kDeep == 1 ? 1 : kMostColumns];
    for (int64_t r = 0; r < round_up(count, kDeep); ++r) {
      const bool seen = r < count && lse[r] != kMinusInfinity<C>;
      if constexpr (kDeep == 1) {
        P* to = panel + r * padded;
        if (seen) convert(row_of<S>(t, batch, head, position + r), to, columns);
        std::fill(to + (seen ? columns : 0), to + padded, P(0));
      } else {
        P* to = panel + r / 2 * padded * 2 + r % 2;
        for (int64_t c = 0; c < padded; c += kMostColumns) {
          const int64_t n = std::min(kMostColumns, padded - c), given = seen ? std::clamp<int64_t>(columns - c, 0, n) : 0;
          if (given > 0) convert(row_of<S>(t, batch, head, position + r) + c, line, given);
          std::fill(line + given, line + n, P(0));
          for (int64_t e = 0; e < n; ++e) to[2 * (c + e)] = line[e];
        }
      }
    }
  }
  static constexpr int64_t kMostColumns = 64;

  // out[r][k] = Σ a[r]·b[k] of the rows that see any key of a panel.
  void by_panels(const Band& band, const P* const* a, const PackedOperand& b, int64_t i, int64_t count, int64_t j,
                 int64_t width, Tile& out, bool add) const {
    const int64_t depth = round_up(b.columns, PanelStep<P>::kDeep), size = transposed_panel(b.columns);
    for (int64_t p = 0; p < width; p += kPanelKeys) {
      const int64_t first = band.first_row(i, count, j + p), last = band.end_row(i, count, j + p, kPanelKeys);
      if (first >= last) continue;
      C* to[kRows];
      for (int64_t r = first; r < last; ++r) to[r] = out.row[r] + p;
      const P* panel = static_cast<const P*>(b.transposed) + (first_panel_ + (j + p) / kPanelKeys) * size;
      multiply<P>(a + first, last - first, depth, panel, kPanelKeys * PanelStep<P>::kDeep, to + first, kPanelKeys, add);
    }
  }

  bool load_biases(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t count, int64_t j) {
    bool any = args_.mask.type == MaskType::None;
    const int64_t n = std::min(kKeys, s.keys - j);
    for (int64_t r = 0; r < count; ++r) {
      bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i + r, band.diagonal, j, n, bias_.row[r]);
      for (int64_t k = 0; k < n && !any; ++k) any = bias_.row[r][k] != kMinusInfinity<C>;
      if (args_.mask_t.type != MaskType::None) {
        bias_row<S>(args_, args_.mask_t, false, s.batch, head, i + r, band.diagonal, j, n, bias_t_.row[r]);
      }
    }
    return any;
  }

  // Of one row: scores become weights times z, and inner products gradients of the scores; their tangents likewise.
  void weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t g, int64_t i, int64_t r, int64_t j,
             int64_t width, C lse) {
    constexpr int kWidth = kLanes<C>;
    C *const p = scores_.row[r], *const inner = inner_.row[r];
    C *const p_t = kTangent ? scores_t_.row[r] : nullptr, *const inner_t = kTangent ? inner_t_.row[r] : nullptr;
    const int64_t begin = std::max<int64_t>(band.first_key(i + r) - j, 0);
    const int64_t end = lse == kMinusInfinity<C> ? 0 : std::min(band.end_key(i + r) - j, width);
    const auto clear = [&](int64_t from, int64_t to) {
      for (C* row : {p, inner, p_t, inner_t}) {
        if (row != nullptr) std::fill(row + from, row + to, C(0));
      }
    };
    if (begin >= end) return clear(0, width);
    const int64_t from = begin / kPanelKeys * kPanelKeys, to = round_up(end, kPanelKeys);
    const bool has_inner = args_.grad_out.data != nullptr;
    const bool has_score_t = kTangent && (args_.query_t.data != nullptr || args_.packed_key_t.transposed != nullptr);
    const bool has_inner_t = kTangent && (args_.grad_out_t.data != nullptr || (has_inner && args_.packed_value_t.transposed != nullptr));
    const bool has_bias_t = kTangent && args_.mask_t.type != MaskType::None;
    const int64_t at = lse_row(args_, s.batch, head, s.query_start + i + r);
    const Vec<C> zero(C(0)), low(kMinusInfinity<C>), scale(static_cast<C>(args_.scale));
    const Vec<C> factor(factor_), base(kLogBase<C>), shift(-lse * kLogBase<C>);
    const Vec<C> cap(static_cast<C>(args_.softcap)), steep(static_cast<C>(args_.softcap != 0 ? 1 / args_.softcap : 0));
    const Vec<C> delta(delta_[g * args_.queries + i + r]), delta_t(kTangent ? delta_t_[g * args_.queries + i + r] : C(0));
    const Vec<C> lse_t(kTangent ? static_cast<const C*>(args_.lse_t)[at] : C(0));
    C z[kPanelKeys];
    for (int64_t k = from; k < to; k += kPanelKeys) {
      if (dropout_.acts()) dropout_.factors(s.batch, head, s.query_start + i + r, j + k, kPanelKeys, z);
#pragma GCC unroll 4
      for (int64_t e = k; e < k + kPanelKeys; e += kWidth) {
        Vec<C> weight, slope(C(1)), bend = zero;
        if (!biased_) {
          weight = power(at::vec::fmadd(Vec<C>::loadu(p + e), factor, shift));
        } else {
          Vec<C> t = Vec<C>::loadu(p + e) * scale;
          if (args_.softcap != 0) {
            const Vec<C> ratio = tanh(t * steep);
            t = ratio * cap;
            slope = Vec<C>(C(1)) - ratio * ratio;
            if constexpr (kTangent) bend = ratio * slope * steep * Vec<C>(C(-2));
          }
          const Vec<C> b = Vec<C>::loadu(bias_.row[r] + e);
          t = select_equal(b, low, low, t + b);
          weight = power(at::vec::fmadd(t, base, shift));
        }
        const Vec<C> kept = dropout_.acts() ? Vec<C>::loadu(z + e - k) : Vec<C>(C(1));
        // What a key that is barred, or is NaN where nobody sees it, would give is no gradient: its weight is zero.
        const auto seen = [&](const Vec<C>& v) { return select_equal(weight, zero, zero, v); };
        const Vec<C> first = has_inner ? Vec<C>::loadu(inner + e) * kept - delta : zero - delta;
        const Vec<C> full = seen(weight * first);
        (weight * kept).store(p + e);
        (full * slope).store(inner + e);
        if constexpr (kTangent) {
          const Vec<C> raw = has_score_t ? Vec<C>::loadu(p_t + e) * scale : zero;
          Vec<C> score = raw * slope;
          if (has_bias_t) score = score + Vec<C>::loadu(bias_t_.row[r] + e);
          const Vec<C> weight_t = seen(weight * (score - lse_t));
          const Vec<C> second = has_inner_t ? Vec<C>::loadu(inner_t + e) * kept - delta_t : zero - delta_t;
          const Vec<C> full_t = seen(weight_t * first + weight * second);
          (weight_t * kept).store(p_t + e);
          seen(full_t * slope + full * bend * raw).store(inner_t + e);
          if (biased_) full_t.store(mask_grads_.row[r] + e);
        } else {
          if (biased_) full.store(mask_grads_.row[r] + e);
        }
      }
    }
    clear(0, begin);
    clear(end, width);
    if (args_.grad_mask != nullptr) add_to_mask(s, head, i + r, j, begin, end, mask_grads_.row[r]);
  }

  void add_to_mask(const AttentionSequence& s, int64_t head, int64_t i, int64_t j, int64_t begin, int64_t end,
                   const C* gradient) const {
    const int64_t* strides = args_.grad_mask_strides;
    C* to = static_cast<C*>(args_.grad_mask) + s.batch * strides[0] + head * strides[1] + i * strides[2] + j;
    for (int64_t k = begin; k < end; ++k) to[k] += gradient[k];
  }

  // [count][width] → [width][padded], zeros beyond count.
  void transpose(const Tile& from, int64_t count, int64_t padded, int64_t width, ScratchRows<P, kKeys>& to) const {
    constexpr int64_t kStep = 16;
    if constexpr (std::is_same_v<P, float>) {
      for (int64_t r = 0; r < count; r += kStep) {
        const int64_t n = std::min(kStep, count - r);
        for (int64_t k = 0; k < width; k += kStep) {
          at::vec::transpose_mxn<float>(from.row[r] + k, kKeys, to.row[k] + r, kWeightRows, static_cast<int>(n), kStep);
        }
      }
    } else {
      for (int64_t k = 0; k < width; ++k) {
        for (int64_t r = 0; r < count; ++r) to.row[k][r] = static_cast<P>(from.row[r][k]);
        for (int64_t r = count; r < padded; ++r) to.row[k][r] = P(0);
      }
    }
  }

  const AttentionBackwardCpu& args_;
  const C factor_;  // from a score to an exponent of the base
  const bool biased_;
  const int64_t columns_, value_columns_;
  const Dropout<C> dropout_;
  Workspace space_;
  size_t parts_[48];
  int next_ = 0;
  bool place_ = false;
  Tile scores_, inner_, scores_t_, inner_t_, bias_, bias_t_;
  Tile mask_grads_;  // gradients of t
  ScratchRows<P, kKeys> weights_[2], score_grads_[2];  // transposed
  ScratchRows<P, kRows> query_grads_[2];               // gradients of scores as operands, where those are no C
  ScratchRows<C, kKeys> key_sums_, value_sums_;
  P *query_buffer_[2], *grad_buffer_[2], *query_panel_[2], *grad_panel_[2], *scrubbed_[2];
  const P *query_[2][kRows], *grad_[2][kRows];
  C *delta_ = nullptr, *delta_t_ = nullptr;
  int64_t first_panel_ = 0;
};

}  // namespace lect11ext::CPU_CAPABILITY
