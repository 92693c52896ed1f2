#include "autoencoder/variational.h"

#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/cuda/row_sums.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/normal.cuh"

namespace lect11ext::cuda {
namespace {

template <class T>
struct Element {
  T scale;                             // e^(logvar/2)
  T kl;                                // before free bits
  T d_mean, d_logvar, d_prior_logvar;  // derivatives of kl
  bool inside;                         // logvar was not clamped
};

template <bool PriorGiven, class T>
__device__ inline Element<T> element(const Gaussian& args, T mean, T raw, T prior_mean, T prior_logvar) {
  const T half = T(0.5), logvar = args.clamps ? clamp(raw, T(args.low), T(args.high)) : raw;
  Element<T> e;
  e.inside = !args.clamps || raw == logvar;
  if constexpr (PriorGiven) {
    const HalfExp<T> d = half_exp(logvar - prior_logvar);
    const T precision_root = root_exp(-prior_logvar), t = (mean - prior_mean) * precision_root;
    e.scale = root_exp(logvar);
    e.kl = half * std::fma(t, t, d.expm1_less_x);
    e.d_mean = t * precision_root;
    e.d_logvar = half * d.expm1;
    e.d_prior_logvar = -half * std::fma(t, t, d.expm1);
  } else {
    const HalfExp<T> d = half_exp(logvar);
    e.scale = d.root;
    e.kl = half * std::fma(mean, mean, d.expm1_less_x);
    e.d_mean = mean;
    e.d_logvar = half * d.expm1;
    e.d_prior_logvar = T(0);
  }
  return e;
}

// The four elements of a thread.
template <class T>
struct Operands {
  T mean[kQuad], logvar[kQuad], prior_mean[kQuad] = {}, prior_logvar[kQuad] = {};

  template <class Access, bool PriorGiven>
  __device__ void load(const Gaussian& args, const Quad& quad) {
    Access::load(args.shape, args.mean, quad.first, quad, mean);
    Access::load(args.shape, args.logvar, quad.first, quad, logvar);
    if constexpr (PriorGiven) {
      Access::load(args.shape, args.prior_mean, quad.first, quad, prior_mean);
      Access::load(args.shape, args.prior_logvar, quad.first, quad, prior_logvar);
    }
  }

  template <bool PriorGiven>
  __device__ Element<T> at(const Gaussian& args, int i) const {
    return element<PriorGiven>(args, mean[i], logvar[i], prior_mean[i], prior_logvar[i]);
  }
};

// A block takes a tile. An element costs two loads and a store of its type for each sample (12 bytes in float, 6 in
// bf16), about as long as the noise and the exponential take to compute; the KL goes through shared memory.
template <class T, class Access, bool PriorGiven>
__global__ void __launch_bounds__(kThreads, Access::kBlocks - PriorGiven)
    forward_kernel(const __grid_constant__ GaussianForward args) {
  __shared__ T shared[kTile];
  const TileRange range(args.tiles, blockIdx.x);
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  const T free_bits = T(args.free_bits);

  // One pass, and a second for one thread where the tile begins inside a quad.
  for (int64_t first = range.first_quad(); first < range.end; first += kTile) {
    const Quad quad(first, range.begin, range.end);
    Operands<T> operands;
    operands.template load<Access, PriorGiven>(args, quad);
    T scale[kQuad], kl[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const Element<T> e = operands.template at<PriorGiven>(args, i);
      scale[i] = e.scale;
      kl[i] = args.free_bits > 0 && e.kl < free_bits ? free_bits : e.kl;
    }
    if (args.kl_elements) {
      Arithmetic<Access, T>::store(args.kl, kDType<T>, first, quad, kl);
    } else {
      range.put(quad, kl, shared);
    }
    for (int64_t k = 0; k < args.samples; ++k) {
      const int64_t number = k * args.shape.numel + first;
      T z[kQuad];
      four_normals<Access::kAligned>(seed, offset, number, z);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) z[i] = std::fma(scale[i], z[i], operands.mean[i]);
      Access::store(args.z, args.z_dtype, number, quad, z);
    }
  }
  if (!args.kl_elements) range.sum(shared, static_cast<T*>(args.kl));
}

// Nothing is summed over elements here, so a block takes 1024 consecutive ones whatever their rows. An element costs
// two loads, one of grad_z for each sample, and two stores: 20 bytes in float, 10 in bf16. The noise is drawn again.
template <class T, class Access, bool PriorGiven>
__global__ void __launch_bounds__(kThreads, Access::kBlocks - PriorGiven)
    backward_kernel(const __grid_constant__ GaussianBackward args) {
  const int64_t numel = args.shape.numel;
  const int64_t first = kQuad * (int64_t{kThreads} * blockIdx.x + threadIdx.x);
  if (first >= numel) return;
  const Quad quad(first, 0, numel);
  Operands<T> operands;
  operands.template load<Access, PriorGiven>(args, quad);
  const bool sampled = args.grad_z.data != nullptr, diverges = args.grad_kl.data != nullptr;
  T weight[kQuad] = {}, plain[kQuad] = {}, noisy[kQuad] = {};  // the last two: sums of grad_z and of grad_z·ε
  if (diverges) Arithmetic<Access, T>::load(args.shape, args.grad_kl, first, quad, weight);
  if (sampled) {
    const bool noise_needed = args.grad_logvar != nullptr;
    const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
    for (int64_t k = 0; k < args.samples; ++k) {
      T grad[kQuad], noise[kQuad] = {};
      Access::load(args.grad_z_shape, args.grad_z, k * numel + first, quad, grad);
      if (noise_needed) four_normals<Access::kAligned>(seed, offset, k * numel + first, noise);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        plain[i] += grad[i];
        noisy[i] = std::fma(grad[i], noise[i], noisy[i]);
      }
    }
  }
  T d_mean[kQuad], d_logvar[kQuad], d_prior_mean[kQuad], d_prior_logvar[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const Element<T> e = operands.template at<PriorGiven>(args, i);
    d_mean[i] = plain[i];
    d_prior_mean[i] = d_prior_logvar[i] = T(0);
    d_logvar[i] = sampled ? T(0.5) * e.scale * noisy[i] : T(0);
    // Skipped, not weighted by zero, which makes NaN of an infinite factor.
    if (diverges && (args.free_bits <= 0 || e.kl >= T(args.free_bits))) {
      const T w = T(args.grad_kl_scale) * weight[i];
      d_mean[i] = std::fma(w, e.d_mean, d_mean[i]);
      d_logvar[i] = std::fma(w, e.d_logvar, d_logvar[i]);
      if constexpr (PriorGiven) {
        d_prior_mean[i] = -(w * e.d_mean);
        d_prior_logvar[i] = w * e.d_prior_logvar;
      }
    }
    if (!e.inside) d_logvar[i] = T(0);
  }
  if (args.grad_mean != nullptr) Access::store(args.grad_mean, args.grad_mean_dtype, first, quad, d_mean);
  if (args.grad_logvar != nullptr) Access::store(args.grad_logvar, args.grad_logvar_dtype, first, quad, d_logvar);
  if constexpr (PriorGiven) {
    if (args.grad_prior_mean != nullptr) {
      Arithmetic<Access, T>::store(args.grad_prior_mean, kDType<T>, first, quad, d_prior_mean);
    }
    if (args.grad_prior_logvar != nullptr) {
      Arithmetic<Access, T>::store(args.grad_prior_logvar, kDType<T>, first, quad, d_prior_logvar);
    }
  }
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class S>
bool operands_fit(const Gaussian& args) {
  return Vectors<S>::fits(args.shape, args.mean) && Vectors<S>::fits(args.shape, args.logvar) &&
         Vectors<S>::fits(args.shape, args.prior_mean) && Vectors<S>::fits(args.shape, args.prior_logvar);
}

template <class S>
bool fits(const GaussianForward& args) {
  return operands_fit<S>(args) && Vectors<S>::fits(args.z, args.z_dtype) && is_aligned<float, kQuad>(args.kl);
}

template <class S>
bool fits(const GaussianBackward& args) {
  return operands_fit<S>(args) && Vectors<S>::fits(args.grad_z_shape, args.grad_z) &&
         Vectors<float>::fits(args.shape, args.grad_kl) && Vectors<S>::fits(args.grad_mean, args.grad_mean_dtype) &&
         Vectors<S>::fits(args.grad_logvar, args.grad_logvar_dtype) && is_aligned<float, kQuad>(args.grad_prior_mean) &&
         is_aligned<float, kQuad>(args.grad_prior_logvar);
}

template <class T, class Access, bool PriorGiven>
auto kernel_for(const GaussianForward&) {
  return forward_kernel<T, Access, PriorGiven>;
}

template <class T, class Access, bool PriorGiven>
auto kernel_for(const GaussianBackward&) {
  return backward_kernel<T, Access, PriorGiven>;
}

template <bool PriorGiven, class Args>
void run(const Args& args, int64_t blocks, void* stream) {
  auto kernel = kernel_for<float, Elements, PriorGiven>(args);
  if (args.compute_double) kernel = kernel_for<double, Elements, PriorGiven>(args);
  else if (fits<float>(args)) kernel = kernel_for<float, Vectors<float>, PriorGiven>(args);
  else if (fits<__nv_bfloat16>(args)) kernel = kernel_for<float, Vectors<__nv_bfloat16>, PriorGiven>(args);
  else if (fits<__half>(args)) kernel = kernel_for<float, Vectors<__half>, PriorGiven>(args);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, args);
}

}  // namespace

void gaussian_forward(const GaussianForward& args, void* stream) {
  if (args.tiles.count == 0) return;
  args.prior_mean.data != nullptr ? run<true>(args, args.tiles.count, stream)
                                  : run<false>(args, args.tiles.count, stream);
}

void gaussian_backward(const GaussianBackward& args, void* stream) {
  if (args.shape.numel == 0) return;
  const int64_t blocks = (args.shape.numel + kTile - 1) / kTile;
  args.prior_mean.data != nullptr ? run<true>(args, blocks, stream) : run<false>(args, blocks, stream);
}

}  // namespace lect11ext::cuda
