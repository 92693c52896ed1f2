// What the parts of penalized_activation on PyTorch's side share: its arguments, their checks, and the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>

#include "autoencoder/penalties.h"
#include "common/autograd.h"
#include "common/tensors.h"

namespace lect11ext::penalties {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

inline Activation parse_activation(c10::string_view name) {
  if (name == "identity") return Activation::Identity;
  if (name == "relu") return Activation::Relu;
  if (name == "sigmoid") return Activation::Sigmoid;
  if (name == "softplus") return Activation::Softplus;
  if (name == "tanh") return Activation::Tanh;
  TORCH_CHECK_VALUE(false, "activation must be one of 'identity', 'relu', 'sigmoid', 'softplus', 'tanh', but got '",
                    name, "'");
}

inline Penalty parse_penalty(c10::string_view name) {
  if (name == "l1") return Penalty::L1;
  if (name == "contractive") return Penalty::Contractive;
  if (name == "mean") return Penalty::Mean;
  TORCH_CHECK_VALUE(false, "penalty must be one of 'l1', 'contractive', 'mean', but got '", name, "'");
}

struct Inputs {
  const Tensor& input;
  const OptionalTensor& scale;
  Activation activation;
  Penalty penalty;

  bool is_scaled() const { return autograd::defined(scale); }

  at::ScalarType compute_dtype() const {
    const auto type = c10::promoteTypes(input.scalar_type(), at::kFloat);
    return is_scaled() ? c10::promoteTypes(type, scale->scalar_type()) : type;
  }

  c10::SymInt cols() const { return input.sym_size(-1); }

  // Of the sums: one for each row, or for each column.
  c10::SymDimVector sums_size() const {
    if (penalty == Penalty::Mean) return {cols()};
    const auto size = input.sym_sizes();
    return c10::SymDimVector(size.begin(), size.end() - 1);
  }

  // What a mean is divided by: no rows at all have a mean of 0.
  c10::SymInt rows() const {
    c10::SymInt rows = 1;
    for (int64_t d = 0; d + 1 < input.dim(); ++d) rows = rows * input.sym_size(d);
    return rows.max(1);
  }

  void check() const {
    check_dtype("input", input);
    TORCH_CHECK_VALUE(input.dim() > 0, "input must have at least one dimension, but got a scalar");
    if (!is_scaled()) return;
    TORCH_CHECK_VALUE(penalty != Penalty::Mean, "scale must be None for the penalty 'mean', but got a tensor");
    check_dtype("scale", *scale);
    check_same_device({{"input", &input}, {"scale", &*scale}});
    const auto size = cols();
    check_shape("scale", scale->sym_sizes(), c10::SymIntArrayRef(&size, 1), "one value for each column of input");
  }

  void check_gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_penalty) const {
    if (autograd::defined(grad_output)) {
      check_shape("grad_output", grad_output->sym_sizes(), input.sym_sizes(), "that of output");
      check_same_device({{"input", &input}, {"grad_output", &*grad_output}});
    }
    if (autograd::defined(grad_penalty)) {
      check_shape("grad_penalty", grad_penalty->sym_sizes(), sums_size(), "that of the penalty");
      check_same_device({{"input", &input}, {"grad_penalty", &*grad_penalty}});
    }
  }

  // The penalty's gradient as a view over the shape of input.
  Tensor expand_grad(const Tensor& grad_penalty) const {
    return (penalty == Penalty::Mean ? grad_penalty : grad_penalty.unsqueeze(-1)).expand_symint(input.sym_sizes());
  }
};

#define PENALTY_PARAMETERS \
  const Tensor &input, const OptionalTensor &scale, c10::string_view activation, c10::string_view penalty
#define PENALTY_INPUTS \
  Inputs { input, scale, parse_activation(activation), parse_penalty(penalty) }
#define PENALTY_ARGUMENTS input, scale, activation, penalty

using ForwardSignature = Pair(PENALTY_PARAMETERS);
using BackwardSignature = Pair(const OptionalTensor&, const OptionalTensor&, PENALTY_PARAMETERS, std::array<bool, 2>);

Pair call_forward(PENALTY_PARAMETERS);

}  // namespace lect11ext::penalties
