// The loss between what a decoder returns, x, and what it should have, t: negative log-likelihoods in nats.
//
//   bernoulli             max(x, 0) − x·t + log(1 + e^−|x|)          x are logits; also for t between 0 and 1
//   continuous_bernoulli  x·(½ − t) + log(sinh(x/2) / (x/2))         the same, normalised over t in [0, 1]
//   gaussian              ½ ((x − t)²·e^−logvar + logvar + log 2π)   logvar absent: 0
//   squared_error         (x − t)²
//
// In the continuous Bernoulli the normalising −log C(x) and the Bernoulli's terms have cancelled. An element counts
// `weight` times; where that is zero it does not count at all, whatever it is.
#pragma once

#include "autoencoder/row_tiles.h"
#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

enum class Likelihood : int8_t { Bernoulli, ContinuousBernoulli, Gaussian, SquaredError };

// Of log(sinh(u) / u) in powers of u², from the first on: (−1)^(k+1) ζ(2k) / (k π^2k). CUDA has a copy of its own,
// since device code cannot index a constant of the host.
inline constexpr double kLogSinhcSeries[] = {1.0 / 6,
                                             -1.0 / 180,
                                             1.0 / 2835,
                                             -1.0 / 37800,
                                             1.0 / 467775,
                                             -691.0 / 3831077250,
                                             2.0 / 127702575,
                                             -3617.0 / 2605132530000,
                                             43867.0 / 350813659321125,
                                             -174611.0 / 15313294652906250};

struct Reconstruction {
  Shape shape;
  View input, target;   // read; any type and strides
  View logvar, weight;  // read; data null where absent
  bool compute_double;  // arithmetic in double, else in float
  Likelihood likelihood;
  bool streams;  // whether the outputs are too large to stay in a CPU's caches
};

struct ReconstructionForward : Reconstruction {
  RowTiles tiles;
  void* loss;          // written, float or double: numel elements if loss_elements, else one sum a row where
  bool loss_elements;  // tiles_per_row is 1, else one sum a tile
};

struct ReconstructionBackward : Reconstruction {
  RowTiles tiles;
  View grad;  // read; over `shape`, stride 0 where the reduction summed
  double grad_scale;
  void *grad_input, *grad_target, *grad_logvar, *grad_weight;  // written: dense, over `shape`; null: not asked for
  DType grad_input_dtype, grad_target_dtype;  // the other two gradients are in the type of the arithmetic
};

LECT11EXT_CPU_KERNEL(reconstruction_forward_kernel, ReconstructionForward)
LECT11EXT_CPU_KERNEL(reconstruction_backward_kernel, ReconstructionBackward)

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void reconstruction_forward(const ReconstructionForward& args, void* stream);
void reconstruction_backward(const ReconstructionBackward& args, void* stream);

}  // namespace lect11ext::cuda
