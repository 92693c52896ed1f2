// The products of a backward pass: C[m][n] = Σ_k A(m, k)·B[k][n], where B's rows are dense and A is any strided matrix.
//
//   gradient of the input      A = gradient of the pre-activations [B, G·H],   B = weights
//   gradient of the weights    A = the same, transposed by its strides,        B = input
#pragma once

#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

struct Product {
  int64_t m, n, k;
  const void* a;  // float, or double where b and c are
  int64_t a_row, a_column;
  const void* b;  // [k, n], rows b_stride apart
  int64_t b_stride;
  void* c;      // [m, n] dense, written; added to where `accumulate`
  DType dtype;  // of b and c
  bool accumulate;
  int64_t columns;  // of a work item: kNarrow or kWide
};

// Work items are blocks of C; each is written by one thread, and every element's sum has the same order in any block.
// Wide blocks read a kilobyte of each row of B where narrow ones read a quarter, and so miss the page tables less.
inline constexpr int64_t kProductRows = 96, kNarrow = 64, kWide = 256;

inline int64_t product_blocks(const Product& p) {
  return (p.m + kProductRows - 1) / kProductRows * ((p.n + p.columns - 1) / p.columns);
}

LECT11EXT_CPU_KERNEL(product_kernel, Product)

// out[n] = Σ_m a[m][n]: the gradient of a bias.
struct ColumnSums {
  int64_t m, n;
  const void* a;  // [m, n] dense: float, or double where `dtype` is, or of `dtype` where `rounded`
  void* out;      // [n], written
  DType dtype;
  bool rounded;
};

inline constexpr int64_t kSumColumns = 256;  // a work item

LECT11EXT_CPU_KERNEL(column_sums_kernel, ColumnSums)

}  // namespace lect11ext
