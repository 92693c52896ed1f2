#include "recurrent/lstm_cell.h"

#include "recurrent/cuda/vectors.cuh"

namespace lect11ext::cuda {
namespace {

// Bound by memory: 5 elements read and 6 written a hidden unit (44 bytes in float, 22 in bf16), the gates' 4 fewer in
// inference; the biases stay in cache. `gates` may be `pre`: a thread reads its units before it writes them.
template <class S, int N>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks) forward_kernel(const __grid_constant__ LstmGates args) {
  using T = Compute<S>;
  const int64_t H = args.hidden;
  for_each_unit<N>(args.batch, H, [&](int64_t row, int64_t unit) {
    Pack<S, N> pre[4], bias_ih[4], bias_hh[4], h_out, c_out;
    const int64_t gates = row * 4 * H + unit, state = row * H + unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) pre[gate] = load<N, S>(args.pre, gates + gate * H);
    const Pack<S, N> c = load<N, S>(args.c, row * args.c_stride + unit);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      bias_ih[gate] = load_or_zero<N, S>(args.bias_ih, gate * H + unit);
      bias_hh[gate] = load_or_zero<N, S>(args.bias_hh, gate * H + unit);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const auto sum = [&](int gate) { return pre[gate][u] + (bias_ih[gate][u] + bias_hh[gate][u]); };
      const T i = sigmoid(sum(0)), f = sigmoid(sum(1)), o = sigmoid(sum(3));
      const T g = args.sigmoid_candidate ? sigmoid(sum(2)) : std::tanh(sum(2));
      const T c_new = std::fma(f, c[u], i * g);
      c_out.set(u, c_new);
      h_out.set(u, o * std::tanh(c_new));
      pre[0].set(u, i);
      pre[1].set(u, f);
      pre[2].set(u, g);
      pre[3].set(u, o);
    }
    store(h_out, args.h_out, state);
    store(c_out, args.c_out, state);
    if (args.gates == nullptr) return;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) store(pre[gate], args.gates, gates + gate * H);
  });
}

// Bound by memory: 8 elements read and 5 written a hidden unit (52 bytes in float, 26 in bf16).
template <class S, int N>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    backward_kernel(const __grid_constant__ LstmGatesBackward args) {
  using T = Compute<S>;
  const int64_t H = args.hidden;
  const T clip = static_cast<T>(args.clip);
  for_each_unit<N>(args.batch, H, [&](int64_t row, int64_t unit) {
    const int64_t gates = row * 4 * H + unit, state = row * H + unit;
    Pack<S, N> gate[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) gate[k] = load<N, S>(args.gates, gates + k * H);
    const Pack<S, N> c = load<N, S>(args.c, row * args.c_stride + unit), c_out = load<N, S>(args.c_out, state);
    const Pack<S, N> grad_h = load_or_zero<N, S>(args.grad_h, state);
    const Pack<S, N> grad_c = load_or_zero<N, S>(args.grad_c, state);
    Pack<S, N> grad_pre[4];
    Pack<S, N> grad_c_in;
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const T i = gate[0][u], f = gate[1][u], g = gate[2][u], o = gate[3][u];
      const T d_h = clamp<T>(grad_h[u], -clip, clip), t = std::tanh(c_out[u]);
      const T d_c = std::fma(d_h * o, 1 - t * t, clamp<T>(grad_c[u], -clip, clip));
      grad_pre[0].set(u, d_c * g * i * (1 - i));
      grad_pre[1].set(u, d_c * c[u] * f * (1 - f));
      grad_pre[2].set(u, d_c * i * (args.sigmoid_candidate ? g * (1 - g) : 1 - g * g));
      grad_pre[3].set(u, d_h * t * o * (1 - o));
      grad_c_in.set(u, d_c * f);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) store(grad_pre[k], args.grad_pre, gates + k * H);
    if (args.grad_c_in != nullptr) store(grad_c_in, args.grad_c_in, state);
  });
}

}  // namespace

void lstm_gates_forward(const LstmGates& args, void* stream) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr int N = kVector<S>;
    const bool vectors =
        use_vectors<S>(args.batch, args.hidden, args.c_stride,
                       {args.pre, args.bias_ih, args.bias_hh, args.c, args.h_out, args.c_out, args.gates});
    launch_cell<N>(forward_kernel<S, 1>, forward_kernel<S, N>, vectors, args, stream);
  });
}

void lstm_gates_backward(const LstmGatesBackward& args, void* stream) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr int N = kVector<S>;
    const bool vectors =
        use_vectors<S>(args.batch, args.hidden, args.c_stride,
                       {args.grad_h, args.grad_c, args.gates, args.c, args.c_out, args.grad_pre, args.grad_c_in});
    launch_cell<N>(backward_kernel<S, 1>, backward_kernel<S, N>, vectors, args, stream);
  });
}

}  // namespace lect11ext::cuda
