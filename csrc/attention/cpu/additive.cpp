// The forward of additive attention. Keys are prepared once, if more than eight queries share them; then every eight go
// over the blocks of keys twice: for the scores, and, when these are weights, for the values.
#include "attention/additive.h"

#include <cmath>
#include <cstring>

#include "attention/cpu/additive_tanh.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// --- panels -------------------------------------------------------------------------------------------------------

template <class T>
void prepare(const AdditivePanels& args, int64_t begin, int64_t end) {
  const int64_t blocks = key_blocks(args.keys), width = padded_columns(args.columns);
  Workspace space;
  const auto part = space.reserve(sizeof(T) * padded_columns(args.hidden));
  T* const row = static_cast<T*>(space.at(part));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t element = item / blocks, block = item % blocks, index = args.first + element;
    if (args.key_panels != nullptr) {
      T* const panel = static_cast<T*>(args.key_panels) + item * panel_size(args.hidden);
      args.forms[item] = static_cast<int8_t>(prepare_keys(args, index, block, /*plainly=*/false, row, panel));
    }
    if (args.value_rows == nullptr) continue;
    const int64_t first = block * kKeyBlock, n = std::min(kKeyBlock, args.keys - first);
    const void* const from = matrix_of(args, args.value, index, first);
    T* const to = static_cast<T*>(args.value_rows) + (element * args.keys + first) * width;
    for (int64_t j = 0; j < n; ++j) load_row(from, args.dtype, j * args.value.row, args.columns, to + j * width);
  }
}

// --- scores -------------------------------------------------------------------------------------------------------

// scores[r][keys[c]] of R queries and four keys; `weight`'s padding is zero, and so nothing depends on that of others.
template <int R, bool kPlain, class T>
inline void score_tile(const T* const* scales, const T* const* shifts, const T* weight, int64_t hidden, const T* panel,
                       const int32_t* keys, T* scores, int64_t scores_stride) {
  constexpr int V = kLanes<T>;
  Vec<T> sums[R][kTileKeys];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kTileKeys; ++c) sums[r][c] = Vec<T>(T(0));
  }
  for (int64_t h = 0; h < hidden; h += V, panel += kPanelRow * V) {
    const Vec<T> w = Vec<T>::loadu(weight + h);
    Vec<T> factor[kTileKeys];
#pragma GCC unroll 4
    for (int c = 0; c < kTileKeys; ++c) factor[c] = Vec<T>::loadu(panel + keys[c] * V);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      PairTanh<T, kPlain> pair;
      pair.load(scales[r] + h, shifts[r] + h);
#pragma GCC unroll 4
      for (int c = 0; c < kTileKeys; ++c) sums[r][c] = at::vec::fmadd(pair(factor[c]), w, sums[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    T four[kTileKeys];
    sum_lanes4(sums[r], four);
#pragma GCC unroll 4
    for (int c = 0; c < kTileKeys; ++c) scores[r * scores_stride + keys[c]] = four[c];
  }
}

// All rows with the keys of a block that `keys` lists; their number is a multiple of four.
template <bool kPlain, class T>
void score_block(const Queries<T>& queries, KeyForm form, int64_t rows, const T* weight, int64_t hidden, const T* panel,
                 const int32_t* keys, int64_t count, T* scores, int64_t scores_stride) {
  for (int64_t i = 0, n; i < rows; i += n) {
    n = std::min<int64_t>(kTileRows, rows - i);
    n = n == 3 ? 2 : n;
    const T *scales[kTileRows], *shifts[kTileRows];
    for (int64_t r = 0; r < n; ++r) {
      scales[r] = queries.scales(kPlain, i + r);
      shifts[r] = queries.shifts(form, i + r);
    }
    const auto run = [&]<int R>() {
      for (int64_t c = 0; c < count; c += kTileKeys) {
        score_tile<R, kPlain>(scales, shifts, weight, hidden, panel, keys + c, scores + i * scores_stride,
                              scores_stride);
      }
    };
    switch (n) {
      case 1: run.template operator()<1>(); break;
      case 2: run.template operator()<2>(); break;
      default: run.template operator()<kTileRows>(); break;
    }
  }
}

// --- the mask -----------------------------------------------------------------------------------------------------

// What the mask adds to the scores of a row with `n` keys: −∞ for what it bars.
template <class T>
void load_bias(const Additive& args, int64_t index, int64_t row, int64_t key, int64_t n, T* bias) {
  const PairMask& mask = args.mask;
  const int64_t offset = batch_offset(args.batches, mask.strides, index) + row * mask.row + key * mask.column;
  if (mask.kind == MaskKind::Bool) {
    const bool* from = static_cast<const bool*>(mask.data) + offset;
    for (int64_t j = 0; j < n; ++j) bias[j] = from[j * mask.column] ? T(0) : -std::numeric_limits<T>::infinity();
    return;
  }
  with_type(mask.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(mask.data)) + offset;
    if (mask.column == 1) return convert(from, bias, n);
    for (int64_t j = 0; j < n; ++j) convert(from + j * mask.column, bias + j, 1);
  });
}

// Lists the keys of a block that any of the rows may attend to, filled up to a multiple of four by the last one.
template <class T>
int64_t list_keys(const T* bias, int64_t rows, int64_t n, int32_t* keys) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    bool any = bias == nullptr;
    for (int64_t i = 0; !any && i < rows; ++i) any = bias[i * kKeyBlock + j] != -std::numeric_limits<T>::infinity();
    if (any) keys[count++] = static_cast<int32_t>(j);
  }
  for (; count % kTileKeys != 0; ++count) keys[count] = keys[count - 1];
  return count;
}

// --- weights ------------------------------------------------------------------------------------------------------

// Scores to weights, in place. A row without keys gets zeros.
template <class T>
void softmax(T* row, int64_t n) {
  constexpr int V = kLanes<T>;
  const int64_t whole = n - n % V;
  T most = -std::numeric_limits<T>::infinity();
  if (whole > 0) {
    Vec<T> lanes(most);
    for (int64_t j = 0; j < whole; j += V) lanes = at::vec::maximum(lanes, Vec<T>::loadu(row + j));
    most = at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return at::vec::maximum(a, b); }, lanes);
  }
  for (int64_t j = whole; j < n; ++j) most = row[j] > most || row[j] != row[j] ? row[j] : most;
  if (most == -std::numeric_limits<T>::infinity()) return std::fill(row, row + n, T(0));
  Vec<T> sums(T(0));
  for (int64_t j = 0; j < whole; j += V) {
    const Vec<T> e = exp(Vec<T>::loadu(row + j) - Vec<T>(most));
    e.store(row + j);
    sums = sums + e;
  }
  T sum = sum_of_lanes(sums);
  if (whole < n) {
    exp(Vec<T>::loadu(row + whole, n - whole) - Vec<T>(most)).store(row + whole, n - whole);
    for (int64_t j = whole; j < n; ++j) sum += row[j];
  }
  const T inverse = T(1) / sum;
  for (int64_t j = 0; j < n; ++j) row[j] *= inverse;
}

// --- output -------------------------------------------------------------------------------------------------------

// out[i] += Σ_j weights[i][j] · v_j over a block. With kSkip pairs of weight zero are left out, whatever their values.
template <bool kSkip, class T>
void add_values(const T* weights, int64_t stride, int64_t rows, const T* values, int64_t value_stride, int64_t columns,
                int64_t n, T* out, int64_t width) {
  constexpr int V = kLanes<T>;
  const auto run = [&]<int R>(int64_t first) {
    const T* row = weights + first * stride;
    T* to = out + first * width;
    for (int64_t c = 0; c < columns; c += V) {
      Vec<T> sums[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sums[i] = Vec<T>(T(0));
      for (int64_t j = 0; j < n; ++j) {
        const Vec<T> v = Vec<T>::loadu(values + j * value_stride + c);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const T weight = row[i * stride + j];
          if (!kSkip || weight != 0) sums[i] = at::vec::fmadd(Vec<T>(weight), v, sums[i]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) (sums[i] + Vec<T>::loadu(to + i * width + c)).store(to + i * width + c);
    }
  };
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) run.template operator()<8>(i);
  for (; i + 2 <= rows; i += 2) run.template operator()<2>(i);
  if (i < rows) run.template operator()<1>(i);
}

template <class T>
bool all_finite(const T* values, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= values[i] - values[i] == 0;
  return finite;
}

template <class T>
void forward(const AdditiveForward& args, int64_t begin, int64_t end) {
  const int64_t groups = (args.queries + kForwardRows - 1) / kForwardRows, blocks = key_blocks(args.keys);
  const int64_t width = padded_columns(args.hidden), out_width = padded_columns(args.columns);
  const bool masked = args.mask.kind != MaskKind::None;
  Workspace space;
  const auto part = [&](int64_t elements) { return space.reserve(elements * static_cast<int64_t>(sizeof(T))); };
  const auto queries_part = part(Queries<T>::size(kForwardRows, args.hidden)), weight_part = part(width),
             row_part = part(width), out_part = part(kForwardRows * out_width),
             spare_part = part(panel_size(args.hidden)),
             scores_part = part(args.weights == nullptr ? kForwardRows * args.keys : 0);
  Queries<T> queries(kForwardRows, args.hidden, static_cast<T*>(space.at(queries_part)));
  T* const weight = static_cast<T*>(space.at(weight_part));
  T* const row = static_cast<T*>(space.at(row_part));
  T* const out = static_cast<T*>(space.at(out_part));
  T* const spare = static_cast<T*>(space.at(spare_part));
  load_row(args.score_weight, args.dtype, 0, args.hidden, weight);
  alignas(64) T bias[kForwardRows * kKeyBlock];
  int32_t keys[kKeyBlock];

  for (int64_t item = begin; item < end; ++item) {
    const int64_t element = item / groups, index = args.first + element, first = item % groups * kForwardRows;
    const int64_t rows = std::min(kForwardRows, args.queries - first), output_row = index * args.queries + first;
    T* scores = args.weights == nullptr ? static_cast<T*>(space.at(scores_part))
                                        : static_cast<T*>(args.weights) + output_row * args.keys;
    queries.load(args, index, first, rows);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t key = block * kKeyBlock, n = std::min(kKeyBlock, args.keys - key);
      for (int64_t i = 0; masked && i < rows; ++i) load_bias(args, index, first + i, key, n, bias + i * kKeyBlock);
      const int64_t count = list_keys<T>(masked ? bias : nullptr, rows, n, keys);
      if (count > 0) {
        KeyForm form;
        const T* panel = fitting_panel(args, queries, element, block, row, spare, &form);
        const auto run = form == KeyForm::Plain ? score_block<true, T> : score_block<false, T>;
        run(queries, form, rows, weight, args.hidden, panel, keys, count, scores + key, args.keys);
      }
      for (int64_t i = 0; masked && i < rows; ++i) {
        T* to = scores + i * args.keys + key;
        const T* added = bias + i * kKeyBlock;
        constexpr T kBarred = -std::numeric_limits<T>::infinity();
        for (int64_t j = 0; j < n; ++j) to[j] = added[j] == kBarred ? kBarred : to[j] + added[j];
      }
    }
    for (int64_t i = 0; i < rows; ++i) softmax(scores + i * args.keys, args.keys);

    int64_t value_stride;
    const T* const values = rows_of_values<T>(args, element, &value_stride);
    const auto add_all = [&](auto add) {
      std::fill(out, out + rows * out_width, T(0));
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t key = block * kKeyBlock, n = std::min(kKeyBlock, args.keys - key);
        add(scores + key, args.keys, rows, values + key * value_stride, value_stride, args.columns, n, out, out_width);
      }
    };
    add_all(add_values<false, T>);
    if (masked && !all_finite(out, rows * out_width)) add_all(add_values<true, T>);
    with_type(args.dtype, [&](auto* type) {
      auto* to = static_cast<decltype(type)>(args.output) + output_row * args.columns;
      for (int64_t i = 0; i < rows; ++i) convert(out + i * out_width, to + i * args.columns, args.columns);
    });
  }
}

}  // namespace

void additive_prepare_kernel(const AdditivePanels& args, int64_t begin, int64_t end) {
  args.dtype == DType::Double ? prepare<double>(args, begin, end) : prepare<float>(args, begin, end);
}

void additive_forward_kernel(const AdditiveForward& args, int64_t begin, int64_t end) {
  args.dtype == DType::Double ? forward<double>(args, begin, end) : forward<float>(args, begin, end);
}

}  // namespace lect11ext::CPU_CAPABILITY
