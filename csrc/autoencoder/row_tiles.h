// How the rows of a matrix are shared out where sums over rows or over columns are formed. Both ways depend on the
// shape alone, so that results do not depend on the number of threads. Shared by CPU and CUDA, free of torch.
#pragma once

#include <cstdint>

namespace lect11ext {

// For sums over rows. A tile is what one thread does at a time: whole rows where several fit, else part of one row.
struct RowTiles {
  static constexpr int64_t kElements = 1024;  // four float buffers of this length fit the first-level cache
  int64_t rows = 0, cols = 0;
  int64_t rows_per_tile = 1;  // > 1 only where tiles_per_row is 1
  int64_t tiles_per_row = 1;
  int64_t count = 0;

  RowTiles() = default;
  RowTiles(int64_t rows, int64_t cols) : rows(rows), cols(cols) {
    if (rows == 0 || cols == 0) return;
    rows_per_tile = cols < kElements ? kElements / cols : 1;
    tiles_per_row = (cols + kElements - 1) / kElements;
    count = tiles_per_row > 1 ? rows * tiles_per_row : (rows + rows_per_tile - 1) / rows_per_tile;
  }
};

// Of a full tile.
inline int64_t elements_of(const RowTiles& tiles) {
  return tiles.tiles_per_row > 1 ? RowTiles::kElements : tiles.rows_per_tile * tiles.cols;
}

// For sums over columns. A block is a run of rows by a piece of the columns, and has one sum of each of its columns.
struct ColumnBlocks {
  // At most: enough for the threads of a CPU, for the blocks of a GPU; what is left to add is small beside the data.
  static constexpr int64_t kRuns = 64, kRunsOnGpu = 512;
  static constexpr int64_t kLeast = 8192;  // elements of a block, where there are as many: a block has a start to pay
  // Columns of a piece: their sums stay in a second-level cache, and a row is read to its end, or far, before the next,
  // as the processor's prefetching wants it.
  static constexpr int64_t kColumns = 16384;
  int64_t rows = 0, cols = 0;
  int64_t rows_per_run = 0, runs = 0;
  int64_t cols_per_piece = 0, pieces = 0;
  int64_t count = 0;  // run by run, pieces of a run being neighbours

  ColumnBlocks() = default;
  ColumnBlocks(int64_t rows, int64_t cols, int64_t most_runs) : rows(rows), cols(cols) {
    if (rows == 0 || cols == 0) return;
    cols_per_piece = cols < kColumns ? cols : kColumns;
    pieces = (cols + cols_per_piece - 1) / cols_per_piece;
    const int64_t least = (kLeast + cols_per_piece - 1) / cols_per_piece, even = (rows + most_runs - 1) / most_runs;
    rows_per_run = even > least ? even : least;
    runs = (rows + rows_per_run - 1) / rows_per_run;
    count = runs * pieces;
  }
};

// Of a full block.
inline int64_t elements_of(const ColumnBlocks& blocks) { return blocks.rows_per_run * blocks.cols_per_piece; }

}  // namespace lect11ext
