// The kernels of derivatives: a block owns a tile of queries or of keys, and what they meet comes by in tiles. Nothing
// is added up by two blocks, so that every sum has one order.
#pragma once

#include "attention/cuda/dot_product_derivative_tiles.cuh"

namespace lect11ext::cuda {

template <class S, Part kPart, int kBound, bool kFinite = false>
class Derivative : public DerivativeTiles<S, kPart, kBound, kFinite> {
 protected:
  using Base = DerivativeTiles<S, kPart, kBound, kFinite>;
  using Base::add_product;
  using Base::args_, Base::plan_, Base::group_, Base::kKeysAreRows, Base::kRowTiles, Base::kTiles;
  using Base::stage_at, Base::load_rows_of, Base::load_columns, Base::know_rows, Base::known_of_column;
  using typename Base::P, typename Base::C, typename Base::Known, typename Base::KnownRows, typename Base::State;
  using typename Base::Sums, typename Base::Spot;

 public:
  using Base::Base;
  using Base::kCols, Base::kDim, Base::kNumbersBytes, Base::kRows, Base::kStages, Base::kWidth;

  __device__ void run() const {
    const int64_t count = plan_.tiles.count();
    const int unit = static_cast<int>(divide(blockIdx.x, count));
    const SequenceTiles::Tile tile = plan_.tiles.find(blockIdx.x - unit * count);
    const Sequence sequence(args_, tile.sequence);
    const int rows = kKeysAreRows ? sequence.keys : sequence.queries, size = static_cast<int>(plan_.tiles.size);
    const int tiles = static_cast<int>(divide_up(rows, size));
    if (tile.number >= tiles) return;
    // What has the most to do in a causal attention comes first: the first keys, the last queries.
    const int first_row = (kKeysAreRows ? tile.number : tiles - 1 - tile.number) * size;
    const int last_row = std::min(first_row + size, rows) - 1;
    const Range range =
        kKeysAreRows ? queries_seen(sequence, first_row, last_row) : keys_seen(sequence, first_row, last_row);
    const int first_tile = range.first / kCols;
    const int columns = range.empty() ? 0 : static_cast<int>(divide_up(range.last, kCols)) - first_tile;
    const int heads = kKeysAreRows ? group_ : 1;

    const Lane lane;
    const Dropout dropout(args_, sequence);
    Spot spot{first_row + kRows * lane.warp, 0, 0};
    spot.kv_head = kKeysAreRows ? unit : unit / group_;
    const auto head_of = [&](int i) { return kKeysAreRows ? unit * group_ + i / columns : unit; };
    load_rows_of(sequence, first_row, kKeysAreRows ? spot.kv_head : unit);
    KnownRows own{};
    if constexpr (!kKeysAreRows) know_rows(own, sequence, unit, spot, lane);

    State state;
    const auto load = [&](int i, int stage) {
      load_columns(sequence, kKeysAreRows ? head_of(i) : spot.kv_head, (first_tile + i % columns) * kCols, stage);
      copy_commit();
    };
    const int all = columns * heads;
    if (all > 0) load(0, 0);
    for (int i = 0; i < all; ++i) {
      const int stage = plan_.stages == 2 ? i & 1 : 0;
      if (plan_.stages == 2 && i + 1 < all) {
        load(i + 1, 1 - stage);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      spot.head = head_of(i);
      if (spot.first_row < rows) {
        Sums sums;
        uint32_t seen;
        if (weigh_tile(sums, seen, state, sequence, dropout, own, spot, (first_tile + i % columns) * kCols, stage,
                       lane)) {
          add_columns(state, sums, seen, stage, lane);
        }
      }
      __syncthreads();
      if (plan_.stages == 1 && i + 1 < all) load(i + 1, 0);
    }
    copy_commit();  // of a block without tiles
    copy_wait<0>();
    if (spot.first_row < rows) finish(state, sequence, spot, unit, rows, lane);
  }

 protected:
  using RowScores = Scores<S, kKeysAreRows>;

  // The query and the key of a row and of a column.
  __device__ static void pair_of(int row, int column, int& query, int& key) {
    query = kKeysAreRows ? column : row;
    key = kKeysAreRows ? row : column;
  }

  __device__ static LaneRow lane_row(const RowScores& scores, const Spot& spot, int m, int half, int first_column,
                                     const Lane& lane) {
    int query, key;
    pair_of(spot.row(m, half, lane), first_column + 2 * lane.q, query, key);
    return scores.row(spot.head, query, key);
  }

  // Weights of the pairs of a warp's rows and the columns from `first_column` on; false where no pair counts.
  __device__ bool weigh_tile(Sums& sums, uint32_t& seen, State& state, const Sequence& sequence, const Dropout& dropout,
                             const KnownRows& own, const Spot& spot, int first_column, int stage,
                             const Lane& lane) const {
    const RowScores scores{args_, sequence, plan_.mask_pairs};
    const int first_query = kKeysAreRows ? first_column : spot.first_row, queries = kKeysAreRows ? kCols : kRows;
    const int first_key = kKeysAreRows ? spot.first_row : first_column, keys = kKeysAreRows ? kRows : kCols;
    uint32_t bits[kRowTiles][2];
    seen = ~0u;
    const bool whole = args_.mask.type == MaskType::None && first_query + queries <= sequence.queries &&
                       all_see(sequence, first_query, queries, first_key, keys);
    if (!whole) seen = 0;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      uint32_t& of_row = bits[i / 2][i % 2];
      of_row = ~0u;
      if (whole) continue;
      of_row = scores.template seen<kTiles>(lane_row(scores, spot, i / 2, i % 2, first_column, lane));
      seen |= of_row;
    }
    if (!whole) {
      if (!__any_sync(~0u, seen != 0)) return false;
      seen = columns_seen(seen);
    }

    sums = {};
    add_product(sums.of[0], sequence, 0, 0, spot, stage, lane);
    if constexpr (P::kGradients) add_product(sums.of[1], sequence, 1, 1, spot, stage, lane);
    if constexpr (P::kTangents) {
      add_product(sums.of[2], sequence, 2, 0, spot, stage, lane);
      add_product(sums.of[2], sequence, 0, 2, spot, stage, lane);
      if constexpr (P::kGradients) {
        add_product(sums.of[3], sequence, 3, 1, spot, stage, lane);
        add_product(sums.of[3], sequence, 1, 3, spot, stage, lane);
      }
    }

    if (plan_.plain) weigh_pairs<true>(sums, bits, state, scores, dropout, own, spot, first_column, stage, lane);
    else weigh_pairs<false>(sums, bits, state, scores, dropout, own, spot, first_column, stage, lane);
    return true;
  }

  template <bool kPlain>
  __device__ void weigh_pairs(Sums& sums, const uint32_t (&bits)[kRowTiles][2], State& state, const RowScores& scores,
                              const Dropout& dropout, const KnownRows& own, const Spot& spot, int first_column,
                              int stage, const Lane& lane) const {
    const C kept = kPlain ? C(1) : C(dropout_factor(args_.dropout_p));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      C capped[kTiles][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto element = [&](int i) -> C& { return sums.of[0][m][i / 2][2 * half + i % 2]; };
        if constexpr (kPlain) {
#pragma unroll
          for (int i = 0; i < 2 * kTiles; ++i) element(i) = rounded_product(element(i), C(args_.scale));
        } else {
          scores.template finish<kTiles>(lane_row(scores, spot, m, half, first_column, lane), bits[m][half], element,
                                         [&](int i, C x) { capped[i / 2][2 * half + i % 2] = x; });
        }
      }
      uint32_t keep = ~0u;  // of two tiles
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (!kPlain && args_.dropout_p > 0 && n % 2 == 0) {
          const int column = first_column + 8 * n;
          if constexpr (kKeysAreRows) {
            keep = dropout.keep_of_keys(spot.head, column, spot.first_row + 16 * m, lane);
          } else {
            const int low = spot.row(m, 0, lane);
            keep = dropout.keep_of_queries(spot.head, low, low + 8, column, lane);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const auto sum = [&](int kind) -> C& { return sums.of[kind][m][n][e]; };
          const bool counts = (bits[m][e / 2] >> (2 * n + e % 2) & 1) != 0;
          C mask_t = 0, lse_t = 0;
          if (P::kTangents && !kPlain && counts && args_.mask_t.type != MaskType::None) {
            int query, key;
            pair_of(spot.row(m, e / 2, lane), first_column + 8 * n + 2 * lane.q + e % 2, query, key);
            mask_t = scores.added(args_.mask_t, spot.head, query, key);
          }
          const Known known = kKeysAreRows ? known_of_column(8 * n + 2 * lane.q + e % 2, stage) : own.of[m][e / 2];
          P::weigh(args_, known, keep >> (n % 2 * 4 + e) & 1 ? kept : C(0), capped[n][e], mask_t, sum(0), sum(1),
                   sum(2), sum(3), lse_t);
          // What does not count is selected away, whatever it may be.
#pragma unroll
          for (int kind = 0; kind < kKinds; ++kind) sum(kind) = counts ? sum(kind) : C(0);
          if constexpr (kPart == Part::Tangent) state.lse_t[m][e / 2] += counts ? lse_t : C(0);
        }
      }
    }
  }

  __device__ void add_columns(State& state, const Sums& sums, uint32_t seen, int stage, const Lane& lane) const {
    const int first_column = static_cast<int>(blockIdx.y) * kWidth;
    const auto add = [&](auto& out, int kind) {
      if (plan_.columns.of[kind] < 0) return;
      multiply_columns<kFinite, S>(out, sums.of[kind], stage_at(stage) + plan_.columns.of[kind], plan_.shape[kind % 2],
                                   first_column, seen, lane);
    };
    if constexpr (P::kFirst) {
      add(state.first, 0);
      if constexpr (P::kTangents) add(state.first, 2);
    }
    if constexpr (P::kSecond) {
      add(state.second, 1);
      if constexpr (P::kTangents) add(state.second, 3);
    }
  }

  // --- results

  // `value` gives a sum's final value.
  template <int kCount, class Value>
  __device__ void write_rows(void* to, const AttentionStrides& strides, bool aligned,
                             const C (&sums)[kRowTiles][kCount][4], int columns, const Sequence& sequence, int head,
                             const Spot& spot, int end, const Lane& lane, Value value) const {
    if (to == nullptr) return;
    const int first_column = static_cast<int>(blockIdx.y) * kWidth;
    const int64_t first = kKeysAreRows ? sequence.first_key : sequence.first_query;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int m = i / 2, half = i % 2, row = spot.row(m, half, lane);
      if (row >= end) continue;
      S* const out =
          static_cast<S*>(to) + sequence.batch * strides.batch + head * strides.head + (first + row) * strides.position;
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const int column = first_column + 8 * n + 2 * lane.q;
        C pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair[e] = column + e < columns ? value(sums[m][n][2 * half + e], m, half, column + e) : C(0);
        }
        store_pair(out + column, pair, columns - column, aligned);
      }
    }
  }

  __device__ void finish(const State& state, const Sequence& sequence, const Spot& spot, int unit, int rows,
                         const Lane& lane) const {
    const int head_dim = static_cast<int>(args_.head_dim), value_dim = static_cast<int>(args_.value_dim);
    if constexpr (kKeysAreRows) {
      const auto plain = [](C sum, int, int, int) { return sum; };
      write_rows(args_.grad_key, args_.grad_key_strides, plan_.pairs_aligned[0], state.first, head_dim, sequence, unit,
                 spot, rows, lane, plain);
      write_rows(args_.grad_value, args_.grad_value_strides, plan_.pairs_aligned[1], state.second, value_dim, sequence,
                 unit, spot, rows, lane, plain);
    } else {
      // A row that sees nothing is zero, whatever was multiplied by its zeros.
      KnownRows own;
      know_rows(own, sequence, unit, spot, lane);
      const auto counts = [&](int m, int half) { return own.of[m][half].lse != infinity<C>(); };
      if constexpr (P::kFirst) {
        write_rows(args_.grad_query, args_.grad_query_strides, plan_.pairs_aligned[0], state.first, head_dim, sequence,
                   unit, spot, rows, lane, [&](C sum, int m, int half, int) { return counts(m, half) ? sum : C(0); });
      } else {
        C lse_t[2];
        const S* out[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          lse_t[half] = state.lse_t[0][half];
          lse_t[half] += __shfl_xor_sync(~0u, lse_t[half], 1);
          lse_t[half] += __shfl_xor_sync(~0u, lse_t[half], 2);
          const int row = spot.row(0, half, lane);
          const int64_t query = sequence.first_query + row;
          out[half] = row_of<S>(args_.out, sequence.batch, unit, query);
          if (row < rows && lane.q == 0 && blockIdx.y == 0) {
            static_cast<C*>(plan_.lse_t)[(sequence.batch * args_.heads + unit) * args_.queries + query] =
                counts(0, half) ? lse_t[half] : C(0);
          }
        }
        write_rows(plan_.out_t, plan_.out_t_strides, plan_.pairs_aligned[0], state.second, value_dim, sequence, unit,
                   spot, rows, lane, [&](C sum, int m, int half, int column) {
                     return counts(m, half) ? sum - lse_t[half] * from_storage<C>(out[half][column]) : C(0);
                   });
      }
    }
  }
};

}  // namespace lect11ext::cuda
