#include "autoencoder/variational.h"

#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/cuda/row_sums.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/normal.cuh"

namespace lect11ext::cuda {
namespace {

// e^(x/2), e^x − 1 and e^x − 1 − x. Near zero the last two are a polynomial, so that neither cancels.
template <class T>
struct HalfExp {
  T root, expm1, expm1_less_x;
};

__device__ inline HalfExp<float> half_exp(float x) {
  constexpr float kCoefficients[] = {0.5f,           0.166666672f,    0.041666735f,    0.00833331048f,
                                     0.00138854515f, 0.000198440292f, 2.53548242e-05f, 2.77224763e-06f};
  const float root = std::exp(0.5f * x), tail = polynomial(kCoefficients, x) * x * x;
  const float square_less_1 = fmaf(root, root, -1.0f);
  const bool is_near = std::abs(x) <= 1.0f;
  return {root, is_near ? x + tail : square_less_1, is_near ? tail : square_less_1 - x};
}

__device__ inline HalfExp<double> half_exp(double x) {
  const double expm1 = std::expm1(x);
  double series = 1.0;
#pragma unroll
  for (int k = kRemainderTerms; k > 2; --k) series = fma(series, x * (1.0 / k), 1.0);
  return {std::exp(0.5 * x), expm1, std::abs(x) < kSmallRemainder ? 0.5 * series * x * x : expm1 - x};
}

template <class T>
struct Element {
  T scale;                             // e^(logvar/2)
  T kl;                                // before free bits
  T d_mean, d_logvar, d_prior_logvar;  // derivatives of kl
};

template <bool PriorGiven, class T>
__device__ inline Element<T> element(T mean, T logvar, T prior_mean, T prior_logvar) {
  const T half = T(0.5);
  if constexpr (PriorGiven) {
    const HalfExp<T> d = half_exp(logvar - prior_logvar);
    const T precision_root = finite(std::exp(-half * prior_logvar)), t = (mean - prior_mean) * precision_root;
    return {std::exp(half * logvar), half * std::fma(t, t, d.expm1_less_x), t * precision_root, half * d.expm1,
            -half * std::fma(t, t, d.expm1)};
  } else {
    const HalfExp<T> d = half_exp(logvar);
    return {d.root, half * std::fma(mean, mean, d.expm1_less_x), mean, half * d.expm1, T(0)};
  }
}

// Of a quad.
template <class T, class Access, bool PriorGiven>
struct Operands {
  typename Access::template Loaded<T> mean, logvar, prior_mean, prior_logvar;

  __device__ void load(const Gaussian& args, const Spot& spot, const Quad& quad) {
    mean = Access::template load<T>(spot, args.mean, quad);
    logvar = Access::template load<T>(spot, args.logvar, quad);
    if constexpr (PriorGiven) {
      prior_mean = Access::template load<T>(spot, args.prior_mean, quad);
      prior_logvar = Access::template load<T>(spot, args.prior_logvar, quad);
    }
  }

  // Of logvar, clamped where that was asked for: all threads branch alike, which costs the others nothing.
  __device__ void clamped(const Gaussian& args, T* out) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) out[i] = logvar[i];
    if (!args.clamps) return;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) out[i] = clamp(out[i], T(args.low), T(args.high));
  }

  __device__ Element<T> at(int i, T clamped) const {
    if constexpr (PriorGiven) return element<true, T>(mean[i], clamped, prior_mean[i], prior_logvar[i]);
    else return element<false, T>(mean[i], clamped, T(0), T(0));
  }
};

// A prior doubles the operands.
template <class Access, bool PriorGiven>
using ForwardWork = Share<Access, 2, PriorGiven ? 640 : 1024>;

// A block takes a tile. An element costs two loads and a store of its type for each sample (12 bytes in float, 6 in
// bf16), and Philox and Box–Muller; the KL goes through shared memory.
template <class T, class Access, bool PriorGiven>
__global__ void __launch_bounds__(kTileThreads, ForwardWork<Access, PriorGiven>::kThreads / kTileThreads)
    forward_kernel(const __grid_constant__ GaussianForward args) {
  constexpr int kQuads = ForwardWork<Access, PriorGiven>::kQuads;
  __shared__ T shared[kRowTile];
  const TileRange<Access> range(args.tiles, blockIdx.x);
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  const int passes = range.template passes<kQuads>();
  const int64_t total = args.samples * args.shape.numel;
  const T free_bits = T(args.free_bits);
  for (int pass = 0; pass < passes; ++pass) {
    Operands<T, Access, PriorGiven> in[kQuads];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Quad quad = range.quad(pass * kQuads + j);
      if (!quad.empty()) in[j].load(args, Spot(args.shape, quad.first), quad);
    }
    // Of the first sample before operands are used: it is drawn while they come.
    T noise[kQuads][kQuad];
    const auto draw = [&](int64_t sample) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        four_normals<Access::kAligned>(seed, offset, sample + range.quad(pass * kQuads + j).first, noise[j]);
      }
    };
    if (total > 0) draw(0);
    T scale[kQuads][kQuad];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Quad quad = range.quad(pass * kQuads + j);
      T logvar[kQuad], kl[kQuad];
      in[j].clamped(args, logvar);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const Element<T> e = in[j].at(i, logvar[i]);
        scale[j][i] = e.scale;
        kl[i] = e.kl;
      }
      if (free_bits > T(0)) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) kl[i] = kl[i] < free_bits ? free_bits : kl[i];
      }
      if (args.kl_elements) Arithmetic<Access, T>::store(args.kl, kDType<T>, quad.first, quad, kl);
      else range.put(quad, kl, shared);
    }
    for (int64_t sample = 0; sample < total;) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const Quad quad = range.quad(pass * kQuads + j);
        T z[kQuad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) z[i] = std::fma(scale[j][i], noise[j][i], T(in[j].mean[i]));
        Access::store(args.z, args.z_dtype, sample + quad.first, quad, z);
      }
      sample += args.shape.numel;
      if (sample < total) draw(sample);
    }
  }
  if (!args.kl_elements) range.sum(shared, static_cast<T*>(args.kl));
}

// One quad a thread, and more threads: 0.95 of the time of two.
template <class Access, bool PriorGiven>
using BackwardWork = Share<Access, 1, PriorGiven ? 1024 : 1536>;

// An element costs two loads, one of grad_z for each sample, and two stores: 20 bytes in float, 10 in bf16. The noise
// is drawn again.
template <class T, class Access, bool PriorGiven>
__global__ void __launch_bounds__(kFlatThreads, BackwardWork<Access, PriorGiven>::kThreads / kFlatThreads)
    backward_kernel(const __grid_constant__ GaussianBackward args) {
  using Sums = Arithmetic<Access, T>;
  constexpr int kQuads = BackwardWork<Access, PriorGiven>::kQuads;
  const int64_t numel = args.shape.numel;
  const FlatRange<kQuads> range(numel);
  const bool sampled = args.grad_z.data != nullptr, diverges = args.grad_kl.data != nullptr;
  const T free_bits = T(args.free_bits);
  Operands<T, Access, PriorGiven> in[kQuads];
  typename Sums::template Loaded<T> weight[kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad = range.quad(j);
    if (quad.empty()) continue;
    const Spot spot(args.shape, quad.first);
    in[j].load(args, spot, quad);
    weight[j] = load_or<Sums>(T(0), spot, args.grad_kl, quad);
  }
  T plain[kQuads][kQuad] = {}, noisy[kQuads][kQuad] = {};  // sums of grad_z and of grad_z·ε
  if (sampled) {
    const bool noise_needed = args.grad_logvar != nullptr;
    const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
    for (int64_t sample = 0; sample < args.samples * numel; sample += numel) {
      typename Access::template Loaded<T> grad[kQuads];
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const Quad quad = range.quad(j);
        grad[j] = Access::template repeat<T>(0);
        if (quad.empty()) continue;
        grad[j] = Access::template load<T>(Spot(args.grad_z_shape, sample + quad.first), args.grad_z, quad);
      }
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        T noise[kQuad] = {};
        if (noise_needed) four_normals<Access::kAligned>(seed, offset, sample + range.quad(j).first, noise);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          plain[j][i] += grad[j][i];
          noisy[j][i] = std::fma(T(grad[j][i]), noise[i], noisy[j][i]);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad = range.quad(j);
    T d_mean[kQuad], d_logvar[kQuad], d_prior_mean[kQuad], d_prior_logvar[kQuad], logvar[kQuad];
    in[j].clamped(args, logvar);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const Element<T> e = in[j].at(i, logvar[i]);
      d_mean[i] = plain[j][i];
      d_prior_mean[i] = d_prior_logvar[i] = T(0);
      d_logvar[i] = sampled ? T(0.5) * e.scale * noisy[j][i] : T(0);
      // Skipped, not weighted by zero, which makes NaN of an infinite factor.
      if (diverges && (free_bits <= T(0) || e.kl >= free_bits)) {
        const T w = T(args.grad_kl_scale) * weight[j][i];
        d_mean[i] = std::fma(w, e.d_mean, d_mean[i]);
        d_logvar[i] = std::fma(w, e.d_logvar, d_logvar[i]);
        if constexpr (PriorGiven) {
          d_prior_mean[i] = -(w * e.d_mean);
          d_prior_logvar[i] = w * e.d_prior_logvar;
        }
      }
    }
    if (args.clamps) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (!(logvar[i] == T(in[j].logvar[i]))) d_logvar[i] = T(0);
      }
    }
    if (args.grad_mean != nullptr) Access::store(args.grad_mean, args.grad_mean_dtype, quad.first, quad, d_mean);
    if (args.grad_logvar != nullptr) {
      Access::store(args.grad_logvar, args.grad_logvar_dtype, quad.first, quad, d_logvar);
    }
    if constexpr (PriorGiven) {
      if (args.grad_prior_mean != nullptr) {
        Sums::store(args.grad_prior_mean, kDType<T>, quad.first, quad, d_prior_mean);
      }
      if (args.grad_prior_logvar != nullptr) {
        Sums::store(args.grad_prior_logvar, kDType<T>, quad.first, quad, d_prior_logvar);
      }
    }
  }
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class Access>
bool operands_fit(const Gaussian& args) {
  return Access::fits(args.shape, args.mean) && Access::fits(args.shape, args.logvar) &&
         Access::fits(args.shape, args.prior_mean) && Access::fits(args.shape, args.prior_logvar);
}

template <class Access>
bool fits(const GaussianForward& args) {
  return operands_fit<Access>(args) && TileRange<Access>::fits(args.tiles) && Access::fits(args.z, args.z_dtype) &&
         is_aligned<float, kQuad>(args.kl);
}

template <class Access>
bool fits(const GaussianBackward& args) {
  return operands_fit<Access>(args) && Access::fits(args.grad_z_shape, args.grad_z) &&
         Vectors<float>::fits(args.shape, args.grad_kl) && Access::fits(args.grad_mean, args.grad_mean_dtype) &&
         Access::fits(args.grad_logvar, args.grad_logvar_dtype) && is_aligned<float, kQuad>(args.grad_prior_mean) &&
         is_aligned<float, kQuad>(args.grad_prior_logvar);
}

template <class T, class Access, bool PriorGiven>
void start(const GaussianForward& args, void* stream) {
  launch(forward_kernel<T, Access, PriorGiven>, dim3(grid_size(args.tiles.count)), kTileThreads, 0, stream, args);
}

template <class T, class Access, bool PriorGiven>
void start(const GaussianBackward& args, void* stream) {
  const dim3 grid = FlatRange<BackwardWork<Access, PriorGiven>::kQuads>::grid(args.shape.numel);
  launch(backward_kernel<T, Access, PriorGiven>, grid, kFlatThreads, 0, stream, args);
}

template <bool PriorGiven, class Args>
void run(const Args& args, void* stream) {
  with_access(
      args.compute_double, [&](auto access) { return fits<decltype(access)>(args); },
      [&](auto type, auto access) { start<decltype(type), decltype(access), PriorGiven>(args, stream); });
}

}  // namespace

void gaussian_forward(const GaussianForward& args, void* stream) {
  if (args.tiles.count == 0) return;
  args.prior_mean.data != nullptr ? run<true>(args, stream) : run<false>(args, stream);
}

void gaussian_backward(const GaussianBackward& args, void* stream) {
  if (args.shape.numel == 0) return;
  args.prior_mean.data != nullptr ? run<true>(args, stream) : run<false>(args, stream);
}

}  // namespace lect11ext::cuda
