#include "autoencoder/reconstruction.h"

#include "autoencoder/cpu/activation.h"
#include "autoencoder/cpu/row_sums.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

inline Vec<float> e_to(Vec<float> x) { return exp(x); }
inline Vec<double> e_to(Vec<double> x) { return x.exp(); }

// log(sinh(u) / u) and its derivative, coth(u) − 1/u (Langevin's function), of u ≥ 0. Below kSmall by their series,
// whose first term left out is 2e-8 (float) and 1e-17 (double) of the value. Above it they are less their asymptotes, u
// and 1, which the other terms of a loss mostly cancel.
template <class T>
struct LogSinhc {
  Vec<T> value, slope;
};

template <class T>
inline constexpr T kSmall = sizeof(T) == 4 ? T(1) : T(0.5);

template <class T>
inline constexpr int kTerms = sizeof(T) == 4 ? 7 : 10;

template <class T>
inline LogSinhc<T> log_sinhc(Vec<T> u) {
  const Vec<T> one(T(1)), two(T(2)), z = u * u;
  Vec<T> value{T(kLogSinhcSeries[kTerms<T> - 1])}, slope{T(2 * kTerms<T> * kLogSinhcSeries[kTerms<T> - 1])};
  for (int k = kTerms<T> - 2; k >= 0; --k) {
    value = at::vec::fmadd(value, z, Vec<T>(T(kLogSinhcSeries[k])));
    slope = at::vec::fmadd(slope, z, Vec<T>(T(2 * (k + 1) * kLogSinhcSeries[k])));
  }
  const Vec<T> e = e_to((u * two).neg()), rest = one - e, small{kSmall<T>};
  const Vec<T> far_value = (rest / (u * two)).log(), far_slope = two * e / rest - one / u;
  return {select_less(u, small, value * z, far_value), select_less(u, small, slope * u, far_slope)};
}

// The loss of one element with its derivatives by input, target and logvar.
template <class T>
struct Element {
  Vec<T> loss, d_input, d_target, d_logvar;
};

template <Likelihood kLikelihood, bool kLogvar, class T>
inline Element<T> element(Vec<T> x, Vec<T> t, Vec<T> logvar) {
  const Vec<T> zero(T(0)), half(T(0.5)), two(T(2));
  if constexpr (kLikelihood == Likelihood::Bernoulli) {
    // Without the digits that max(x, 0) − t·x and 0 or 1 − t would cost where both are alike.
    const Logistic<T> s(x);
    const Vec<T> limit = select_less(x, zero, t.neg(), Vec<T>(T(1)) - t);
    return {at::vec::fmadd(x, limit, s.beyond_relu()), limit + s.beyond_step(), x.neg(), zero};
  } else if constexpr (kLikelihood == Likelihood::ContinuousBernoulli) {
    const Vec<T> u = half * x.abs(), step = select_less(x, zero, zero, Vec<T>(T(1)));
    const LogSinhc<T> f = log_sinhc(u);
    const Vec<T> limit = select_less(u, Vec<T>(kSmall<T>), half, step) - t, slope = half * f.slope;
    return {at::vec::fmadd(x, limit, f.value), limit + select_less(x, zero, slope.neg(), slope), x.neg(), zero};
  } else if constexpr (kLikelihood == Likelihood::Gaussian) {
    const Vec<T> d = x - t, constant{T(kHalfLog2Pi)};
    if constexpr (!kLogvar) return {at::vec::fmadd(half * d, d, constant), d, d.neg(), zero};
    // By its root, so that a small variance does not overflow before it meets a small difference; and finite, so that
    // no difference is none.
    const Vec<T> root = finite(e_to(logvar * Vec<T>(T(-0.5)))), scaled = d * root, square = scaled * scaled;
    return {half * (square + logvar) + constant, scaled * root, (scaled * root).neg(), half * (Vec<T>(T(1)) - square)};
  } else {
    const Vec<T> d = x - t;
    return {d * d, two * d, two * d.neg(), zero};
  }
}

// The operands of elements start … start + n − 1.
template <class T>
class Operands {
 public:
  Operands(const Reconstruction& args, int64_t start, int64_t n, Buffer<T>* buffers) {
    input_ = fetch<T>(args.shape, args.input, start, n, buffers[0]);
    target_ = fetch<T>(args.shape, args.target, start, n, buffers[1]);
    if (args.logvar.data != nullptr) logvar_ = fetch<T>(args.shape, args.logvar, start, n, buffers[2]);
    if (args.weight.data != nullptr) weight_ = fetch<T>(args.shape, args.weight, start, n, buffers[3]);
  }

  template <Likelihood kLikelihood, bool kLogvar>
  Element<T> at(int64_t i) const {
    const Vec<T> logvar = kLogvar ? Vec<T>::loadu(logvar_ + i) : Vec<T>(T(0));
    return element<kLikelihood, kLogvar>(Vec<T>::loadu(input_ + i), Vec<T>::loadu(target_ + i), logvar);
  }

  bool is_weighted() const { return weight_ != nullptr; }

  // By selection where the weight is zero: a product would be NaN where the value is infinite or NaN.
  Vec<T> weighted(int64_t i, Vec<T> value) const {
    const Vec<T> weight = Vec<T>::loadu(weight_ + i), zero(T(0));
    return select_equal(weight, zero, zero, weight * value);
  }

 private:
  const T *input_, *target_, *logvar_ = nullptr, *weight_ = nullptr;
};

template <class T, Likelihood kLikelihood, bool kLogvar>
void forward(const ReconstructionForward& args, int64_t begin, int64_t end) {
  Buffer<T> buffers[4], losses;
  for (int64_t item = begin; item < end; ++item) {
    int64_t n;
    const int64_t start = tile_range(args.tiles, item, &n);
    const Operands<T> operands(args, start, n, buffers);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> loss = operands.template at<kLikelihood, kLogvar>(i).loss;
      (operands.is_weighted() ? operands.weighted(i, loss) : loss).store(losses + i);
    }
    store_sums<T>(args.tiles, item, start, n, losses, args.loss, args.loss_elements);
  }
}

// Where one gradient of a tile goes: to memory, or by way of a buffer.
template <class T>
class Gradient {
 public:
  Gradient(void* data, DType dtype, int64_t start, int64_t n, bool streams, Buffer<T>& buffer)
      : data_(data), dtype_(dtype), start_(start), n_(n), buffer_(buffer) {
    if (data == nullptr) return;
    to_ = target<T>(data, dtype, start, n, buffer_);
    streams_ = streams && to_ != buffer_ && can_stream(to_);
  }
  explicit operator bool() const { return to_ != nullptr; }
  void put(int64_t i, Vec<T> value) { store(value, to_ + i, streams_); }
  void finish() {
    if (to_ != nullptr) flush<T>(data_, dtype_, start_, n_, to_, buffer_);
  }

 private:
  void* data_;
  DType dtype_;
  int64_t start_, n_;
  T* buffer_;
  T* to_ = nullptr;
  bool streams_ = false;
};

template <class T, Likelihood kLikelihood, bool kLogvar>
void backward(const ReconstructionBackward& args, int64_t begin, int64_t end) {
  Buffer<T> buffers[4], grads, staged[4];
  const Vec<T> scale(T(args.grad_scale));
  for (int64_t item = begin; item < end; ++item) {
    int64_t n;
    const int64_t start = tile_range(args.tiles, item, &n);
    const Operands<T> operands(args, start, n, buffers);
    const T* grad = fetch<T>(args.shape, args.grad, start, n, grads);
    Gradient<T> input(args.grad_input, args.grad_input_dtype, start, n, args.streams, staged[0]);
    Gradient<T> target(args.grad_target, args.grad_target_dtype, start, n, args.streams, staged[1]);
    Gradient<T> logvar(args.grad_logvar, kDType<T>, start, n, args.streams, staged[2]);
    Gradient<T> weight(args.grad_weight, kDType<T>, start, n, args.streams, staged[3]);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Element<T> e = operands.template at<kLikelihood, kLogvar>(i);
      const Vec<T> g = scale * Vec<T>::loadu(grad + i);
      const auto by = [&](Vec<T> d) { return operands.is_weighted() ? operands.weighted(i, g * d) : g * d; };
      if (input) input.put(i, by(e.d_input));
      if (target) target.put(i, by(e.d_target));
      if (logvar) logvar.put(i, by(e.d_logvar));
      if (weight) weight.put(i, g * e.loss);
    }
    for (Gradient<T>* written : {&input, &target, &logvar, &weight}) written->finish();
  }
  if (args.streams) finish_streams();
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class T, Likelihood kLikelihood, bool kLogvar>
void run(const ReconstructionForward& args, int64_t begin, int64_t end) {
  forward<T, kLikelihood, kLogvar>(args, begin, end);
}

template <class T, Likelihood kLikelihood, bool kLogvar>
void run(const ReconstructionBackward& args, int64_t begin, int64_t end) {
  backward<T, kLikelihood, kLogvar>(args, begin, end);
}

template <class Args>
void choose(const Args& args, int64_t begin, int64_t end) {
  const auto typed = [&](auto type) {
    using T = decltype(type);
    switch (args.likelihood) {
      case Likelihood::Bernoulli: return run<T, Likelihood::Bernoulli, false>(args, begin, end);
      case Likelihood::ContinuousBernoulli: return run<T, Likelihood::ContinuousBernoulli, false>(args, begin, end);
      case Likelihood::SquaredError: return run<T, Likelihood::SquaredError, false>(args, begin, end);
      case Likelihood::Gaussian:
        return args.logvar.data != nullptr ? run<T, Likelihood::Gaussian, true>(args, begin, end)
                                           : run<T, Likelihood::Gaussian, false>(args, begin, end);
    }
  };
  args.compute_double ? typed(0.0) : typed(0.0f);
}

}  // namespace

void reconstruction_forward_kernel(const ReconstructionForward& args, int64_t begin, int64_t end) {
  choose(args, begin, end);
}

void reconstruction_backward_kernel(const ReconstructionBackward& args, int64_t begin, int64_t end) {
  choose(args, begin, end);
}

}  // namespace lect11ext::CPU_CAPABILITY
