// What the parts of gaussian_rsample_kl on PyTorch's side share: its arguments, their checks, and the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "autoencoder/reduction.h"
#include "common/autograd.h"
#include "common/random_ops.h"
#include "common/tensors.h"

namespace lect11ext::gaussian {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline Reduction parse_reduction(c10::string_view name) { return lect11ext::parse_reduction(name, "sum_latent"); }

constexpr int64_t kMostSamples = (int64_t(1) << 31) - 1;  // more, times the elements, soon leave 64 bits

// The arguments that are the same for the forward and its derivatives.
struct Inputs {
  const Tensor &mean, &logvar;
  const OptionalTensor &prior_mean, &prior_logvar;
  const Tensor& key;
  const std::optional<c10::SymInt>& num_samples;
  double free_bits;
  std::optional<double> logvar_min, logvar_max;
  Reduction reduction;

  bool has_prior() const { return autograd::defined(prior_mean); }
  bool clamps() const { return logvar_min.has_value() || logvar_max.has_value(); }
  at::ScalarType z_dtype() const { return c10::promoteTypes(mean.scalar_type(), logvar.scalar_type()); }

  at::ScalarType compute_dtype() const {
    at::ScalarType type = c10::promoteTypes(z_dtype(), at::kFloat);
    if (has_prior()) {
      type = c10::promoteTypes(type, prior_mean->scalar_type());
      type = c10::promoteTypes(type, prior_logvar->scalar_type());
    }
    return type;
  }

  c10::SymDimVector z_size() const {
    c10::SymDimVector size;
    if (num_samples.has_value()) size.push_back(*num_samples);
    size.append(mean.sym_sizes().begin(), mean.sym_sizes().end());
    return size;
  }

  c10::SymDimVector kl_size() const { return reduced_size(mean.sym_sizes(), reduction); }

  void check() const {
    check_operands();
    check_key(key, mean.device());
  }

  // All but the key, so that a call that fails draws none.
  void check_operands() const {
    check_dtype("mean", mean);
    check_dtype("logvar", logvar);
    check_shape("logvar", logvar.sym_sizes(), mean.sym_sizes(), "that of mean");
    check_same_device({{"mean", &mean}, {"logvar", &logvar}});
    TORCH_CHECK_VALUE(has_prior() == autograd::defined(prior_logvar),
                      "prior_mean and prior_logvar must be given "
                      "together, but got only ",
                      has_prior() ? "prior_mean" : "prior_logvar");
    if (has_prior()) {
      check_same_device({{"mean", &mean}, {"prior_mean", &*prior_mean}, {"prior_logvar", &*prior_logvar}});
      check_prior("prior_mean", *prior_mean);
      check_prior("prior_logvar", *prior_logvar);
    }
    TORCH_CHECK_VALUE(!num_samples.has_value() || *num_samples >= 1, "num_samples must be at least 1, but got ",
                      *num_samples);
    // A symbolic number is left alone: the bound would become one of an exported program.
    const auto known = num_samples.has_value() ? num_samples->maybe_as_int() : std::nullopt;
    TORCH_CHECK_VALUE(!known || *known <= kMostSamples, "num_samples must be at most 2**31 - 1, but got ", *known);
    TORCH_CHECK_VALUE(free_bits >= 0, "free_bits must be nonnegative, but got ", free_bits);
    TORCH_CHECK_VALUE(!clamps() || logvar_min.value_or(-INFINITY) <= logvar_max.value_or(INFINITY),
                      "logvar_range must be (low, high) with low <= high, but got (", logvar_min.value_or(-INFINITY),
                      ", ", logvar_max.value_or(INFINITY), ")");
    TORCH_CHECK_VALUE(mean.dim() > 0 || reduction == Reduction::None || reduction == Reduction::Sum,
                      "mean must have at least one dimension for this reduction, but got a scalar");
  }

  // Incoming gradients of the outputs, where defined.
  void check_gradients(const OptionalTensor& grad_z, const OptionalTensor& grad_kl) const {
    if (autograd::defined(grad_z)) {
      check_shape("grad_z", grad_z->sym_sizes(), z_size(), "that of z");
      check_same_device({{"mean", &mean}, {"grad_z", &*grad_z}});
    }
    if (autograd::defined(grad_kl)) {
      check_shape("grad_kl", grad_kl->sym_sizes(), kl_size(), "that of kl");
      check_same_device({{"mean", &mean}, {"grad_kl", &*grad_kl}});
    }
  }

 private:
  void check_prior(const char* name, const Tensor& prior) const {
    check_dtype(name, prior);
    check_broadcast(name, prior, "mean", mean);
  }
};

inline Tensor expand_grad_kl(const Tensor& grad_kl, const Inputs& in) {
  return expand_reduced(grad_kl, in.mean.sym_sizes(), in.reduction);
}

// The schema's argument list, shared by all registrations of the two ops.
#define GAUSSIAN_PARAMETERS                                                                                      \
  const Tensor &mean, const Tensor &logvar, const OptionalTensor &prior_mean, const OptionalTensor &prior_logvar, \
      const Tensor &key, std::optional<c10::SymInt> num_samples, double free_bits,                              \
      std::optional<double> logvar_min, std::optional<double> logvar_max, c10::string_view reduction
#define GAUSSIAN_INPUTS                                                                             \
  Inputs {                                                                                          \
    mean, logvar, prior_mean, prior_logvar, key, num_samples, free_bits, logvar_min, logvar_max,    \
        parse_reduction(reduction)                                                                  \
  }
#define GAUSSIAN_ARGUMENTS \
  mean, logvar, prior_mean, prior_logvar, key, num_samples, free_bits, logvar_min, logvar_max, reduction

using ForwardSignature = std::tuple<Tensor, Tensor>(GAUSSIAN_PARAMETERS);
using BackwardSignature = Gradients(const OptionalTensor&, const OptionalTensor&, GAUSSIAN_PARAMETERS,
                                    std::array<bool, 4>);

}  // namespace lect11ext::gaussian
