// What the parts of the ops on sparse codes share: checks of their arguments, types and sizes of their results.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/autograd.h"
#include "common/tensors.h"

namespace lect11ext::sparse_code {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_indices(const Tensor& indices) {
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
                   "indices must be int64 or int32, but got ", indices.scalar_type());
  TORCH_CHECK_VALUE(indices.dim() > 0, "indices must have at least one dimension, but got a scalar");
}

inline void check_values(const Tensor& values, const Tensor& indices) {
  check_dtype("values", values);
  check_indices(indices);
  check_shape("values", values.sym_sizes(), indices.sym_sizes(), "that of indices");
  check_same_device({{"indices", &indices}, {"values", &values}});
}

inline void check_weight(const Tensor& weight, const Tensor& indices) {
  check_dtype("weight", weight);
  check_same_device({{"indices", &indices}, {"weight", &weight}});
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have shape [atoms, features], but got ", weight.sym_sizes());
}

// All dimensions but the last as one. By a product: what has no columns has rows nevertheless.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (const int64_t size : t.sizes().slice(0, t.dim() - 1)) rows *= size;
  return rows;
}

// The sizes of indices, with another last one.
inline c10::SymDimVector size_with(const Tensor& indices, const c10::SymInt& columns) {
  c10::SymDimVector size(indices.sym_sizes().begin(), indices.sym_sizes().end());
  size.back() = columns;
  return size;
}

// `columns` is empty where any number of them fits.
inline void check_dense(const Tensor& dense, const Tensor& indices, const std::optional<c10::SymInt>& columns) {
  check_dtype("dense", dense);
  TORCH_CHECK_VALUE(dense.dim() > 0, "dense must have at least one dimension, but got a scalar");
  check_shape("dense", dense.sym_sizes(), size_with(indices, columns.value_or(dense.sym_size(-1))),
              "the rows of indices and the columns of weight");
  check_same_device({{"indices", &indices}, {"dense", &dense}});
}

inline void check_bias(const OptionalTensor& bias, const Tensor& weight, int64_t dim, const char* meaning) {
  if (!autograd::defined(bias)) return;
  check_dtype("bias", *bias);
  check_shape("bias", bias->sym_sizes(), {weight.sym_size(dim)}, meaning);
  check_same_device({{"weight", &weight}, {"bias", &*bias}});
}

inline void check_decode(const Tensor& values, const Tensor& indices, const Tensor& weight,
                         const OptionalTensor& bias) {
  check_values(values, indices);
  check_weight(weight, indices);
  check_bias(bias, weight, 1, "the columns of weight");
}

inline void check_dots(const Tensor& dense, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  check_indices(indices);
  check_weight(weight, indices);
  check_dense(dense, indices, weight.sym_size(1));
  check_bias(bias, weight, 0, "the rows of weight");
}

inline void check_outer(const Tensor& values, const Tensor& indices, const Tensor& dense, const c10::SymInt& atoms) {
  check_values(values, indices);
  check_dense(dense, indices, std::nullopt);
  TORCH_CHECK_VALUE(atoms >= 0, "atoms must be nonnegative, but got ", atoms);
}

inline void check_topk(const Tensor& input, const c10::SymInt& k) {
  check_dtype("input", input);
  TORCH_CHECK_VALUE(input.dim() > 0, "input must have at least one dimension, but got a scalar");
  TORCH_CHECK_VALUE(k >= 0 && k <= input.sym_size(-1), "k must be in [0, ", input.sym_size(-1),
                    "], the last dimension of input, but got ", k);
}

inline void check_topk_backward(const Tensor& grad_values, const Tensor& indices, const c10::SymInt& length) {
  check_values(grad_values, indices);
  TORCH_CHECK_VALUE(length >= 0, "length must be nonnegative, but got ", length);
}

inline bool rectifies(c10::string_view activation) {
  if (activation == "relu") return true;
  TORCH_CHECK_VALUE(activation == "identity", "activation must be one of 'relu', 'identity', but got '", activation,
                    "'");
  return false;
}

inline at::ScalarType promoted_type(const Tensor& a, const Tensor& b, const OptionalTensor& c = std::nullopt) {
  const auto type = c10::promoteTypes(a.scalar_type(), b.scalar_type());
  return autograd::defined(c) ? c10::promoteTypes(type, c->scalar_type()) : type;
}

}  // namespace lect11ext::sparse_code
