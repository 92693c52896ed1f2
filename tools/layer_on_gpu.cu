// Layers on a GPU without torch: both ways of csrc/recurrent/cuda, by a counter and by dataflow, against a plain loop
// on the host, against one another, and in time.
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -I csrc -I tools
//     -o layer_on_gpu tools/layer_on_gpu.cu csrc/recurrent/cuda/layer*.cu
//
// Links CUDA's runtime statically: what is built where there is no GPU runs where there is one. An LSTM in bfloat16; a
// line for each shape and path: the largest error of the states after some steps, the largest differences of a backward
// from the plainest path's, in units of the largest value, whether runs repeat, and microseconds a step, forward and
// backward. Stops after three minutes, since a barrier that is wrong waits for ever.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>

#include "on_gpu.h"
#include "recurrent/layer_cuda.h"

namespace {

using namespace lect11ext;
using namespace lect11ext::on_gpu;

constexpr int64_t kGates = 4;

struct Path {
  const char *name, *dataflow, *tiles;
};
constexpr Path kPaths[] = {{"counter", "0", "0"},  // the others' measure; they fall back to it where they do not fit
                           {"dataflow, 1 tile", "1", "1"},
                           {"dataflow, 2 tiles", "1", "2"}};

void choose(const Path& path) {
  setenv("LECT11EXT_LAYER_DATAFLOW", path.dataflow, 1);
  setenv("LECT11EXT_LAYER_TILES", path.tiles, 1);
}

// A layer with all that its kernels read and write; sums of the inputs' product are drawn.
struct Case {
  int64_t steps, batch, hidden, depth, states;
  Device<S> weight, pre, h, c, out, h_out, c_out, gates, cells, grad_out, grad_pre, grad_h, grad_c;
  Device<char> scratch, zeros;

  Case(int64_t steps, int64_t batch, int64_t hidden)
      : steps(steps),
        batch(batch),
        hidden(hidden),
        depth(cuda_depth(hidden, sizeof(S))),
        states(batch * hidden),
        weight(kGates * hidden * hidden),
        pre(steps * kGates * states),
        h(states),
        c(states),
        out(steps * states),
        h_out(states),
        c_out(states),
        gates(steps * kGates * states),
        cells(steps * states),
        grad_out(steps * states),
        grad_pre(steps * kGates * states),
        grad_h(states),
        grad_c(states),
        scratch(size_t(cuda_tiles(hidden) * kCudaTileUnits * kGates * depth) * sizeof(S) + states * 4 * sizeof(float)),
        zeros(size_t(2 * batch * kGates * depth) * sizeof(S) + cuda_arrivals(batch) * sizeof(int64_t)) {
    std::mt19937 random(1);
    weight.draw(random, 1 / std::sqrt(static_cast<float>(hidden)));
    for (Device<S>* t : {&pre, &h, &c, &grad_out}) t->draw(random);
  }

  void describe(LayerCommon& args) const {
    args.cell = LayerCell::Lstm;
    args.steps = steps, args.batch = batch, args.hidden = hidden;
    args.dtype = DType::BFloat16;
    args.weight_hh = weight.data, args.weight_hh_stride = hidden;
    args.h = h.data, args.c = c.data;
  }
  TimeStrides over_time(int64_t parts) const { return {batch * parts * hidden, parts * hidden}; }

  // Scratch that must be zero comes first in `zeros`, the rest in `scratch`.
  template <class Args>
  char* place(Args& args, int64_t parts) {
    zeros.clear();
    const int64_t exchange = batch * parts * depth * int64_t{sizeof(S)};
    args.exchange[0] = zeros.data, args.exchange[1] = zeros.data + exchange, args.arrivals = zeros.data + 2 * exchange;
    args.panels = scratch.data;
    return scratch.data + cuda_tiles(hidden) * kCudaTileUnits * kGates * depth * int64_t{sizeof(S)};
  }

  void forward() {
    LayerCuda args{};
    describe(args);
    char* const rest = place(args, 1);
    args.state_c = rest, args.state_h = rest + states * sizeof(float);
    args.out = out.data, args.out_strides = over_time(1);
    args.h_out = h_out.data, args.c_out = c_out.data;
    args.gates = gates.data, args.gates_strides = over_time(kGates);
    args.cells = cells.data;
    args.pre = pre.data, args.pre_strides = over_time(kGates);
    cuda::layer_forward(args, nullptr);
  }

  void backward() {
    LayerCudaBackward args{};
    describe(args);
    char* const rest = place(args, kGates);
    args.carry_h = rest, args.carry_c = rest + states * sizeof(float);
    args.clip = INFINITY;
    args.grad_out = grad_out.data, args.out = out.data, args.gates = gates.data, args.cells = cells.data;
    args.out_strides = over_time(1), args.gates_strides = over_time(kGates);
    args.grad_pre = grad_pre.data, args.grad_pre_strides = over_time(kGates);
    args.grad_h = grad_h.data, args.grad_c = grad_c.data;
    cuda::layer_backward(args, nullptr);
  }

  std::vector<std::vector<S>> results() {
    for (Device<S>* t : {&out, &h_out, &c_out, &gates, &cells, &grad_pre, &grad_h, &grad_c}) t->poison();
    forward();
    backward();
    cuda::check(cudaDeviceSynchronize(), "run a layer");
    return {h_out.read(), c_out.read(), out.read(), grad_pre.read(), grad_h.read(), grad_c.read()};
  }

  // h and c after all steps, in double; h is rounded as it is kept.
  std::vector<std::vector<S>> expected() const {
    const auto w = weight.read(), x = pre.read(), c0 = c.read();
    auto state = h.read();
    std::vector<double> cell(states);
    for (int64_t i = 0; i < states; ++i) cell[i] = wide(c0[i]);
    const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
    for (int64_t t = 0; t < steps; ++t) {
      auto next = state;
      const auto find = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t b = i / hidden, unit = i % hidden;
          double sums[kGates];
          for (int64_t g = 0; g < kGates; ++g) {
            sums[g] = wide(x[((t * batch + b) * kGates + g) * hidden + unit]);
            const S* row = &w[(g * hidden + unit) * hidden];
            for (int64_t k = 0; k < hidden; ++k) sums[g] += wide(row[k]) * wide(state[b * hidden + k]);
          }
          cell[i] = sigmoid(sums[1]) * cell[i] + sigmoid(sums[0]) * std::tanh(sums[2]);
          next[i] = __float2bfloat16(static_cast<float>(sigmoid(sums[3]) * std::tanh(cell[i])));
        }
      };
      constexpr int64_t kThreads = 12;
      std::vector<std::thread> threads;
      for (int64_t i = 0; i < kThreads; ++i)
        threads.emplace_back(find, states * i / kThreads, states * (i + 1) / kThreads);
      for (std::thread& thread : threads) thread.join();
      state = next;
    }
    std::vector<S> last(states);
    for (int64_t i = 0; i < states; ++i) last[i] = __float2bfloat16(static_cast<float>(cell[i]));
    return {state, last};
  }
};

void compare(int64_t batch, int64_t hidden) {
  constexpr int64_t kChecked = 5, kTimed = 512;
  Case small(kChecked, batch, hidden), large(kTimed, batch, hidden);
  const auto expected = small.expected();
  std::vector<std::vector<S>> plain;
  for (const Path& path : kPaths) {
    choose(path);
    std::printf("B %3lld H %4lld %-20s", static_cast<long long>(batch), static_cast<long long>(hidden), path.name);
    try {
      const auto found = small.results(), again = small.results();
      if (plain.empty()) plain = found;
      double repeats = 0;
      for (size_t i = 0; i < found.size(); ++i) repeats += difference(found[i], again[i]);
      std::printf(" h %.1e c %.1e; out %.1e grad_pre %.1e grad_h %.1e grad_c %.1e; repeats %s;",
                  difference(found[0], expected[0]), difference(found[1], expected[1]), difference(found[2], plain[2]),
                  difference(found[3], plain[3]), difference(found[4], plain[4]), difference(found[5], plain[5]),
                  repeats == 0 ? "yes" : "NO");
      large.forward();
      std::printf(" %.2f and %.2f us a step\n", milliseconds([&] { large.forward(); }) * 1e3 / kTimed,
                  milliseconds([&] { large.backward(); }) * 1e3 / kTimed);
    } catch (const std::exception& error) {
      std::printf(" %s\n", error.what());
    }
    std::fflush(stdout);
  }
}

}  // namespace

int main() {
  alarm(180);
  for (const int64_t hidden : {8, 128, 256, 512, 768, 1024, 2048}) {
    for (const int64_t batch : {1, 16, 64}) compare(batch, hidden);
  }
  for (const int64_t hidden : {256, 1024}) {  // teams of unlike rows, and more than one launch
    for (const int64_t batch : {125, 250}) compare(batch, hidden);
  }
}
