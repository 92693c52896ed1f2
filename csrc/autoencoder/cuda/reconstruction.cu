#include "autoencoder/reconstruction.h"

#include "autoencoder/cuda/activation.cuh"
#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/cuda/row_sums.cuh"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {
namespace {

template <Likelihood kLikelihood>
using Constant = std::integral_constant<Likelihood, kLikelihood>;

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// log(sinh(u) / u) and its derivative, of u ≥ 0, less u and 1 from kSmall on: as autoencoder/cpu/reconstruction.cpp has
// them.
template <class T>
struct LogSinhc {
  T value, slope;
};

template <class T>
inline constexpr T kSmall = sizeof(T) == 4 ? T(1) : T(0.5);

template <class T>
__device__ inline LogSinhc<T> log_sinhc(T u) {
  constexpr double kSeries[] = {1.0 / 6,
                                -1.0 / 180,
                                1.0 / 2835,
                                -1.0 / 37800,
                                1.0 / 467775,
                                -691.0 / 3831077250,
                                2.0 / 127702575,
                                -3617.0 / 2605132530000,
                                43867.0 / 350813659321125,
                                -174611.0 / 15313294652906250};
  constexpr int kTerms = sizeof(T) == 4 ? 7 : 10;
  if (u < kSmall<T>) {
    const T z = u * u;
    T value = T(0), slope = T(0);
#pragma unroll
    for (int k = kTerms; k > 0; --k) {
      value = std::fma(value, z, T(kSeries[k - 1]));
      slope = std::fma(slope, z, T(2 * k * kSeries[k - 1]));
    }
    return {value * z, slope * u};
  }
  const T e = std::exp(T(-2) * u), rest = T(1) - e;
  return {std::log(rest / (T(2) * u)), T(2) * e / rest - T(1) / u};
}

template <class T>
struct Element {
  T loss, d_input, d_target, d_logvar;
};

template <Likelihood kLikelihood, bool kVariance, class T>
__device__ inline Element<T> element(T x, T t, T logvar) {
  const T half = T(0.5), d = x - t;
  if constexpr (kLikelihood == Likelihood::Bernoulli) {
    const Logistic<T> s(x);
    const T limit = x < T(0) ? -t : T(1) - t;
    return {std::fma(x, limit, s.beyond_relu()), limit + s.beyond_step(), -x, T(0)};
  } else if constexpr (kLikelihood == Likelihood::ContinuousBernoulli) {
    const T u = half * std::abs(x);
    const LogSinhc<T> f = log_sinhc(u);
    const T limit = (u < kSmall<T> ? half : x < T(0) ? T(0) : T(1)) - t, slope = half * f.slope;
    return {std::fma(x, limit, f.value), limit + (x < T(0) ? -slope : slope), -x, T(0)};
  } else if constexpr (kLikelihood == Likelihood::SquaredError) {
    return {d * d, T(2) * d, T(-2) * d, T(0)};
  } else if constexpr (!kVariance) {
    return {std::fma(half * d, d, T(kHalfLog2Pi)), d, -d, T(0)};
  } else {
    const T root = finite(std::exp(-half * logvar)), scaled = d * root, square = scaled * scaled;
    return {half * (square + logvar) + T(kHalfLog2Pi), scaled * root, -(scaled * root), half * (T(1) - square)};
  }
}

// Calls f with the likelihood, and whether it has a variance, as constants: one branch for all elements of a thread,
// where all threads go the same way.
template <class F>
__device__ inline void with_likelihood(const Reconstruction& args, F f) {
  switch (args.likelihood) {
    case Likelihood::Bernoulli: return f(Constant<Likelihood::Bernoulli>(), std::false_type());
    case Likelihood::ContinuousBernoulli: return f(Constant<Likelihood::ContinuousBernoulli>(), std::false_type());
    case Likelihood::SquaredError: return f(Constant<Likelihood::SquaredError>(), std::false_type());
    case Likelihood::Gaussian:
      if (args.logvar.data != nullptr) return f(Constant<Likelihood::Gaussian>(), std::true_type());
      return f(Constant<Likelihood::Gaussian>(), std::false_type());
  }
}

// Of a quad.
template <class T, class Access>
struct Operands {
  typename Access::template Loaded<T> input, target, logvar, weight;

  __device__ void load(const Reconstruction& args, const Spot& spot, const Quad& quad) {
    input = Access::template load<T>(spot, args.input, quad);
    target = Access::template load<T>(spot, args.target, quad);
    if (args.logvar.data != nullptr) logvar = Access::template load<T>(spot, args.logvar, quad);
    if (args.weight.data != nullptr) weight = Access::template load<T>(spot, args.weight, quad);
  }

  // Where the weight is zero nothing counts, whatever it is.
  __device__ void apply_weight(const Reconstruction& args, T* values) const {
    if (args.weight.data == nullptr) return;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) values[i] = T(weight[i]) == T(0) ? T(0) : T(weight[i]) * values[i];
  }
};

template <class Access>
using ForwardWork = Share<Access, 2, 1024>;

// A block takes a tile: two loads an element, 8 bytes in float, 4 in 16 bits.
template <class T, class Access>
__global__ void __launch_bounds__(kTileThreads, ForwardWork<Access>::kThreads / kTileThreads)
    forward_kernel(const __grid_constant__ ReconstructionForward args) {
  constexpr int kQuads = ForwardWork<Access>::kQuads;
  __shared__ T shared[kRowTile];
  const TileRange<Access> range(args.tiles, blockIdx.x);
  const int passes = range.template passes<kQuads>();
  for (int pass = 0; pass < passes; ++pass) {
    Operands<T, Access> in[kQuads] = {};
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Quad quad = range.quad(pass * kQuads + j);
      if (!quad.empty()) in[j].load(args, Spot(args.shape, quad.first), quad);
    }
    T losses[kQuads][kQuad];
    with_likelihood(args, [&](auto likelihood, auto variance) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          losses[j][i] = element<likelihood, variance, T>(in[j].input[i], in[j].target[i], in[j].logvar[i]).loss;
        }
      }
    });
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Quad quad = range.quad(pass * kQuads + j);
      in[j].apply_weight(args, losses[j]);
      if (args.loss_elements) Arithmetic<Access, T>::store(args.loss, kDType<T>, quad.first, quad, losses[j]);
      else range.put(quad, losses[j], shared);
    }
  }
  if (!args.loss_elements) range.sum(shared, static_cast<T*>(args.loss));
}

// One quad a thread, and all threads that there can be: 0.9 of the time of two.
template <class Access>
using BackwardWork = Share<Access, 1, 2048>;

template <class T, class Access>
__global__ void __launch_bounds__(kFlatThreads, BackwardWork<Access>::kThreads / kFlatThreads)
    backward_kernel(const __grid_constant__ ReconstructionBackward args) {
  using Sums = Arithmetic<Access, T>;
  constexpr int kQuads = BackwardWork<Access>::kQuads;
  const FlatRange<kQuads> range(args.shape.numel);
  Operands<T, Access> in[kQuads] = {};
  typename Sums::template Loaded<T> grad[kQuads] = {};
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad = range.quad(j);
    if (quad.empty()) continue;
    const Spot spot(args.shape, quad.first);
    in[j].load(args, spot, quad);
    grad[j] = Sums::template load<T>(spot, args.grad, quad);
  }
  with_likelihood(args, [&](auto likelihood, auto variance) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Quad quad = range.quad(j);
      T d_input[kQuad], d_target[kQuad], d_logvar[kQuad], d_weight[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const Element<T> e = element<likelihood, variance, T>(in[j].input[i], in[j].target[i], in[j].logvar[i]);
        const T g = T(args.grad_scale) * grad[j][i];
        d_input[i] = g * e.d_input;
        d_target[i] = g * e.d_target;
        d_logvar[i] = g * e.d_logvar;
        d_weight[i] = g * e.loss;
      }
      if (args.grad_input != nullptr) {
        in[j].apply_weight(args, d_input);
        Access::store(args.grad_input, args.grad_input_dtype, quad.first, quad, d_input);
      }
      if (args.grad_target != nullptr) {
        in[j].apply_weight(args, d_target);
        Access::store(args.grad_target, args.grad_target_dtype, quad.first, quad, d_target);
      }
      if (args.grad_logvar != nullptr) {
        in[j].apply_weight(args, d_logvar);
        Sums::store(args.grad_logvar, kDType<T>, quad.first, quad, d_logvar);
      }
      if (args.grad_weight != nullptr) Sums::store(args.grad_weight, kDType<T>, quad.first, quad, d_weight);
    }
  });
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class Access>
bool operands_fit(const Reconstruction& args) {
  return Access::fits(args.shape, args.input) && Access::fits(args.shape, args.target) &&
         Access::fits(args.shape, args.logvar) && Access::fits(args.shape, args.weight);
}

template <class Access>
bool fits(const ReconstructionForward& args) {
  return operands_fit<Access>(args) && TileRange<Access>::fits(args.tiles) && is_aligned<float, kQuad>(args.loss);
}

template <class Access>
bool fits(const ReconstructionBackward& args) {
  return operands_fit<Access>(args) && Vectors<float>::fits(args.shape, args.grad) &&
         Access::fits(args.grad_input, args.grad_input_dtype) &&
         Access::fits(args.grad_target, args.grad_target_dtype) && is_aligned<float, kQuad>(args.grad_logvar) &&
         is_aligned<float, kQuad>(args.grad_weight);
}

template <class T, class Access>
void start(const ReconstructionForward& args, void* stream) {
  launch(forward_kernel<T, Access>, dim3(grid_size(args.tiles.count)), kTileThreads, 0, stream, args);
}

template <class T, class Access>
void start(const ReconstructionBackward& args, void* stream) {
  const dim3 grid = FlatRange<BackwardWork<Access>::kQuads>::grid(args.shape.numel);
  launch(backward_kernel<T, Access>, grid, kFlatThreads, 0, stream, args);
}

template <class Args>
void run(const Args& args, void* stream) {
  with_access(
      args.compute_double, [&](auto access) { return fits<decltype(access)>(args); },
      [&](auto type, auto access) { start<decltype(type), decltype(access)>(args, stream); });
}

}  // namespace

void reconstruction_forward(const ReconstructionForward& args, void* stream) { run(args, stream); }

void reconstruction_backward(const ReconstructionBackward& args, void* stream) { run(args, stream); }

}  // namespace lect11ext::cuda
