// The additive attention op as a function; what it computes stands in additive.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lect11ext {

// The output, and the weights where save_weights asks for them.
std::tuple<at::Tensor, std::optional<at::Tensor>> additive_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& score_weight,
    const std::optional<at::Tensor>& attn_mask, bool save_weights);

}  // namespace lect11ext
