#include "recurrent/gru_cell.h"

#include "common/cpu/math.h"
#include "recurrent/cpu/cell_rows.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// Slots of the sums of a block: r, z, the input's part of n, and the state's part of n.
enum Slot { R, Z, NInput, NHidden, kSlots };

template <class S>
class Block {
 public:
  using C = Compute<S>;

  Block(const GruCell& args, int64_t block)
      : args_(args), first_(block * kUnits), units_(std::min(kUnits, args.hidden - first_)) {
    load_bias(args.bias_ih, 0, bias_[R]);
    load_bias(args.bias_ih, 1, bias_[Z]);
    load_bias(args.bias_ih, 2, bias_[NInput]);
    C hidden[kUnits];
    for (int gate : {0, 1}) {
      load_bias(args.bias_hh, gate, hidden);
      for (int64_t u = 0; u < kUnits; ++u) bias_[gate][u] += hidden[u];
    }
    load_bias(args.bias_hh, 2, bias_[NHidden]);
  }

  void run() {
    for (int64_t row = 0, rows; row < args_.batch; row += rows) {
      rows = next_rows_of_x(args_.batch - row);
      multiply(row, rows);
      for (int64_t r = 0; r < rows; ++r) finish(row + r, pre_ + r * kSlots * kUnits);
    }
  }

 private:
  void load_bias(const void* bias, int gate, C* to) {
    std::fill(to, to + kUnits, C(0));
    if (bias != nullptr) convert(static_cast<const S*>(bias) + gate * args_.hidden + first_, to, units_);
  }

  RowProduct<S> input_product(int gate) const {
    return gate_rows<S, 3>(args_, args_.weight_ih, args_.weight_ih_stride, args_.input, args_.input_stride,
                           args_.input_size, first_ / kUnits, gate);
  }

  RowProduct<S> hidden_product(int gate, const void* x, int64_t x_stride) const {
    return gate_rows<S, 3>(args_, args_.weight_hh, args_.weight_hh_stride, x, x_stride, args_.hidden, first_ / kUnits,
                           gate);
  }

  void multiply(int64_t row, int64_t rows) {
    const auto dot = [&](Slot slot, const RowProduct<S>* products, int count) {
      dot_block<kUnits>(products, count, units_, row, rows, pre_ + slot * kUnits, kSlots * kUnits);
    };
    if (args_.stage != GruStage::Output) {
      for (Slot slot : {R, Z}) {
        const RowProduct<S> both[2] = {input_product(slot), hidden_product(slot, args_.h, args_.h_stride)};
        dot(slot, both, 2);
      }
    }
    if (args_.stage == GruStage::Reset) return;
    const RowProduct<S> input = input_product(2);
    dot(NInput, &input, 1);
    const bool after = args_.stage == GruStage::After;
    const RowProduct<S> hidden =
        hidden_product(2, after ? args_.h : args_.reset_h, after ? args_.h_stride : args_.hidden);
    dot(NHidden, &hidden, 1);
  }

  void finish(int64_t row, const C* pre) {
    const GruStage stage = args_.stage;
    const int gates_kept = stage == GruStage::After ? 4 : 3;
    const int64_t H = args_.hidden, at = row * H + first_;
    alignas(64) C h[kUnits], kept[kSlots][kUnits], out[kUnits];
    convert(static_cast<const S*>(args_.h) + row * args_.h_stride + first_, h, units_);
    S* gates = args_.gates == nullptr ? nullptr : static_cast<S*>(args_.gates) + row * gates_kept * H + first_;
    if (stage == GruStage::Output) convert(gates + H, kept[1], units_);
    for (int64_t u = 0; u < kUnits; u += kLanes<C>) {
      const auto slot = [&](Slot s) { return Vec<C>::loadu(pre + s * kUnits + u) + Vec<C>::loadu(bias_[s] + u); };
      const Vec<C> state = Vec<C>::loadu(h + u);
      Vec<C> r(C(1)), z = Vec<C>::loadu(kept[1] + u);
      if (stage != GruStage::Output) {
        r = sigmoid(slot(R));
        z = sigmoid(slot(Z));
        r.store(kept[0] + u);
        z.store(kept[1] + u);
      }
      if (stage == GruStage::Reset) {
        (r * state).store(out + u);
        continue;
      }
      const Vec<C> hidden = slot(NHidden);
      const Vec<C> n = tanh(at::vec::fmadd(r, hidden, slot(NInput)));
      n.store(kept[2] + u);
      hidden.store(kept[3] + u);
      at::vec::fmadd(z, state - n, n).store(out + u);
    }
    convert(out, static_cast<S*>(stage == GruStage::Reset ? args_.reset_h : args_.h_out) + at, units_);
    if (gates == nullptr) return;
    const int begin = stage == GruStage::Output ? 2 : 0, end = stage == GruStage::Reset ? 2 : gates_kept;
    for (int g = begin; g < end; ++g) convert(kept[g], gates + g * H, units_);
  }

  const GruCell& args_;
  int64_t first_, units_;
  alignas(64) C bias_[kSlots][kUnits];
  alignas(64) C pre_[kMaxRowsOfX * kSlots * kUnits] = {};
};

// Units that the backward takes at a time.
constexpr int64_t kChunk = 64;

template <class S>
void gates_backward(const GruGatesBackward& args, int64_t begin, int64_t end) {
  using C = Compute<S>;
  const Vec<C> one(C(1)), low(C(-args.clip)), high(C(args.clip));
  const GruStage stage = args.stage;
  const int64_t H = args.hidden;
  const int gates_kept = stage == GruStage::After ? 4 : 3;
  alignas(64) C in[4][kChunk], grad_h[kChunk], h[kChunk], out[3][kChunk], hidden_n[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < H; first += kChunk) {
      const int64_t n = std::min(kChunk, H - first), at = row * H + first;
      const S* gates = static_cast<const S*>(args.gates) + row * gates_kept * H + first;
      for (int g = 0; g < gates_kept; ++g) convert(gates + g * H, in[g], n);
      convert(static_cast<const S*>(args.h) + row * args.h_stride + first, h, n);
      C* grad_pre = static_cast<C*>(args.grad_pre_input) + row * 3 * H + first;
      C* grad_h_in = args.grad_h_in == nullptr ? nullptr : static_cast<C*>(args.grad_h_in) + at;
      if (stage == GruStage::Output) {
        const C* grad = static_cast<const C*>(args.grad_reset_h) + at;
        for (int64_t u = 0; u < n; ++u) {
          const C r = in[0][u];
          grad_pre[u] = grad[u] * h[u] * r * (C(1) - r);
          if (grad_h_in != nullptr) grad_h_in[u] += grad[u] * r;
        }
        continue;
      }
      convert(static_cast<const S*>(args.grad_h) + at, grad_h, n);
      for (int64_t u = 0; u < n; u += kLanes<C>) {
        const Vec<C> r = Vec<C>::loadu(in[0] + u), z = Vec<C>::loadu(in[1] + u), candidate = Vec<C>::loadu(in[2] + u);
        const Vec<C> dh = at::vec::clamp(Vec<C>::loadu(grad_h + u), low, high);
        const Vec<C> dn = dh * (one - z) * (one - candidate * candidate);
        (dh * (Vec<C>::loadu(h + u) - candidate) * z * (one - z)).store(out[1] + u);
        dn.store(out[2] + u);
        (dh * z).store(grad_h + u);
        if (stage == GruStage::After) {
          (dn * Vec<C>::loadu(in[3] + u) * r * (one - r)).store(out[0] + u);
          (dn * r).store(hidden_n + u);
        }
      }
      const bool after = stage == GruStage::After;
      for (int g = after ? 0 : 1; g < 3; ++g) convert(out[g], grad_pre + g * H, n);
      if (after) {
        C* hidden = static_cast<C*>(args.grad_pre_hidden) + row * 3 * H + first;
        convert(out[0], hidden, n);
        convert(out[1], hidden + H, n);
        convert(hidden_n, hidden + 2 * H, n);
      }
      if (grad_h_in != nullptr) convert(grad_h, grad_h_in, n);
    }
  }
}

}  // namespace

void gru_cell_kernel(const GruCell& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    for (int64_t block = begin; block < end; ++block) Block<std::remove_pointer_t<decltype(type)>>(args, block).run();
  });
}

void gru_gates_backward_kernel(const GruGatesBackward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { gates_backward<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

}  // namespace lect11ext::CPU_CAPABILITY
