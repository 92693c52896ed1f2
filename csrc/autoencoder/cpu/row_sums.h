// Tiles of rows on the CPU: their buffers, their elements, their sums.
#pragma once

#include <algorithm>

#include "autoencoder/row_tiles.h"
#include "common/cpu/math.h"
#include "common/cpu/memory.h"
#include "common/cpu/normal.h"

namespace lect11ext::CPU_CAPABILITY {

inline constexpr int64_t kTile = RowTiles::kElements;

template <class T>
struct alignas(64) Buffer {
  T data[kTile + kNormalSlack];
  operator T*() { return data; }
};

// First element of tile number t, and how many it has.
inline int64_t tile_range(const RowTiles& tiles, int64_t t, int64_t* n) {
  if (tiles.tiles_per_row > 1) {
    const int64_t within = t % tiles.tiles_per_row * kTile;
    *n = std::min(kTile, tiles.cols - within);
    return t / tiles.tiles_per_row * tiles.cols + within;
  }
  const int64_t row = t * tiles.rows_per_tile;
  *n = std::min(tiles.rows_per_tile, tiles.rows - row) * tiles.cols;
  return row * tiles.cols;
}

// Sum in a fixed order: a vector of partial sums, then its lanes as a tree (one after the other they would take longer
// than a short row's arithmetic), then what did not fill a vector.
template <class T>
T row_sum(const T* values, int64_t n) {
  T sum = 0;
  int64_t i = 0;
  if (n >= kLanes<T>) {
    Vec<T> partial(T(0));
    for (; i + kLanes<T> <= n; i += kLanes<T>) partial = partial + Vec<T>::loadu(values + i);
    sum = sum_of_lanes(partial);
  }
  for (; i < n; ++i) sum += values[i];
  return sum;
}

// The sums of tile t, whose values are elements start … start + n − 1; or the elements themselves.
template <class T>
void store_sums(const RowTiles& tiles, int64_t t, int64_t start, int64_t n, const T* values, void* to, bool elements) {
  T* out = static_cast<T*>(to);
  if (elements) {
    std::copy(values, values + n, out + start);
    return;
  }
  if (tiles.tiles_per_row > 1) {
    out[t] = row_sum(values, n);
    return;
  }
  for (int64_t i = 0, row = t * tiles.rows_per_tile; i < n; i += tiles.cols, ++row) {
    out[row] = row_sum(values + i, tiles.cols);
  }
}

// One block, and the sums over its columns, which are formed where they are to stand, in [runs, cols]; `to` may be
// null.
template <class T>
class ColumnSums {
 public:
  ColumnSums(const ColumnBlocks& blocks, int64_t item, void* to) : cols_(blocks.cols) {
    const int64_t run = item / blocks.pieces;
    first_row_ = run * blocks.rows_per_run;
    last_row_ = std::min(first_row_ + blocks.rows_per_run, blocks.rows);
    first_col_ = item % blocks.pieces * blocks.cols_per_piece;
    width_ = std::min(blocks.cols_per_piece, blocks.cols - first_col_);
    if (to == nullptr) return;
    sums_ = static_cast<T*>(to) + run * blocks.cols + first_col_;
    std::fill(sums_, sums_ + width_, T(0));
  }

  // Calls f(start, n, to) for the block's elements, at most kTile at a time: part of a row, or some rows. Where `to` is
  // not null f adds the elements' values to what stands there, else it leaves them in `values`.
  template <class F>
  void each_run(const T* values, F f) {
    const int64_t together = width_ == cols_ ? std::max<int64_t>(kTile / cols_, 1) : 1;
    for (int64_t row = first_row_; row < last_row_; row += together) {
      const int64_t rows = std::min(together, last_row_ - row);
      for (int64_t col = 0; col < width_; col += kTile) {
        const int64_t n = rows * std::min(width_ - col, kTile);
        const bool direct = sums_ != nullptr && rows == 1 && n % kLanes<T> == 0;
        f(row * cols_ + first_col_ + col, n, direct ? sums_ + col : nullptr);
        if (sums_ != nullptr && !direct) add(values, n / rows, rows, sums_ + col);
      }
    }
  }

 private:
  static void add(const T* values, int64_t width, int64_t rows, T* to) {
    for (int64_t row = 0; row < rows; ++row, values += width) {
      int64_t i = 0;
      for (; i + kLanes<T> <= width; i += kLanes<T>) (Vec<T>::loadu(to + i) + Vec<T>::loadu(values + i)).store(to + i);
      for (; i < width; ++i) to[i] += values[i];
    }
  }

  const int64_t cols_;
  int64_t first_row_, last_row_, first_col_, width_;
  T* sums_ = nullptr;
};

}  // namespace lect11ext::CPU_CAPABILITY
