// Reparametrised Gaussian sampling and its KL divergence, in one pass.
//
//   z = mean + e^(logvar/2) · ε            ε the Philox normals of `key`, element i of z taking normal number i
//   kl = ½ (expm1(d) − d + u²·e^−prior_logvar)      d = logvar − prior_logvar, u = mean − prior_mean; no prior: N(0, I)
//
// With `samples` = K, z has K dense copies of the shape, one after the other. logvar is clamped to [low, high] first.
// Elements of kl below `free_bits` (where that is positive) are raised to it and have no gradient.
#pragma once

#include "autoencoder/row_tiles.h"
#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

// e^x − 1 − x = x²·Σ x^(k−2) / k! of |x| < kSmallRemainder in double, where the difference is one of nearly equal
// numbers.
constexpr double kSmallRemainder = 0.5;
constexpr int kRemainderTerms = 16;  // 0.5^16 / 16! is below double's rounding

struct Gaussian {
  Shape shape;
  View mean, logvar;              // read; any type and strides
  View prior_mean, prior_logvar;  // read; data null for the standard normal
  bool compute_double;            // arithmetic in double, else in float
  const int64_t* key;             // [seed, offset]; on the device of the kernel
  int64_t samples;
  double free_bits;
  bool clamps;  // whether [low, high] was asked for
  double low, high;
  bool streams;  // whether the outputs are too large to stay in a CPU's caches
};

struct GaussianForward : Gaussian {
  RowTiles tiles{0, 0};
  void* z;  // written: samples × numel, dense
  DType z_dtype;
  void* kl;          // written, float or double: numel elements if kl_elements, else one sum a row where tiles_per_row
  bool kl_elements;  // is 1, else one sum a tile
};

struct GaussianBackward : Gaussian {
  RowTiles tiles{0, 0};
  Shape grad_z_shape;  // [samples, *shape]
  View grad_z;         // read; data null where undefined
  View grad_kl;        // read; over `shape`, stride 0 where the reduction summed; data null where undefined
  double grad_kl_scale;
  void *grad_mean, *grad_logvar, *grad_prior_mean, *grad_prior_logvar;  // written: dense, over `shape`; null: not asked
  DType grad_mean_dtype, grad_logvar_dtype;  // the priors' gradients are in the type of the arithmetic
};

LECT11EXT_CPU_KERNEL(gaussian_forward_kernel, GaussianForward)
LECT11EXT_CPU_KERNEL(gaussian_backward_kernel, GaussianBackward)

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void gaussian_forward(const GaussianForward& args, void* stream);
void gaussian_backward(const GaussianBackward& args, void* stream);

}  // namespace lect11ext::cuda
