// tanh(q + k) of every pair, for less than a tanh each: with E = e^2q · e^2k it is (E − 1) / (E + 1), and the
// exponentials are taken once for each q and each k. A pair costs a multiply-add, an addition and a division.
//
// E overflows, or its factors lose the sum, where q and k are large: those blocks take tanh(q + k) itself. And E − 1
// loses the relative digits of small sums, which gradients need: where all keys of a block are small, it is taken from
// e^2k − 1, as (e^2k − 1)·e^2q + (e^2q − 1). Both are factor · scale + shift, so the loops do not differ.
#pragma once

#include "common/cpu/dot.h"
#include "common/cpu/math.h"
#include "common/cpu/memory.h"

namespace lect11ext::CPU_CAPABILITY {

// Queries and keys of a tile, forward and backward: as many sums as there are registers for.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kTileRows = 4;
#else
inline constexpr int kTileRows = 2;
#endif
inline constexpr int kTileKeys = 4;

// What a key panel holds: e^2k, e^2k − 1, or k.
enum class KeyForm : int8_t { Exp, Expm1, Plain };

inline constexpr double kLargestFactored = 20;  // e^(4·20) is finite in float, and so is its square root's inverse
inline constexpr double kLargestSmall = 0.5;    // (e^2k − 1)·e^2q + (e^2q − 1) cancels little

inline Vec<double> exp(Vec<double> x) { return x.exp(); }

inline Vec<float> expm1(Vec<float> x) {
  const ReducedExp e = reduced_exp(x);
  const Vec<float> one(1.0f), scale = ldexp(one, e.n);
  return at::vec::fmadd(scale, e.em1, scale - one);
}
inline Vec<double> expm1(Vec<double> x) { return x.expm1(); }

// a / b for b in [1, e^81]. A division takes 16 cycles for a vector of AVX-512, and all of one port; the estimate of 14
// bits and one step of Newton's take five.
template <class T>
inline Vec<T> quotient(Vec<T> a, Vec<T> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512 r = _mm512_rcp14_ps(b), t = _mm512_mul_ps(a, r);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(b, t, a), r, t);
  }
#endif
  return a / b;
}

// One query's operands of a vector of hidden units, and tanh(q + k) for a vector of a panel.
template <class T, bool kPlain>
struct PairTanh {
  Vec<T> scale, shift;  // e^2q, and −1 or e^2q − 1; where kPlain q, and nothing

  void load(const T* from, const T* shifts) {
    scale = Vec<T>::loadu(from);
    if constexpr (!kPlain) shift = Vec<T>::loadu(shifts);
  }
  Vec<T> operator()(const Vec<T>& factor) const {
    if constexpr (kPlain) return tanh(scale + factor);
    const Vec<T> less_1 = at::vec::fmadd(factor, scale, shift);
    return quotient<T>(less_1, less_1 + Vec<T>(T(2)));
  }
};

// `columns` of a row as T, zeros up to a whole number of vectors behind them.
template <class T>
inline void load_row(const void* data, DType dtype, int64_t offset, int64_t columns, T* row) {
  with_type(dtype,
            [&](auto* type) { convert(static_cast<decltype(type)>(const_cast<void*>(data)) + offset, row, columns); });
  std::fill(row + columns, row + (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>, T(0));
}

// The largest magnitude, NaN where there is one.
template <class T>
inline T largest(const Vec<T>& magnitudes) {
  T lanes[kLanes<T>], most = 0;
  magnitudes.store(lanes);
  for (T lane : lanes) most = lane > most || lane != lane ? lane : most;
  return most;
}

// Rows `first … first + rows − 1` of a matrix as a panel: [columns / lanes][kPanelRow][lanes]. Returns the largest
// magnitude.
template <class T>
inline T fill_panel(const void* data, DType dtype, int64_t row_stride, int64_t rows, int64_t columns, T* row,
                    T* panel) {
  constexpr int V = kLanes<T>;
  Vec<T> most(T(0));
  for (int64_t j = 0; j < rows; ++j) {
    load_row(data, dtype, j * row_stride, columns, row);
    for (int64_t c = 0; c * V < columns; ++c) {
      const Vec<T> x = Vec<T>::loadu(row + c * V);
      most = at::vec::maximum(most, x.abs());
      x.store(panel + (c * kPanelRow + j) * V);
    }
  }
  return largest<T>(most);
}

// Where element number `index` of the batch begins.
inline int64_t batch_offset(const Shape& batches, const int64_t* strides, int64_t index) {
  int64_t offset = 0;
  for (int d = batches.ndim - 1; d >= 0; --d) {
    offset += index % batches.sizes[d] * strides[d];
    index /= batches.sizes[d];
  }
  return offset;
}

inline const void* matrix_of(const Additive& args, const Matrices& matrices, int64_t index, int64_t row) {
  const int64_t offset = batch_offset(args.batches, matrices.strides, index) + row * matrices.row;
  return static_cast<const char*>(matrices.data) + offset * storage_size(args.dtype);
}

// Some queries of a work item, as the pairs want them.
template <class T>
struct Queries {
  int64_t width;              // of a row: padded_columns(hidden)
  T *plain, *power, *less_1;  // q, e^2q, e^2q − 1: [rows][width]
  T* minus_one;               // [width]
  bool factored;

  static int64_t size(int64_t rows, int64_t hidden) { return (3 * rows + 1) * padded_columns(hidden); }

  Queries(int64_t rows, int64_t hidden, T* memory) : width(padded_columns(hidden)) {
    plain = memory;
    power = plain + rows * width;
    less_1 = power + rows * width;
    minus_one = less_1 + rows * width;
    std::fill(minus_one, minus_one + width, T(-1));
  }

  void load(const Additive& args, int64_t index, int64_t first, int64_t rows) {
    const void* from = matrix_of(args, args.query, index, first);
    Vec<T> most(T(0));
    for (int64_t i = 0; i < rows; ++i) {
      T* row = plain + i * width;
      load_row(from, args.dtype, i * args.query.row, args.hidden, row);
      for (int64_t h = 0; h < args.hidden; h += kLanes<T>) {
        const Vec<T> q = Vec<T>::loadu(row + h), twice = q + q;
        most = at::vec::maximum(most, q.abs());
        exp(twice).store(power + i * width + h);
        expm1(twice).store(less_1 + i * width + h);
      }
    }
    factored = largest<T>(most) <= T(kLargestFactored);
  }

  // What PairTanh loads for row i, given what a panel holds.
  const T* scales(bool plainly, int64_t i) const { return (plainly ? plain : power) + i * width; }
  const T* shifts(KeyForm form, int64_t i) const { return form == KeyForm::Expm1 ? less_1 + i * width : minus_one; }
};

// A block of keys as a panel, in the form that suits it; as k where `plainly`.
template <class T>
inline KeyForm prepare_keys(const Additive& args, int64_t index, int64_t block, bool plainly, T* row, T* panel) {
  const int64_t first = block * kKeyBlock, n = std::min(kKeyBlock, args.keys - first);
  const T most =
      fill_panel(matrix_of(args, args.key, index, first), args.dtype, args.key.row, n, args.hidden, row, panel);
  if (plainly || !(most <= T(kLargestFactored))) return KeyForm::Plain;
  const KeyForm form = most <= T(kLargestSmall) ? KeyForm::Expm1 : KeyForm::Exp;
  for (int64_t group = 0; group * kLanes<T> < args.hidden; ++group) {
    T* from = panel + group * kPanelRow * kLanes<T>;
    for (int64_t i = 0; i < n * kLanes<T>; i += kLanes<T>) {
      const Vec<T> k = Vec<T>::loadu(from + i), twice = k + k;
      (form == KeyForm::Exp ? exp(twice) : expm1(twice)).store(from + i);
    }
  }
  return form;
}

// The panel of a block in a form that these queries can take: the one that was prepared, or one written to `spare`.
template <class T>
inline const T* fitting_panel(const AdditivePanels& args, const Queries<T>& queries, int64_t element, int64_t block,
                              T* row, T* spare, KeyForm* form) {
  const int64_t number = element * key_blocks(args.keys) + block;
  if (args.key_panels != nullptr) {
    *form = static_cast<KeyForm>(args.forms[number]);
    const bool fits = queries.factored || *form == KeyForm::Plain;
    if (fits) return static_cast<const T*>(args.key_panels) + number * panel_size(args.hidden);
  }
  *form = prepare_keys(args, args.first + element, block, !queries.factored, row, spare);
  return spare;
}

// The values of an element of the batch, rows `stride` apart, whole vectors each.
template <class T>
inline const T* rows_of_values(const AdditivePanels& args, int64_t element, int64_t* stride) {
  if (args.value_rows == nullptr) {
    *stride = args.value.row;
    return static_cast<const T*>(matrix_of(args, args.value, args.first + element, 0));
  }
  *stride = padded_columns(args.columns);
  return static_cast<const T*>(args.value_rows) + element * args.keys * *stride;
}

}  // namespace lect11ext::CPU_CAPABILITY
