// The ops on sparse codes as functions; what they compute stands in sparse_code.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lect11ext {

std::tuple<at::Tensor, at::Tensor> topk_code(const at::Tensor& input, c10::SymInt k, c10::string_view activation);
// The gradient of topk_code, before that of its activation: zeros of `length` columns, and grad_values at the indices.
at::Tensor topk_code_backward(const at::Tensor& grad_values, const at::Tensor& indices, c10::SymInt length);

at::Tensor sparse_decode(const at::Tensor& values, const at::Tensor& indices, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias);
at::Tensor sparse_dots(const at::Tensor& dense, const at::Tensor& indices, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);
at::Tensor sparse_outer(const at::Tensor& values, const at::Tensor& indices, const at::Tensor& dense,
                        c10::SymInt atoms);

}  // namespace lect11ext
