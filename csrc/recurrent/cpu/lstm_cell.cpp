#include "recurrent/lstm_cell.h"

#include "common/cpu/math.h"
#include "recurrent/cpu/cell_rows.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

constexpr int kGates = 4;

template <class C>
Vec<C> activate(Vec<C> x, bool as_sigmoid) {
  return as_sigmoid ? sigmoid(x) : tanh(x);
}

// The elementwise half for one row and one block of units: `pre` holds the gates' sums, kUnits apart.
template <class S>
void finish_row(const LstmCell& args, int64_t row, int64_t first, int64_t units, Compute<S>* pre,
                const Compute<S>* bias) {
  using C = Compute<S>;
  alignas(64) C c[kUnits], h_out[kUnits], c_out[kUnits];
  convert(static_cast<const S*>(args.c) + row * args.c_stride + first, c, units);
  for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
    const auto gate = [&](int g) { return Vec<C>::loadu(pre + g * kUnits + u) + Vec<C>::loadu(bias + g * kUnits + u); };
    const Vec<C> i = sigmoid(gate(0)), f = sigmoid(gate(1)), o = sigmoid(gate(3));
    const Vec<C> g = activate<C>(gate(2), args.sigmoid_candidate);
    const Vec<C> cell = at::vec::fmadd(f, Vec<C>::loadu(c + u), i * g);
    cell.store(c_out + u);
    (o * tanh(cell)).store(h_out + u);
    if (args.gates != nullptr) {
      i.store(pre + u);
      f.store(pre + kUnits + u);
      g.store(pre + 2 * kUnits + u);
      o.store(pre + 3 * kUnits + u);
    }
  }
  const int64_t at = row * args.hidden + first;
  convert(c_out, static_cast<S*>(args.c_out) + at, units);
  convert(h_out, static_cast<S*>(args.h_out) + at, units);
  if (args.gates == nullptr) return;
  S* gates = static_cast<S*>(args.gates) + row * kGates * args.hidden + first;
  for (int g = 0; g < kGates; ++g) convert(pre + g * kUnits, gates + g * args.hidden, units);
}

template <class S>
void step(const LstmCell& args, int64_t begin, int64_t end) {
  using C = Compute<S>;
  alignas(64) C bias[kGates * kUnits] = {}, pre[kMaxRowsOfX * kGates * kUnits] = {};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kUnits, units = std::min(kUnits, args.hidden - first);
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = g * args.hidden + first;
      C other[kUnits] = {};
      if (args.bias_ih != nullptr) convert(static_cast<const S*>(args.bias_ih) + at, bias + g * kUnits, units);
      if (args.bias_hh != nullptr) convert(static_cast<const S*>(args.bias_hh) + at, other, units);
      for (int64_t u = 0; u < units; ++u) bias[g * kUnits + u] = (args.bias_ih ? bias[g * kUnits + u] : 0) + other[u];
    }
    for (int64_t row = 0, rows; row < args.batch; row += rows) {
      rows = next_rows_of_x(args.batch - row);
      for (int g = 0; g < kGates; ++g) {
        const RowProduct<S> products[2] = {gate_rows<S, kGates>(args, args.weight_ih, args.weight_ih_stride, args.input,
                                                                args.input_stride, args.input_size, block, g),
                                           gate_rows<S, kGates>(args, args.weight_hh, args.weight_hh_stride, args.h,
                                                                args.h_stride, args.state_size, block, g)};
        dot_block<kUnits>(products, 2, units, row, rows, pre + g * kUnits, kGates * kUnits);
      }
      for (int64_t r = 0; r < rows; ++r) finish_row<S>(args, row + r, first, units, pre + r * kGates * kUnits, bias);
    }
  }
}

// Units that the backward takes at a time.
constexpr int64_t kChunk = 64;

template <class S>
void gates_backward(const LstmGatesBackward& args, int64_t begin, int64_t end) {
  using C = Compute<S>;
  const Vec<C> one(C(1)), low(C(-args.clip)), high(C(args.clip));
  const int64_t H = args.hidden;
  alignas(64) C in[kGates][kChunk], grad_h[kChunk] = {}, grad_c[kChunk] = {}, c[kChunk], c_out[kChunk];
  alignas(64) C out[kGates][kChunk], grad_c_in[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < H; first += kChunk) {
      const int64_t n = std::min(kChunk, H - first), at = row * H + first;
      const S* gates = static_cast<const S*>(args.gates) + row * kGates * H + first;
      for (int g = 0; g < kGates; ++g) convert(gates + g * H, in[g], n);
      if (args.grad_h != nullptr) convert(static_cast<const S*>(args.grad_h) + at, grad_h, n);
      if (args.grad_c != nullptr) convert(static_cast<const S*>(args.grad_c) + at, grad_c, n);
      convert(static_cast<const S*>(args.c) + row * args.c_stride + first, c, n);
      convert(static_cast<const S*>(args.c_out) + at, c_out, n);
      for (int64_t u = 0; u < n; u += kLanes<C>) {
        const Vec<C> i = Vec<C>::loadu(in[0] + u), f = Vec<C>::loadu(in[1] + u), g = Vec<C>::loadu(in[2] + u),
                     o = Vec<C>::loadu(in[3] + u), t = tanh(Vec<C>::loadu(c_out + u));
        const Vec<C> dh = at::vec::clamp(Vec<C>::loadu(grad_h + u), low, high);
        const Vec<C> dc = at::vec::fmadd(dh * o, one - t * t, at::vec::clamp(Vec<C>::loadu(grad_c + u), low, high));
        const Vec<C> slope = args.sigmoid_candidate ? g * (one - g) : one - g * g;
        (dc * g * i * (one - i)).store(out[0] + u);
        (dc * Vec<C>::loadu(c + u) * f * (one - f)).store(out[1] + u);
        (dc * i * slope).store(out[2] + u);
        (dh * t * o * (one - o)).store(out[3] + u);
        (dc * f).store(grad_c_in + u);
      }
      C* grad_pre = static_cast<C*>(args.grad_pre) + row * kGates * H + first;
      for (int g = 0; g < kGates; ++g) convert(out[g], grad_pre + g * H, n);
      if (args.grad_c_in != nullptr) convert(grad_c_in, static_cast<S*>(args.grad_c_in) + at, n);
    }
  }
}

}  // namespace

void lstm_cell_kernel(const LstmCell& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { step<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void lstm_gates_backward_kernel(const LstmGatesBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { gates_backward<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

}  // namespace lect11ext::CPU_CAPABILITY
