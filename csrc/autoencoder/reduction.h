// How the values of elements become a loss. "Rows" is the sum over the last dimension, by a name that says of what.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace lect11ext {

enum class Reduction { None, Rows, BatchMean, Sum };

inline Reduction parse_reduction(c10::string_view name, c10::string_view rows) {
  if (name == rows) return Reduction::Rows;
  if (name == "none") return Reduction::None;
  if (name == "batchmean") return Reduction::BatchMean;
  if (name == "sum") return Reduction::Sum;
  TORCH_CHECK_VALUE(false, "reduction must be one of 'none', '", rows, "', 'batchmean', 'sum', but got '", name, "'");
}

inline c10::SymDimVector reduced_size(c10::SymIntArrayRef size, Reduction reduction) {
  if (reduction == Reduction::None) return c10::SymDimVector(size.begin(), size.end());
  if (reduction == Reduction::Rows) return c10::SymDimVector(size.begin(), size.end() - 1);
  return {};
}

// The gradient of a loss as a view over its elements, before the scale of batchmean.
inline at::Tensor expand_reduced(const at::Tensor& grad, c10::SymIntArrayRef size, Reduction reduction) {
  return (reduction == Reduction::Rows ? grad.unsqueeze(-1) : grad).expand_symint(size);
}

// What batchmean divides by: an empty batch has a loss of 0.
inline c10::SymInt batch_of(const at::Tensor& input) { return input.sym_size(0).max(1); }

inline double reduction_scale(const at::Tensor& input, Reduction reduction) {
  return reduction == Reduction::BatchMean ? 1.0 / static_cast<double>(batch_of(input).guard_int(__FILE__, __LINE__))
                                           : 1.0;
}

}  // namespace lect11ext
