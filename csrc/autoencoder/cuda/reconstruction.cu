#include "autoencoder/reconstruction.h"

#include "autoencoder/cuda/activation.cuh"
#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/cuda/row_sums.cuh"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {
namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// log(sinh(u) / u) and its derivative, of u ≥ 0, as autoencoder/cpu/reconstruction.cpp has them.
template <class T>
struct LogSinhc {
  T value, slope;
};

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
  if (u < (sizeof(T) == 4 ? T(1) : T(0.5))) {
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
  return {u + std::log(rest / (T(2) * u)), (T(1) + e) / rest - T(1) / u};
}

template <class T>
struct Element {
  T loss, d_input, d_target, d_logvar;
};

// The choice is the same for all threads, as in activation.cuh.
template <class T>
__device__ inline Element<T> element(const Reconstruction& args, T x, T t, T logvar) {
  const T half = T(0.5), d = x - t;
  switch (args.likelihood) {
    case Likelihood::Bernoulli: {
      const Logistic<T> s(x);
      return {std::fma(-x, t, s.softplus()), s.sigmoid() - t, -x, T(0)};
    }
    case Likelihood::ContinuousBernoulli: {
      const LogSinhc<T> f = log_sinhc(half * std::abs(x));
      const T slope = half * f.slope;
      return {std::fma(x, half - t, f.value), half - t + (x < T(0) ? -slope : slope), -x, T(0)};
    }
    case Likelihood::Gaussian: {
      if (args.logvar.data == nullptr) return {std::fma(half * d, d, T(kHalfLog2Pi)), d, -d, T(0)};
      const T root = std::exp(-half * logvar), scaled = d * root, square = scaled * scaled;
      return {half * (square + logvar) + T(kHalfLog2Pi), scaled * root, -(scaled * root), half * (T(1) - square)};
    }
    default: return {d * d, T(2) * d, T(-2) * d, T(0)};
  }
}

// The four elements of a thread.
template <class T>
struct Operands {
  T input[kQuad], target[kQuad], logvar[kQuad] = {}, weight[kQuad];

  template <class Access>
  __device__ void load(const Reconstruction& args, const Quad& quad) {
    Access::load(args.shape, args.input, quad.first, quad, input);
    Access::load(args.shape, args.target, quad.first, quad, target);
    if (args.logvar.data != nullptr) Access::load(args.shape, args.logvar, quad.first, quad, logvar);
    if (args.weight.data != nullptr) {
      Access::load(args.shape, args.weight, quad.first, quad, weight);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) weight[i] = T(1);
    }
  }

  // Where the weight is zero nothing counts, whatever it is.
  __device__ T weighted(int i, T value) const { return weight[i] == T(0) ? T(0) : weight[i] * value; }
};

// A block takes a tile: two loads an element, 8 bytes in float, 4 in 16 bits.
template <class T, class Access>
__global__ void __launch_bounds__(kThreads, Access::kBlocks)
    forward_kernel(const __grid_constant__ ReconstructionForward args) {
  __shared__ T shared[kTile];
  const TileRange range(args.tiles, blockIdx.x);
  for (int64_t first = range.first_quad(); first < range.end; first += kTile) {
    const Quad quad(first, range.begin, range.end);
    Operands<T> in;
    in.template load<Access>(args, quad);
    T losses[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      losses[i] = in.weighted(i, element(args, in.input[i], in.target[i], in.logvar[i]).loss);
    }
    if (args.loss_elements) Arithmetic<Access, T>::store(args.loss, kDType<T>, first, quad, losses);
    else range.put(quad, losses, shared);
  }
  if (!args.loss_elements) range.sum(shared, static_cast<T*>(args.loss));
}

template <class T, class Access>
__global__ void __launch_bounds__(kThreads, Access::kBlocks)
    backward_kernel(const __grid_constant__ ReconstructionBackward args) {
  const int64_t first = kQuad * (int64_t{kThreads} * blockIdx.x + threadIdx.x);
  if (first >= args.shape.numel) return;
  const Quad quad(first, 0, args.shape.numel);
  Operands<T> in;
  in.template load<Access>(args, quad);
  T grad[kQuad], d_input[kQuad], d_target[kQuad], d_logvar[kQuad], d_weight[kQuad];
  Arithmetic<Access, T>::load(args.shape, args.grad, first, quad, grad);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const Element<T> e = element(args, in.input[i], in.target[i], in.logvar[i]);
    const T g = T(args.grad_scale) * grad[i];
    d_input[i] = in.weighted(i, g * e.d_input);
    d_target[i] = in.weighted(i, g * e.d_target);
    d_logvar[i] = in.weighted(i, g * e.d_logvar);
    d_weight[i] = g * e.loss;
  }
  using Sums = Arithmetic<Access, T>;
  if (args.grad_input != nullptr) Access::store(args.grad_input, args.grad_input_dtype, first, quad, d_input);
  if (args.grad_target != nullptr) Access::store(args.grad_target, args.grad_target_dtype, first, quad, d_target);
  if (args.grad_logvar != nullptr) Sums::store(args.grad_logvar, kDType<T>, first, quad, d_logvar);
  if (args.grad_weight != nullptr) Sums::store(args.grad_weight, kDType<T>, first, quad, d_weight);
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class S>
bool operands_fit(const Reconstruction& args) {
  return Vectors<S>::fits(args.shape, args.input) && Vectors<S>::fits(args.shape, args.target) &&
         Vectors<S>::fits(args.shape, args.logvar) && Vectors<S>::fits(args.shape, args.weight);
}

template <class S>
bool fits(const ReconstructionForward& args) {
  return operands_fit<S>(args) && is_aligned<float, kQuad>(args.loss);
}

template <class S>
bool fits(const ReconstructionBackward& args) {
  return operands_fit<S>(args) && Vectors<float>::fits(args.shape, args.grad) &&
         Vectors<S>::fits(args.grad_input, args.grad_input_dtype) &&
         Vectors<S>::fits(args.grad_target, args.grad_target_dtype) && is_aligned<float, kQuad>(args.grad_logvar) &&
         is_aligned<float, kQuad>(args.grad_weight);
}

template <class T, class Access>
auto kernel_for(const ReconstructionForward&) {
  return forward_kernel<T, Access>;
}

template <class T, class Access>
auto kernel_for(const ReconstructionBackward&) {
  return backward_kernel<T, Access>;
}

template <class Args>
void run(const Args& args, int64_t blocks, void* stream) {
  auto kernel = kernel_for<float, Elements>(args);
  if (args.compute_double) kernel = kernel_for<double, Elements>(args);
  else if (fits<float>(args)) kernel = kernel_for<float, Vectors<float>>(args);
  else if (fits<__nv_bfloat16>(args)) kernel = kernel_for<float, Vectors<__nv_bfloat16>>(args);
  else if (fits<__half>(args)) kernel = kernel_for<float, Vectors<__half>>(args);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, args);
}

}  // namespace

void reconstruction_forward(const ReconstructionForward& args, void* stream) { run(args, args.tiles.count, stream); }

void reconstruction_backward(const ReconstructionBackward& args, void* stream) {
  run(args, (args.shape.numel + kTile - 1) / kTile, stream);
}

}  // namespace lect11ext::cuda
