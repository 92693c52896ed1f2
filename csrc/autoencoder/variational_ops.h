// The fused sampling op as a function; what it computes stands in variational.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lect11ext {

std::tuple<at::Tensor, at::Tensor> gaussian_rsample_kl(
    const at::Tensor& mean, const at::Tensor& logvar, const std::optional<at::Tensor>& prior_mean,
    const std::optional<at::Tensor>& prior_logvar, const at::Tensor& key, std::optional<c10::SymInt> num_samples,
    double free_bits, std::optional<double> logvar_min, std::optional<double> logvar_max, c10::string_view reduction);

}  // namespace lect11ext
