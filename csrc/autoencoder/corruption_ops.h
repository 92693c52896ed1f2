// The corrupting op as a function; what it computes stands in corruption.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lect11ext {

// No second output unless `return_mask`.
std::tuple<at::Tensor, std::optional<at::Tensor>> corrupt(const at::Tensor& input, const at::Tensor& key,
                                                          c10::string_view kind, double amount, double low, double high,
                                                          bool return_mask);

// The derivative to the input, of any order: what was replaced has none.
at::Tensor corrupt_backward(const at::Tensor& grad, const at::Tensor& key, c10::string_view kind, double amount);

}  // namespace lect11ext
