#include "recurrent/cuda/layer_team.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

template <class S, LayerCell kCell, bool kTensorCores>
class Backward : public LayerTeam<S, kTensorCores, 1, gates_of(kCell)> {
  static constexpr bool kLstm = kCell == LayerCell::Lstm, kResetFirst = kCell == LayerCell::GruResetFirst;
  static constexpr int kGates = gates_of(kCell);
  using Team = LayerTeam<S, kTensorCores, 1, kGates>;
  using Team::active, Team::at, Team::parameter, Team::restarts, Team::time, Team::wait;
  using typename Team::C;

 public:
  enum State : int { kCarryH, kCarryC, kProduct, kCarryMask, kStates };

  __device__ Backward(const LayerCudaBackward& args, const LayerPlan& plan)
      : Team(args, plan, args.panels, args.arrivals, dynamic_shared), args_(args), gate_chunks_(plan.chunks / kGates) {}

  __device__ void run() {
    this->prepare();
    this->each_unit([&](int64_t b, int64_t unit) { start(b, unit); });
    for (int64_t s = args_.steps - 1; s >= 0; --s) {
      const int64_t t = time(s);
      this->each_unit([&](int64_t b, int64_t unit) { active(t, b) ? activate(s, t, b, unit) : skip(s, t, b, unit); });
      if constexpr (kResetFirst) back_through_reset(s, t);
      else if (args_.norm != nullptr) back_through_norm(s, t);
      if (s == 0 && args_.grad_h == nullptr && args_.grad_mask == nullptr) break;
      wait();
      back_to_state(s, t);
    }
    this->each_unit([&](int64_t b, int64_t unit) {
      const auto give = [&](void* to, const C& from) {
        if (to != nullptr) static_cast<S*>(to)[at(b, unit)] = to_storage<S>(from);
      };
      give(args_.grad_h, carry_h(b, unit));
      if constexpr (kLstm) give(args_.grad_c, carry_c(b, unit));
      if (args_.carry_mask != nullptr) give(args_.grad_mask, carry_mask(b, unit));
    });
  }

 private:
  __device__ C& carry_h(int64_t b, int64_t unit) const { return this->state(kCarryH, args_.carry_h, b, unit); }
  __device__ C& carry_c(int64_t b, int64_t unit) const { return this->state(kCarryC, args_.carry_c, b, unit); }
  __device__ C& product(int64_t b, int64_t unit) const { return this->state(kProduct, args_.product, b, unit); }
  __device__ C& carry_mask(int64_t b, int64_t unit) const { return this->state(kCarryMask, args_.carry_mask, b, unit); }
  __device__ const S* row(const void* tensor, TimeStrides strides, int64_t t, int64_t b) const {
    return over_time(static_cast<const S*>(tensor), strides, t, b);
  }
  // Of a gradient of the sums, at a gate's unit.
  __device__ S& sums_at(void* tensor, int64_t t, int64_t b, int gate, int64_t unit) const {
    return over_time(static_cast<S*>(tensor), args_.grad_pre_strides, t, b)[gate * args_.hidden + unit];
  }
  // What the product of step s sees of the gradient of its gate.
  __device__ S& exchanged(int64_t s, int64_t b, int gate, int64_t unit) const {
    return this->operand(args_.exchange[s % 2], b, gate, unit);
  }
  // Whether a step's state reaches the next without the product.
  __device__ bool passes_by() const { return !kLstm || args_.zoneout_h.mask != nullptr || args_.zoneout_h.rate != 0; }
  // Whether the gradient of the state before the step ends there.
  __device__ bool is_cut(int64_t s, int64_t t, int64_t b) const {
    const int64_t step = args_.first_step + s;
    return restarts(t, b) || (args_.truncate > 0 && step > 0 && step % args_.truncate == 0);
  }
  // A state before step s.
  __device__ C before(int64_t s, int64_t t, int64_t b, int64_t unit, const void* initial, const void* states) const {
    if (restarts(t, b)) return 0;
    const int64_t previous = args_.reverse ? t + 1 : t - 1;
    if (s == 0 || !active(previous, b)) return parameter(initial, at(b, unit));
    return from_storage<C>(row(states, args_.out_strides, previous, b)[unit]);
  }

  __device__ void start(int64_t b, int64_t unit) {
    const auto given = [&](const void* grad) { return grad == nullptr ? C(0) : parameter(grad, at(b, unit)); };
    carry_h(b, unit) = given(args_.grad_h_out);
    if constexpr (kLstm) carry_c(b, unit) = given(args_.grad_c_out);
    if (args_.carry_mask != nullptr) carry_mask(b, unit) = 0;
  }

  // --- gates

  // A step's gradients of a unit's gates: of the sums, and, of what is multiplied, where that differs.
  __device__ void give_sums(int64_t s, int64_t t, int64_t b, int64_t unit, const C (&pre)[kGates], C hidden_n) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const S sum = to_storage<S>(pre[g]);
      const S hidden = kCell == LayerCell::Gru && g == 2 ? to_storage<S>(hidden_n) : sum;
      sums_at(args_.grad_pre, t, b, g, unit) = sum;
      if (args_.grad_normed != nullptr) sums_at(args_.grad_normed, t, b, g, unit) = hidden;
      if (args_.norm != nullptr) continue;  // the rest follows once its statistics are known
      if (args_.grad_hidden != nullptr) sums_at(args_.grad_hidden, t, b, g, unit) = hidden;
      exchanged(s, b, g, unit) = hidden;
    }
  }

  // A row whose step does not take place.
  __device__ void skip(int64_t s, int64_t t, int64_t b, int64_t unit) const {
    for (int g = 0; g < kGates; ++g) {
      for (void* tensor : {args_.grad_pre, args_.grad_hidden, args_.grad_normed}) {
        if (tensor != nullptr) sums_at(tensor, t, b, g, unit) = to_storage<S>(C(0));
      }
      exchanged(s, b, g, unit) = to_storage<S>(C(0));
    }
  }

  __device__ C clip(C grad) const { return clamp<C>(grad, static_cast<C>(-args_.clip), static_cast<C>(args_.clip)); }

  // The part of a gradient that zoneout lets by; the gradient keeps the rest.
  __device__ C zone_out(const Zoneout& zoneout, int64_t t, int64_t b, int64_t unit, C& grad) const {
    const uint8_t* mask = over_time(zoneout.mask, zoneout.strides, t, b);
    const C kept = (mask != nullptr ? C(mask[unit] != 0) : C(zoneout.rate)) * grad;
    grad -= kept;
    return kept;
  }

  __device__ void activate(int64_t s, int64_t t, int64_t b, int64_t unit) const {
    const S* gates = row(args_.gates, args_.gates_strides, t, b) + unit;
    const S* grad_gates = row(args_.grad_gates, args_.gates_strides, t, b);
    const S* grad_out = row(args_.grad_out, args_.out_strides, t, b);
    const auto gate = [&](int g) { return from_storage<C>(gates[g * args_.hidden]); };
    const auto plus_gate = [&](C sum, int g) {
      return grad_gates == nullptr ? sum : sum + from_storage<C>(grad_gates[g * args_.hidden + unit]);
    };
    C& carry = carry_h(b, unit);
    C dh = carry;
    if (grad_out != nullptr) dh += from_storage<C>(grad_out[unit]);
    dh = clip(dh);
    const C by_h = zone_out(args_.zoneout_h, t, b, unit, dh);
    const C through = kLstm ? lstm(s, t, b, unit, dh, gate, plus_gate) : gru(s, t, b, unit, dh, gate, plus_gate);
    carry = is_cut(s, t, b) ? C(0) : through + by_h;
  }

  // Gives what reaches the state before the step without the product, as does gru.
  template <class Gate, class PlusGate>
  __device__ C lstm(int64_t s, int64_t t, int64_t b, int64_t unit, C dh, const Gate& gate,
                    const PlusGate& plus_gate) const {
    if constexpr (!kLstm) return 0;
    else {
      const S* grad_cells = row(args_.grad_cells, args_.out_strides, t, b);
      const auto peep = [&](int part) {
        return args_.peephole == nullptr ? C(0) : parameter(args_.peephole, part * args_.hidden + unit);
      };
      C& carry = carry_c(b, unit);
      C dc = carry;
      if (grad_cells != nullptr) dc += from_storage<C>(grad_cells[unit]);
      dc = clip(dc);
      const C by_c = zone_out(args_.zoneout_c, t, b, unit, dc);
      const C i = gate(0), f = gate(1), g = gate(2), o = gate(3), c = before(s, t, b, unit, args_.c, args_.cells);
      const bool zones_c = args_.zoneout_c.mask != nullptr || args_.zoneout_c.rate != 0;
      const C after =
          zones_c ? std::fma(f, c, i * g) : from_storage<C>(row(args_.cells, args_.out_strides, t, b)[unit]);
      const C tanh_c = std::tanh(after);
      const C pre_o = plus_gate(dh * tanh_c, 3) * o * (1 - o);
      dc = std::fma(peep(2), pre_o, std::fma(dh * o, 1 - tanh_c * tanh_c, dc));
      const C pre_i = plus_gate(dc * g, 0) * i * (1 - i), pre_f = plus_gate(dc * c, 1) * f * (1 - f);
      const C slope = args_.sigmoid_candidate ? g * (1 - g) : 1 - g * g;
      give_sums(s, t, b, unit, {pre_i, pre_f, plus_gate(dc * i, 2) * slope, pre_o}, 0);
      const C through = std::fma(peep(0), pre_i, std::fma(peep(1), pre_f, std::fma(dc, f, by_c)));
      carry = is_cut(s, t, b) ? C(0) : through;
      return 0;
    }
  }

  template <class Gate, class PlusGate>
  __device__ C gru(int64_t s, int64_t t, int64_t b, int64_t unit, C dh, const Gate& gate,
                   const PlusGate& plus_gate) const {
    if constexpr (kLstm) return 0;
    else {
      const C z = gate(1), n = gate(2), h = before(s, t, b, unit, args_.h, args_.out);
      const C dz = plus_gate(dh * (h - n), 1) * z * (1 - z);
      const C dn = plus_gate(dh * (1 - z), 2) * (1 - n * n);
      if constexpr (kResetFirst) {
        give_sums(s, t, b, unit, {0, dz, dn}, 0);
      } else {
        const C r = gate(0), dr = plus_gate(dn * gate(3), 0) * r * (1 - r);
        give_sums(s, t, b, unit, {dr, dz, dn}, plus_gate(dn * r, 3));
      }
      return dh * z;
    }
  }

  // --- a norm

  __device__ void* normed_grad() const { return args_.grad_normed == nullptr ? args_.grad_pre : args_.grad_normed; }

  // A column's gradient before the norm's scale times that, and its normed value.
  struct Normed {
    C grad, value;
  };
  __device__ Normed normed(int64_t t, int64_t b, int gate, int64_t unit) const {
    const int64_t column = gate * args_.hidden + unit;
    return {from_storage<C>(sums_at(normed_grad(), t, b, gate, unit)) * parameter(args_.norm, column),
            from_storage<C>(row(args_.normed, args_.normed_strides, t, b)[column])};
  }

  __device__ C* moments(int64_t tile, int64_t b) const {
    return static_cast<C*>(args_.moments) + (tile * args_.batch + b) * 2;
  }

  __device__ void back_through_norm(int64_t s, int64_t t) {
    __syncthreads();  // the gates' gradients are those of other threads
    this->each_pass([&](int64_t first_tile, int64_t first_row) {
      this->each_tile_of(first_tile, [&](int64_t tile) {
        for (int64_t b = first_row + threadIdx.x; b < this->end_of_pass(first_row); b += kLayerThreads) {
          if (active(t, b)) measure(t, tile, b);
        }
      });
    });
    wait();
    const C each = C(1) / C(kGates * args_.hidden);
    this->each_pass([&](int64_t tile, int64_t first_row) {
      this->find_row_numbers(first_row, [&](int64_t b, int lane, C* numbers) {
        for (int which = 0; which < 2; ++which) {
          const C sum = this->sum_tiles(lane, [&](int64_t other) { return __ldcg(moments(other, b) + which); });
          if (lane == 0) numbers[which] = sum * each;
        }
      });
      this->each_unit_of(tile, first_row, [&](int64_t b, int64_t unit) {
        if (!active(t, b)) return;
        const C* numbers = this->row_numbers(b - first_row);
        const C rstd = *over_time(static_cast<const C*>(args_.rstd), args_.rstd_strides, t, b);
        for (int g = 0; g < kGates; ++g) {
          const Normed of = normed(t, b, g, unit);
          const S grad = to_storage<S>(rstd * (of.grad - numbers[0] - of.value * numbers[1]));
          sums_at(args_.grad_hidden, t, b, g, unit) = exchanged(s, b, g, unit) = grad;
        }
      });
      __syncthreads();
    });
  }

  __device__ void measure(int64_t t, int64_t tile, int64_t b) const {
    C sum = 0, along = 0;
    for (int g = 0; g < kGates; ++g) {
      for (int64_t u = 0; u < this->units(tile); ++u) {
        const Normed of = normed(t, b, g, tile * kTile + u);
        sum += of.grad;
        along += of.grad * of.value;
      }
    }
    moments(tile, b)[0] = sum;
    moments(tile, b)[1] = along;
  }

  // --- products

  // The gates first … last − 1 of step s's exchange times their rows of the weights.
  template <class Finish>
  __device__ void multiply_gates(int64_t s, int first, int last, Finish finish) {
    this->template multiply<0, 1>(
        this->rows_of(args_.exchange[s % 2]), first * gate_chunks_, last * gate_chunks_,
        [](int64_t, int64_t) { return 0; },
        [&](int64_t b, int64_t unit, int, const C(&sum)[1]) { finish(b, unit, sum[0]); });
  }

  __device__ C mask_at(int64_t b, int64_t unit) const { return parameter(args_.hidden_mask, at(b, unit)); }

  // From n through r ⊙ u: the gradient of r, and u's part of it.
  __device__ void back_through_reset(int64_t s, int64_t t) {
    wait();
    multiply_gates(s, 2, 3, [&](int64_t b, int64_t unit, C grad) {
      if (!active(t, b)) return;
      const C r = from_storage<C>(row(args_.gates, args_.gates_strides, t, b)[unit]);
      const S* grad_gates = row(args_.grad_gates, args_.gates_strides, t, b);
      C dr = grad * before(s, t, b, unit, args_.h, args_.out);
      if (args_.hidden_mask != nullptr) dr *= mask_at(b, unit);
      if (grad_gates != nullptr) dr += from_storage<C>(grad_gates[unit]);
      sums_at(args_.grad_pre, t, b, 0, unit) = exchanged(s, b, 0, unit) = to_storage<S>(dr * r * (1 - r));
      product(b, unit) = grad * r;
    });
  }

  // The gradient of the state before the step.
  __device__ void back_to_state(int64_t s, int64_t t) {
    multiply_gates(s, 0, kResetFirst ? 2 : kGates, [&](int64_t b, int64_t unit, C grad) {
      if (!active(t, b)) return;
      if constexpr (kResetFirst) grad += product(b, unit);
      if (args_.hidden_mask != nullptr) {
        C& sum = carry_mask(b, unit);
        sum = std::fma(grad, before(s, t, b, unit, args_.h, args_.out), sum);
        grad *= mask_at(b, unit);
      }
      C& carry = carry_h(b, unit);
      carry = is_cut(s, t, b) ? C(0) : passes_by() ? carry + grad : grad;
    });
  }

  const LayerCudaBackward& args_;
  const int64_t gate_chunks_;
};

template <class S, LayerCell kCell, bool kTensorCores>
__global__ void __launch_bounds__(kLayerThreads, 1)
    backward_kernel(const __grid_constant__ LayerCudaBackward args, const __grid_constant__ LayerPlan plan) {
  Backward<S, kCell, kTensorCores>(args, plan).run();
}

template <class S, LayerCell kCell, bool kTensorCores>
void run(const LayerCudaBackward& args, void* stream) {
  using Kernel = Backward<S, kCell, kTensorCores>;
  pack_weights<S, kTensorCores, true>(args, gates_of(kCell), args.panels, stream);
  launch_layer(backward_kernel<S, kCell, kTensorCores>, args, Kernel::needs(args, Kernel::kStates), stream);
}

}  // namespace

void layer_backward(const LayerCudaBackward& args, void* stream) {
  if (args.batch == 0 || args.hidden == 0 || layer_backward_dataflow(args, stream)) return;
  with_product(args.dtype, args.tensor_cores, [&](auto* type, auto tensor_cores) {
    using S = std::remove_pointer_t<decltype(type)>;
    switch (args.cell) {
      case LayerCell::Lstm: return run<S, LayerCell::Lstm, tensor_cores>(args, stream);
      case LayerCell::Gru: return run<S, LayerCell::Gru, tensor_cores>(args, stream);
      case LayerCell::GruResetFirst: return run<S, LayerCell::GruResetFirst, tensor_cores>(args, stream);
    }
  });
}

}  // namespace lect11ext::cuda
