#include "recurrent/layer.h"

#include "common/barrier.h"
#include "common/cpu/dot.h"
#include "common/cpu/math.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// A block of units of one row at one step: `sums` are the gates' products, kUnits apart.
template <class C>
struct StepSums {
  const C* sums;
  const C* pre;  // the row's, at the block's first unit; gates H apart
  int64_t hidden;
  int64_t units;

  // The sum of gate g, vector at u. What lies beyond `units` is computed and not stored.
  Vec<C> operator()(int g, int64_t u) const {
    const int64_t n = std::min<int64_t>(units - u, kLanes<C>);
    return Vec<C>::loadu(sums + g * kUnits + u) + Vec<C>::loadu(pre + g * hidden + u, n);
  }
};

template <class C>
struct LstmRule {
  static constexpr int kGates = 4;
  bool sigmoid_candidate;
  C* cells;  // c at (row 0, unit 0)

  void start_block(const Layer&, int64_t, int64_t) {}

  Vec<C> new_state(const StepSums<C>& step, Vec<C>, int64_t u, int64_t at, int64_t n) const {
    const Vec<C> i = sigmoid(step(0, u)), f = sigmoid(step(1, u)), o = sigmoid(step(3, u));
    const Vec<C> g = sigmoid_candidate ? sigmoid(step(2, u)) : tanh(step(2, u));
    const Vec<C> c = at::vec::fmadd(f, Vec<C>::loadu(cells + at, n), i * g);
    c.store(cells + at, n);
    return o * tanh(c);
  }

  void clear(int64_t at, int64_t units) const { std::fill(cells + at, cells + at + units, C(0)); }
};

template <class C>
struct GruRule {
  static constexpr int kGates = 3;
  alignas(64) C bias[kUnits] = {};

  void start_block(const Layer& args, int64_t first, int64_t units) {
    if (args.bias_hidden != nullptr) std::copy_n(static_cast<const C*>(args.bias_hidden) + first, units, bias);
  }

  Vec<C> new_state(const StepSums<C>& step, Vec<C> h, int64_t u, int64_t, int64_t n) const {
    const Vec<C> r = sigmoid(step(0, u)), z = sigmoid(step(1, u));
    const Vec<C> hidden = Vec<C>::loadu(step.sums + 2 * kUnits + u) + Vec<C>::loadu(bias + u);
    const Vec<C> candidate = tanh(at::vec::fmadd(r, hidden, Vec<C>::loadu(step.pre + 2 * step.hidden + u, n)));
    return at::vec::fmadd(z, h - candidate, candidate);
  }

  void clear(int64_t, int64_t) const {}
};

// The blocks begin … end − 1 of one step.
template <class C, class Rule>
void run_step(const Layer& args, Rule& rule, int64_t s, int64_t begin, int64_t end) {
  constexpr int kGates = Rule::kGates;
  const int64_t H = args.hidden, B = args.batch, t = args.reverse ? args.steps - 1 - s : s;
  const int64_t next = args.reverse ? t - 1 : t + 1;
  const C* h = static_cast<const C*>(args.h[s % 2]);
  C* h_next = static_cast<C*>(args.h[(s + 1) % 2]);
  const C* pre = static_cast<const C*>(args.pre) + t * args.pre_step;
  C* out = static_cast<C*>(args.out) + t * args.out_step;
  const auto active = [&](int64_t time, int64_t row) { return args.lengths == nullptr || time < args.lengths[row]; };
  const bool resets = args.reset != nullptr && s + 1 < args.steps;
  alignas(64) C sums[kMaxRowsOfX * kGates * kUnits];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kUnits, units = std::min(kUnits, H - first);
    rule.start_block(args, first, units);
    for (int64_t row = 0, rows; row < B; row += rows) {
      rows = next_rows_of_x(B - row);
      for (int g = 0; g < kGates; ++g) {
        const C* weight = static_cast<const C*>(args.weight_hh) + (g * H + first) * args.weight_stride;
        const RowProduct<C> product{weight, args.weight_stride, h, H, H};
        dot_block<kUnits>(&product, 1, units, row, rows, sums + g * kUnits, kGates * kUnits);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = row + r, at = b * H + first;
        C* to = out + b * args.out_row + first;
        if (!active(t, b)) {
          std::fill(to, to + units, C(0));
          std::copy(h + at, h + at + units, h_next + at);
          if (resets && args.reset[next * B + b] && active(next, b)) {
            std::fill(h_next + at, h_next + at + units, C(0));
            rule.clear(at, units);
          }
          continue;
        }
        const StepSums<C> step{sums + r * kGates * kUnits, pre + b * args.pre_row + first, H, units};
        const bool restart = resets && args.reset[next * B + b] && active(next, b);
        for (int64_t u = 0; u < units; u += kLanes<C>) {
          const int64_t n = std::min<int64_t>(units - u, kLanes<C>);
          const Vec<C> state = rule.new_state(step, Vec<C>::loadu(h + at + u, n), u, at + u, n);
          state.store(to + u, n);
          (restart ? Vec<C>(C(0)) : state).store(h_next + at + u, n);
        }
        if (restart) rule.clear(at, units);
      }
    }
  }
}

template <class C, class Rule>
void run(const Layer& args, Rule rule, int64_t begin, int64_t end) {
  const int64_t blocks = (args.hidden + kUnits - 1) / kUnits;
  const int64_t first = blocks * begin / args.shares, last = blocks * end / args.shares;
  for (int64_t s = 0; s < args.steps; ++s) {
    run_step<C>(args, rule, s, first, last);
    args.barrier->arrive_and_wait(end - begin);
  }
}

template <class C>
void run_cell(const Layer& args, int64_t begin, int64_t end) {
  if (args.cell == LayerCell::Lstm) {
    run<C>(args, LstmRule<C>{args.sigmoid_candidate, static_cast<C*>(args.c)}, begin, end);
  } else {
    run<C>(args, GruRule<C>{}, begin, end);
  }
}

}  // namespace

void layer_kernel(const Layer& args, int64_t begin, int64_t end) {
  args.dtype == DType::Double ? run_cell<double>(args, begin, end) : run_cell<float>(args, begin, end);
}

}  // namespace lect11ext::CPU_CAPABILITY
