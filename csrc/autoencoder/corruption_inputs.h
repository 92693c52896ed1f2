// What the parts of corrupt on PyTorch's side share: its arguments and their checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "common/random_ops.h"
#include "common/tensors.h"

namespace lect11ext::corruption {

using at::Tensor;

enum class Kind { Gaussian, Masking, SaltAndPepper };

inline Kind parse_kind(c10::string_view name) {
  if (name == "gaussian") return Kind::Gaussian;
  if (name == "masking") return Kind::Masking;
  if (name == "salt_and_pepper") return Kind::SaltAndPepper;
  TORCH_CHECK_VALUE(false, "kind must be one of 'gaussian', 'masking', 'salt_and_pepper', but got '", name, "'");
}

struct Inputs {
  const Tensor& input;
  const char* name;  // the argument's
  Kind kind;
  double amount;

  void check(const Tensor& key) const {
    check_operands();
    check_key(key, input.device());
  }

  // All but the key, so that a call that fails draws none.
  void check_operands() const {
    check_dtype(name, input);
    if (kind == Kind::Gaussian) {
      TORCH_CHECK_VALUE(amount >= 0 && std::isfinite(amount),
                        "amount must be nonnegative and finite (the standard deviation), but got ", amount);
    } else {
      TORCH_CHECK_VALUE(amount >= 0 && amount <= 1, "amount must be between 0 and 1 (a probability), but got ", amount);
    }
  }

  bool is_double_stream() const { return kind == Kind::Gaussian && input.scalar_type() == at::kDouble; }

  // How many words of 32 bits are below it: those replace.
  uint64_t threshold() const { return static_cast<uint64_t>(std::nearbyint(amount * 0x1p32)); }
};

}  // namespace lect11ext::corruption
