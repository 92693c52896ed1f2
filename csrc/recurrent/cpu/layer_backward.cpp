#include "recurrent/cpu/layer_common.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// kLanes elements of S, of which n exist, in arithmetic's type, and back.
template <class S>
inline Vec<Compute<S>> load_units(const S* from, int64_t n) {
  using C = Compute<S>;
  if constexpr (std::is_same_v<S, C>) {
    return n >= kLanes<C> ? Vec<C>::loadu(from) : Vec<C>::loadu(from, n);
  } else {
    C buffer[kLanes<C>];
    convert(from, buffer, std::min<int64_t>(n, kLanes<C>));
    return Vec<C>::loadu(buffer);
  }
}

template <class C>
inline void store_units(Vec<C> v, C* to, int64_t n) {
  v.store(to, std::min<int64_t>(n, kLanes<C>));
}

// One share's run back through all steps.
template <class S, LayerCell kCell>
class Backward {
  using C = Compute<S>;
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr int kGates = kLstm ? 4 : 3;
  static constexpr int64_t kPanel = 4;  // blocks of a panel: 64 columns

 public:
  Backward(const LayerBackward& args, int64_t begin, int64_t end)
      : args_(args),
        schedule_{args},
        blocks_(args, begin, end),
        parties_(end - begin),
        carry_row_((args.hidden + kUnits - 1) / kUnits * kUnits) {}

  void run() {
    start();
    for (int64_t s = args_.steps - 1; s >= 0; --s) {
      const int64_t t = schedule_.time(s);
      for (int64_t b = 0; b < args_.batch; ++b) schedule_.active(t, b) ? activate(s, t, b) : skip(t, b);
      if (s == 0 && args_.grad_h == nullptr) break;
      args_.barrier->arrive_and_wait(parties_);
      multiply(t);
    }
    finish();
  }

 private:
  int64_t first_unit(int64_t block) const { return block * kUnits; }
  int64_t units(int64_t block) const { return std::min(kUnits, args_.hidden - first_unit(block)); }

  C* carry_h(int64_t b) const { return static_cast<C*>(args_.carry_h) + b * carry_row_; }
  C* carry_c(int64_t b) const { return static_cast<C*>(args_.carry_c) + b * carry_row_; }
  const S* over_time(const void* tensor, TimeStrides strides, int64_t t, int64_t b) const {
    return tensor == nullptr ? nullptr : static_cast<const S*>(tensor) + t * strides.step + b * strides.row;
  }
  C* grad_pre(void* tensor, int64_t t, int64_t b) const {
    return static_cast<C*>(tensor) + t * args_.grad_pre_strides.step + b * args_.grad_pre_strides.row;
  }
  // What the state's product was made of.
  void* grad_sums() const { return kLstm ? args_.grad_pre : args_.grad_pre_hidden; }

  // --- before the first step

  void start() {
    const int64_t size = kGates * args_.hidden;
    const auto load = [&](const void* grad, C* to, int64_t b, int64_t first, int64_t n) {
      if (grad == nullptr) std::fill(to + first, to + first + n, C(0));
      else convert(static_cast<const S*>(grad) + b * args_.hidden + first, to + first, n);
    };
    for (int64_t block = blocks_.first; block < blocks_.last; block += kPanel) {
      const int64_t columns = std::min(kPanel, blocks_.last - block) * kUnits;
      const int64_t first = first_unit(block), n = std::min(columns, args_.hidden - first);
      C* panel = static_cast<C*>(args_.panels) + first * size;
      for (int64_t k = 0; k < size; ++k, panel += columns) {
        convert(static_cast<const S*>(args_.weight_hh) + k * args_.weight_hh_stride + first, panel, n);
        std::fill(panel + n, panel + columns, C(0));
      }
      for (int64_t b = 0; b < args_.batch; ++b) {
        load(args_.grad_h_out, carry_h(b), b, first, n);
        if constexpr (kLstm) load(args_.grad_c_out, carry_c(b), b, first, n);
      }
    }
  }

  // --- a step

  // The row of a state before the step at time t: null for zeros.
  const S* before(int64_t s, int64_t t, int64_t b, const void* initial, const void* states) const {
    if (schedule_.restarts(t, b)) return nullptr;
    const int64_t previous = args_.reverse ? t + 1 : t - 1;
    const bool first = s == 0 || !schedule_.active(previous, b);
    if (first) return static_cast<const S*>(initial) + b * args_.hidden;
    return over_time(states, args_.out_strides, previous, b);
  }

  void activate(int64_t s, int64_t t, int64_t b) {
    const int64_t first = first_unit(blocks_.first);
    const int64_t end = std::min(first_unit(blocks_.last), args_.hidden);
    const S* gates = over_time(args_.gates, args_.gates_strides, t, b);
    const S* grad_out = over_time(args_.grad_out, args_.out_strides, t, b);
    const S* grad_gates = over_time(args_.grad_gates, args_.gates_strides, t, b);
    const auto gate = [&](int g, int64_t u, int64_t n) { return load_units(gates + g * args_.hidden + u, n); };
    const auto plus_gate = [&](Vec<C> sum, int g, int64_t u, int64_t n) {
      return grad_gates == nullptr ? sum : sum + load_units(grad_gates + g * args_.hidden + u, n);
    };
    const Vec<C> one(C(1)), low(C(-args_.clip)), high(C(args_.clip));
    C* pre = grad_pre(args_.grad_pre, t, b);
    const bool restarts = schedule_.restarts(t, b);
    if constexpr (kLstm) {
      const S* c_before = before(s, t, b, args_.c, args_.cells);
      const S* cells = over_time(args_.cells, args_.out_strides, t, b);
      const S* grad_cells = over_time(args_.grad_cells, args_.out_strides, t, b);
      for (int64_t u = first, n; u < end; u += kLanes<C>) {
        n = end - u;
        Vec<C> dh = Vec<C>::loadu(carry_h(b) + u), dc = Vec<C>::loadu(carry_c(b) + u);
        if (grad_out != nullptr) dh = dh + load_units(grad_out + u, n);
        if (grad_cells != nullptr) dc = dc + load_units(grad_cells + u, n);
        dh = at::vec::clamp(dh, low, high);
        const Vec<C> i = gate(0, u, n), f = gate(1, u, n), g = gate(2, u, n), o = gate(3, u, n);
        const Vec<C> tanh_c = tanh(load_units(cells + u, n));
        dc = at::vec::fmadd(dh * o, one - tanh_c * tanh_c, at::vec::clamp(dc, low, high));
        const Vec<C> c = c_before == nullptr ? Vec<C>(C(0)) : load_units(c_before + u, n);
        const Vec<C> slope = args_.sigmoid_candidate ? g * (one - g) : one - g * g;
        const int64_t H = args_.hidden;
        store_units(plus_gate(dc * g, 0, u, n) * i * (one - i), pre + u, n);
        store_units(plus_gate(dc * c, 1, u, n) * f * (one - f), pre + H + u, n);
        store_units(plus_gate(dc * i, 2, u, n) * slope, pre + 2 * H + u, n);
        store_units(plus_gate(dh * tanh_c, 3, u, n) * o * (one - o), pre + 3 * H + u, n);
        (restarts ? Vec<C>(C(0)) : dc * f).store(carry_c(b) + u);
      }
    } else {
      const S* h_before = before(s, t, b, args_.h, args_.out);
      C* hidden_pre = grad_pre(args_.grad_pre_hidden, t, b);
      for (int64_t u = first, n; u < end; u += kLanes<C>) {
        n = end - u;
        Vec<C> dh = Vec<C>::loadu(carry_h(b) + u);
        if (grad_out != nullptr) dh = dh + load_units(grad_out + u, n);
        dh = at::vec::clamp(dh, low, high);
        const Vec<C> r = gate(0, u, n), z = gate(1, u, n), candidate = gate(2, u, n), hidden = gate(3, u, n);
        const Vec<C> h = h_before == nullptr ? Vec<C>(C(0)) : load_units(h_before + u, n);
        const Vec<C> dz = plus_gate(dh * (h - candidate), 1, u, n) * z * (one - z);
        const Vec<C> dn = plus_gate(dh * (one - z), 2, u, n) * (one - candidate * candidate);
        const Vec<C> dr = plus_gate(dn * hidden, 0, u, n) * r * (one - r);
        const int64_t H = args_.hidden;
        for (C* to : {pre, hidden_pre}) {
          store_units(dr, to + u, n);
          store_units(dz, to + H + u, n);
        }
        store_units(dn, pre + 2 * H + u, n);
        store_units(plus_gate(dn * r, 3, u, n), hidden_pre + 2 * H + u, n);
        (restarts ? Vec<C>(C(0)) : dh * z).store(carry_h(b) + u);
      }
    }
  }

  // A row whose step did not take place.
  void skip(int64_t t, int64_t b) {
    const int64_t first = first_unit(blocks_.first);
    const int64_t n = std::min(first_unit(blocks_.last), args_.hidden) - first;
    for (void* tensor : {args_.grad_pre, args_.grad_pre_hidden}) {
      if (tensor == nullptr) continue;
      C* to = grad_pre(tensor, t, b) + first;
      for (int g = 0; g < kGates; ++g, to += args_.hidden) std::fill(to, to + n, C(0));
    }
  }

  // The gradient of the state before the step; the GRU's has a part already.
  void multiply(int64_t t) {
    const int64_t size = kGates * args_.hidden;
    for (int64_t b = 0; b < args_.batch;) {
      int64_t n = 0;
      const C* from[kLayerRows];
      C *carry[kLayerRows], *to[kLayerRows];
      for (; b < args_.batch && n < kLayerRows; ++b) {
        if (!schedule_.active(t, b)) continue;
        if (schedule_.restarts(t, b)) {
          std::fill(carry_h(b) + first_unit(blocks_.first), carry_h(b) + first_unit(blocks_.last), C(0));
          continue;
        }
        from[n] = grad_pre(grad_sums(), t, b);
        carry[n++] = carry_h(b);
      }
      for (int64_t block = blocks_.first; block < blocks_.last; block += kPanel) {
        const C* panel = static_cast<const C*>(args_.panels) + first_unit(block) * size;
        for (int64_t i = 0; i < n; ++i) to[i] = carry[i] + first_unit(block);
        switch (std::min(kPanel, blocks_.last - block)) {
          case 1: panel_product<kUnits>(from, n, size, panel, kUnits, to, !kLstm); break;
          case 2: panel_product<2 * kUnits>(from, n, size, panel, 2 * kUnits, to, !kLstm); break;
          case 3: panel_product<3 * kUnits>(from, n, size, panel, 3 * kUnits, to, !kLstm); break;
          default: panel_product<4 * kUnits>(from, n, size, panel, 4 * kUnits, to, !kLstm); break;
        }
      }
    }
  }

  // --- after the last step

  void finish() {
    const int64_t first = first_unit(blocks_.first);
    const int64_t n = std::min(first_unit(blocks_.last), args_.hidden) - first;
    for (int64_t b = 0; b < args_.batch; ++b) {
      const int64_t at = b * args_.hidden + first;
      if (args_.grad_h != nullptr) convert(carry_h(b) + first, static_cast<S*>(args_.grad_h) + at, n);
      if (args_.grad_c != nullptr) convert(carry_c(b) + first, static_cast<S*>(args_.grad_c) + at, n);
    }
  }

  const LayerBackward& args_;
  const Schedule<LayerBackward> schedule_;
  const Blocks blocks_;
  const int64_t parties_, carry_row_;
};

}  // namespace

void layer_backward_kernel(const LayerBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (args.cell == LayerCell::Lstm) Backward<S, LayerCell::Lstm>(args, begin, end).run();
    else Backward<S, LayerCell::Gru>(args, begin, end).run();
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
