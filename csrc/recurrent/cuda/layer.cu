#include "recurrent/cuda/layer_team.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

template <class S, LayerCell kCell, bool kTensorCores>
class Forward : public LayerTeam<S, kTensorCores, gates_of(kCell), 1> {
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr int kGates = gates_of(kCell), kKept = kCell == LayerCell::GruResetFirst ? 3 : 4;
  using Team = LayerTeam<S, kTensorCores, kGates, 1>;
  using Team::active, Team::at, Team::operand, Team::parameter, Team::restarts, Team::time, Team::wait;
  using typename Team::C;

 public:
  enum State : int { kStateH, kStateC, kStates = kLstm ? 2 : 1 };

  __device__ Forward(const LayerCuda& args, const LayerPlan& plan)
      : Team(args, plan, args.panels, args.arrivals, dynamic_shared), args_(args) {}

  __device__ void run() {
    this->prepare();
    this->each_unit([&](int64_t b, int64_t unit) { start(b, unit); });
    for (int64_t s = 0; s < args_.steps; ++s) {
      wait();
      if constexpr (kCell == LayerCell::GruResetFirst) step_reset_first(s);
      else if (args_.norm != nullptr) step_normed(s);
      else step(s);
    }
    this->each_unit([&](int64_t b, int64_t unit) {
      static_cast<S*>(args_.h_out)[at(b, unit)] = state_h(b, unit);
      if constexpr (kLstm) static_cast<S*>(args_.c_out)[at(b, unit)] = to_storage<S>(state_c(b, unit));
    });
  }

 private:
  struct Sums {
    C of[kGates];
  };

  __device__ S& state_h(int64_t b, int64_t unit) const {
    return this->template state<S>(kStateH, args_.state_h, b, unit);
  }
  __device__ C& state_c(int64_t b, int64_t unit) const { return this->state(kStateC, args_.state_c, b, unit); }
  __device__ C* waiting_sums(int64_t b, int64_t unit) const {
    return static_cast<C*>(args_.sums) + b * kGates * args_.hidden + unit;
  }
  // hidden_mask ⊙ h.
  __device__ C masked(int64_t b, int64_t unit, S h) const {
    const C state = from_storage<C>(h);
    return args_.hidden_mask == nullptr ? state : state * parameter(args_.hidden_mask, at(b, unit));
  }

  // --- states

  __device__ void start(int64_t b, int64_t unit) {
    if constexpr (kLstm) state_c(b, unit) = parameter(args_.c, at(b, unit));
    begin_step(0, b, unit, static_cast<const S*>(args_.h)[at(b, unit)]);
  }

  // What step s finds.
  __device__ void begin_step(int64_t s, int64_t b, int64_t unit, S h) {
    if (s < args_.steps && restarts(time(s), b)) {
      h = to_storage<S>(C(0));
      if constexpr (kLstm) state_c(b, unit) = 0;
    }
    state_h(b, unit) = h;
    operand(args_.exchange[s % 2], b, 0, unit) = to_storage<S>(masked(b, unit, h));
  }

  // Of the states that only every so many steps are kept, the one after step s.
  __device__ void save_cell(int64_t s, int64_t b, int64_t unit) const {
    if (args_.cells_every == 0 || args_.cells == nullptr) return;
    if ((s + 1) % args_.cells_every != 0 || s + 1 == args_.steps) return;
    const int64_t row = ((s + 1) / args_.cells_every - 1) * args_.batch + b;
    static_cast<S*>(args_.cells)[row * args_.hidden + unit] = to_storage<S>(state_c(b, unit));
  }

  // A row whose step does not take place.
  __device__ void keep(int64_t s, int64_t t, int64_t b, int64_t unit) {
    const auto zero = [&](void* tensor, TimeStrides strides, int parts) {
      S* row = over_time(static_cast<S*>(tensor), strides, t, b);
      for (int g = 0; row != nullptr && g < parts; ++g) row[g * args_.hidden + unit] = to_storage<S>(C(0));
    };
    zero(args_.out, args_.out_strides, 1);
    zero(args_.gates, args_.gates_strides, kKept);
    zero(args_.normed, args_.normed_strides, kGates);
    if constexpr (kLstm) {
      if (args_.cells_every == 0) zero(args_.cells, args_.out_strides, 1);
      save_cell(s, b, unit);
    }
    save_rstd(t, b, unit, 0);
    begin_step(s + 1, b, unit, state_h(b, unit));
  }

  // --- steps

  __device__ Sums load_pre(int64_t t, int64_t b, int64_t unit) const {
    const S* pre = over_time(static_cast<const S*>(args_.pre), args_.pre_strides, t, b) + unit;
    Sums sums;
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      sums.of[g] = from_storage<C>(pre[g * args_.hidden]);
      if (kCell != LayerCell::Gru || g != 2)
        sums.of[g] += bias(g, unit);  // else it is in the product that r multiplies
    }
    return sums;
  }

  __device__ void prefetch_pre(int64_t t, int64_t b, int64_t unit) const {
    const S* pre = over_time(static_cast<const S*>(args_.pre), args_.pre_strides, t, b) + unit;
#pragma unroll
    for (int g = 0; g < kGates; ++g) prefetch(pre + g * args_.hidden);
  }

  __device__ C bias(int gate, int64_t unit) const {
    return args_.bias_hh == nullptr ? C(0) : parameter(args_.bias_hh, gate * args_.hidden + unit);
  }

  // The product of step s's state and the weights of all gates.
  template <class Finish>
  __device__ void multiply_state(int64_t s, Finish finish) {
    this->template multiply<0, kGates>(
        this->rows_of(args_.exchange[s % 2]), 0, this->plan_.chunks,
        [&](int64_t b, int64_t unit) {
          if (s + 1 < args_.steps) prefetch_pre(time(s + 1), b, unit);
          return load_pre(time(s), b, unit);
        },
        finish);
  }

  __device__ void step(int64_t s) {
    const int64_t t = time(s);
    multiply_state(s, [&](int64_t b, int64_t unit, const Sums& pre, const C(&sums)[kGates]) {
      active(t, b) ? activate(s, t, b, unit, pre, sums) : keep(s, t, b, unit);
    });
  }

  __device__ void activate(int64_t s, int64_t t, int64_t b, int64_t unit, const Sums& pre, const C (&sums)[kGates]) {
    C kept[kKept];
    const C before = from_storage<C>(state_h(b, unit));
    C h;
    if constexpr (kLstm) h = lstm(t, b, unit, pre, sums, kept);
    else h = gru(unit, before, pre, sums, kept);
    h = zone_out(args_.zoneout_h, t, b, unit, before, h);
    const S rounded = to_storage<S>(h);
    over_time(static_cast<S*>(args_.out), args_.out_strides, t, b)[unit] = rounded;
    if (args_.gates != nullptr) {
      S* gates = over_time(static_cast<S*>(args_.gates), args_.gates_strides, t, b) + unit;
#pragma unroll
      for (int g = 0; g < kKept; ++g) gates[g * args_.hidden] = to_storage<S>(kept[g]);
    }
    if constexpr (kLstm) {
      if (args_.cells != nullptr && args_.cells_every == 0) {
        over_time(static_cast<S*>(args_.cells), args_.out_strides, t, b)[unit] = to_storage<S>(state_c(b, unit));
      }
      save_cell(s, b, unit);
    }
    begin_step(s + 1, b, unit, rounded);
  }

  __device__ C lstm(int64_t t, int64_t b, int64_t unit, const Sums& pre, const C (&sums)[kGates], C (&kept)[4]) const {
    const C before = state_c(b, unit);
    const auto gate = [&](int g) { return pre.of[g] + sums[g]; };
    const auto peep = [&](int part, C cell) {
      return args_.peephole == nullptr ? C(0) : parameter(args_.peephole, part * args_.hidden + unit) * cell;
    };
    const C i = sigmoid(gate(0) + peep(0, before)), f = sigmoid(gate(1) + peep(1, before));
    const C g = args_.sigmoid_candidate ? sigmoid(gate(2)) : std::tanh(gate(2));
    const C state = std::fma(f, before, i * g), o = sigmoid(gate(3) + peep(2, state));
    state_c(b, unit) = zone_out(args_.zoneout_c, t, b, unit, before, state);
    kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o;
    return o * std::tanh(state);
  }

  // Where the reset came first, sums hold r and z themselves.
  __device__ C gru(int64_t unit, C before, const Sums& pre, const C (&sums)[kGates], C (&kept)[kKept]) const {
    constexpr bool kResetAfter = kCell == LayerCell::Gru;
    const auto gate = [&](int g) { return kResetAfter ? sigmoid(pre.of[g] + sums[g]) : sums[g]; };
    const C r = gate(0), z = gate(1);
    const C hidden = kResetAfter ? sums[2] + bias(2, unit) : sums[2];
    const C n = std::tanh(kResetAfter ? std::fma(r, hidden, pre.of[2]) : pre.of[2] + hidden);
    kept[0] = r, kept[1] = z, kept[2] = n;
    if constexpr (kResetAfter) kept[3] = hidden;
    return std::fma(z, before - n, n);
  }

  __device__ C zone_out(const Zoneout& zoneout, int64_t t, int64_t b, int64_t unit, C before, C after) const {
    if (zoneout.mask != nullptr) return over_time(zoneout.mask, zoneout.strides, t, b)[unit] != 0 ? before : after;
    return zoneout.rate == 0 ? after : after + C(zoneout.rate) * (before - after);
  }

  // --- a norm, whose statistics are over the units of all blocks

  __device__ void step_normed(int64_t s) {
    const int64_t t = time(s);
    multiply_state(s, [&](int64_t b, int64_t unit, const Sums&, const C(&sums)[kGates]) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) waiting_sums(b, unit)[g * args_.hidden] = sums[g];
    });
    this->each_pass([&](int64_t first_tile, int64_t row) {
      this->each_tile_of(first_tile, [&](int64_t tile) {
        for (int64_t b = row + threadIdx.x; b < this->end_of_pass(row); b += kLayerThreads) measure(tile, b);
      });
    });
    wait();
    this->each_pass([&](int64_t tile, int64_t row) {
      this->find_row_numbers(row, [&](int64_t b, int lane, C* numbers) { find_statistics(b, lane, numbers); });
      this->each_unit_of(tile, row, [&](int64_t b, int64_t unit) {
        if (!active(t, b)) return keep(s, t, b, unit);
        const C* numbers = this->row_numbers(b - row);
        C sums[kGates];
        normalize(t, b, unit, numbers[0], numbers[1], sums);
        activate(s, t, b, unit, load_pre(t, b, unit), sums);
      });
      __syncthreads();
    });
  }

  __device__ C* moments(int64_t tile, int64_t b) const {
    return static_cast<C*>(args_.moments) + (tile * args_.batch + b) * 2;
  }

  // Mean, and sum of squares about it: no digits are lost where the mean is far from zero.
  __device__ void measure(int64_t tile, int64_t b) const {
    const int64_t first = tile * kTile, n = this->units(tile);
    C mean = 0, squares = 0;
    for (int g = 0; g < kGates; ++g) {
      for (int64_t u = 0; u < n; ++u) mean += waiting_sums(b, first + u)[g * args_.hidden];
    }
    mean /= C(kGates * n);
    for (int g = 0; g < kGates; ++g) {
      for (int64_t u = 0; u < n; ++u) {
        const C d = waiting_sums(b, first + u)[g * args_.hidden] - mean;
        squares += d * d;
      }
    }
    moments(tile, b)[0] = mean;
    moments(tile, b)[1] = squares;
  }

  __device__ void find_statistics(int64_t b, int lane, C* numbers) const {
    const auto part = [&](int64_t tile, int which) { return __ldcg(moments(tile, b) + which); };
    const C mean =
        this->sum_tiles(lane, [&](int64_t tile) { return part(tile, 0) * C(this->units(tile)); }) / C(args_.hidden);
    const C squares = this->sum_tiles(lane, [&](int64_t tile) {
      const C d = part(tile, 0) - mean;
      return part(tile, 1) + d * d * C(kGates * this->units(tile));
    });
    if (lane != 0) return;
    numbers[0] = mean;
    numbers[1] = C(1) / std::sqrt(squares / C(kGates * args_.hidden) + C(kLayerNormEpsilon));
  }

  __device__ void normalize(int64_t t, int64_t b, int64_t unit, C mean, C rstd, C (&sums)[kGates]) const {
    S* normed = over_time(static_cast<S*>(args_.normed), args_.normed_strides, t, b);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const int64_t column = g * args_.hidden + unit;
      sums[g] = (waiting_sums(b, unit)[g * args_.hidden] - mean) * rstd;
      if (normed != nullptr) normed[column] = to_storage<S>(sums[g]);
      sums[g] *= parameter(args_.norm, column);
    }
    save_rstd(t, b, unit, rstd);
  }

  __device__ void save_rstd(int64_t t, int64_t b, int64_t unit, C rstd) const {
    if (args_.rstd == nullptr || unit != 0) return;
    *over_time(static_cast<C*>(args_.rstd), args_.rstd_strides, t, b) = rstd;
  }

  // --- a GRU that resets first

  __device__ void step_reset_first(int64_t s) {
    const int64_t t = time(s), chunks = this->plan_.chunks;
    const auto load = [&](int64_t b, int64_t unit) { return load_pre(t, b, unit); };
    this->template multiply<0, 2>(this->rows_of(args_.exchange[s % 2]), 0, chunks, load,
                                  [&](int64_t b, int64_t unit, const Sums& pre, const C(&sums)[2]) {
                                    const C r = sigmoid(pre.of[0] + sums[0]), u = masked(b, unit, state_h(b, unit));
                                    waiting_sums(b, unit)[0] = r;
                                    waiting_sums(b, unit)[args_.hidden] = sigmoid(pre.of[1] + sums[1]);
                                    operand(args_.reset_state, b, 0, unit) = to_storage<S>(r * u);
                                  });
    wait();
    this->template multiply<2, 1>(this->rows_of(args_.reset_state), 0, chunks, load,
                                  [&](int64_t b, int64_t unit, const Sums& pre, const C(&sum)[1]) {
                                    if (!active(t, b)) return keep(s, t, b, unit);
                                    const C sums[] = {waiting_sums(b, unit)[0], waiting_sums(b, unit)[args_.hidden],
                                                      sum[0]};
                                    activate(s, t, b, unit, pre, sums);
                                  });
  }

  const LayerCuda& args_;
};

template <class S, LayerCell kCell, bool kTensorCores>
__global__ void __launch_bounds__(kLayerThreads, 1)
    forward_kernel(const __grid_constant__ LayerCuda args, const __grid_constant__ LayerPlan plan) {
  Forward<S, kCell, kTensorCores>(args, plan).run();
}

template <class S, LayerCell kCell, bool kTensorCores>
void run(const LayerCuda& args, void* stream) {
  using Kernel = Forward<S, kCell, kTensorCores>;
  pack_weights<S, kTensorCores, false>(args, gates_of(kCell), args.panels, stream);
  launch_layer(forward_kernel<S, kCell, kTensorCores>, args, Kernel::needs(args, Kernel::kStates), stream);
}

}  // namespace

void layer_forward(const LayerCuda& args, void* stream) {
  if (args.batch == 0 || args.hidden == 0 || layer_forward_dataflow(args, stream)) return;
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
