#include "recurrent/gru_cell.h"

#include "recurrent/cuda/vectors.cuh"

namespace lect11ext::cuda {
namespace {

// What a thread works at: N hidden units of a row, and where they lie in rows of 1, 2, 3 and 4 gates.
struct Units {
  int64_t H, row, unit;

  __device__ int64_t at(int gates, int gate) const { return (row * gates + gate) * H + unit; }
};

// The parts of gate number `gate`'s pre-activation.
template <class S, int N>
struct Gate {
  Pack<S, N> x, w, bias_ih, bias_hh;

  __device__ void load(const GruGates& args, const Units& units, int gate, int hidden_gates, int hidden_gate) {
    x = cuda::load<N, S>(args.pre_input, units.at(3, gate));
    w = cuda::load<N, S>(args.pre_hidden, units.at(hidden_gates, hidden_gate));
    bias_ih = load_or_zero<N, S>(args.bias_ih, gate * units.H + units.unit);
    bias_hh = load_or_zero<N, S>(args.bias_hh, gate * units.H + units.unit);
  }
  __device__ Compute<S> input(int u) const { return x[u] + bias_ih[u]; }
  __device__ Compute<S> hidden(int u) const { return w[u] + bias_hh[u]; }
  __device__ Compute<S> sum(int u) const { return input(u) + hidden(u); }
};

// 7 elements read and 5 written a hidden unit: 48 bytes in float, 24 in bf16; in inference 4 elements fewer.
template <class S, int N>
__device__ inline void forward_after(const GruGates& args, const Units& units) {
  using T = Compute<S>;
  Gate<S, N> gate[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) gate[k].load(args, units, k, 3, k);
  const auto h = load<N, S>(args.h, units.row * args.h_stride + units.unit);
  Pack<S, N> kept[4], h_out;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    const T r = sigmoid(gate[0].sum(u)), z = sigmoid(gate[1].sum(u)), product = gate[2].hidden(u);
    const T n = std::tanh(std::fma(r, product, gate[2].input(u)));
    h_out.set(u, std::fma(z, h[u], (1 - z) * n));
    kept[0].set(u, r);
    kept[1].set(u, z);
    kept[2].set(u, n);
    kept[3].set(u, product);
  }
  store(h_out, args.h_out, units.at(1, 0));
  if (args.gates == nullptr) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) store(kept[k], args.gates, units.at(4, k));
}

// 5 elements read and 3 written.
template <class S, int N>
__device__ inline void forward_reset(const GruGates& args, const Units& units) {
  using T = Compute<S>;
  Gate<S, N> gate[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) gate[k].load(args, units, k, 2, k);
  const auto h = load<N, S>(args.h, units.row * args.h_stride + units.unit);
  Pack<S, N> r_out, z_out, reset_h;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    const T r = sigmoid(gate[0].sum(u));
    r_out.set(u, r);
    z_out.set(u, sigmoid(gate[1].sum(u)));
    reset_h.set(u, r * h[u]);
  }
  store(r_out, args.gates, units.at(3, 0));
  store(z_out, args.gates, units.at(3, 1));
  store(reset_h, args.reset_h, units.at(1, 0));
}

// 4 elements read and 2 written.
template <class S, int N>
__device__ inline void forward_output(const GruGates& args, const Units& units) {
  using T = Compute<S>;
  Gate<S, N> gate;
  gate.load(args, units, 2, 1, 0);
  const auto h = load<N, S>(args.h, units.row * args.h_stride + units.unit);
  const auto z = load<N, S>(args.gates, units.at(3, 1));
  Pack<S, N> n_out, h_out;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    const T n = std::tanh(gate.sum(u));
    n_out.set(u, n);
    h_out.set(u, std::fma(z[u], h[u], (1 - z[u]) * n));
  }
  store(n_out, args.gates, units.at(3, 2));
  store(h_out, args.h_out, units.at(1, 0));
}

// The stage is the same for all threads: one kernel with a branch, not three.
template <class S, int N>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks) forward_kernel(const __grid_constant__ GruGates args) {
  for_each_unit<N>(args.batch, args.hidden, [&](int64_t row, int64_t unit) {
    const Units units{args.hidden, row, unit};
    switch (args.stage) {
      case GruStage::After: return forward_after<S, N>(args, units);
      case GruStage::Reset: return forward_reset<S, N>(args, units);
      case GruStage::Output: return forward_output<S, N>(args, units);
    }
  });
}

// After: 6 elements read and 7 written a hidden unit, 52 bytes in float, 26 in bf16. Reset: 4 read and 3 written.
template <class S, int N>
__device__ inline void backward_output_gates(const GruGatesBackward& args, const Units& units) {
  using T = Compute<S>;
  const bool after = args.stage == GruStage::After;
  const int kept = after ? 4 : 3;
  const T clip = static_cast<T>(args.clip);
  const auto grad_h = load<N, S>(args.grad_h, units.at(1, 0));
  const auto h = load<N, S>(args.h, units.row * args.h_stride + units.unit);
  const auto z_in = load<N, S>(args.gates, units.at(kept, 1)), n_in = load<N, S>(args.gates, units.at(kept, 2));
  const auto r_in = load_or_zero<N, S>(after ? args.gates : nullptr, units.at(kept, 0));
  const auto product = load_or_zero<N, S>(after ? args.gates : nullptr, units.at(kept, 3));
  Pack<S, N> d_r, d_z, d_n, d_product, grad_h_in;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    const T d_h = clamp<T>(grad_h[u], -clip, clip), z = z_in[u], n = n_in[u], r = r_in[u];
    const T dn = d_h * (1 - z) * (1 - n * n);
    d_r.set(u, dn * product[u] * r * (1 - r));
    d_z.set(u, d_h * (h[u] - n) * z * (1 - z));
    d_n.set(u, dn);
    d_product.set(u, r * dn);
    grad_h_in.set(u, d_h * z);
  }
  store(d_z, args.grad_pre_input, units.at(3, 1));
  store(d_n, args.grad_pre_input, units.at(3, 2));
  if (args.grad_h_in != nullptr) store(grad_h_in, args.grad_h_in, units.at(1, 0));
  if (!after) return;
  store(d_r, args.grad_pre_input, units.at(3, 0));
  store(d_r, args.grad_pre_hidden, units.at(3, 0));
  store(d_z, args.grad_pre_hidden, units.at(3, 1));
  store(d_product, args.grad_pre_hidden, units.at(3, 2));
}

// 4 elements read and 2 written.
template <class S, int N>
__device__ inline void backward_reset_gate(const GruGatesBackward& args, const Units& units) {
  using T = Compute<S>;
  const auto grad = load<N, S>(args.grad_reset_h, units.at(1, 0));
  const auto h = load<N, S>(args.h, units.row * args.h_stride + units.unit);
  const auto r_in = load<N, S>(args.gates, units.at(3, 0));
  auto grad_h_in = load_or_zero<N, S>(args.grad_h_in, units.at(1, 0));
  Pack<S, N> d_r;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    const T r = r_in[u];
    d_r.set(u, grad[u] * h[u] * r * (1 - r));
    grad_h_in.set(u, std::fma(grad[u], r, grad_h_in[u]));
  }
  store(d_r, args.grad_pre_input, units.at(3, 0));
  if (args.grad_h_in != nullptr) store(grad_h_in, args.grad_h_in, units.at(1, 0));
}

template <class S, int N>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    backward_kernel(const __grid_constant__ GruGatesBackward args) {
  for_each_unit<N>(args.batch, args.hidden, [&](int64_t row, int64_t unit) {
    const Units units{args.hidden, row, unit};
    if (args.stage == GruStage::Output) backward_reset_gate<S, N>(args, units);
    else backward_output_gates<S, N>(args, units);
  });
}

}  // namespace

void gru_gates_forward(const GruGates& args, void* stream) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr int N = kVector<S>;
    const bool vectors = use_vectors<S>(
        args.batch, args.hidden, args.h_stride,
        {args.pre_input, args.pre_hidden, args.bias_ih, args.bias_hh, args.h, args.reset_h, args.h_out, args.gates});
    launch_cell<N>(forward_kernel<S, 1>, forward_kernel<S, N>, vectors, args, stream);
  });
}

void gru_gates_backward(const GruGatesBackward& args, void* stream) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr int N = kVector<S>;
    const bool vectors = use_vectors<S>(args.batch, args.hidden, args.h_stride,
                                        {args.grad_h, args.gates, args.h, args.grad_reset_h, args.grad_pre_input,
                                         args.grad_pre_hidden, args.grad_h_in});
    launch_cell<N>(backward_kernel<S, 1>, backward_kernel<S, N>, vectors, args, stream);
  });
}

}  // namespace lect11ext::cuda
