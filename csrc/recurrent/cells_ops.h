// The cells as functions; what they compute stands in lstm_cell.h and gru_cell.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lect11ext {

// (h', c', gates); no gates unless `save_gates`.
std::tuple<at::Tensor, at::Tensor, std::optional<at::Tensor>> lstm_cell(
    const at::Tensor& input, const at::Tensor& h, const at::Tensor& c, const at::Tensor& weight_ih,
    const at::Tensor& weight_hh, const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
    c10::string_view candidate, std::optional<double> grad_clip, bool save_gates);

// (h', gates); no gates unless `save_gates`.
std::tuple<at::Tensor, std::optional<at::Tensor>> gru_cell(
    const at::Tensor& input, const at::Tensor& h, const at::Tensor& weight_ih, const at::Tensor& weight_hh,
    const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh, bool reset_after,
    std::optional<double> grad_clip, bool save_gates);

// The identity, whose gradient is clamped to ±limit.
at::Tensor clip_gradient(const at::Tensor& x, double limit);

// The steps over packed weights: inference alone, on the CPU.
std::tuple<at::Tensor, at::Tensor> lstm_cell_packed(
    const at::Tensor& input, const at::Tensor& h, const at::Tensor& c, const at::Tensor& packed_ih,
    const at::Tensor& packed_hh, const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
    c10::string_view candidate);
at::Tensor gru_cell_packed(const at::Tensor& input, const at::Tensor& h, const at::Tensor& packed_ih,
                           const at::Tensor& packed_hh, const std::optional<at::Tensor>& bias_ih,
                           const std::optional<at::Tensor>& bias_hh, bool reset_after);

}  // namespace lect11ext
