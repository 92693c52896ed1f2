// Products of strided matrices that stay in the caches: what attention's passes spend their time in.
//
//   c[m][n] = Σ_k a(m, k) · b[k][n]
//
// Rows of b are dense, columns of it whole steps of 16. Operands P that are multiplied in pairs have kDeep = 2 (else
// 1): b is [k / kDeep][n][kDeep]. a is read by broadcasts, which cost the same along its rows as across them, so that a
// gradient of weights needs no transposed copy:
//
//   along    a(m, k) is a[m·stride + k]
//   across   a(m, k) is a[k / kDeep · stride + m·kDeep + k mod kDeep]
#pragma once

#include "common/cpu/panel.h"

namespace lect11ext::CPU_CAPABILITY {

template <class P>
struct Matrix {
  P* data;
  int64_t stride;

  P* row(int64_t r) const { return data + r * stride; }
};

enum class Order { Along, Across };

// `depth` is in whole steps of kDeep. Added to c where `add`, else written.
template <Order kOrder, class P>
void multiply(const Matrix<const P>& a, int64_t rows, int64_t depth, const Matrix<const P>& b,
              const Matrix<Compute<P>>& c, int64_t columns, bool add);

}  // namespace lect11ext::CPU_CAPABILITY
