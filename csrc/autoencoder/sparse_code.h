// Sparse codes: K values and the K places where they stand, in each of B rows.
//
// topk_code takes the K largest of a row. What is computed from a code is one trilinear form in the values v, a
// dictionary W [M, D] and rows g [B, D],
//
//   F = Σ_b Σ_j v_bj ⟨W[i_bj], g_b⟩,
//
// and its three partial derivatives: ∂F/∂g is sparse_decode, ∂F/∂v sparse_dots, ∂F/∂W sparse_outer. A derivative of
// one of them is again one of them, with other operands, so that derivatives of all orders take the same kernels. There
// are two of these: sparse_decode and sparse_outer both are weighted sums of rows of a table, of W and of g.
#pragma once

#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

// The k largest of every row, in descending order; equal ones in the order of their indices. NaN is the largest.
struct TopkCode {
  int64_t rows, length, k;  // 0 < k ≤ length < 2^31
  const void* input;        // read: row r begins `stride` elements after row r − 1, its elements one after the other
  DType dtype;
  int64_t stride;
  bool rectify;      // whether values below zero become zero
  void* values;      // written: [rows, k], dense, of the same type
  int64_t* indices;  // written: [rows, k], dense
};

// Rows of zeros but for k values each. Indices of one row are distinct and, on the CPU, in range; on CUDA others are
// left out.
struct ScatterCode {
  int64_t rows, length, k;
  int64_t element_bytes;   // 2, 4 or 8
  const void* values;      // read: [rows, k], dense
  const int64_t* indices;  // read: the same
  void* out;               // written: [rows, length], dense. The CUDA kernel finds it zeroed
};

// out[r] = bias + Σ_e values[p]·table[row of e], e over the entries of row r, p = e or order[e].
//
// Without an order (sparse_decode) row r has the k entries from r·k on, and indices[e] is an entry's row of the table.
// With one (sparse_outer) entries stand sorted by their row of `out`, row r's from starts[r] to starts[r + 1], and p /
// k is an entry's row of the table. An index out of range, which only CUDA comes to see, makes its row of `out` NaN.
struct WeightedRows {
  int64_t rows, width, k, table_rows;
  const void* values;             // read: dense, double where the table is, else float
  const int64_t* indices;         // read: as many; null with an order
  const int64_t *order, *starts;  // read: both or neither
  const void* table;              // read: [table_rows, width], rows `stride` elements apart
  DType dtype;                    // of the table
  int64_t stride;
  const void* bias;  // read: [width], of the values' type; or null
  void* out;         // written: [rows, width], dense
  DType out_dtype;
};

// out[b, j] = ⟨table[i], dense[b]⟩ + bias[i], i = indices[b, j]. An index out of range, which only CUDA comes to see,
// gives NaN.
struct RowDots {
  int64_t rows, width, k, table_rows;
  const int64_t* indices;  // read: [rows, k], dense
  const void* table;       // read: [table_rows, width], rows `stride` elements apart
  DType dtype;             // of the table; where it is double or `dense` is, both are
  int64_t stride;
  const void* dense;  // read: [rows, width], rows `dense_stride` elements apart
  DType dense_dtype;
  int64_t dense_stride;
  const void* bias;  // read: [table_rows], dense, double where the table is, else float; or null
  void* out;         // written: [rows, k], dense
  DType out_dtype;
};

LECT11EXT_CPU_KERNEL(topk_code_kernel, TopkCode)          // over rows
LECT11EXT_CPU_KERNEL(scatter_code_kernel, ScatterCode)    // over rows
LECT11EXT_CPU_KERNEL(weighted_rows_kernel, WeightedRows)  // over rows of `out`
LECT11EXT_CPU_KERNEL(row_dots_kernel, RowDots)            // over rows

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

inline constexpr int64_t kMostSelected = 2048;  // the largest k that topk_code takes: it sorts them in shared memory

void topk_code(const TopkCode& args, void* stream);
void scatter_code(const ScatterCode& args, void* stream);
void weighted_rows(const WeightedRows& args, void* stream);
void row_dots(const RowDots& args, void* stream);

}  // namespace lect11ext::cuda
