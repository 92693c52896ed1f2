// What the parts of reconstruction_loss on PyTorch's side share: its arguments, their checks, and the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>

#include "autoencoder/reconstruction.h"
#include "autoencoder/reduction.h"
#include "common/autograd.h"
#include "common/tensors.h"

namespace lect11ext::reconstruction {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline Likelihood parse_likelihood(c10::string_view name) {
  if (name == "bernoulli") return Likelihood::Bernoulli;
  if (name == "continuous_bernoulli") return Likelihood::ContinuousBernoulli;
  if (name == "gaussian") return Likelihood::Gaussian;
  if (name == "squared_error") return Likelihood::SquaredError;
  TORCH_CHECK_VALUE(false,
                    "likelihood must be one of 'bernoulli', 'continuous_bernoulli', 'gaussian', 'squared_error', but "
                    "got '",
                    name, "'");
}

inline Reduction parse_reduction(c10::string_view name) { return lect11ext::parse_reduction(name, "sum_features"); }

struct Inputs {
  const Tensor &input, &target;
  const OptionalTensor &logvar, &weight;
  Likelihood likelihood;
  Reduction reduction;

  bool has_logvar() const { return autograd::defined(logvar); }
  bool has_weight() const { return autograd::defined(weight); }

  at::ScalarType compute_dtype() const {
    at::ScalarType type = c10::promoteTypes(input.scalar_type(), target.scalar_type());
    if (has_logvar()) type = c10::promoteTypes(type, logvar->scalar_type());
    if (has_weight()) type = c10::promoteTypes(type, weight->scalar_type());
    return c10::promoteTypes(type, at::kFloat);
  }

  c10::SymDimVector loss_size() const { return reduced_size(input.sym_sizes(), reduction); }

  void check() const {
    check_dtype("input", input);
    check_dtype("target", target);
    check_shape("target", target.sym_sizes(), input.sym_sizes(), "that of input");
    check_same_device({{"input", &input}, {"target", &target}});
    TORCH_CHECK_VALUE(!has_logvar() || likelihood == Likelihood::Gaussian,
                      "logvar must be None for this likelihood, but got a tensor; it belongs to 'gaussian'");
    if (has_logvar()) check_like_input("logvar", *logvar);
    if (has_weight()) check_like_input("weight", *weight);
    TORCH_CHECK_VALUE(input.dim() > 0 || reduction == Reduction::None || reduction == Reduction::Sum,
                      "input must have at least one dimension for this reduction, but got a scalar");
  }

  void check_gradient(const Tensor& grad) const {
    check_shape("grad", grad.sym_sizes(), loss_size(), "that of the loss");
    check_same_device({{"input", &input}, {"grad", &grad}});
  }

 private:
  void check_like_input(const char* name, const Tensor& tensor) const {
    check_dtype(name, tensor);
    check_same_device({{"input", &input}, {name, &tensor}});
    check_broadcast(name, tensor, "input", input);
  }
};

// The schema's argument list, shared by all registrations of the two ops.
#define RECONSTRUCTION_PARAMETERS                                                                      \
  const Tensor &input, const Tensor &target, const OptionalTensor &logvar, const OptionalTensor &weight, \
      c10::string_view likelihood, c10::string_view reduction
#define RECONSTRUCTION_INPUTS \
  Inputs { input, target, logvar, weight, parse_likelihood(likelihood), parse_reduction(reduction) }
#define RECONSTRUCTION_ARGUMENTS input, target, logvar, weight, likelihood, reduction

using ForwardSignature = Tensor(RECONSTRUCTION_PARAMETERS);
using BackwardSignature = Gradients(const Tensor&, RECONSTRUCTION_PARAMETERS, std::array<bool, 4>);

Tensor call_forward(RECONSTRUCTION_PARAMETERS);

}  // namespace lect11ext::reconstruction
