#include "autoencoder/penalties.h"

#include "autoencoder/cpu/activation.h"
#include "autoencoder/cpu/row_sums.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// What is summed up, ψ, and ψ'.
template <Penalty kPenalty, Activation kActivation, class T>
inline Vec<T> summand(const Activated<kActivation, T>& h) {
  if constexpr (kPenalty == Penalty::L1) return h.value().abs();
  else if constexpr (kPenalty == Penalty::Contractive) return h.slope() * h.slope();
  else return h.value();
}

template <Penalty kPenalty, Activation kActivation, class T>
inline Vec<T> summand_slope(const Activated<kActivation, T>& h) {
  constexpr bool kSigned = kActivation == Activation::Identity || kActivation == Activation::Tanh;
  if constexpr (kPenalty == Penalty::Contractive) {
    return Vec<T>(T(2)) * h.slope() * h.curvature();
  } else if constexpr (kPenalty == Penalty::L1 && kSigned) {
    const Vec<T> zero(T(0)), slope = h.slope();  // φ has the sign of its argument
    return select_less(zero, h.x, slope, select_less(h.x, zero, slope.neg(), zero));
  } else {
    return h.slope();
  }
}

template <class T>
inline void put(Vec<T> value, int64_t i, T* sums, T* columns) {
  if (columns == nullptr) value.store(sums + i);
  else (Vec<T>::loadu(columns + i) + value).store(columns + i);
}

// Elements start … start + n − 1: writes the output, adds the scaled summands to `columns`, or leaves them in `sums`.
template <class T, Activation kActivation, Penalty kPenalty>
void forward_run(const PenaltyForward& args, int64_t start, int64_t n, Buffer<T>* buffers, T* sums, T* columns) {
  const T* input = fetch<T>(args.shape, args.input, start, n, buffers[0]);
  const bool scaled = args.scale.data != nullptr;
  const T* scale = scaled ? fetch<T>(args.shape, args.scale, start, n, buffers[1]) : nullptr;
  T* output = target<T>(args.output, args.output_dtype, start, n, buffers[2]);
  const bool stream = args.streams && output != buffers[2] && can_stream(output);
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Activated<kActivation, T> h{Vec<T>::loadu(input + i)};
    store(h.value(), output + i, stream);
    const Vec<T> psi = summand<kPenalty>(h);
    put(scaled ? psi * Vec<T>::loadu(scale + i) : psi, i, sums, columns);
  }
  flush<T>(args.output, args.output_dtype, start, n, output, buffers[2]);
}

template <class T, Activation kActivation, Penalty kPenalty>
void forward(const PenaltyForward& args, int64_t begin, int64_t end) {
  Buffer<T> buffers[3], sums;
  for (int64_t item = begin; item < end; ++item) {
    if constexpr (kPenalty == Penalty::Mean) {
      ColumnSums<T> columns(args.blocks, item, args.sums);
      columns.each_run(sums.data, [&](int64_t start, int64_t n, T* to) {
        forward_run<T, kActivation, kPenalty>(args, start, n, buffers, sums, to);
      });
    } else {
      int64_t n;
      const int64_t start = tile_range(args.tiles, item, &n);
      forward_run<T, kActivation, kPenalty>(args, start, n, buffers, sums, nullptr);
      store_sums<T>(args.tiles, item, start, n, sums, args.sums, /*elements=*/false);
    }
  }
  if (args.streams) finish_streams();
}

// By selection for relu, as torch has it: a product with its slope of zero is NaN where the gradient is infinite.
template <Activation kActivation, class T>
inline Vec<T> times_slope(Vec<T> grad, Vec<T> slope) {
  if constexpr (kActivation == Activation::Identity) return grad;
  else if constexpr (kActivation == Activation::Relu) return select_equal(slope, Vec<T>(T(0)), slope, grad);
  else return grad * slope;
}

template <class T, Activation kActivation, Penalty kPenalty>
void backward_run(const PenaltyBackward& args, int64_t start, int64_t n, Buffer<T>* buffers, T* sums, T* columns) {
  const bool passes = args.grad_output.data != nullptr, penalizes = args.grad_penalty.data != nullptr;
  const bool scaled = args.scale.data != nullptr, wanted = args.grad_input != nullptr;
  const T* input = fetch<T>(args.shape, args.input, start, n, buffers[0]);
  const T* scale = scaled ? fetch<T>(args.shape, args.scale, start, n, buffers[1]) : nullptr;
  const T* grad_output = passes ? fetch<T>(args.shape, args.grad_output, start, n, buffers[2]) : nullptr;
  const T* weight = penalizes ? fetch<T>(args.shape, args.grad_penalty, start, n, buffers[3]) : nullptr;
  T* out = wanted ? target<T>(args.grad_input, args.grad_input_dtype, start, n, buffers[4]) : nullptr;
  const bool stream = args.streams && out != buffers[4] && can_stream(out);
  const Vec<T> factor(T(args.grad_penalty_scale)), zero(T(0));
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Activated<kActivation, T> h{Vec<T>::loadu(input + i)};
    Vec<T> grad = zero;
    if (passes) grad = times_slope<kActivation>(Vec<T>::loadu(grad_output + i), h.slope());
    if (penalizes) {
      const Vec<T> w = factor * Vec<T>::loadu(weight + i);
      if (args.grad_scale != nullptr) put(w * summand<kPenalty>(h), i, sums, columns);
      const Vec<T> s = scaled ? w * Vec<T>::loadu(scale + i) : w;
      if constexpr (kPenalty != Penalty::Contractive && kActivation == Activation::Relu) {
        grad = grad + times_slope<kActivation>(s, h.slope());
      } else if constexpr (kPenalty != Penalty::Contractive ||
                           (kActivation != Activation::Relu && kActivation != Activation::Identity)) {
        grad = at::vec::fmadd(s, summand_slope<kPenalty>(h), grad);
      }
    }
    if (wanted) store(grad, out + i, stream);
  }
  if (wanted) flush<T>(args.grad_input, args.grad_input_dtype, start, n, out, buffers[4]);
}

template <class T, Activation kActivation, Penalty kPenalty>
void backward(const PenaltyBackward& args, int64_t begin, int64_t end) {
  Buffer<T> buffers[5], sums;
  if (args.grad_penalty.data == nullptr) std::fill(sums.data, sums.data + kTile, T(0));
  for (int64_t item = begin; item < end; ++item) {
    ColumnSums<T> columns(args.blocks, item, args.grad_scale);
    columns.each_run(sums.data, [&](int64_t start, int64_t n, T* to) {
      backward_run<T, kActivation, kPenalty>(args, start, n, buffers, sums, to);
    });
  }
  if (args.streams) finish_streams();
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class T, Penalty kPenalty>
void run(const PenaltyForward& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto a) { forward<T, a.value, kPenalty>(args, begin, end); });
}

template <class T, Penalty kPenalty>
void run(const PenaltyBackward& args, int64_t begin, int64_t end) {
  with_activation(args.activation, [&](auto a) { backward<T, a.value, kPenalty>(args, begin, end); });
}

template <class Args>
void choose(const Args& args, int64_t begin, int64_t end) {
  const auto typed = [&](auto type) {
    using T = decltype(type);
    switch (args.penalty) {
      case Penalty::L1: return run<T, Penalty::L1>(args, begin, end);
      case Penalty::Contractive: return run<T, Penalty::Contractive>(args, begin, end);
      case Penalty::Mean: return run<T, Penalty::Mean>(args, begin, end);
    }
  };
  args.compute_double ? typed(0.0) : typed(0.0f);
}

}  // namespace

void penalty_forward_kernel(const PenaltyForward& args, int64_t begin, int64_t end) { choose(args, begin, end); }
void penalty_backward_kernel(const PenaltyBackward& args, int64_t begin, int64_t end) { choose(args, begin, end); }

}  // namespace lect11ext::CPU_CAPABILITY
