// What the parts of dot-product attention on PyTorch's side share: arguments, checks, the ops' signatures.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/autograd.h"

namespace lect11ext::attention_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor>;                    // output, lse
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of query, key, value, attn_mask
using GradientMask = std::array<bool, 4>;

// The arguments of the forward, which every derivative is given too. Equations: dot_product.h.
struct Inputs {
  const Tensor &query, &key, &value;
  const OptionalTensor &attn_mask, &alibi_slopes, &cu_seqlens_q, &cu_seqlens_k, &dropout_key;
  double dropout_p;
  std::optional<double> scale;
  std::optional<int64_t> window_left, window_right;
  bool bottom_right;
  std::optional<double> softcap;

  c10::SymInt batch() const { return query.sym_size(0); }
  c10::SymInt heads() const { return query.sym_size(1); }
  c10::SymInt queries() const { return query.sym_size(2); }
  c10::SymInt keys() const { return key.sym_size(2); }
  bool has_mask() const { return autograd::defined(attn_mask); }
  bool has_float_mask() const { return has_mask() && attn_mask->scalar_type() != at::kBool; }
  bool has_starts() const { return autograd::defined(cu_seqlens_q); }
  // Of sums and of lse.
  at::ScalarType compute_type() const { return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  double scale_or_default() const;

  // Throws where an argument does not fit, and names it.
  void check() const;
  void check_lse_like(const char* name, const OptionalTensor& tensor) const;
  void check_output_like(const char* name, const OptionalTensor& tensor) const;
};

// Tangents of the inputs, undefined where there are none.
struct Tangents {
  const OptionalTensor &query, &key, &value, &attn_mask;

  void check(const Inputs& in) const;
};

// The schemas' shared arguments, in C++, and an Inputs made of them.
#define ATTENTION_SCHEMA                                                                                             \
  "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? cu_seqlens_q, "          \
  "Tensor? cu_seqlens_k, Tensor? dropout_key, float dropout_p, float? scale, int? window_left, int? window_right, " \
  "bool bottom_right, float? softcap"
#define ATTENTION_PARAMETERS                                                                                    \
  const Tensor &query, const Tensor &key, const Tensor &value, const OptionalTensor &attn_mask,                 \
      const OptionalTensor &alibi_slopes, const OptionalTensor &cu_seqlens_q, const OptionalTensor &cu_seqlens_k, \
      const OptionalTensor &dropout_key, double dropout_p, std::optional<double> scale,                         \
      std::optional<int64_t> window_left, std::optional<int64_t> window_right, bool bottom_right,               \
      std::optional<double> softcap
#define ATTENTION_ARGUMENTS                                                                                           \
  query, key, value, attn_mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, dropout_key, dropout_p, scale, window_left, \
      window_right, bottom_right, softcap
#define ATTENTION_INPUTS \
  Inputs { ATTENTION_ARGUMENTS }
#define ATTENTION_ARGUMENTS_OF(in)                                                                               \
  in.query, in.key, in.value, in.attn_mask, in.alibi_slopes, in.cu_seqlens_q, in.cu_seqlens_k, in.dropout_key,   \
      in.dropout_p, in.scale, in.window_left, in.window_right, in.bottom_right, in.softcap
#define ATTENTION_TANGENT_PARAMETERS                                                               \
  const OptionalTensor &query_t, const OptionalTensor &key_t, const OptionalTensor &value_t,       \
      const OptionalTensor &attn_mask_t
#define ATTENTION_TANGENTS \
  Tangents { query_t, key_t, value_t, attn_mask_t }

using ForwardSignature = Outputs(ATTENTION_PARAMETERS);
using BackwardSignature = Gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_lse,
                                    ATTENTION_PARAMETERS, const Tensor& output, const Tensor& lse, GradientMask mask);
using TangentSignature = Outputs(ATTENTION_PARAMETERS, const Tensor& output, const Tensor& lse,
                                 ATTENTION_TANGENT_PARAMETERS);
using BackwardTangentSignature = Gradients(
    const OptionalTensor& grad_output, const OptionalTensor& grad_lse, ATTENTION_PARAMETERS, const Tensor& output,
    const Tensor& lse, const OptionalTensor& grad_output_t, const OptionalTensor& grad_lse_t,
    ATTENTION_TANGENT_PARAMETERS, const Tensor& output_t, const Tensor& lse_t, GradientMask mask);

// The ops through the dispatcher.
Outputs call_forward(const Inputs& in);
Gradients call_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,
                        const Tensor& output, const Tensor& lse, GradientMask mask);
Outputs call_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Tangents& tangents);
// What the backward and its tangent are given beside the inputs.
struct Directions {
  const OptionalTensor &grad_output, &grad_lse, &grad_output_t, &grad_lse_t;
  Tangents tangents;
  const Tensor &output_t, &lse_t;
};
Gradients call_backward_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Directions& along,
                                GradientMask mask);
// Which elements dropout keeps: bool [B, H, L, S].
void check_dropout_mask(const Tensor& key, c10::SymIntArrayRef size, double p);
Tensor call_dropout_mask(const Tensor& key, c10::SymIntArrayRef size, double p);

// The ops' definitions in differentiable ATen, for derivatives of third order and beyond, and for what kernels do not
// cover. They hold [B, H, L, S].
Outputs composite_forward(const Inputs& in);
Gradients composite_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,
                             GradientMask mask);
Outputs composite_tangent(const Inputs& in, const Tangents& tangents);
Gradients composite_backward_tangent(const Inputs& in, const Directions& along, GradientMask mask);

}  // namespace lect11ext::attention_op
