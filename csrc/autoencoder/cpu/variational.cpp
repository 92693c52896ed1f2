#include "autoencoder/variational.h"

#include "autoencoder/cpu/row_sums.h"
#include "common/cpu/memory.h"
#include "common/cpu/normal.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// e^x, expm1(x) and expm1(x) − x of one argument, taken at x/2: then e^(x/2), which scales the noise, costs no second
// exponential. Near zero neither of the last two cancels: with m = expm1(x/2) they are m·(2 + m) and 2·(m − x/2) + m².
template <class T>
struct HalfExp {
  Vec<T> root;          // e^(x/2)
  Vec<T> expm1;         // e^x − 1
  Vec<T> expm1_less_x;  // e^x − 1 − x
};

inline HalfExp<float> half_exp(Vec<float> x) {
  const Vec<float> one(1.0f), two(2.0f);
  const ReducedExp e = reduced_exp(x * Vec<float>(0.5f));
  const Vec<float> root = ldexp(e.em1 + one, e.n);
  const Vec<float> square_less_1 = at::vec::fmsub(root, root, one);
  const Vec<float> zero(0.0f);
  return {root, select_equal(e.n, zero, e.em1 * (two + e.em1), square_less_1),
          select_equal(e.n, zero, at::vec::fmadd(two, e.tail, e.em1 * e.em1), square_less_1 - x)};
}

inline HalfExp<double> half_exp(Vec<double> x) {
  const Vec<double> expm1 = x.expm1(), one(1.0);
  Vec<double> series = one;
  for (int k = kRemainderTerms; k > 2; --k) series = at::vec::fmadd(series, x * Vec<double>(1.0 / k), one);
  const Vec<double> small = x.abs() < Vec<double>(kSmallRemainder);
  return {(x * Vec<double>(0.5)).exp(), expm1,
          Vec<double>::blendv(expm1 - x, series * x * x * Vec<double>(0.5), small)};
}

inline Vec<float> root_exp(Vec<float> x) { return exp(x * Vec<float>(0.5f)); }
inline Vec<double> root_exp(Vec<double> x) { return (x * Vec<double>(0.5)).exp(); }

// The operands of one tile, as the arithmetic's type.
template <class T>
class Tile {
 public:
  Tile(const Gaussian& args, int64_t start, int64_t n, Buffer<T>* buffers)
      : clamps_(args.clamps), low_(T(args.low)), high_(T(args.high)) {
    mean_ = fetch<T>(args.shape, args.mean, start, n, buffers[0]);
    logvar_ = fetch<T>(args.shape, args.logvar, start, n, buffers[1]);
    if (args.prior_mean.data == nullptr) return;
    prior_mean_ = fetch<T>(args.shape, args.prior_mean, start, n, buffers[2]);
    prior_logvar_ = fetch<T>(args.shape, args.prior_logvar, start, n, buffers[3]);
  }

  Vec<T> mean(int64_t i) const { return Vec<T>::loadu(mean_ + i); }

  struct Element {
    Vec<T> scale;     // e^(logvar/2)
    Vec<T> kl;        // before free bits
    Vec<T> d_mean;    // ∂kl/∂mean
    Vec<T> d_logvar;  // ∂kl/∂logvar
    Vec<T> d_prior_logvar;
    Vec<T> inside;  // all ones where logvar was not clamped
  };

  // PriorGiven is a template argument so that the common case has no branch inside the loop.
  template <bool PriorGiven>
  Element element(int64_t i) const {
    const Vec<T> half(T(0.5));
    Element e;
    const Vec<T> raw = Vec<T>::loadu(logvar_ + i);
    Vec<T> logvar = raw, u = mean(i);
    if (clamps_) {
      logvar = at::vec::clamp(raw, low_, high_);
      e.inside = raw == logvar;
    }
    if constexpr (PriorGiven) {
      const Vec<T> prior_logvar = Vec<T>::loadu(prior_logvar_ + i);
      const HalfExp<T> d = half_exp(logvar - prior_logvar);
      const Vec<T> precision_root = finite(root_exp(prior_logvar.neg()));
      u = u - Vec<T>::loadu(prior_mean_ + i);
      const Vec<T> t = u * precision_root;
      e.scale = root_exp(logvar);
      e.kl = half * at::vec::fmadd(t, t, d.expm1_less_x);
      e.d_mean = t * precision_root;
      e.d_logvar = half * d.expm1;
      e.d_prior_logvar = (half * at::vec::fmadd(t, t, d.expm1)).neg();
    } else {
      const HalfExp<T> d = half_exp(logvar);
      e.scale = d.root;
      e.kl = half * at::vec::fmadd(u, u, d.expm1_less_x);
      e.d_mean = u;
      e.d_logvar = half * d.expm1;
    }
    return e;
  }

 private:
  const bool clamps_;
  const Vec<T> low_, high_;
  const T *mean_, *logvar_, *prior_mean_ = nullptr, *prior_logvar_ = nullptr;
};

template <class T, bool PriorGiven>
void forward(const GaussianForward& args, int64_t begin, int64_t end) {
  Buffer<T> operands[4], noise, scale, kl, staged;
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  const bool raises = args.free_bits > 0;
  const Vec<T> free_bits(T(args.free_bits));
  for (int64_t t = begin; t < end; ++t) {
    int64_t n;
    const int64_t start = tile_range(args.tiles, t, &n);
    const Tile<T> tile(args, start, n, operands);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const auto e = tile.template element<PriorGiven>(i);
      e.scale.store(scale + i);
      const Vec<T> raised = raises ? select_less(e.kl, free_bits, free_bits, e.kl) : e.kl;
      raised.store(kl + i);
    }
    store_sums<T>(args.tiles, t, start, n, kl, args.kl, args.kl_elements);
    for (int64_t k = 0; k < args.samples; ++k) {
      const int64_t first = k * args.shape.numel + start;
      const T* eps = normals(seed, offset, first, n, noise.data);
      T* z = target<T>(args.z, args.z_dtype, first, n, staged);
      const bool stream = args.streams && z != staged && can_stream(z);
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        store(at::vec::fmadd(Vec<T>::loadu(scale + i), Vec<T>::loadu(eps + i), tile.mean(i)), z + i, stream);
      }
      flush<T>(args.z, args.z_dtype, first, n, z, staged);
    }
  }
  if (args.streams) finish_streams();
}

// Sums over the samples of grad_z and of grad_z·ε.
template <class T>
struct SampleSums {
  const T* plain;
  const T* noisy;
};

template <class T>
SampleSums<T> sum_samples(const GaussianBackward& args, int64_t start, int64_t n, Buffer<T>* buffers) {
  Buffer<T>&fetched = buffers[0], &noise = buffers[1], &plain = buffers[2], &noisy = buffers[3];
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  const T* only = nullptr;
  for (int64_t k = 0; k < args.samples; ++k) {
    const int64_t first = k * args.shape.numel + start;
    const T* grad = fetch<T>(args.grad_z_shape, args.grad_z, first, n, fetched);
    if (args.samples == 1) only = grad;
    const T* eps = args.grad_logvar != nullptr ? normals(seed, offset, first, n, noise.data) : grad;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> g = Vec<T>::loadu(grad + i), product = g * Vec<T>::loadu(eps + i);
      if (args.samples > 1) (k == 0 ? g : g + Vec<T>::loadu(plain + i)).store(plain + i);
      (k == 0 ? product : product + Vec<T>::loadu(noisy + i)).store(noisy + i);
    }
  }
  return {only != nullptr ? only : plain.data, noisy};
}

template <class T, bool PriorGiven>
void backward(const GaussianBackward& args, int64_t begin, int64_t end) {
  Buffer<T> operands[4], sums[4], weights, staged_mean, staged_logvar, staged_prior_mean, staged_prior_logvar;
  const bool sampled = args.grad_z.data != nullptr, diverges = args.grad_kl.data != nullptr;
  const bool clamps = args.clamps, raises = args.free_bits > 0;
  const Vec<T> zero(T(0)), half(T(0.5)), free_bits(T(args.free_bits)), scale(T(args.grad_kl_scale));
  for (int64_t t = begin; t < end; ++t) {
    int64_t n;
    const int64_t start = tile_range(args.tiles, t, &n);
    const Tile<T> tile(args, start, n, operands);
    SampleSums<T> sum{};
    if (sampled) sum = sum_samples<T>(args, start, n, sums);
    const T* weight = diverges ? fetch<T>(args.shape, args.grad_kl, start, n, weights) : nullptr;
    T* grad_mean = target<T>(args.grad_mean, args.grad_mean_dtype, start, n, staged_mean);
    T* grad_logvar = target<T>(args.grad_logvar, args.grad_logvar_dtype, start, n, staged_logvar);
    T* grad_prior_mean = target<T>(args.grad_prior_mean, kDType<T>, start, n, staged_prior_mean);
    T* grad_prior_logvar = target<T>(args.grad_prior_logvar, kDType<T>, start, n, staged_prior_logvar);
    const bool stream_mean = args.streams && grad_mean != staged_mean && can_stream(grad_mean);
    const bool stream_logvar = args.streams && grad_logvar != staged_logvar && can_stream(grad_logvar);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const auto e = tile.template element<PriorGiven>(i);
      Vec<T> d_mean = zero, d_logvar = zero, d_prior_mean = zero, d_prior_logvar = zero;
      if (sampled) {
        d_mean = Vec<T>::loadu(sum.plain + i);
        d_logvar = half * e.scale * Vec<T>::loadu(sum.noisy + i);
      }
      if (diverges) {
        const Vec<T> w = scale * Vec<T>::loadu(weight + i);
        // A selection, not a product with zero, which is NaN where the other factor is infinite.
        const Vec<T> active = e.kl >= free_bits;
        const auto weighted = [&](Vec<T> d) { return raises ? Vec<T>::blendv(zero, w * d, active) : w * d; };
        const Vec<T> by_mean = weighted(e.d_mean);
        d_mean = d_mean + by_mean;
        d_logvar = d_logvar + weighted(e.d_logvar);
        if constexpr (PriorGiven) {
          d_prior_mean = by_mean.neg();
          d_prior_logvar = weighted(e.d_prior_logvar);
        }
      }
      if (clamps) d_logvar = Vec<T>::blendv(zero, d_logvar, e.inside);
      if (args.grad_mean != nullptr) store(d_mean, grad_mean + i, stream_mean);
      if (args.grad_logvar != nullptr) store(d_logvar, grad_logvar + i, stream_logvar);
      if constexpr (PriorGiven) {
        if (args.grad_prior_mean != nullptr) d_prior_mean.store(grad_prior_mean + i);
        if (args.grad_prior_logvar != nullptr) d_prior_logvar.store(grad_prior_logvar + i);
      }
    }
    if (args.grad_mean != nullptr) flush<T>(args.grad_mean, args.grad_mean_dtype, start, n, grad_mean, staged_mean);
    if (args.grad_logvar != nullptr) {
      flush<T>(args.grad_logvar, args.grad_logvar_dtype, start, n, grad_logvar, staged_logvar);
    }
    if (args.grad_prior_mean != nullptr) {
      flush<T>(args.grad_prior_mean, kDType<T>, start, n, grad_prior_mean, staged_prior_mean);
    }
    if (args.grad_prior_logvar != nullptr) {
      flush<T>(args.grad_prior_logvar, kDType<T>, start, n, grad_prior_logvar, staged_prior_logvar);
    }
  }
  if (args.streams) finish_streams();
}

}  // namespace

void gaussian_forward_kernel(const GaussianForward& args, int64_t begin, int64_t end) {
  const bool prior = args.prior_mean.data != nullptr;
  if (args.compute_double) {
    prior ? forward<double, true>(args, begin, end) : forward<double, false>(args, begin, end);
  } else {
    prior ? forward<float, true>(args, begin, end) : forward<float, false>(args, begin, end);
  }
}

void gaussian_backward_kernel(const GaussianBackward& args, int64_t begin, int64_t end) {
  const bool prior = args.prior_mean.data != nullptr;
  if (args.compute_double) {
    prior ? backward<double, true>(args, begin, end) : backward<double, false>(args, begin, end);
  } else {
    prior ? backward<float, true>(args, begin, end) : backward<float, false>(args, begin, end);
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
