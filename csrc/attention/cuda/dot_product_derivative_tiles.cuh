// What a block of a derivative's kernel holds: tiles of its rows and of the columns that come by, what is known of the
// queries among them, and a warp's products of the two.
#pragma once

#include "attention/cuda/dot_product_pairs.cuh"

namespace lect11ext::cuda {

// The backward's of floats, without tangents, which has kernels for more cases than others.
template <class S, Part kPart>
inline constexpr bool kFloatBackward = std::is_same_v<S, float> && (kPart == Part::Query || kPart == Part::Key);
// Whether kBound is one of head_dim and value_dim; else it is one of the columns of each sum that a block owns.
template <class S, Part kPart>
inline constexpr bool kBoundsRows = kIsHalf<S> || kFloatBackward<S, kPart>;

// kFinite: as in Fragment<float>::set.
template <class S, Part kPart, int kBound, bool kFinite>
struct DerivativeTiles {
  using P = Pairs<S, kPart>;
  using C = Compute<S>;
  using Known = typename P::Known;
  static constexpr int kDim = kBoundsRows<S, kPart> ? known_columns<S>(kBound) : 0;
  // Columns of each sum that a block owns.
  static constexpr int kWidth = std::min(kBound, sizeof(S) < 8 && kPart != Part::KeyTangent ? 128 : 64);
  using Plan = DerivativePlan<kDim>;
  static constexpr bool kKeysAreRows = P::kKeysAreRows;
  // Tiles of sixteen rows for a warp: two where registers hold the sums, so that what is read of the columns counts
  // twice.
  static constexpr int kRowTiles = kPart == Part::Query && (kIsHalf<S> || (sizeof(S) == 4 && kWidth == 64)) ? 2
                                   : kPart == Part::Key && kIsHalf<S> && kWidth == 64                       ? 2
                                                                                                            : 1;

  // Columns in a tile, and tiles in shared memory: two blocks are to have room.
  static constexpr int kCols = sizeof(S) < 8 ? (P::kTangents ? 16 : 32) : P::kTangents ? 8 : 16;
  static constexpr int kStages = P::kOfMask || (std::is_same_v<S, float> && kWidth == 128) ? 1 : 2;

  static constexpr int kTiles = kCols / 8, kColumns = kWidth / 8;
  static constexpr int kFirstColumns = P::kFirst ? kColumns : 1, kSecondColumns = P::kSecond ? kColumns : 1;

  struct State {
    C first[kRowTiles][kFirstColumns][4] = {}, second[kRowTiles][kSecondColumns][4] = {};
    C lse_t[kRowTiles][2] = {};
  };

  // Of each pair at first its products, at last its weights: for columns of kind 0, 1, 2, 3.
  struct Sums {
    C of[kKinds][kRowTiles][kTiles][4];
  };

  struct KnownRows {
    Known of[kRowTiles][2];
  };

  // Where a warp is: its rows, and the head of the queries' side and of the keys'.
  struct Spot {
    int first_row, head, kv_head;
    __device__ int row(int m, int half, const Lane& lane) const { return first_row + 16 * m + 8 * half + lane.g; }
  };

  __device__ DerivativeTiles(const DerivativeArgs& args, const Plan& plan, unsigned char* shared)
      : args_(args),
        plan_(plan),
        numbers_(reinterpret_cast<C*>(shared)),
        rows_(reinterpret_cast<S*>(shared + (kKeysAreRows ? plan.stages * kNumbersBytes : 0))),
        group_(static_cast<int>(args.heads / args.kv_heads)) {}

  static constexpr int kRows = 16 * kRowTiles;  // of a warp
  // Of what is known of the queries that come by, a stage.
  static constexpr int kNumbersBytes = kKinds * kCols * static_cast<int>(sizeof(C));

  // --- tiles in shared memory

  __device__ S* stage_at(int stage) const { return rows_ + plan_.rows_size + stage * plan_.stage_size; }

  __device__ void load_rows_of(const Sequence& sequence, int first_row, int head) const {
    if (!plan_.rows_shared) return;
    const int64_t first = (kKeysAreRows ? sequence.first_key : sequence.first_query) + first_row;
    const int end = (kKeysAreRows ? sequence.keys : sequence.queries) - first_row;
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
      if (!P::uses_row(kind) || plan_.rows.of[kind] < 0) continue;
      const AttentionOperand& operand = P::row(args_, kind);
      load_rows(rows_ + plan_.rows.of[kind], plan_.shape[kind % 2], plan_.warps * kRows,
                (kKeysAreRows ? plan_.key_side_aligned : plan_.query_side_aligned)[kind],
                row_of<S>(operand, sequence.batch, head, first), operand.strides.position, end);
    }
  }

  // Columns from `first_column` on, of a head of the queries' side or of the keys'.
  __device__ void load_columns(const Sequence& sequence, int head, int first_column, int stage) const {
    const int64_t first = (kKeysAreRows ? sequence.first_query : sequence.first_key) + first_column;
    const int end = (kKeysAreRows ? sequence.queries : sequence.keys) - first_column;
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
      if (!P::uses_column(kind) || plan_.columns.of[kind] < 0) continue;
      const AttentionOperand& operand = P::column(args_, kind);
      load_rows(stage_at(stage) + plan_.columns.of[kind], plan_.shape[kind % 2], kCols,
                (kKeysAreRows ? plan_.query_side_aligned : plan_.key_side_aligned)[kind],
                row_of<S>(operand, sequence.batch, head, first), operand.strides.position, end);
    }
    if constexpr (kKeysAreRows) {
      const void* const all[kKinds] = {args_.lse, plan_.delta, P::kTangents ? args_.lse_t : nullptr,
                                       P::kTangents ? plan_.delta_t : nullptr};
      const int64_t number = (sequence.batch * args_.heads + head) * args_.queries + first;
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
        const int i = static_cast<int>(threadIdx.x);
        if (all[kind] == nullptr || i >= kCols) continue;
        C* const to = numbers_ + (stage * kKinds + kind) * kCols + i;
        if (i < end) copy_async<sizeof(C)>(to, static_cast<const C*>(all[kind]) + number + i);
        else *to = 0;
      }
    }
  }

  __device__ void know_rows(KnownRows& own, const Sequence& sequence, int head, const Spot& spot,
                            const Lane& lane) const {
    const int64_t first = (sequence.batch * args_.heads + head) * args_.queries + sequence.first_query;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = spot.row(m, half, lane);
        own.of[m][half] = Known{infinity<C>(), 0, 0, 0};
        if (query < sequence.queries) own.of[m][half] = P::known(args_, plan_, first + query);
      }
    }
  }

  // Of the query that a column is.
  __device__ Known known_of_column(int column, int stage) const {
    const C* const from = numbers_ + stage * kKinds * kCols + column;
    Known known{P::usable(from[0]), from[kCols], 0, 0};
    if constexpr (P::kTangents) known.lse_t = from[2 * kCols], known.delta_t = from[3 * kCols];
    return known;
  }

  // --- pairs

  __device__ SharedRows<S, kFinite> shared_rows(int kind, int m, const Lane& lane) const {
    const TileShape<kDim>& shape = plan_.shape[kind % 2];
    return {rows_ + plan_.rows.of[kind] + (kRows * lane.warp + 16 * m) * shape.stride(), shape.stride()};
  }

  __device__ GlobalRows<S, kFinite> global_rows(const Sequence& sequence, int kind, int m, const Spot& spot,
                                                const Lane& lane) const {
    const int64_t first = kKeysAreRows ? sequence.first_key : sequence.first_query;
    const int end = kKeysAreRows ? sequence.keys : sequence.queries;
    const auto row = [&](int i) -> const S* {
      if (i >= end) return nullptr;
      return row_of<S>(P::row(args_, kind), sequence.batch, kKeysAreRows ? spot.kv_head : spot.head, first + i);
    };
    return {row(spot.row(m, 0, lane)), row(spot.row(m, 1, lane)), plan_.shape[kind % 2].columns};
  }

  __device__ void add_product(C (&sums)[kRowTiles][kTiles][4], const Sequence& sequence, int row_kind, int column_kind,
                              const Spot& spot, int stage, const Lane& lane) const {
    if (plan_.rows.of[row_kind] < 0 || plan_.columns.of[column_kind] < 0) return;
    const auto multiply = [&](auto source) {
      decltype(source(0)) sources[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) sources[m] = source(m);
      // Scores are to have the bits that they had in the forward, whose rows are queries.
      multiply_rows<kKeysAreRows, kFinite>(sums, sources, stage_at(stage) + plan_.columns.of[column_kind],
                                           plan_.shape[column_kind % 2], lane);
    };
    // Of 16-bit types all rows have room in shared memory; wider ones may have to be read from global memory each time.
    if constexpr (!kIsHalf<S>) {
      if (!plan_.rows_shared) return multiply([&](int m) { return global_rows(sequence, row_kind, m, spot, lane); });
    }
    multiply([&](int m) { return shared_rows(row_kind, m, lane); });
  }

  const DerivativeArgs& args_;
  const Plan& plan_;
  C* numbers_;  // [stages, kinds, kCols], where keys are rows
  S* rows_;
  int group_;
};

}  // namespace lect11ext::cuda
