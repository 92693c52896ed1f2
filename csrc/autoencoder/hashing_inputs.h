// The checks of the arguments of semantic hashing's ops, with symbolic sizes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>

#include "autoencoder/hashing.h"
#include "common/tensors.h"

namespace lect11ext::hashing {

using at::Tensor;

inline void check_threshold(double threshold) {
  TORCH_CHECK_VALUE(!std::isnan(threshold), "threshold must be a number, but got nan");
}

inline void check_binarize(const Tensor& input, double threshold) {
  check_dtype("input", input);
  check_threshold(threshold);
}

// Whether `a > threshold` is asked of integers.
inline bool is_integer(at::ScalarType type) {
  return type == at::kByte || type == at::kChar || type == at::kShort || type == at::kInt || type == at::kLong;
}

inline void check_pack(const Tensor& input, double threshold) {
  const auto type = input.scalar_type();
  TORCH_CHECK_TYPE(is_kernel_dtype(type) || is_integer(type) || type == at::kBool,
                   "input must be float32, float64, bfloat16, float16, bool or a signed integer or uint8, but got ",
                   type);
  TORCH_CHECK_VALUE(input.dim() > 0, "input must have at least one dimension, the bits of a code, but got a scalar");
  check_threshold(threshold);
}

inline void check_codes_type(const char* name, const Tensor& codes) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, name, " must be uint8, packed bits, but got ",
                   codes.scalar_type());
}

inline bool is_unpack_type(at::ScalarType type) {
  return is_kernel_dtype(type) || is_integer(type) || type == at::kBool;
}

// How many bits are wanted.
inline c10::SymInt check_unpack(const Tensor& codes, const std::optional<c10::SymInt>& num_bits, at::ScalarType dtype) {
  check_codes_type("codes", codes);
  TORCH_CHECK_VALUE(codes.dim() > 0, "codes must have at least one dimension, the bytes of a code, but got a scalar");
  TORCH_CHECK_TYPE(is_unpack_type(dtype),
                   "dtype must be float32, float64, bfloat16, float16, bool or a signed integer or uint8, but got ",
                   dtype);
  const c10::SymInt most = codes.sym_size(-1) * 8;
  if (!num_bits.has_value()) return most;
  TORCH_CHECK_VALUE(*num_bits >= 0 && *num_bits <= most, "num_bits must be from 0 to ", most,
                    ", the bits of a code, but got ", *num_bits);
  return *num_bits;
}

// Both tensors of codes, the first dimensions apart.
inline void check_pair(const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  check_codes_type(a_name, a);
  check_codes_type(b_name, b);
  check_same_device({{a_name, &a}, {b_name, &b}});
  TORCH_CHECK_VALUE(a.sym_size(-1) == b.sym_size(-1), b_name, " must have as many bytes a code as ", a_name, ", ",
                    a.sym_size(-1), ", but got ", b.sym_size(-1));
  TORCH_CHECK_VALUE(a.sym_size(-1) <= kMostCodeBytes, a_name, " must have at most ", kMostCodeBytes,
                    " bytes a code, but got ", a.sym_size(-1));
}

// The size of all distances.
inline c10::SymDimVector check_distance(const Tensor& a, const Tensor& b) {
  for (const auto& [name, codes] : {std::pair("a", &a), std::pair("b", &b)}) {
    TORCH_CHECK_VALUE(codes->dim() >= 2, name, " must have at least two dimensions, [*, codes, bytes], but got shape ",
                      codes->sym_sizes());
  }
  check_pair("a", a, "b", b);
  const int64_t dims = std::max(a.dim(), b.dim());
  c10::SymDimVector size(static_cast<size_t>(dims));
  const auto batch = [&](const Tensor& t, int64_t d) {
    const int64_t own = d - (dims - t.dim());
    return own < 0 ? c10::SymInt(1) : t.sym_size(own);
  };
  for (int64_t d = 0; d < dims - 2; ++d) {
    const c10::SymInt of_a = batch(a, d), of_b = batch(b, d);
    TORCH_CHECK_VALUE(of_a == of_b || of_a == 1 || of_b == 1, "the batches of a and b must broadcast, but got shapes ",
                      a.sym_sizes(), " and ", b.sym_sizes());
    size[d] = of_a == 1 ? of_b : of_a;
  }
  size[dims - 2] = a.sym_size(-2);
  size[dims - 1] = b.sym_size(-2);
  return size;
}

inline void check_search(const Tensor& query, const Tensor& codes) {
  for (const auto& [name, tensor] : {std::pair("query", &query), std::pair("codes", &codes)}) {
    TORCH_CHECK_VALUE(tensor->dim() == 2, name, " must have two dimensions, [codes, bytes], but got shape ",
                      tensor->sym_sizes());
  }
  check_pair("query", query, "codes", codes);
}

inline void check_topk(const Tensor& query, const Tensor& codes, const c10::SymInt& k) {
  check_search(query, codes);
  TORCH_CHECK_VALUE(k >= 0 && k <= codes.sym_size(0), "k must be from 0 to the number of codes, ", codes.sym_size(0),
                    ", but got ", k);
}

inline void check_radius(const Tensor& query, const Tensor& codes, int64_t radius) {
  check_search(query, codes);
  TORCH_CHECK_VALUE(radius >= 0, "radius must be nonnegative, but got ", radius);
}

}  // namespace lect11ext::hashing
