// Where the kernels of attention find things: sequences and tiles of their rows, and how tiles come to shared memory.
//
// A kernel's rows are queries and its columns keys, or the other way round. A block owns sixteen rows for every warp
// (or a multiple), and columns come by in tiles.
#pragma once

#include <algorithm>

#include "attention/cuda/dot_product_fragments.cuh"
#include "attention/dot_product.h"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {

inline constexpr int kMostWarps = 4;
inline constexpr int kMostThreads = 32 * kMostWarps;

// --- sequences ----------------------------------------------------------------------------------------------------

// Positions within a sequence fit an int with room to spare; offsets in memory are of 64 bits.
inline constexpr int kMostPositions = 1 << 29;

struct Sequence {
  int64_t batch;  // index of the tensors' first dimension
  int64_t first_query, first_key;
  int queries, keys, diagonal;
  int left, right;  // the window

  __device__ Sequence(const Attention& args, int64_t n)
      : left(clamp_window(args.window_left)), right(clamp_window(args.window_right)) {
    if (args.query_starts != nullptr) {
      batch = 0;
      first_query = args.query_starts[n];
      queries = static_cast<int>(args.query_starts[n + 1] - first_query);
      first_key = args.key_starts[n];
      keys = static_cast<int>(args.key_starts[n + 1] - first_key);
    } else {
      batch = n;
      first_query = first_key = 0;
      queries = static_cast<int>(args.queries);
      keys = static_cast<int>(args.keys);
    }
    diagonal = args.bottom_right ? keys - queries : 0;
  }

 private:
  static __device__ int clamp_window(int64_t bound) {
    constexpr int64_t kMost = 2 * int64_t{kMostPositions};
    return static_cast<int>(bound > kMost ? kMost : bound < -kMost ? -kMost : bound);
  }
};

struct Range {
  int first, last;
  __device__ bool empty() const { return first >= last; }
};

// Keys that some query from first_query to last_query sees, by the window alone.
__device__ inline Range keys_seen(const Sequence& sequence, int first_query, int last_query) {
  return {std::max(0, first_query + sequence.diagonal - sequence.left),
          std::min(sequence.keys, last_query + sequence.diagonal + sequence.right + 1)};
}

// Queries that see some key from first_key to last_key.
__device__ inline Range queries_seen(const Sequence& sequence, int first_key, int last_key) {
  return {std::max(0, first_key - sequence.diagonal - sequence.right),
          std::min(sequence.queries, last_key - sequence.diagonal + sequence.left + 1)};
}

// Whether all of `queries` from `query` on see all of `keys` from `key` on. Queries beyond the last count as others do.
__device__ inline bool all_see(const Sequence& sequence, int query, int queries, int key, int keys) {
  return key + keys <= sequence.keys && key + keys - 1 <= query + sequence.diagonal + sequence.right &&
         key >= query + queries - 1 + sequence.diagonal - sequence.left;
}

inline void check_positions(const Attention& args) {
  if (args.queries > kMostPositions || args.keys > kMostPositions) {
    throw std::runtime_error("attention on CUDA takes at most 2^29 queries and keys.");
  }
}

// --- tiles of rows ------------------------------------------------------------------------------------------------

// Tiles of `size` rows of all sequences, numbered one behind the other. With starts the lengths are on the device
// alone, and there are a few numbers too many: sequence n has those from starts[n] / size + n on, never fewer than it
// needs.
struct SequenceTiles {
  const int64_t* starts;  // null: `rows` rows in each sequence
  int64_t sequences;
  int64_t rows;  // with starts those of all sequences together
  int64_t size;
  int64_t packed;  // rows for every position

  __host__ __device__ int64_t count() const {
    return starts == nullptr ? sequences * divide_up(rows, size) : rows / size + sequences;
  }

  struct Tile {
    int64_t sequence;
    int number;
  };

  __device__ int64_t first_of(int64_t n) const { return starts[n] * packed / size + n; }

  __device__ Tile find(int64_t number) const {
    if (starts == nullptr) {
      const int64_t tiles = divide_up(rows, size), sequence = divide(number, tiles);
      return {sequence, static_cast<int>(number - sequence * tiles)};
    }
    int64_t low = 0, high = sequences;  // first_of(low) ≤ number < first_of(high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_of(middle) <= number ? low : high) = middle;
    }
    return {low, static_cast<int>(number - first_of(low))};
  }
};

// --- tiles in shared memory ---------------------------------------------------------------------------------------

// What the compiler is told of rows' columns where `bound` is one: of floats beyond 128, and of doubles, nothing.
template <class S>
constexpr int known_columns(int bound) {
  return kIsHalf<S> || (std::is_same_v<S, float> && bound <= 128) ? bound : 0;
}

// `columns` elements of a row, zero up to a multiple of sixteen. The elements between rows keep lanes that read one
// column of several rows out of each other's memory banks. kDim: a bound of the columns, by which the compiler knows
// where rows lie; 0 for none.
template <int kDim>
struct TileShape {
  static constexpr int kGap = 8;
  int columns, own_stride, own_lanes_log;

  template <class S>
  static TileShape of(int64_t columns) {
    TileShape shape{static_cast<int>(columns), static_cast<int>(divide_up(columns, 16)) * 16 + kGap, 0};
    while (shape.own_lanes_log < 5 && kVector<S> << shape.own_lanes_log < shape.padded()) ++shape.own_lanes_log;
    return shape;
  }
  __host__ __device__ int padded() const { return own_stride - kGap; }
  __host__ __device__ int stride() const { return kDim > 0 ? kDim + kGap : own_stride; }
  // So many lanes share a row.
  template <class S>
  __device__ int lanes() const {
    if constexpr (kDim > 0) return std::min(kDim / kVector<S>, 32);
    else return 1 << own_lanes_log;
  }
  __device__ bool full() const { return kDim > 0 && columns == kDim; }
};

template <class S>
__device__ inline const S* row_of(const AttentionOperand& operand, int64_t batch, int64_t head, int64_t position) {
  return static_cast<const S*>(operand.data) + batch * operand.strides.batch + head * operand.strides.head +
         position * operand.strides.position;
}

// Whether rows may be read in pieces of 16 bytes.
template <class S>
bool is_aligned(const AttentionOperand& operand) {
  const AttentionStrides& s = operand.strides;
  return is_aligned<S, kVector<S>>(operand.data) && s.batch % kVector<S> == 0 && s.head % kVector<S> == 0 &&
         s.position % kVector<S> == 0;
}

// Sixteen bytes of a row, of which `valid` elements are there and the others zero; `aligned`: both sides are, to
// sixteen bytes.
template <class S>
__device__ inline void copy_piece(S* to, const S* from, int valid, bool aligned) {
  constexpr int kElements = kVector<S>;
  if (aligned && valid == kElements) return copy_async<kVectorBytes>(to, from);
  Pack<S, kElements> pack = Pack<S, kElements>::zero();
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if (e < valid) pack.data[e] = from[e];
  }
  uint4 words;  // Pack::store is for global memory alone
  memcpy(&words, &pack, sizeof(words));
  *reinterpret_cast<uint4*>(to) = words;
}

// Has the block's threads copy `count` rows, row by row(i): where the i-th begins, null for one of zeros. Waited for
// with copy_wait and a barrier of the block.
template <class S, int kDim, class Row>
__device__ inline void load_rows(S* to, const TileShape<kDim>& shape, int count, bool aligned, Row row) {
  constexpr int kElements = kVector<S>;
  const int thread = static_cast<int>(threadIdx.x), lanes = shape.template lanes<S>();
  for (int i = thread / lanes; i < count; i += static_cast<int>(blockDim.x) / lanes) {
    const S* const from = row(i);
    for (int column = thread % lanes * kElements; column < shape.padded(); column += lanes * kElements) {
      const int valid = from == nullptr ? 0 : std::max(0, std::min(kElements, shape.columns - column));
      copy_piece(to + i * shape.stride() + column, from + (valid > 0 ? column : 0), valid, aligned);
    }
  }
}

// The same of rows that are `step` elements apart, of which the first `valid` are there.
template <class S, int kDim>
__device__ inline void load_rows(S* to, const TileShape<kDim>& shape, int count, bool aligned, const S* first,
                                 int64_t step, int valid) {
  constexpr int kElements = kVector<S>;
  const int thread = static_cast<int>(threadIdx.x), lanes = shape.template lanes<S>();
  const int rows = static_cast<int>(blockDim.x) / lanes, own = thread / lanes;
  for (int column = thread % lanes * kElements; column < shape.padded(); column += lanes * kElements) {
    const int there = std::max(0, std::min(kElements, shape.columns - column));
    const S* from = first + own * step + column;
    S* piece = to + own * shape.stride() + column;
    const auto each = [&](auto copy) {
#pragma unroll 4
      for (int i = own; i < count; i += rows) {
        copy(i);
        from += rows * step;
        piece += rows * shape.stride();
      }
    };
    if (aligned && valid >= count && shape.columns == shape.padded()) {
      each([&](int) { copy_async<kVectorBytes>(piece, from); });
    } else {
      each([&](int i) { copy_piece(piece, from, i < valid ? there : 0, aligned); });
    }
    if (kDim > 0 && kDim <= 32 * kElements) break;  // a row has no more pieces than lanes
  }
}

// Two neighbouring elements of a row, of which `count` are there; aligned: `to` is to twice an element's size.
template <class T, class C>
__device__ inline void store_pair(T* to, const C (&pair)[2], int count, bool aligned) {
  if (aligned && count >= 2) {
    Pack<T, 2> pack;
    pack.set(0, pair[0]);
    pack.set(1, pair[1]);
    pack.store(to);
  } else {
    if (count > 0) to[0] = to_storage<T>(pair[0]);
    if (count > 1) to[1] = to_storage<T>(pair[1]);
  }
}

template <class S>
bool pairs_are_aligned(const void* data, const AttentionStrides& strides) {
  return is_aligned<S, 2>(data) && strides.batch % 2 == 0 && strides.head % 2 == 0 && strides.position % 2 == 0;
}

// Two bits for every eight rows of a tile, of those that a lane takes along.
template <int kTiles>
inline constexpr uint32_t kAllRows = static_cast<uint32_t>((uint64_t{1} << (2 * kTiles)) - 1);

// Sixteen rows of a left operand, in shared memory.
template <class S, bool kFinite>
struct SharedRows {
  const S* rows;
  int stride;

  __device__ Left<S> load(int column, const Lane& lane) const {
    return left_of_shared<kFinite>(rows, stride, column, lane);
  }
};

// Of a lane, in global memory: null where there are none.
template <class S, bool kFinite>
struct GlobalRows {
  const S *low, *high;
  int columns;

  __device__ Left<S> load(int column, const Lane& lane) const {
    return left_of_global<kFinite>(low, high, column, columns, lane);
  }
};

// sums += rows · tileᵀ for 8 · kTiles rows of a tile. kMirrored: as in multiply.
//
// Of 16-bit types a row that fills its room is one straight line of code, in which what is multiplied next is loaded
// ahead; else loads do not pass a branch, which comes after two steps.
template <bool kMirrored, bool kFinite, int kDim, class S, class Rows, int kRowTiles, int kTiles>
__device__ inline void multiply_rows(Compute<S> (&sums)[kRowTiles][kTiles][4], const Rows (&rows)[kRowTiles],
                                     const S* tile, const TileShape<kDim>& shape, const Lane& lane) {
  constexpr int kTogether = std::min(tiles_together<S>(kRowTiles), kTiles), kStep = kPieces<S> * kDepth<S>;
  const auto step = [&](int column) {
    Left<S> left[kPieces<S>][kRowTiles];
#pragma unroll
    for (int i = 0; i < kPieces<S> * kRowTiles; ++i) {
      const int piece = i / kRowTiles, m = i % kRowTiles;
      left[piece][m] = rows[m].load(column + piece * kDepth<S>, lane);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += kTogether) {
      Right<S> right[kPieces<S>][kTogether];
#pragma unroll
      for (int piece = 0; piece < kPieces<S>; ++piece) {
        const S* const from = tile + 8 * n * shape.stride();
        right_of_rows<kFinite>(right[piece], from, shape.stride(), column + piece * kDepth<S>, lane);
      }
      multiply<S, kMirrored>(left, right, [&](int m, int t) -> auto& { return sums[m][n + t]; });
    }
  };
  if constexpr (kDim > 0 && kIsHalf<S>) {
    if (shape.full()) {
#pragma unroll
      for (int column = 0; column < kDim; column += kStep) step(column);
      return;
    }
  }
  [[maybe_unused]] constexpr int kStepsAtOnce = 2 / kPieces<S>;  // unknown to compilers of the host
#pragma unroll kStepsAtOnce
  for (int column = 0; column < shape.padded(); column += kStep) step(column);
}

// out += weights · tile, for the tile's columns first_column … first_column + columns − 1. Of its rows those count that
// `rows_seen` names, the same in all lanes with one q.
template <bool kFinite, class S, int kDim, int kRowTiles, int kTiles, int kColumns>
__device__ inline void multiply_columns(
    Compute<S> (&out)[kRowTiles][kColumns][4], const Compute<S> (&weights)[kRowTiles][kTiles][4], const S* tile,
    const TileShape<kDim>& shape, int first_column, uint32_t rows_seen, const Lane& lane) {
  constexpr int kTilesOfDepth = kDepth<S> / 8;
  // Loads pass products only between branches. What lies beyond the last column is summed to what nobody writes; where
  // rows have no more room than columns, sixteen are read at once, of which a row has a multiple.
  constexpr int kTogether = kDim > 0 ? tiles_together<S>(kRowTiles) : std::min(2, tiles_together<S>(kRowTiles));
  constexpr int kColumnsAtOnce = kDim > 0 ? 4 : kTogether;
  const int columns = shape.columns - first_column;
  const auto sum = [&](auto plain) {
#pragma unroll
    for (int part = 0; part < kTiles / kTilesOfDepth; part += kPieces<S>) {
      Left<S> left[kPieces<S>][kRowTiles];
#pragma unroll
      for (int i = 0; i < kPieces<S> * kRowTiles; ++i) {
        left[i / kRowTiles][i % kRowTiles] = left_of_sums<S>(weights[i % kRowTiles], part + i / kRowTiles);
      }
#pragma unroll
      for (int n = 0; n < kColumns; n += kTogether) {
        if (!plain && n % kColumnsAtOnce == 0 && 8 * n >= columns) break;
        Right<S> right[kPieces<S>][kTogether];
#pragma unroll
        for (int piece = 0; piece < kPieces<S>; ++piece) {
          const S* const from = tile + (part + piece) * kDepth<S> * shape.stride();
          const uint32_t seen = plain ? ~0u : rows_seen >> (2 * kTilesOfDepth * (part + piece));
          right_of_columns<kFinite>(right[piece], from, shape.stride(), first_column + 8 * n, seen, lane);
        }
        multiply<S>(left, right, [&](int m, int t) -> auto& { return out[m][n + t]; });
      }
    }
  };
  if constexpr (kDim > 0) {
    if (columns >= 8 * kColumns && __all_sync(~0u, (rows_seen & kAllRows<kTiles>) == kAllRows<kTiles>)) {
      return sum(std::true_type{});
    }
  }
  sum(std::false_type{});
}

}  // namespace lect11ext::cuda
