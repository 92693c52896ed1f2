// A layer's weights as panels, and its inputs' part of the sums, a chunk of steps at a time.
#pragma once

#include "recurrent/cpu/layer_common.h"

namespace lect11ext::CPU_CAPABILITY {

// What the forward's parts know of a share: where its blocks, panels and rows lie.
template <class S, LayerCell kCell>
class LayerShare {
 protected:
  using C = Compute<S>;
  using P = Operand<S>;
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr bool kResetAfter = kCell == LayerCell::Gru;
  static constexpr int kGates = kLstm ? 4 : 3;
  static constexpr int64_t kWidth = kGates * kUnits;
  static constexpr int64_t kDeep = PanelStep<P>::kDeep;

  LayerShare(const Layer& args, int64_t begin, int64_t end) : args_(args), schedule_{args}, blocks_(args, begin, end) {
    staged_ = static_cast<P*>(args.staged) + begin * kLayerRows * even(args.input_size);
  }

  static int64_t even(int64_t size) { return size + size % 2; }
  static int64_t deep(int64_t size) { return (size + kDeep - 1) / kDeep * kDeep; }
  bool packed() const { return args_.panels_hh != nullptr; }
  int64_t first_unit(int64_t block) const { return block * kUnits; }
  int64_t units(int64_t block) const { return std::min(kUnits, args_.hidden - first_unit(block)); }

  C* pre(int64_t block, int64_t row_of_chunk) const {
    return static_cast<C*>(args_.pre) + (block * args_.chunk * args_.batch + row_of_chunk) * kWidth;
  }
  P* panel(void* panels, int64_t block, int64_t size) const {
    return static_cast<P*>(panels) + block * kWidth * even(size);
  }
  const S* input(int64_t t, int64_t row) const {
    return over_time(static_cast<const S*>(args_.input), args_.input_strides, t, row);
  }

  void pack_weights() {
    if (!packed()) return;
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      if (!args_.is_multiplied) {
        pack(block, args_.weight_ih, args_.weight_ih_stride, args_.input_size, args_.panels_ih);
      }
      pack(block, args_.weight_hh, args_.weight_hh_stride, args_.hidden, args_.panels_hh);
    }
  }

  // Into pre: of steps begin … end − 1.
  void multiply_inputs(int64_t begin, int64_t end) {
    if (args_.is_multiplied) {
      copy_sums(begin, end);
    } else if (packed()) {
      multiply_inputs_packed(begin, end);
    } else {
      const bool dense = args_.batch == 1 || args_.input_strides.step == args_.batch * args_.input_strides.row;
      if (dense) {
        const int64_t low = std::min(schedule_.time(begin), schedule_.time(end - 1));
        const int64_t stride = args_.batch == 1 ? args_.input_strides.step : args_.input_strides.row;
        multiply_inputs_in_place(input(low, 0), stride, (end - begin) * args_.batch, 0);
      } else {
        for (int64_t s = begin; s < end; ++s) {
          multiply_inputs_in_place(input(schedule_.time(s), 0), args_.input_strides.row, args_.batch,
                                   row_of_chunk(s, begin, end, 0));
        }
      }
    }
    add_bias((end - begin) * args_.batch);
  }

  // Rows of a chunk lie in the order of time, whichever way the steps go.
  int64_t row_of_chunk(int64_t s, int64_t begin, int64_t end, int64_t b) const {
    return (args_.reverse ? end - 1 - s : s - begin) * args_.batch + b;
  }

  const Layer& args_;
  const Schedule schedule_;
  const Blocks blocks_;

 private:
  // A block's rows of all gates become columns, kDeep elements of k beside one another.
  void pack(int64_t block, const void* weight, int64_t stride, int64_t size, void* panels) {
    constexpr int64_t kChunk = 64;  // keeps what is written in the first-level cache
    P* to = panel(panels, block, size);
    const int64_t transposed = transpose(block, static_cast<const S*>(weight), stride, size, to);
    for (int64_t k = transposed; k < size; k += kChunk) {
      const int64_t n = std::min(kChunk, size - k);
      for (int64_t column = 0; column < kWidth; ++column) {
        const int64_t gate = column / kUnits, unit = column % kUnits;
        P row[kChunk + 1] = {};
        const int64_t at = gate * args_.hidden + first_unit(block) + unit;
        if (unit < units(block)) convert(static_cast<const S*>(weight) + at * stride + k, row, n);
        P* out = to + k * kWidth + column * kDeep;
        for (int64_t i = 0; i < deep(n); i += kDeep, out += kWidth * kDeep) {
          for (int64_t d = 0; d < kDeep; ++d) out[d] = row[i + d];
        }
      }
    }
  }

  // The same in blocks of 16 × 16 words, as far as there are whole ones: how many elements of k were moved. A word is a
  // float, or a pair of kDeep elements.
  int64_t transpose(int64_t block, const S* weight, int64_t stride, int64_t size, P* to) {
    constexpr int64_t kWord = sizeof(float) / sizeof(S);
    if constexpr (!std::is_same_v<S, P> || kWord != kDeep) return 0;
    if (units(block) != kUnits || stride % kWord != 0) return 0;
    const int64_t whole = size / (kUnits * kWord) * kUnits * kWord;
    for (int g = 0; g < kGates; ++g) {  // sixteen rows are as many streams as the prefetchers follow
      const S* from = weight + (g * args_.hidden + first_unit(block)) * stride;
      for (int64_t k = 0; k < whole; k += kUnits * kWord) {
        at::vec::transpose_mxn<float, kUnits, kUnits>(reinterpret_cast<const float*>(from + k), stride / kWord,
                                                      reinterpret_cast<float*>(to + k * kWidth) + g * kUnits, kWidth);
      }
    }
    return whole;
  }

  // An input that is already multiplied.
  void copy_sums(int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t t = schedule_.time(s);
      for (int64_t b = 0; b < args_.batch; ++b) {
        if (!schedule_.active(t, b)) continue;
        for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
          C* to = pre(block, row_of_chunk(s, begin, end, b));
          for (int g = 0; g < kGates; ++g) {
            move_units(input(t, b) + g * args_.hidden + first_unit(block), to + g * kUnits, units(block));
          }
        }
      }
    }
  }

  void multiply_inputs_packed(int64_t begin, int64_t end) {
    const int64_t size = args_.input_size;
    // Rows are converted first where the machine does not multiply S, and padded where pairs would be cut.
    const bool stage = !std::is_same_v<S, P> || size % kDeep != 0;
    int64_t rows[kLayerRows], n = 0;
    const P* from[kLayerRows];
    C* to[kLayerRows];
    const auto flush = [&] {
      for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
        for (int64_t i = 0; i < n; ++i) to[i] = pre(block, rows[i]);
        panel_product<kWidth>(from, n, deep(size), panel(args_.panels_ih, block, size), kWidth * kDeep, to, false);
      }
      n = 0;
    };
    for (int64_t s = begin; s < end; ++s) {
      const int64_t t = schedule_.time(s);
      for (int64_t b = 0; b < args_.batch; ++b) {
        if (!schedule_.active(t, b)) continue;
        rows[n] = row_of_chunk(s, begin, end, b);
        if (stage) {
          P* row = staged_ + n * even(size);
          convert(input(t, b), row, size);
          if (size % 2 != 0) row[size] = P(0);
          from[n] = row;
        } else {
          from[n] = reinterpret_cast<const P*>(input(t, b));
        }
        if (++n == kLayerRows) flush();
      }
    }
    if (n > 0) flush();
  }

  void multiply_inputs_in_place(const S* x, int64_t x_stride, int64_t count, int64_t first_row) {
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      for (int64_t row = 0, rows; row < count; row += rows) {
        rows = next_rows_of_x(count - row);
        for (int g = 0; g < kGates; ++g) {
          const S* weight = static_cast<const S*>(args_.weight_ih);
          weight += (g * args_.hidden + first_unit(block)) * args_.weight_ih_stride;
          const RowProduct<S> product{weight, args_.weight_ih_stride, x, x_stride, args_.input_size};
          dot_block<kUnits>(&product, 1, units(block), row, rows, pre(block, first_row + row) + g * kUnits, kWidth);
        }
      }
    }
  }

  // Both biases, but for the state's of n where the reset gate multiplies it.
  void add_bias(int64_t rows) {
    if (args_.bias_ih == nullptr && args_.bias_hh == nullptr) return;
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      alignas(64) C bias[kWidth] = {}, other[kUnits] = {};
      for (int g = 0; g < kGates; ++g) {
        const int64_t at = g * args_.hidden + first_unit(block);
        if (args_.bias_ih != nullptr)
          convert(static_cast<const S*>(args_.bias_ih) + at, bias + g * kUnits, units(block));
        if (args_.bias_hh == nullptr || (kResetAfter && g == 2)) continue;
        convert(static_cast<const S*>(args_.bias_hh) + at, other, units(block));
        for (int64_t u = 0; u < kUnits; ++u) bias[g * kUnits + u] += other[u];
      }
      for (int64_t row = 0; row < rows; ++row) {
        C* to = pre(block, row);
        for (int64_t u = 0; u < kWidth; u += kLanes<C>) (Vec<C>::loadu(to + u) + Vec<C>::loadu(bias + u)).store(to + u);
      }
    }
  }

  P* staged_;
};

}  // namespace lect11ext::CPU_CAPABILITY
