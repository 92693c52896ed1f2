#include "recurrent/cuda/layer_dataflow.cuh"
#include "recurrent/cuda/layer_pack.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

// Where a thread's first row of its unit has what belongs to a step; its other rows lie some rows further on.
template <class S, bool kLstm>
struct Place {
  const S* pre;
  S *out, *gates, *cells;

  __device__ Place(const LayerCuda& args, int64_t b, int64_t unit) {
    const int64_t t = args.reverse ? args.steps - 1 : 0;
    const auto at = [&](const void* tensor, TimeStrides strides) {
      return tensor == nullptr ? nullptr
                               : static_cast<S*>(const_cast<void*>(tensor)) + t * strides.step + b * strides.row + unit;
    };
    pre = at(args.pre, args.pre_strides);
    out = at(args.out, args.out_strides);
    gates = at(args.gates, args.gates_strides);
    // Those of every so many steps are [·, B, H].
    cells = !kLstm                  ? nullptr
            : args.cells_every == 0 ? at(args.cells, args.out_strides)
                                    : at(args.cells, {0, args.hidden});
  }

  __device__ void advance(const LayerCuda& args, int sign, int64_t cells_step) {
    pre += sign * args.pre_strides.step;
    out += sign * args.out_strides.step;
    if (gates != nullptr) gates += sign * args.gates_strides.step;
    if (kLstm && cells != nullptr) cells += cells_step;
  }
};

// What a thread knows of its unit in one row.
template <class S, LayerCell kCell>
struct Unit {
  static constexpr bool kLstm = kCell == LayerCell::Lstm;
  static constexpr int kGates = gates_of(kCell), kKept = 4;

  bool exists;
  S next[kGates];  // of pre, on its way while a step is multiplied
  float state;     // c, or h of a GRU
  float kept[kKept];

  __device__ Unit(const LayerCuda& args, int64_t b, int64_t unit, bool exists) : exists(exists) {
    if (exists) state = from_storage<float>(static_cast<const S*>(kLstm ? args.c : args.h)[b * args.hidden + unit]);
  }

  // Asks for the next step's.
  __device__ void ask(const LayerCuda& args, const Place<S, kLstm>& place, int row) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) next[g] = place.pre[row * args.pre_strides.row + g * args.hidden];
  }

  // The new h.
  __device__ S step(const float (&sums)[kGates], const float (&bias)[kGates]) {
    const auto given = [&](int g) { return from_storage<float>(next[g]); };
    if constexpr (kLstm) {
      const auto gate = [&](int g) { return given(g) + bias[g] + sums[g]; };
      const float i = quick_sigmoid(gate(0)), f = quick_sigmoid(gate(1)), g = quick_tanh(gate(2));
      const float o = quick_sigmoid(gate(3));
      state = fmaf(f, state, i * g);
      kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o;
      return to_storage<S>(o * quick_tanh(state));
    } else {
      const float r = quick_sigmoid(given(0) + bias[0] + sums[0]), z = quick_sigmoid(given(1) + bias[1] + sums[1]);
      const float hidden = sums[2] + bias[2], n = quick_tanh(fmaf(r, hidden, given(2)));
      kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = hidden;
      const S h = to_storage<S>(fmaf(z, state - n, n));
      state = from_storage<float>(h);
      return h;
    }
  }

  // keeps_cell: all do, or that of every so many steps.
  __device__ void keep(const LayerCuda& args, const Place<S, kLstm>& place, int row, bool keeps_cell) const {
    if (place.gates != nullptr) {
#pragma unroll
      for (int g = 0; g < kKept; ++g) {
        place.gates[row * args.gates_strides.row + g * args.hidden] = to_storage<S>(kept[g]);
      }
    }
    if (!kLstm || place.cells == nullptr || !keeps_cell) return;
    place.cells[row * (args.cells_every == 0 ? args.out_strides.row : args.hidden)] = to_storage<S>(state);
  }
};

template <class S, LayerCell kCell, int kTiles, int kPer>
__global__ void __launch_bounds__(kLayerThreads, 1)
    dataflow_kernel(const __grid_constant__ LayerCuda args, const __grid_constant__ DataflowPlan plan) {
  constexpr int kGates = gates_of(kCell), kRowsOn = kLayerThreads / (kTiles * kTile);  // from item to item
  DataflowBlock<S, 1, kGates, kTiles, kPer> block(args, plan, args.panels, reinterpret_cast<float*>(dynamic_shared));
  const auto unit_of = [&](int i) {
    const auto item = block.item(i);
    return Unit<S, kCell>(args, item.b, item.unit, item.exists);
  };
  Unit<S, kCell> units[kDataflowItems] = {unit_of(0), unit_of(1)};
  float bias[kGates] = {};  // of a thread's one unit
  for (int g = 0; g < kGates && args.bias_hh != nullptr && units[0].exists; ++g) {
    bias[g] = from_storage<float>(static_cast<const S*>(args.bias_hh)[g * args.hidden + block.item(0).unit]);
  }
  Place<S, kCell == LayerCell::Lstm> place(args, block.item(0).b, block.item(0).unit);
#pragma unroll
  for (int i = 0; i < kDataflowItems; ++i) {
    if (units[i].exists) units[i].ask(args, place, i * kRowsOn);
  }
  const int sign = args.reverse ? -1 : 1;
  const S* before = static_cast<const S*>(args.out) + (args.reverse ? args.steps - 1 : 0) * args.out_strides.step;
  S last[kDataflowItems];
  int until_kept = static_cast<int>(args.cells_every);
  for (int s = 0; s < args.steps; ++s) {
    if (s == 0) {
      block.template multiply<false>(static_cast<const S*>(args.h), args.hidden);
    } else {
      block.template multiply<true>(before, args.out_strides.row);
      before += sign * args.out_strides.step;
    }
#pragma unroll
    for (int i = 0; i < kDataflowItems; ++i) {
      if (!units[i].exists) continue;
      float sums[kGates];
      block.sum(i, sums);
      last[i] = units[i].step(sums, bias);
      write_for_others(place.out + i * kRowsOn * args.out_strides.row, last[i]);
    }
    // Beside the others' next step:
    const bool keeps_cell = args.cells_every == 0 || (--until_kept == 0 && s + 1 < args.steps);
    const int64_t cells_step = args.cells_every == 0 ? sign * args.out_strides.step
                               : keeps_cell          ? plan.batch * args.hidden
                                                     : 0;
    if (until_kept == 0) until_kept = static_cast<int>(args.cells_every);
#pragma unroll
    for (int i = 0; i < kDataflowItems; ++i) {
      if (units[i].exists) units[i].keep(args, place, i * kRowsOn, keeps_cell);
    }
    place.advance(args, sign, cells_step);
#pragma unroll
    for (int i = 0; i < kDataflowItems; ++i) {
      if (units[i].exists && s + 1 < args.steps) units[i].ask(args, place, i * kRowsOn);
    }
  }
#pragma unroll
  for (int i = 0; i < kDataflowItems; ++i) {
    if (!units[i].exists) continue;
    const auto item = block.item(i);
    const int64_t at = item.b * args.hidden + item.unit;
    static_cast<S*>(args.h_out)[at] = last[i];
    if constexpr (kCell == LayerCell::Lstm) static_cast<S*>(args.c_out)[at] = to_storage<S>(units[i].state);
  }
}

template <class S, LayerCell kCell>
bool run(const LayerCuda& args, void* stream) {
  constexpr int kGates = gates_of(kCell);
  const int64_t rows = rows_of_part(args, sizeof(S), 1, kGates);
  if (rows == 0 || !rows_are_aligned<S>(args.out, args.out_strides)) return false;
  make_absent<S>(args, args.out, args.out_strides, args.hidden, stream);
  pack_weights<S, true, false>(args, kGates, args.panels, stream);
  for (int64_t first = 0; first < args.batch; first += rows) {
    LayerCuda part = args;
    part.batch = std::min(rows, args.batch - first);
    move_to<S>(first * args.hidden, part.h, part.c, part.h_out, part.c_out);
    move_to<S>(first * args.out_strides.row, part.out);
    move_to<S>(first * (args.cells_every == 0 ? args.out_strides.row : args.hidden), part.cells);
    move_to<S>(first * args.gates_strides.row, part.gates);
    move_to<S>(first * args.pre_strides.row, part.pre);
    DataflowPlan plan = plan_dataflow(args.hidden, part.batch, sizeof(S), 1, kGates);
    plan.batch = args.batch;
    with_dataflow(plan, [&](auto tiles, auto per) {
      launch_dataflow(dataflow_kernel<S, kCell, tiles.value, per.value>, part, plan, stream);
    });
  }
  return true;
}

}  // namespace

bool layer_forward_dataflow(const LayerCuda& args, void* stream) {
  return with_plain(args, [&](auto* type, auto cell) {
    return run<std::remove_pointer_t<decltype(type)>, cell.value>(args, stream);
  });
}

}  // namespace lect11ext::cuda
