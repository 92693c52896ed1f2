// The backward of additive attention. A work item goes over its queries, sixteen at a time, and over the blocks of
// keys: first for the scores' gradients, then for everything that needs tanh. What it adds up for keys and values lies
// in panels of its own, which a last kernel adds in order.
#include "attention/additive.h"

#include <cmath>
#include <cstring>

#include "attention/cpu/additive_tanh.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// Queries whose sums stay in registers while the keys go by.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileKeys = 4;

// --- gradients of the scores --------------------------------------------------------------------------------------

// products[r][j] = ⟨grad_r, v_j⟩ of R rows with the keys of a block; a row of products has room for whole fours.
template <int R, class T>
inline void product_tile(const T* grads, int64_t width, int64_t columns, const T* panel, int64_t n, T* products,
                         int64_t stride) {
  constexpr int V = kLanes<T>;
  for (int64_t j = 0; j < n; j += kTileKeys) {
    int64_t key[kTileKeys];
    for (int c = 0; c < kTileKeys; ++c) key[c] = std::min(j + c, n - 1) * V;
    Vec<T> sums[R][kTileKeys];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kTileKeys; ++c) sums[r][c] = Vec<T>(T(0));
    }
    const T* from = panel;
    for (int64_t d = 0; d < columns; d += V, from += kPanelRow * V) {
      Vec<T> value[kTileKeys];
#pragma GCC unroll 4
      for (int c = 0; c < kTileKeys; ++c) value[c] = Vec<T>::loadu(from + key[c]);
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
void value_products(const T* grads, int64_t rows, int64_t width, int64_t columns, const T* panel, int64_t n,
                    T* products, int64_t stride) {
  int64_t i = 0;
  const auto run = [&]<int R>() {
    for (; i + R <= rows; i += R) {
      product_tile<R>(grads + i * width, width, columns, panel, n, products + i * stride, stride);
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
  T sum = at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, sums);
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

// The same for all rows and hidden units. Sums over the rows are formed apart and then added: a long chain of
// additions would lose digits.
template <bool kPlain, class T>
void gradient_block(const Queries<T>& queries, KeyForm form, int64_t rows, int64_t hidden, const T* panel,
                    const int32_t* keys, int64_t count, const T* grads, int64_t stride, T* query_sums, T* key_sums,
                    T* weight_sums) {
  constexpr int V = kLanes<T>;
  alignas(64) T tile[kKeyBlock * V];
  for (int64_t h = 0; h < hidden; h += V, panel += kPanelRow * V, key_sums += kPanelRow * V) {
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
    for (int64_t i = 0; i < count; ++i) {
      T* to = key_sums + keys[i] * V;
      (Vec<T>::loadu(to) + Vec<T>::loadu(tile + keys[i] * V)).store(to);
    }
  }
}

// value_sums[j] += Σ_i α_ij dout_i for the keys of a block.
template <class T>
void add_value_gradients(const T* weights, int64_t stride, int64_t rows, const T* grads, int64_t columns, int64_t width,
                         const int32_t* keys, int64_t count, T* value_sums) {
  constexpr int V = kLanes<T>;
  const auto run = [&]<int K>(int64_t first, int64_t d) {
    Vec<T> sums[K];
#pragma GCC unroll 8
    for (int c = 0; c < K; ++c) sums[c] = Vec<T>(T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> grad = Vec<T>::loadu(grads + r * width + d);
#pragma GCC unroll 8
      for (int c = 0; c < K; ++c) {
        sums[c] = at::vec::fmadd(Vec<T>(weights[r * stride + keys[first + c]]), grad, sums[c]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < K; ++c) {
      T* to = value_sums + keys[first + c] * V;
      (sums[c] + Vec<T>::loadu(to)).store(to);
    }
  };
  for (int64_t d = 0; d < columns; d += V, value_sums += kPanelRow * V) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) run.template operator()<8>(i, d);
    for (; i < count; ++i) run.template operator()<1>(i, d);
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

// row · weight, stored as number `number` of dense rows.
template <class T>
void store_row(T* row, const T* weight, int64_t columns, void* out, DType dtype, int64_t number) {
  if (weight != nullptr) {
    for (int64_t i = 0; i < columns; ++i) row[i] *= weight[i];
  }
  with_type(dtype, [&](auto* type) { convert(row, static_cast<decltype(type)>(out) + number * columns, columns); });
}

// --- kernels ------------------------------------------------------------------------------------------------------

template <class T>
void backward(const AdditiveBackward& args, int64_t begin, int64_t end) {
  const int64_t blocks = key_blocks(args.keys), width = padded_columns(args.hidden);
  const int64_t grad_width = padded_columns(args.columns), stride = blocks * kKeyBlock;
  const int64_t key_panels = blocks * panel_size(args.hidden), value_panels = blocks * panel_size(args.columns);
  const bool through_tanh = args.grad_query != nullptr || args.grad_key != nullptr || args.grad_score_weight != nullptr;
  Workspace space;
  const auto part = [&](int64_t elements) { return space.reserve(elements * static_cast<int64_t>(sizeof(T))); };
  const auto queries_part = part(Queries<T>::size(kBackwardRows, args.hidden)), weight_part = part(width),
             row_part = part(width), grad_part = part(kBackwardRows * grad_width), scores_part = part(kBackwardRows * stride),
             query_sums_part = part(kBackwardRows * width), weight_sums_part = part(width),
             spare_part = part(panel_size(args.hidden)), key_sums_part = part(args.grad_key == nullptr ? key_panels : 0);
  Queries<T> queries(kBackwardRows, args.hidden, static_cast<T*>(space.at(queries_part)));
  const auto at = [&](size_t reserved) { return static_cast<T*>(space.at(reserved)); };
  T *const weight = at(weight_part), *const row = at(row_part), *const grads = at(grad_part);
  T *const scores = at(scores_part), *const query_sums = at(query_sums_part), *const weight_sums = at(weight_sums_part);
  load_row(args.score_weight, args.dtype, 0, args.hidden, weight);
  int32_t keys[kKeyBlock];

  for (int64_t item = begin; item < end; ++item) {
    const int64_t element = item / args.parts, index = args.first + element, part_first = item % args.parts * args.part_rows;
    const int64_t part_end = std::min(args.queries, part_first + args.part_rows);
    T* const key_sums = args.grad_key == nullptr ? at(key_sums_part) : static_cast<T*>(args.key_sums) + item * key_panels;
    T* const value_sums = static_cast<T*>(args.value_sums) + item * value_panels;
    const T* const values = static_cast<const T*>(args.value_panels) + element * value_panels;
    if (through_tanh) std::fill(key_sums, key_sums + key_panels, T(0));
    if (args.grad_value != nullptr) std::fill(value_sums, value_sums + value_panels, T(0));
    std::fill(weight_sums, weight_sums + width, T(0));

    for (int64_t first = part_first; first < part_end; first += kBackwardRows) {
      const int64_t rows = std::min(kBackwardRows, part_end - first), output_row = index * args.queries + first;
      const T* const weights = static_cast<const T*>(args.weights) + output_row * args.keys;
      const void* const from = matrix_of(args, args.grad_output, index, first);
      for (int64_t i = 0; i < rows; ++i) {
        load_row(from, args.dtype, i * args.grad_output.row, args.columns, grads + i * grad_width);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t n = std::min(kKeyBlock, args.keys - block * kKeyBlock);
        value_products(grads, rows, grad_width, args.columns, values + block * panel_size(args.columns), n,
                       scores + block * kKeyBlock, stride);
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
        if (count == 0) continue;
        if (args.grad_value != nullptr) {
          add_value_gradients(weights + key, args.keys, rows, grads, args.columns, grad_width, keys, count,
                              value_sums + block * panel_size(args.columns));
        }
        if (!through_tanh) continue;
        KeyForm form;
        const T* panel = fitting_panel(args, queries, element, block, row, at(spare_part), &form);
        const auto run = form == KeyForm::Plain ? gradient_block<true, T> : gradient_block<false, T>;
        run(queries, form, rows, args.hidden, panel, keys, count, scores + key, stride, query_sums,
            key_sums + block * panel_size(args.hidden), weight_sums);
      }
      for (int64_t i = 0; args.grad_query != nullptr && i < rows; ++i) {
        store_row(query_sums + i * width, weight, args.hidden, args.grad_query, args.grad_query_dtype, output_row + i);
      }
    }
    if (args.grad_score_weight == nullptr) continue;
    T* const to = static_cast<T*>(args.grad_score_weight) + (args.first * args.parts + item) * args.hidden;
    std::copy_n(weight_sums, args.hidden, to);
  }
}

// Adds the parts' panels of a block and writes them as rows.
template <class T>
void finish_rows(const T* sums, int64_t parts, int64_t blocks, int64_t rows, int64_t columns, const T* weight, T* row,
                 void* out, DType dtype, int64_t first) {
  constexpr int V = kLanes<T>;
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t c = 0; c * V < columns; ++c) {
      Vec<T> sum(T(0));
      for (int64_t p = 0; p < parts; ++p) {
        sum = sum + Vec<T>::loadu(sums + p * blocks * panel_size(columns) + (c * kPanelRow + j) * V);
      }
      sum.store(row + c * V);
    }
    store_row(row, weight, columns, out, dtype, first + j);
  }
}

template <class T>
void finish(const AdditiveBackward& args, int64_t begin, int64_t end) {
  const int64_t blocks = key_blocks(args.keys), key_size = panel_size(args.hidden), value_size = panel_size(args.columns);
  Workspace space;
  const auto weight_part = space.reserve(sizeof(T) * padded_columns(args.hidden)),
             row_part = space.reserve(sizeof(T) * padded_columns(std::max(args.hidden, args.columns)));
  T *const weight = static_cast<T*>(space.at(weight_part)), *const row = static_cast<T*>(space.at(row_part));
  load_row(args.score_weight, args.dtype, 0, args.hidden, weight);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t element = item / blocks, block = item % blocks, key = block * kKeyBlock;
    const int64_t rows = std::min(kKeyBlock, args.keys - key), first = (args.first + element) * args.keys + key;
    const int64_t number = element * args.parts * blocks + block;  // of the first part's panel
    if (args.grad_key != nullptr) {
      finish_rows(static_cast<const T*>(args.key_sums) + number * key_size, args.parts, blocks, rows, args.hidden,
                  weight, row, args.grad_key, args.grad_key_dtype, first);
    }
    if (args.grad_value != nullptr) {
      finish_rows<T>(static_cast<const T*>(args.value_sums) + number * value_size, args.parts, blocks, rows,
                     args.columns, nullptr, row, args.grad_value, args.grad_value_dtype, first);
    }
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
