#include "recurrent/cuda/layer_dataflow.cuh"
#include "recurrent/cuda/layer_pack.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

// What a thread knows of one of its units in one row. `state`: c of the LSTM, h of the GRU.
template <class S, LayerCell kCell>
struct Unit {
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr int kGates = gates_of(kCell), kKept = 4;

  bool exists;
  int64_t b = 0, unit = 0;
  float carry_h = 0, carry_c = 0;
  float after = 0;                                  // the state after the step that comes
  float through = 0;                                // what reaches the GRU's state before it without the product
  S gates[kKept] = {}, grad_out = {}, before = {};  // of that step, on their way while another is multiplied

  __device__ Unit(const LayerCudaBackward& args, int64_t b, int64_t unit, bool exists)
      : exists(exists), b(b), unit(unit) {
    if (!exists) return;
    const auto given = [&](const void* grad) {
      return grad == nullptr ? 0.0f : from_storage<float>(static_cast<const S*>(grad)[b * args.hidden + unit]);
    };
    carry_h = given(args.grad_h_out);
    if constexpr (kLstm) {
      carry_c = given(args.grad_c_out);
      after = from_storage<float>(*at(args, states(args), args.out_strides, args.steps - 1));
    }
  }

  static __device__ const void* states(const LayerCudaBackward& args) { return kLstm ? args.cells : args.out; }

  // This unit of step s.
  __device__ const S* at(const LayerCudaBackward& args, const void* tensor, TimeStrides strides, int64_t s) const {
    const int64_t t = args.reverse ? args.steps - 1 - s : s;
    return static_cast<const S*>(tensor) + t * strides.step + b * strides.row + unit;
  }

  // Asks for what step s needs.
  __device__ void ask(const LayerCudaBackward& args, int64_t s) {
    const S* const of = at(args, args.gates, args.gates_strides, s);
#pragma unroll
    for (int g = 0; g < kKept; ++g) gates[g] = of[g * args.hidden];
    if (args.grad_out != nullptr) grad_out = *at(args, args.grad_out, args.out_strides, s);
    const void* const initial = kLstm ? args.c : args.h;
    before = s == 0 ? static_cast<const S*>(initial)[b * args.hidden + unit]
                    : *at(args, states(args), args.out_strides, s - 1);
  }

  // Gradients of the sums; hidden_n: of the state's part of a GRU's n.
  __device__ void step(float (&pre)[kGates], float& hidden_n) {
    const auto gate = [&](int g) { return from_storage<float>(gates[g]); };
    const float dh = carry_h + from_storage<float>(grad_out), last = from_storage<float>(before);
    if constexpr (kLstm) {
      const float i = gate(0), f = gate(1), g = gate(2), o = gate(3), tanh_c = quick_tanh(after);
      const float dc = fmaf(dh * o, 1 - tanh_c * tanh_c, carry_c);
      pre[0] = dc * g * i * (1 - i), pre[1] = dc * last * f * (1 - f), pre[2] = dc * i * (1 - g * g);
      pre[3] = dh * tanh_c * o * (1 - o);
      carry_c = dc * f;
      after = last;
    } else {
      const float r = gate(0), z = gate(1), n = gate(2), dn = dh * (1 - z) * (1 - n * n);
      pre[0] = dn * gate(3) * r * (1 - r), pre[1] = dh * (last - n) * z * (1 - z), pre[2] = dn;
      hidden_n = dn * r;
      through = dh * z;
    }
  }
};

template <class S, LayerCell kCell, int kTiles, int kPer>
__global__ void __launch_bounds__(kLayerThreads, 1)
    dataflow_kernel(const __grid_constant__ LayerCudaBackward args, const __grid_constant__ DataflowPlan plan) {
  constexpr int kGates = gates_of(kCell);
  DataflowBlock<S, kGates, 1, kTiles, kPer> block(args, plan, args.panels, reinterpret_cast<float*>(dynamic_shared));
  const auto unit_of = [&](int i) {
    const auto item = block.item(i);
    return Unit<S, kCell>(args, item.b, item.unit, item.exists);
  };
  Unit<S, kCell> units[kDataflowItems] = {unit_of(0), unit_of(1)};
#pragma unroll
  for (auto& unit : units) {
    if (unit.exists) unit.ask(args, args.steps - 1);
  }
  S* const multiplied = static_cast<S*>(kCell == LayerCell::Gru ? args.grad_hidden : args.grad_pre);
  for (int64_t s = args.steps - 1; s >= 0; --s) {
    const int64_t t = args.reverse ? args.steps - 1 - s : s;
#pragma unroll
    for (auto& unit : units) {
      if (!unit.exists) continue;
      float pre[kGates], hidden_n = 0;
      unit.step(pre, hidden_n);
      const int64_t at = t * args.grad_pre_strides.step + unit.b * args.grad_pre_strides.row + unit.unit;
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const float product = kCell == LayerCell::Gru && g == 2 ? hidden_n : pre[g];
        write_for_others(multiplied + at + g * args.hidden, to_storage<S>(product));
      }
      if constexpr (kCell == LayerCell::Gru) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          static_cast<S*>(args.grad_pre)[at + g * args.hidden] = to_storage<S>(pre[g]);
        }
      }
      if (s > 0) unit.ask(args, s - 1);
    }
    if (s == 0 && args.grad_h == nullptr) break;
    block.template multiply<true>(multiplied + t * args.grad_pre_strides.step, args.grad_pre_strides.row);
#pragma unroll
    for (int i = 0; i < kDataflowItems; ++i) {
      if (!units[i].exists) continue;
      float sum[1];
      block.sum(i, sum);
      units[i].carry_h = units[i].through + sum[0];
    }
  }
#pragma unroll
  for (auto& unit : units) {
    if (!unit.exists) continue;
    const auto give = [&](void* to, float grad) {
      if (to != nullptr) static_cast<S*>(to)[unit.b * args.hidden + unit.unit] = to_storage<S>(grad);
    };
    give(args.grad_h, unit.carry_h);
    if constexpr (kCell == LayerCell::Lstm) give(args.grad_c, unit.carry_c);
  }
}

template <class S, LayerCell kCell>
bool run(const LayerCudaBackward& args, void* stream) {
  constexpr int kGates = gates_of(kCell);
  void* const multiplied = kCell == LayerCell::Gru ? args.grad_hidden : args.grad_pre;
  const int64_t rows = rows_of_part(args, sizeof(S), kGates, 1);
  if (rows == 0 || multiplied == nullptr || !rows_are_aligned<S>(multiplied, args.grad_pre_strides)) return false;
  make_absent<S>(args, multiplied, args.grad_pre_strides, kGates * args.hidden, stream);
  pack_weights<S, true, true>(args, kGates, args.panels, stream);
  for (int64_t first = 0; first < args.batch; first += rows) {
    LayerCudaBackward part = args;
    part.batch = std::min(rows, args.batch - first);
    move_to<S>(first * args.hidden, part.h, part.c, part.grad_h_out, part.grad_c_out, part.grad_h, part.grad_c);
    move_to<S>(first * args.out_strides.row, part.out, part.cells, part.grad_out);
    move_to<S>(first * args.gates_strides.row, part.gates);
    move_to<S>(first * args.grad_pre_strides.row, part.grad_pre, part.grad_hidden);
    const DataflowPlan plan = plan_dataflow(args.hidden, part.batch, sizeof(S), kGates, 1);
    with_dataflow(plan, [&](auto tiles, auto per) {
      launch_dataflow(dataflow_kernel<S, kCell, tiles.value, per.value>, part, plan, stream);
    });
  }
  return true;
}

}  // namespace

bool layer_backward_dataflow(const LayerCudaBackward& args, void* stream) {
  if (args.truncate > 0 || std::isfinite(args.clip) || args.grad_gates != nullptr || args.grad_cells != nullptr ||
      args.grad_normed != nullptr || args.grad_mask != nullptr) {
    return false;
  }
  return with_plain(args, [&](auto* type, auto cell) {
    return run<std::remove_pointer_t<decltype(type)>, cell.value>(args, stream);
  });
}

}  // namespace lect11ext::cuda
