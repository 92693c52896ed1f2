// The backward of additive attention. A work item goes over its queries, sixteen at a time, and over the blocks of
// keys: first for the scores' gradients, then for everything that needs tanh. Where there are several parts, what each
// adds up for keys and values lies in memory of its own, which a last kernel adds in order.
#include "attention/additive.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/cpu/additive_tanh.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// --- gradients of the scores --------------------------------------------------------------------------------------

// products[r][j] = ⟨grad_r, v_j⟩ of R rows with the keys of a block; a row of products has room for whole fours.
template <int R, class T>
inline void product_tile(const T* grads, int64_t width, int64_t columns, const T* values, int64_t value_stride,
                         int64_t n, T* products, int64_t stride) {
  constexpr int V = kLanes<T>;
  for (int64_t j = 0; j < n; j += kTileKeys) {
    const T* from[kTileKeys];
    for (int c = 0; c < kTileKeys; ++c) from[c] = values + std::min(j + c, n - 1) * value_stride;
    Vec<T> sums[R][kTileKeys];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kTileKeys; ++c) sums[r][c] = Vec<T>(T(0));
    }
    for (int64_t d = 0; d < columns; d += V) {
      Vec<T> value[kTileKeys];
#pragma GCC unroll 4
      for (int c = 0; c < kTileKeys; ++c) value[c] = Vec<T>::loadu(from[c] + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<T> grad = Vec<T>::loadu(grads + r * width + d);
#pragma GCC unroll 4
        for (int c = 0; c < kTileKeys; ++c) sums[r][c] = at::vec::fmadd(grad, value[c], sums[r][c]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum_lanes4(sums[r], products + r * stride + j);
  }
}

template <class T>
void value_products(const T* grads, int64_t rows, int64_t width, int64_t columns, const T* values, int64_t value_stride,
                    int64_t n, T* products, int64_t stride) {
  int64_t i = 0;
  const auto run = [&]<int R>() {
    for (; i + R <= rows; i += R) {
      product_tile<R>(grads + i * width, width, columns, values, value_stride, n, products + i * stride, stride);
    }
  };
  run.template operator()<kTileRows>();
  run.template operator()<1>();
}

// de = α·(dα − Σ α·dα), in place of dα. A pair of weight zero has no part in it, whatever its value.
template <class T>
void score_gradients(const T* weights, int64_t n, T* grads) {
  constexpr int V = kLanes<T>;
  const Vec<T> zero(T(0));
  Vec<T> sums(T(0));
  const int64_t whole = n - n % V;
  const auto product = [](T weight, T grad) { return weight == 0 ? T(0) : weight * grad; };
  for (int64_t j = 0; j < whole; j += V) {
    const Vec<T> p = Vec<T>::loadu(weights + j);
    sums = sums + select_equal(p, zero, zero, p * Vec<T>::loadu(grads + j));
  }
  T sum = sum_of_lanes(sums);
  for (int64_t j = whole; j < n; ++j) sum += product(weights[j], grads[j]);
  for (int64_t j = 0; j < n; ++j) grads[j] = product(weights[j], grads[j] - sum);
}

// --- tanh ---------------------------------------------------------------------------------------------------------

// R queries with the keys of a block that `keys` lists, for one vector of hidden units:
//   query_sums[r] += Σ_j de (1 − tanh²)     key_sums[j] += Σ_r de (1 − tanh²)     weight_sums += Σ_rj de tanh
template <int R, bool kPlain, class T>
inline void gradient_tile(const T* const* scales, const T* const* shifts, const T* panel, const int32_t* keys,
                          int64_t count, const T* grads, int64_t stride, T* query_sums, int64_t width, T* key_sums,
                          T* weight_sums) {
  constexpr int V = kLanes<T>;
  PairTanh<T, kPlain> pair[R];
  Vec<T> to_query[R], to_weight[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    pair[r].load(scales[r], shifts[r]);
    to_query[r] = to_weight[r] = Vec<T>(T(0));
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = keys[i];
    const Vec<T> factor = Vec<T>::loadu(panel + j * V);
    Vec<T> to_key = Vec<T>::loadu(key_sums + j * V);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const T grad = grads[r * stride + j];
      if (kPlain && grad == 0) continue;  // of what a mask bars, which may be NaN
      const Vec<T> g(grad), t = pair[r](factor), gt = g * t, slope = at::vec::fnmadd(gt, t, g);
      to_weight[r] = to_weight[r] + gt;
      to_query[r] = to_query[r] + slope;
      to_key = to_key + slope;
    }
    to_key.store(key_sums + j * V);
  }
  Vec<T> weight = Vec<T>::loadu(weight_sums);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    (to_query[r] + Vec<T>::loadu(query_sums + r * width)).store(query_sums + r * width);
    weight = weight + to_weight[r];
  }
  weight.store(weight_sums);
}

// Where sums for the rows of a block of keys go: rows of whole vectors, `stride` apart. A `fresh` block is written, all
// `n` rows of it; another is added to.
template <class T>
struct BlockSums {
  T* data;  // null where nobody wants them
  int64_t stride, n;
  bool fresh;

  void put(int64_t j, int64_t column, const Vec<T>& sum) const {
    T* to = data + j * stride + column;
    (fresh ? sum : sum + Vec<T>::loadu(to)).store(to);
  }
};

// The same for all rows and hidden units. Sums over the rows are formed apart and then added: a long chain of
// additions would lose digits.
template <bool kPlain, class T>
void gradient_block(const Queries<T>& queries, KeyForm form, int64_t rows, const T* weight, int64_t hidden,
                    const T* panel, const int32_t* keys, int64_t count, const T* grads, int64_t stride, T* query_sums,
                    const BlockSums<T>& key_sums, T* weight_sums) {
  constexpr int V = kLanes<T>;
  alignas(64) T tile[kKeyBlock * V];
  for (int64_t h = 0; h < hidden; h += V, panel += kPanelRow * V) {
    std::fill(tile, tile + kKeyBlock * V, T(0));
    for (int64_t i = 0, n; i < rows; i += n) {
      n = std::min<int64_t>(kTileRows, rows - i);
      n = n == 3 ? 2 : n;
      const T *scales[kTileRows], *shifts[kTileRows];
      for (int64_t r = 0; r < n; ++r) {
        scales[r] = queries.scales(kPlain, i + r) + h;
        shifts[r] = queries.shifts(form, i + r) + h;
      }
      const auto run = [&]<int R>() {
        gradient_tile<R, kPlain>(scales, shifts, panel, keys, count, grads + i * stride, stride,
                                 query_sums + i * queries.width + h, queries.width, tile, weight_sums + h);
      };
      switch (n) {
        case 1: run.template operator()<1>(); break;
        case 2: run.template operator()<2>(); break;
        default: run.template operator()<kTileRows>(); break;
      }
    }
    const Vec<T> w = Vec<T>::loadu(weight + h);
    for (int64_t j = 0; key_sums.data != nullptr && j < key_sums.n; ++j) {
      key_sums.put(j, h, Vec<T>::loadu(tile + j * V) * w);
    }
  }
}

// sums[j] += Σ_i α_ij dout_i for the keys of a block.
template <class T>
void add_value_gradients(const T* weights, int64_t stride, int64_t rows, const T* grads, int64_t columns, int64_t width,
                         const BlockSums<T>& value_sums) {
  constexpr int V = kLanes<T>;
  const auto run = [&]<int K>(int64_t j, int64_t d) {
    Vec<T> sums[K];
#pragma GCC unroll 8
    for (int c = 0; c < K; ++c) sums[c] = Vec<T>(T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> grad = Vec<T>::loadu(grads + r * width + d);
#pragma GCC unroll 8
      for (int c = 0; c < K; ++c) sums[c] = at::vec::fmadd(Vec<T>(weights[r * stride + j + c]), grad, sums[c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < K; ++c) value_sums.put(j + c, d, sums[c]);
  };
  for (int64_t d = 0; d < columns; d += V) {
    int64_t j = 0;
    for (; j + 8 <= value_sums.n; j += 8) run.template operator()<8>(j, d);
    for (; j < value_sums.n; ++j) run.template operator()<1>(j, d);
  }
}

template <class T>
int64_t list_keys(const T* weights, int64_t stride, int64_t rows, int64_t n, int32_t* keys) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    bool any = false;
    for (int64_t i = 0; !any && i < rows; ++i) any = weights[i * stride + j] != 0;
    if (any) keys[count++] = static_cast<int32_t>(j);
  }
  return count;
}

// Stored as number `number` of dense rows.
template <class T>
void store_row(const T* row, int64_t columns, void* out, DType dtype, int64_t number) {
  with_type(dtype, [&](auto* type) { convert(row, static_cast<decltype(type)>(out) + number * columns, columns); });
}

// --- kernels ------------------------------------------------------------------------------------------------------

// Where a part's sums lie, or the gradient itself where there is but one part; null where it is not asked for.
template <class T>
T* sums_of(const AdditiveBackward& args, void* grad, void* sums, int64_t item, int64_t columns) {
  if (grad == nullptr) return nullptr;
  const int64_t size = args.keys * padded_columns(columns);
  return sums != nullptr ? static_cast<T*>(sums) + item * size : static_cast<T*>(grad) + (args.first + item) * size;
}

template <class T>
void backward(const AdditiveBackward& args, int64_t begin, int64_t end) {
  const int64_t blocks = key_blocks(args.keys), width = padded_columns(args.hidden);
  const int64_t grad_width = padded_columns(args.columns), stride = blocks * kKeyBlock;
  const bool through_tanh = args.grad_query != nullptr || args.grad_key != nullptr || args.grad_score_weight != nullptr;
  Workspace space;
  const auto part = [&](int64_t elements) { return space.reserve(elements * static_cast<int64_t>(sizeof(T))); };
  const auto queries_part = part(Queries<T>::size(kBackwardRows, args.hidden)), weight_part = part(width),
             row_part = part(width), grad_part = part(kBackwardRows * grad_width),
             scores_part = part(kBackwardRows * stride), query_sums_part = part(kBackwardRows * width),
             weight_sums_part = part(width), spare_part = part(panel_size(args.hidden));
  const auto at = [&](size_t reserved) { return static_cast<T*>(space.at(reserved)); };
  Queries<T> queries(kBackwardRows, args.hidden, at(queries_part));
  T *const weight = at(weight_part), *const row = at(row_part), *const grads = at(grad_part);
  T *const scores = at(scores_part), *const query_sums = at(query_sums_part), *const weight_sums = at(weight_sums_part);
  load_row(args.score_weight, args.dtype, 0, args.hidden, weight);
  int32_t keys[kKeyBlock];

  for (int64_t item = begin; item < end; ++item) {
    const int64_t element = item / args.parts, index = args.first + element;
    const int64_t part_first = item % args.parts * args.part_rows;
    const int64_t part_end = std::min(args.queries, part_first + args.part_rows);
    T* const key_sums = sums_of<T>(args, args.grad_key, args.key_sums, item, args.hidden);
    T* const value_sums = sums_of<T>(args, args.grad_value, args.value_sums, item, args.columns);
    int64_t value_stride;
    const T* const values = rows_of_values<T>(args, element, &value_stride);
    std::fill(weight_sums, weight_sums + width, T(0));

    for (int64_t first = part_first; first < part_end; first += kBackwardRows) {
      const int64_t rows = std::min(kBackwardRows, part_end - first), output_row = index * args.queries + first;
      const bool fresh = first == part_first;
      const T* const weights = static_cast<const T*>(args.weights) + output_row * args.keys;
      const void* const from = matrix_of(args, args.grad_output, index, first);
      for (int64_t i = 0; i < rows; ++i) {
        load_row(from, args.dtype, i * args.grad_output.row, args.columns, grads + i * grad_width);
        // A query that sees no key passes no gradient on, be it NaN.
        const T *const row = weights + i * args.keys, *const end = row + args.keys;
        if (std::all_of(row, end, [](T weight) { return weight == 0; }))
          std::fill_n(grads + i * grad_width, grad_width, T(0));
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t key = block * kKeyBlock;
        value_products(grads, rows, grad_width, args.columns, values + key * value_stride, value_stride,
                       std::min(kKeyBlock, args.keys - key), scores + key, stride);
      }
      for (int64_t i = 0; i < rows; ++i) {
        score_gradients(weights + i * args.keys, args.keys, scores + i * stride);
        if (args.grad_scores == nullptr) continue;
        std::copy_n(scores + i * stride, args.keys, static_cast<T*>(args.grad_scores) + (output_row + i) * args.keys);
      }
      if (through_tanh) {
        queries.load(args, index, first, rows);
        std::fill(query_sums, query_sums + rows * width, T(0));
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t key = block * kKeyBlock, n = std::min(kKeyBlock, args.keys - key);
        const int64_t count = list_keys(weights + key, args.keys, rows, n, keys);
        if (count == 0 && !fresh) continue;
        if (value_sums != nullptr) {
          add_value_gradients<T>(weights + key, args.keys, rows, grads, args.columns, grad_width,
                                 {value_sums + key * grad_width, grad_width, n, fresh});
        }
        if (!through_tanh) continue;
        const BlockSums<T> sums{key_sums == nullptr ? nullptr : key_sums + key * width, width, n, fresh};
        KeyForm form = KeyForm::Exp;
        const T* const panel =
            count == 0 ? at(spare_part) : fitting_panel(args, queries, element, block, row, at(spare_part), &form);
        const auto run = form == KeyForm::Plain ? gradient_block<true, T> : gradient_block<false, T>;
        run(queries, form, rows, weight, args.hidden, panel, keys, count, scores + key, stride, query_sums, sums,
            weight_sums);
      }
      for (int64_t i = 0; args.grad_query != nullptr && i < rows; ++i) {
        T* const sum = query_sums + i * width;
        for (int64_t h = 0; h < args.hidden; ++h) sum[h] *= weight[h];
        store_row(sum, args.hidden, args.grad_query, args.grad_query_dtype, output_row + i);
      }
    }
    if (args.grad_score_weight == nullptr) continue;
    store_row(weight_sums, args.hidden, args.grad_score_weight, kDType<T>, args.first * args.parts + item);
  }
}

// Adds the parts' sums of a block of keys and writes them as rows of the gradient.
template <class T>
void finish_rows(const AdditiveBackward& args, const void* sums, int64_t item, int64_t columns, T* row, void* grad,
                 DType dtype) {
  if (grad == nullptr || sums == nullptr) return;
  const int64_t blocks = key_blocks(args.keys), element = item / blocks, first = item % blocks * kKeyBlock;
  const int64_t width = padded_columns(columns), size = args.keys * width;
  const T* const parts = static_cast<const T*>(sums) + element * args.parts * size;
  for (int64_t j = first; j < std::min(args.keys, first + kKeyBlock); ++j) {
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      Vec<T> sum(T(0));
      for (int64_t p = 0; p < args.parts; ++p) sum = sum + Vec<T>::loadu(parts + p * size + j * width + c);
      sum.store(row + c);
    }
    store_row(row, columns, grad, dtype, (args.first + element) * args.keys + j);
  }
}

template <class T>
void finish(const AdditiveBackward& args, int64_t begin, int64_t end) {
  Workspace space;
  const auto part = space.reserve(sizeof(T) * padded_columns(std::max(args.hidden, args.columns)));
  T* const row = static_cast<T*>(space.at(part));
  for (int64_t item = begin; item < end; ++item) {
    finish_rows(args, args.key_sums, item, args.hidden, row, args.grad_key, args.grad_key_dtype);
    finish_rows(args, args.value_sums, item, args.columns, row, args.grad_value, args.grad_value_dtype);
  }
}

template <class T>
void sum(const AdditiveSum& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kAdditiveSumColumns, n = std::min(kAdditiveSumColumns, args.n - first);
    double sums[kAdditiveSumColumns] = {};
    for (int64_t m = 0; m < args.m; ++m) {
      const T* row = static_cast<const T*>(args.a) + m * args.n + first;
      for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(row[i]);
    }
    for (int64_t i = 0; i < n; ++i) static_cast<T*>(args.out)[first + i] = static_cast<T>(sums[i]);
  }
}

}  // namespace

void additive_backward_kernel(const AdditiveBackward& args, int64_t begin, int64_t end) {
  args.dtype == DType::Double ? backward<double>(args, begin, end) : backward<float>(args, begin, end);
}

void additive_finish_kernel(const AdditiveBackward& args, int64_t begin, int64_t end) {
  args.dtype == DType::Double ? finish<double>(args, begin, end) : finish<float>(args, begin, end);
}

void additive_sum_kernel(const AdditiveSum& args, int64_t begin, int64_t end) {
  args.dtype == DType::Double ? sum<double>(args, begin, end) : sum<float>(args, begin, end);
}

}  // namespace lect11ext::CPU_CAPABILITY
