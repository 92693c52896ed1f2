// What the parts of additive_attention on PyTorch's side share: its arguments, their checks, and the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/autograd.h"
#include "common/tensors.h"

namespace lect11ext::additive_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, OptionalTensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Wanted = std::array<bool, 5>;

struct Inputs {
  const Tensor &query, &key, &value, &score_weight;
  const OptionalTensor& attn_mask;

  bool masked() const { return autograd::defined(attn_mask); }
  bool additive() const { return masked() && attn_mask->scalar_type() != at::kBool; }
  c10::SymInt queries() const { return query.sym_size(-2); }
  c10::SymInt keys() const { return key.sym_size(-2); }
  c10::SymInt hidden() const { return query.sym_size(-1); }
  c10::SymInt columns() const { return value.sym_size(-1); }
  at::ScalarType compute_dtype() const { return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

  // The dimensions before the matrices', broadcast as by matmul.
  c10::SymDimVector batch() const {
    const int64_t dims = std::max({query.dim(), key.dim(), value.dim()}) - 2;
    c10::SymDimVector size(dims, 1);
    for (const Tensor* tensor : {&query, &key, &value}) {
      for (int64_t d = 1; d <= tensor->dim() - 2; ++d) {
        const c10::SymInt n = tensor->sym_size(-2 - d);
        if (n != 1) size[dims - d] = n;
      }
    }
    return size;
  }

  c10::SymDimVector size(const c10::SymInt& rows, const c10::SymInt& columns) const {
    c10::SymDimVector out = batch();
    out.push_back(rows);
    out.push_back(columns);
    return out;
  }
  c10::SymDimVector output_size() const { return size(queries(), columns()); }
  c10::SymDimVector weights_size() const { return size(queries(), keys()); }

  void check() const {
    check_device_and_type();
    for (const auto& [name, tensor] :
         {std::pair("query", &query), std::pair("key", &key), std::pair("value", &value)}) {
      TORCH_CHECK_VALUE(tensor->dim() >= 2, name, " must be at least 2-D, but got ", tensor->dim(), "-D");
    }
    TORCH_CHECK_VALUE(key.sym_size(-1) == hidden(), "key must have as many columns as query, ", hidden(), ", but got ",
                      key.sym_sizes());
    TORCH_CHECK_VALUE(value.sym_size(-2) == keys(), "value must have as many rows as key, ", keys(), ", but got ",
                      value.sym_sizes());
    const c10::SymDimVector weight_size{hidden()};
    check_shape("score_weight", score_weight.sym_sizes(), weight_size, "the columns of query");
    const c10::SymDimVector size = batch();
    for (const auto& [name, tensor] :
         {std::pair("query", &query), std::pair("key", &key), std::pair("value", &value)}) {
      check_broadcast(name, *tensor, size, tensor->sym_size(-2), tensor->sym_size(-1));
    }
    if (masked()) check_broadcast("attn_mask", *attn_mask, size, queries(), keys());
  }

  void check_backward(const Tensor& grad_output, const Tensor& weights) const {
    check();
    const auto output = output_size(), kept = weights_size();
    check_shape("grad_output", grad_output.sym_sizes(), output, "that of the output");
    TORCH_CHECK_TYPE(grad_output.scalar_type() == query.scalar_type(), "grad_output must have the type of query, ",
                     query.scalar_type(), ", but got ", grad_output.scalar_type());
    TORCH_CHECK_VALUE(weights.defined(), "weights must be those of a forward with save_weights, but got none");
    check_shape("weights", weights.sym_sizes(), kept, "queries and keys");
    TORCH_CHECK_TYPE(weights.scalar_type() == compute_dtype(), "weights must be ", compute_dtype(), ", but got ",
                     weights.scalar_type());
    check_same_device({{"query", &query}, {"grad_output", &grad_output}, {"weights", &weights}});
  }

 private:
  void check_device_and_type() const {
    check_dtype("query", query);
    for (const auto& [name, tensor] :
         {std::pair("key", &key), std::pair("value", &value), std::pair("score_weight", &score_weight)}) {
      TORCH_CHECK_TYPE(tensor->scalar_type() == query.scalar_type(), name, " must have the type of query, ",
                       query.scalar_type(), ", but got ", tensor->scalar_type());
    }
    if (masked()) {
      const auto type = attn_mask->scalar_type();
      TORCH_CHECK_TYPE(type == at::kBool || type == query.scalar_type() || type == compute_dtype(),
                       "attn_mask must be bool, ", compute_dtype(), " or of the type of query, ", query.scalar_type(),
                       ", but got ", type);
    }
    check_same_device({{"query", &query}, {"key", &key}, {"value", &value}, {"score_weight", &score_weight}});
    if (masked()) check_same_device({{"query", &query}, {"attn_mask", &*attn_mask}});
  }

  static void check_broadcast(const char* name, const Tensor& tensor, const c10::SymDimVector& batch,
                              const c10::SymInt& rows, const c10::SymInt& columns) {
    c10::SymDimVector expected = batch;
    expected.push_back(rows);
    expected.push_back(columns);
    const int64_t dims = static_cast<int64_t>(expected.size());
    bool fits = tensor.dim() <= dims;
    for (int64_t d = 1; fits && d <= tensor.dim(); ++d) {
      fits = tensor.sym_size(-d) == expected[dims - d] || tensor.sym_size(-d) == 1;
    }
    TORCH_CHECK_VALUE(fits, name, " must broadcast to ", c10::SymIntArrayRef(expected), ", but got ",
                      tensor.sym_sizes());
  }
};

// The schema's argument list, shared by all registrations of the two ops.
#define ADDITIVE_PARAMETERS                                                                         \
  const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &score_weight,          \
      const OptionalTensor &attn_mask
#define ADDITIVE_ARGUMENTS query, key, value, score_weight, attn_mask

using ForwardSignature = Outputs(ADDITIVE_PARAMETERS, bool);
using BackwardSignature = Gradients(const Tensor&, ADDITIVE_PARAMETERS, const Tensor&, Wanted);

}  // namespace lect11ext::additive_op
