#include "recurrent/cpu/layer_backward_share.h"
#include "recurrent/cpu/layer_norm.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// One share's run back through all steps.
template <class S, LayerCell kCell, class Sum>
class Backward : BackwardShare<S, kCell, Sum> {
  using Share = BackwardShare<S, kCell, Sum>;
  using Share::args_, Share::schedule_, Share::blocks_, Share::first_, Share::end_;
  using Share::at, Share::sums_at, Share::normed_grad, Share::publish, Share::multiply, Share::each_group;
  using Share::first_unit, Share::units, Share::columns, Share::scratch_row, Share::carry_h, Share::carry_c;
  using Share::kLstm, Share::kResetFirst, Share::kGates;
  using typename Share::C, typename Share::P;

 public:
  Backward(const LayerBackward& args, int64_t begin, int64_t end)
      : Share(args, begin, end),
        parties_(end - begin),
        parts_(args, parties_, args.norm != nullptr || kResetFirst, is_multiplied_by_amx<P>()) {}

  void run() {
    start();
    for (int64_t s = args_.steps - 1; s >= 0; --s) {
      for (BatchPart& part : parts_) {
        if (s + 1 < args_.steps) back_to_state(s + 1, part);
        step(s, part);
      }
    }
    if (args_.steps > 0 && wants_start()) {
      for (BatchPart& part : parts_) back_to_state(0, part);
    }
    finish();
  }

 private:
  // Whether anything before the first step has a gradient.
  bool wants_start() const { return args_.grad_h != nullptr || args_.grad_mask != nullptr; }

  // The gradients of a step's sums.
  void step(int64_t s, BatchPart& part) {
    const int64_t t = schedule_.time(s);
    for (int64_t b = part.first; b < part.last; ++b) schedule_.active(t, b) ? activate(s, t, b) : skip(t, b);
    if constexpr (kResetFirst) {
      publish(s, t, part, 2, 3);
      part.barrier->arrive_and_wait(parties_);
      back_through_reset(s, t, part);
    } else if (args_.norm != nullptr) {
      part.barrier->arrive_and_wait(parties_);
      back_through_norm(t, part);
    }
    if (s == 0 && !wants_start()) return;
    publish(s, t, part, 0, kResetFirst ? 2 : kGates);
    part.due = part.barrier->arrive(parties_);
  }

  // From there to the state before the step.
  void back_to_state(int64_t s, const BatchPart& part) {
    part.barrier->wait(part.due);
    const int64_t t = schedule_.time(s);
    args_.product == nullptr ? back_to_carry(s, t, part) : back_through_product(s, t, part);
  }

  // Whether a step's state reaches the next without the product.
  bool passes_by() const { return !kLstm || args_.zoneout_h.acts(); }
  // Whether the gradient of the state before the step ends there.
  bool is_cut(int64_t s, int64_t t, int64_t b) const {
    const int64_t step = args_.first_step + s;
    return schedule_.restarts(t, b) || (args_.truncate > 0 && step > 0 && step % args_.truncate == 0);
  }

  // --- before the first step

  void start() {
    this->pack_weights();
    const auto load = [&](const void* grad, C* to, int64_t b) {
      if (grad == nullptr) std::fill(to + first_, to + end_, C(0));
      else convert(static_cast<const S*>(grad) + b * args_.hidden + first_, to + first_, end_ - first_);
    };
    for (int64_t b = 0; b < args_.batch; ++b) {
      load(args_.grad_h_out, carry_h(b), b);
      if constexpr (kLstm) load(args_.grad_c_out, carry_c(b), b);
      if (args_.carry_mask != nullptr) load(nullptr, scratch_row(args_.carry_mask, b), b);
    }
  }

  // --- gates

  // The row of a state before the step at time t: null for zeros.
  const S* before(int64_t s, int64_t t, int64_t b, const void* initial, const void* states) const {
    if (schedule_.restarts(t, b)) return nullptr;
    const int64_t previous = args_.reverse ? t + 1 : t - 1;
    const bool first = s == 0 || !schedule_.active(previous, b);
    if (first) return static_cast<const S*>(initial) + b * args_.hidden;
    return at(states, args_.out_strides, previous, b);
  }

  static Vec<C> load_or_zero(const S* from, int64_t u, int64_t n) {
    return from == nullptr ? Vec<C>(C(0)) : load_units(from + u, n);
  }

  Vec<C> clip(Vec<C> grad) const { return at::vec::clamp(grad, Vec<C>(C(-args_.clip)), Vec<C>(C(args_.clip))); }

  void activate(int64_t s, int64_t t, int64_t b) {
    const bool cut = is_cut(s, t, b);
    if constexpr (kLstm) args_.peephole == nullptr ? lstm<false>(s, t, b, cut) : lstm<true>(s, t, b, cut);
    else gru(s, t, b, cut);
    if (args_.norm != nullptr) measure(t, b);
  }

  // The part of a gradient that zoneout lets by; the gradient keeps the rest.
  Vec<C> zone_out(const Zoneout& zoneout, int64_t t, int64_t b, int64_t u, int64_t n, Vec<C>& grad) const {
    const Vec<C> kept = kept_share<C>(zoneout, t, b, u, n) * grad;
    grad = grad - kept;
    return kept;
  }

  template <bool kPeephole>
  void lstm(int64_t s, int64_t t, int64_t b, bool cut) {
    const int64_t H = args_.hidden;
    const S* gates = at(args_.gates, args_.gates_strides, t, b);
    const S* grad_gates = at(args_.grad_gates, args_.gates_strides, t, b);
    const S* grad_out = at(args_.grad_out, args_.out_strides, t, b);
    const S* grad_cells = at(args_.grad_cells, args_.out_strides, t, b);
    const S* cells = at(args_.cells, args_.out_strides, t, b);
    const S* c_before = before(s, t, b, args_.c, args_.cells);
    const S* peephole = static_cast<const S*>(args_.peephole);
    const bool zones_h = args_.zoneout_h.acts(), zones_c = args_.zoneout_c.acts();
    const Vec<C> one(C(1)), zero(C(0));
    Sum* pre = sums_at(args_.grad_pre, t, b);
    for (int64_t u = first_, n; u < end_; u += kLanes<C>) {
      n = end_ - u;
      const auto gate = [&](int g) { return load_units(gates + g * H + u, n); };
      const auto plus_gate = [&](Vec<C> sum, int g) {
        return grad_gates == nullptr ? sum : sum + load_units(grad_gates + g * H + u, n);
      };
      const auto peep = [&](int part) { return load_units(peephole + part * H + u, n); };
      Vec<C> dh = Vec<C>::loadu(carry_h(b) + u), dc = Vec<C>::loadu(carry_c(b) + u);
      if (grad_out != nullptr) dh = dh + load_units(grad_out + u, n);
      if (grad_cells != nullptr) dc = dc + load_units(grad_cells + u, n);
      dh = clip(dh);
      dc = clip(dc);
      const Vec<C> by_h = zones_h ? zone_out(args_.zoneout_h, t, b, u, n, dh) : zero;
      const Vec<C> by_c = zones_c ? zone_out(args_.zoneout_c, t, b, u, n, dc) : zero;
      const Vec<C> i = gate(0), f = gate(1), g = gate(2), o = gate(3), c = load_or_zero(c_before, u, n);
      const Vec<C> tanh_c = tanh(zones_c ? at::vec::fmadd(f, c, i * g) : load_units(cells + u, n));
      const Vec<C> slope = args_.sigmoid_candidate ? g * (one - g) : one - g * g;
      const Vec<C> pre_o = plus_gate(dh * tanh_c, 3) * o * (one - o);
      dc = at::vec::fmadd(dh * o, one - tanh_c * tanh_c, dc);
      if constexpr (kPeephole) dc = at::vec::fmadd(peep(2), pre_o, dc);
      const Vec<C> pre_i = plus_gate(dc * g, 0) * i * (one - i), pre_f = plus_gate(dc * c, 1) * f * (one - f);
      store_units(pre_i, pre + u, n);
      store_units(pre_f, pre + H + u, n);
      store_units(plus_gate(dc * i, 2) * slope, pre + 2 * H + u, n);
      store_units(pre_o, pre + 3 * H + u, n);
      Vec<C> carry = at::vec::fmadd(dc, f, by_c);
      if constexpr (kPeephole) carry = at::vec::fmadd(peep(0), pre_i, at::vec::fmadd(peep(1), pre_f, carry));
      (cut ? zero : carry).store(carry_c(b) + u);
      if (zones_h) by_h.store(carry_h(b) + u);
    }
  }

  void gru(int64_t s, int64_t t, int64_t b, bool cut) {
    const int64_t H = args_.hidden;
    const S* gates = at(args_.gates, args_.gates_strides, t, b);
    const S* grad_gates = at(args_.grad_gates, args_.gates_strides, t, b);
    const S* grad_out = at(args_.grad_out, args_.out_strides, t, b);
    const S* h_before = before(s, t, b, args_.h, args_.out);
    const bool zones = args_.zoneout_h.acts();
    const Vec<C> one(C(1)), zero(C(0));
    Sum* pre = sums_at(args_.grad_pre, t, b);
    Sum* hidden_pre = sums_at(args_.grad_normed == nullptr ? args_.grad_hidden : args_.grad_normed, t, b);
    for (int64_t u = first_, n; u < end_; u += kLanes<C>) {
      n = end_ - u;
      const auto gate = [&](int g) { return load_units(gates + g * H + u, n); };
      const auto plus_gate = [&](Vec<C> sum, int g) {
        return grad_gates == nullptr ? sum : sum + load_units(grad_gates + g * H + u, n);
      };
      Vec<C> dh = Vec<C>::loadu(carry_h(b) + u);
      if (grad_out != nullptr) dh = dh + load_units(grad_out + u, n);
      dh = clip(dh);
      const Vec<C> by_h = zones ? zone_out(args_.zoneout_h, t, b, u, n, dh) : zero;
      const Vec<C> z = gate(1), candidate = gate(2), h = load_or_zero(h_before, u, n);
      const Vec<C> dz = plus_gate(dh * (h - candidate), 1) * z * (one - z);
      const Vec<C> dn = plus_gate(dh * (one - z), 2) * (one - candidate * candidate);
      store_units(dz, pre + H + u, n);
      store_units(dn, pre + 2 * H + u, n);
      if constexpr (!kResetFirst) {
        const Vec<C> r = gate(0), dr = plus_gate(dn * gate(3), 0) * r * (one - r);
        store_units(dr, pre + u, n);
        store_units(dr, hidden_pre + u, n);
        store_units(dz, hidden_pre + H + u, n);
        store_units(plus_gate(dn * r, 3), hidden_pre + 2 * H + u, n);
      }
      (cut ? zero : at::vec::fmadd(dh, z, by_h)).store(carry_h(b) + u);
    }
  }

  // A row whose step did not take place.
  void skip(int64_t t, int64_t b) {
    for (void* tensor : {args_.grad_pre, args_.grad_hidden, args_.grad_normed}) {
      if (tensor == nullptr) continue;
      Sum* to = sums_at(tensor, t, b) + first_;
      for (int g = 0; g < kGates; ++g, to += args_.hidden) std::fill_n(to, end_ - first_, Sum(0));
    }
  }

  // --- a norm

  C* moments(int64_t block, int64_t b) const { return block_moments<C>(args_.moments, block, args_.batch, b); }

  // Calls back with vectors of a block's columns: the first column, how many are left, the gradient of what the norm
  // gave before its scale, and the normed values. What the vectors hold beyond those left is for nobody.
  template <class Call>
  void each_normed(int64_t t, int64_t b, int64_t block, const Call& call) const {
    const Sum* grad = sums_at(normed_grad(), t, b);
    const S* normed = at(args_.normed, args_.normed_strides, t, b);
    const S* scale = static_cast<const S*>(args_.norm);
    for (int64_t u = 0; u < units(block); u += kLanes<C>) {
      for (int g = 0; g < kGates; ++g) {
        const int64_t column = g * args_.hidden + first_unit(block) + u, left = units(block) - u;
        call(column, left, load_units(grad + column, left) * load_units(scale + column, left),
             load_units(normed + column, left));
      }
    }
  }

  void measure(int64_t t, int64_t b) {
    for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
      Vec<C> sum(C(0)), along(C(0));
      each_normed(t, b, block, [&](int64_t, int64_t left, Vec<C> grad, Vec<C> normed) {
        sum = sum + first_lanes(grad, left);
        along = along + first_lanes(grad * normed, left);
      });
      moments(block, b)[0] = sum_of_lanes(sum);
      moments(block, b)[1] = sum_of_lanes(along);
    }
  }

  void back_through_norm(int64_t t, const BatchPart& part) {
    const int64_t blocks = (args_.hidden + kUnits - 1) / kUnits;
    const C each = C(1) / C(kGates * args_.hidden);
    for (int64_t b = part.first; b < part.last; ++b) {
      if (!schedule_.active(t, b)) continue;
      C mean = 0, along = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        mean += moments(block, b)[0];
        along += moments(block, b)[1];
      }
      mean *= each;
      along *= each;
      const C rstd = *over_time(static_cast<const C*>(args_.rstd), args_.rstd_strides, t, b);
      Sum* to = sums_at(args_.grad_hidden, t, b);
      for (int64_t block = blocks_.first; block < blocks_.last; ++block) {
        each_normed(t, b, block, [&](int64_t column, int64_t left, Vec<C> grad, Vec<C> normed) {
          store_units(Vec<C>(rstd) * (grad - Vec<C>(mean) - normed * Vec<C>(along)), to + column, left);
        });
      }
    }
  }

  // --- products

  // The gradient of the state before the step, straight to where it is carried; a part may be there already.
  void back_to_carry(int64_t s, int64_t t, const BatchPart& part) {
    for (int64_t b = part.first; b < part.last; ++b) {
      if (schedule_.active(t, b) && is_cut(s, t, b)) std::fill(carry_h(b) + first_, carry_h(b) + end_, C(0));
    }
    each_group(
        part, [&](int64_t b) { return schedule_.active(t, b) && !is_cut(s, t, b); },
        [&](const int64_t* rows, int64_t n) { multiply(s, t, rows, n, 0, columns(), args_.carry_h, passes_by()); });
  }

  // From n through r ⊙ u: the gradient of r, and u's part of it.
  void back_through_reset(int64_t s, int64_t t, const BatchPart& part) {
    const int64_t H = args_.hidden;
    each_group(
        part, [&](int64_t b) { return schedule_.active(t, b); },
        [&](const int64_t* rows, int64_t n) { multiply(s, t, rows, n, 2 * H, H, args_.product, false); });
    const Vec<C> one(C(1));
    for (int64_t b = part.first; b < part.last; ++b) {
      if (!schedule_.active(t, b)) continue;
      const S* h = before(s, t, b, args_.h, args_.out);
      const S* mask = mask_row(b);
      const S* gates = at(args_.gates, args_.gates_strides, t, b);
      const S* grad_gates = at(args_.grad_gates, args_.gates_strides, t, b);
      C* product = scratch_row(args_.product, b);
      Sum* pre = sums_at(args_.grad_pre, t, b);
      for (int64_t u = first_, n; u < end_; u += kLanes<C>) {
        n = end_ - u;
        const Vec<C> grad = Vec<C>::loadu(product + u), r = load_units(gates + u, n);
        Vec<C> dr = grad * load_or_zero(h, u, n);
        if (mask != nullptr) dr = dr * load_units(mask + u, n);
        if (grad_gates != nullptr) dr = dr + load_units(grad_gates + u, n);
        store_units(dr * r * (one - r), pre + u, n);
        (grad * r).store(product + u);
      }
    }
  }

  const S* mask_row(int64_t b) const {
    return args_.hidden_mask == nullptr ? nullptr : static_cast<const S*>(args_.hidden_mask) + b * args_.hidden;
  }

  // The same where what was multiplied was not the state itself.
  void back_through_product(int64_t s, int64_t t, const BatchPart& part) {
    const int64_t depth = kResetFirst ? 2 * args_.hidden : columns();
    each_group(
        part, [&](int64_t b) { return schedule_.active(t, b); },
        [&](const int64_t* rows, int64_t n) { multiply(s, t, rows, n, 0, depth, args_.product, kResetFirst); });
    for (int64_t b = part.first; b < part.last; ++b) {
      if (!schedule_.active(t, b)) continue;
      const bool cut = is_cut(s, t, b);
      const S* mask = mask_row(b);
      const S* h = before(s, t, b, args_.h, args_.out);
      for (int64_t u = first_, n; u < end_; u += kLanes<C>) {
        n = end_ - u;
        Vec<C> grad = Vec<C>::loadu(scratch_row(args_.product, b) + u);
        if (mask != nullptr) {
          C* sum = scratch_row(args_.carry_mask, b) + u;
          at::vec::fmadd(grad, load_or_zero(h, u, n), Vec<C>::loadu(sum)).store(sum);
          grad = grad * load_units(mask + u, n);
        }
        if (passes_by()) grad = grad + Vec<C>::loadu(carry_h(b) + u);
        (cut ? Vec<C>(C(0)) : grad).store(carry_h(b) + u);
      }
    }
  }

  // --- after the last step

  void finish() {
    const int64_t n = end_ - first_;
    for (int64_t b = 0; b < args_.batch; ++b) {
      const auto give = [&](void* scratch, void* to) {
        if (to == nullptr) return;
        convert(scratch_row(scratch, b) + first_, static_cast<S*>(to) + b * args_.hidden + first_, n);
      };
      give(args_.carry_h, args_.grad_h);
      give(args_.carry_c, args_.grad_c);
      give(args_.carry_mask, args_.grad_mask);
    }
  }

  const int64_t parties_;
  BatchParts parts_;
};

}  // namespace

void layer_backward_kernel(const LayerBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using C = Compute<S>;
    const auto run = [&]<LayerCell kCell>() {
      if constexpr (kIsHalf<S> && std::is_same_v<Operand<S>, S> && kCell != LayerCell::GruResetFirst) {
        if (args.rounds) return Backward<S, kCell, S>(args, begin, end).run();
      }
      Backward<S, kCell, C>(args, begin, end).run();
    };
    switch (args.cell) {
      case LayerCell::Lstm: return run.template operator()<LayerCell::Lstm>();
      case LayerCell::Gru: return run.template operator()<LayerCell::Gru>();
      case LayerCell::GruResetFirst: return run.template operator()<LayerCell::GruResetFirst>();
    }
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
