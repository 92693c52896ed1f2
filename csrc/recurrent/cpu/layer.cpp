#include "recurrent/cpu/layer_common.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// One share's run through all steps.
template <class S, LayerCell kCell>
class Recurrence {
  using C = Compute<S>;
  using P = Operand<S>;
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr int kGates = kLstm ? 4 : 3;
  static constexpr int64_t kWidth = kGates * kUnits;
  static constexpr int64_t kDeep = PanelStep<P>::kDeep;

 public:
  Recurrence(const Layer& args, int64_t begin, int64_t end)
      : args_(args), schedule_{args}, blocks_(args, begin, end), parties_(end - begin) {
    for (auto& sums : sums_at_) sums = sums_ + (&sums - sums_at_) * kWidth;
    staged_ = static_cast<P*>(args.staged) + begin * kLayerRows * even(args.input_size);
  }

  void run() {
    start();
    for (int64_t s = 0; s < args_.steps; ++s) {
      if (s % args_.chunk == 0) multiply_inputs(s, std::min(s + args_.chunk, args_.steps));
      step(s);
      args_.barrier->arrive_and_wait(parties_);
    }
    finish();
  }

 private:
  static int64_t even(int64_t size) { return size + size % 2; }
  static int64_t deep(int64_t size) { return (size + kDeep - 1) / kDeep * kDeep; }
  bool packed() const { return args_.panels_hh != nullptr; }
  int64_t first_unit(int64_t block) const { return block * kUnits; }
  int64_t units(int64_t block) const { return std::min(kUnits, args_.hidden - first_unit(block)); }

  P* exchange(int64_t s, int64_t row) const {
    return static_cast<P*>(args_.exchange[s % 2]) + row * even(args_.hidden);
  }
  C* cell_state(int64_t block, int64_t row) const {
    return static_cast<C*>(args_.cell_states) + (block * args_.batch + row) * kUnits;
  }
  C* pre(int64_t block, int64_t row_of_chunk) const {
    return static_cast<C*>(args_.pre) + (block * args_.chunk * args_.batch + row_of_chunk) * kWidth;
  }
  P* panel(void* panels, int64_t block, int64_t size) const {
    return static_cast<P*>(panels) + block * kWidth * even(size);
  }
  const S* input(int64_t t, int64_t row) const {
    return static_cast<const S*>(args_.input) + t * args_.input_strides.step + row * args_.input_strides.row;
  }

  // --- before the first step

  void start() {
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      if (packed()) {
        pack(block, args_.weight_ih, args_.weight_ih_stride, args_.input_size, args_.panels_ih);
        pack(block, args_.weight_hh, args_.weight_hh_stride, args_.hidden, args_.panels_hh);
      }
      const int64_t at = first_unit(block);
      for (int64_t b = 0; b < args_.batch; ++b) {
        const int64_t from = b * args_.hidden + at;
        convert(static_cast<const S*>(args_.h) + from, exchange(0, b) + at, units(block));
        if constexpr (kLstm) convert(static_cast<const S*>(args_.c) + from, cell_state(block, b), units(block));
        if (args_.steps > 0 && schedule_.restarts(schedule_.time(0), b)) clear(0, block, b);
      }
    }
    const bool owns_last = blocks_.last == (args_.hidden + kUnits - 1) / kUnits;
    for (int64_t b = 0; owns_last && args_.hidden % 2 != 0 && b < args_.batch; ++b) {
      for (int64_t s : {0, 1}) exchange(s, b)[args_.hidden] = P(0);
    }
    args_.barrier->arrive_and_wait(parties_);
  }

  void clear(int64_t s, int64_t block, int64_t b) {
    P* h = exchange(s, b) + first_unit(block);
    std::fill(h, h + units(block), P(0));
    if constexpr (kLstm) std::fill(cell_state(block, b), cell_state(block, b) + kUnits, C(0));
  }

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

  // --- the inputs' part of the sums of steps s … end − 1

  void multiply_inputs(int64_t begin, int64_t end) {
    if (packed()) {
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

  // Both biases, but for the state's of the GRU's n, which the reset gate multiplies.
  void add_bias(int64_t rows) {
    if (args_.bias_ih == nullptr && args_.bias_hh == nullptr) return;
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      alignas(64) C bias[kWidth] = {}, other[kUnits] = {};
      for (int g = 0; g < kGates; ++g) {
        const int64_t at = g * args_.hidden + first_unit(block);
        if (args_.bias_ih != nullptr)
          convert(static_cast<const S*>(args_.bias_ih) + at, bias + g * kUnits, units(block));
        if (args_.bias_hh == nullptr || (!kLstm && g == 2)) continue;
        convert(static_cast<const S*>(args_.bias_hh) + at, other, units(block));
        for (int64_t u = 0; u < kUnits; ++u) bias[g * kUnits + u] += other[u];
      }
      for (int64_t row = 0; row < rows; ++row) {
        C* to = pre(block, row);
        for (int64_t u = 0; u < kWidth; u += kLanes<C>) (Vec<C>::loadu(to + u) + Vec<C>::loadu(bias + u)).store(to + u);
      }
    }
  }

  // --- a step

  void step(int64_t s) {
    const int64_t t = schedule_.time(s), begin = s / args_.chunk * args_.chunk;
    const int64_t end = std::min(begin + args_.chunk, args_.steps);
    int64_t rows[kLayerRows];
    for (int64_t b = 0; b < args_.batch;) {
      int64_t n = 0;
      if (packed()) {
        for (; b < args_.batch && n < kLayerRows; ++b) {
          schedule_.active(t, b) ? void(rows[n++] = b) : keep(s, t, b);
        }
      } else {
        n = next_rows_of_x(args_.batch - b);
        for (int64_t i = 0; i < n; ++i) rows[i] = b++;
      }
      // With few rows the products of several blocks come first: their activations are then independent of one another,
      // and fill one another's waiting times.
      const int64_t together = n == 0 ? 1 : kLayerRows / n;
      for (int64_t first = blocks_.first; first < blocks_.last; first += together) {
        const int64_t last = std::min(first + together, blocks_.last);
        for (int64_t block = first; block < last; ++block) multiply_states(s, block, rows, n, (block - first) * n);
        for (int64_t block = first; block < last; ++block) {
          alignas(64) C bias[kUnits] = {};
          if (!kLstm && args_.bias_hh != nullptr) {
            convert(static_cast<const S*>(args_.bias_hh) + 2 * args_.hidden + first_unit(block), bias, units(block));
          }
          for (int64_t i = 0; i < n; ++i) {
            if (!packed() && !schedule_.active(t, rows[i])) continue;
            activate(s, t, block, rows[i], pre(block, row_of_chunk(s, begin, end, rows[i])),
                     sums_at_[(block - first) * n + i], bias);
          }
        }
      }
      for (int64_t i = 0; i < n && !packed(); ++i) {
        if (!schedule_.active(t, rows[i])) keep(s, t, rows[i]);
      }
    }
  }

  // Into the sums from row `at` on.
  void multiply_states(int64_t s, int64_t block, const int64_t* rows, int64_t n, int64_t at) {
    const int64_t size = args_.hidden;
    if (packed()) {
      const P* from[kLayerRows];
      for (int64_t i = 0; i < n; ++i) from[i] = exchange(s, rows[i]);
      panel_product<kWidth>(from, n, deep(size), panel(args_.panels_hh, block, size), kWidth * kDeep, sums_at_ + at,
                            false);
    } else if constexpr (std::is_same_v<S, P>) {
      for (int g = 0; g < kGates; ++g) {
        const S* weight = static_cast<const S*>(args_.weight_hh);
        weight += (g * size + first_unit(block)) * args_.weight_hh_stride;
        const RowProduct<S> product{weight, args_.weight_hh_stride, exchange(s, 0), even(size), size};
        dot_block<kUnits>(&product, 1, units(block), rows[0], n, sums_at_[at] + g * kUnits, kWidth);
      }
    }
  }

  // A row whose step does not take place.
  void keep(int64_t s, int64_t t, int64_t b) {
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      const int64_t at = first_unit(block), n = units(block);
      move_units(exchange(s, b) + at, exchange(s + 1, b) + at, n);
      S* out = over_time(args_.out, args_.out_strides, t, b) + at;
      std::fill(out, out + n, S(0));
      if (args_.gates != nullptr) {
        S* gates = over_time(args_.gates, args_.gates_strides, t, b) + at;
        for (int g = 0; g < 4; ++g) std::fill(gates + g * args_.hidden, gates + g * args_.hidden + n, S(0));
      }
      if (args_.cells != nullptr) {
        S* cells = over_time(args_.cells, args_.out_strides, t, b) + at;
        std::fill(cells, cells + n, S(0));
      }
      restart_next(s, block, b);
    }
  }

  static S* over_time(void* tensor, TimeStrides strides, int64_t t, int64_t b) {
    return static_cast<S*>(tensor) + t * strides.step + b * strides.row;
  }

  void restart_next(int64_t s, int64_t block, int64_t b) {
    if (args_.reset == nullptr || s + 1 == args_.steps) return;
    if (schedule_.restarts(schedule_.time(s + 1), b)) clear(s + 1, block, b);
  }

  void activate(int64_t s, int64_t t, int64_t block, int64_t b, const C* pre, const C* sums, const C* bias) {
    const int64_t at = first_unit(block), n = units(block);
    alignas(64) C h[kUnits], kept[4][kUnits];
    if constexpr (kLstm) lstm(cell_state(block, b), pre, sums, h, kept);
    else gru(exchange(s, b) + at, n, pre, sums, bias, h, kept);
    S* out = over_time(args_.out, args_.out_strides, t, b) + at;
    move_units(h, out, n);
    move_units(out, exchange(s + 1, b) + at, n);  // of half precision the next step sees what was written
    if (args_.gates != nullptr) {
      S* gates = over_time(args_.gates, args_.gates_strides, t, b) + at;
      for (int g = 0; g < 4; ++g) move_units(kept[g], gates + g * args_.hidden, n);
      if constexpr (kLstm) {
        move_units(cell_state(block, b), over_time(args_.cells, args_.out_strides, t, b) + at, n);
      }
    }
    restart_next(s, block, b);
  }

  void lstm(C* c, const C* pre, const C* sums, C* h, C (&kept)[4][kUnits]) const {
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      const auto gate = [&](int g) {
        return Vec<C>::loadu(pre + g * kUnits + u) + Vec<C>::loadu(sums + g * kUnits + u);
      };
      const Vec<C> i = sigmoid(gate(0)), f = sigmoid(gate(1)), o = sigmoid(gate(3));
      const Vec<C> g = args_.sigmoid_candidate ? sigmoid(gate(2)) : tanh(gate(2));
      const Vec<C> state = at::vec::fmadd(f, Vec<C>::loadu(c + u), i * g);
      state.store(c + u);
      (o * tanh(state)).store(h + u);
      i.store(kept[0] + u);
      f.store(kept[1] + u);
      g.store(kept[2] + u);
      o.store(kept[3] + u);
    }
  }

  void gru(const P* state, int64_t n, const C* pre, const C* sums, const C* bias, C* h, C (&kept)[4][kUnits]) const {
    alignas(64) C before[kUnits];
    move_units(state, before, n);
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      const auto load = [&](const C* from, int g) { return Vec<C>::loadu(from + g * kUnits + u); };
      const Vec<C> r = sigmoid(load(pre, 0) + load(sums, 0)), z = sigmoid(load(pre, 1) + load(sums, 1));
      const Vec<C> hidden = load(sums, 2) + load(bias, 0);
      const Vec<C> candidate = tanh(at::vec::fmadd(r, hidden, load(pre, 2)));
      at::vec::fmadd(z, load(before, 0) - candidate, candidate).store(h + u);
      r.store(kept[0] + u);
      z.store(kept[1] + u);
      candidate.store(kept[2] + u);
      hidden.store(kept[3] + u);
    }
  }

  // --- after the last step

  void finish() {
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      for (int64_t b = 0; b < args_.batch; ++b) {
        const int64_t at = b * args_.hidden + first_unit(block);
        convert(exchange(args_.steps, b) + first_unit(block), static_cast<S*>(args_.h_out) + at, units(block));
        if constexpr (kLstm) convert(cell_state(block, b), static_cast<S*>(args_.c_out) + at, units(block));
      }
    }
  }

  const Layer& args_;
  const Schedule<Layer> schedule_;
  const Blocks blocks_;
  const int64_t parties_;
  P* staged_;
  C* sums_at_[kLayerRows];
  alignas(64) C sums_[kLayerRows * kWidth] = {};
};

}  // namespace

void layer_kernel(const Layer& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (args.cell == LayerCell::Lstm) Recurrence<S, LayerCell::Lstm>(args, begin, end).run();
    else Recurrence<S, LayerCell::Gru>(args, begin, end).run();
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
