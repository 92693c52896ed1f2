// Checks of dot-product attention's arguments, and its ops through the dispatcher.
#include "attention/dot_product_inputs.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <limits>

#include "common/ops.h"
#include "common/random_ops.h"
#include "common/tensors.h"

namespace lect11ext::attention_op {
namespace {

void check_rank(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, name, " must be 4-D ([batch, heads, positions, columns]), but got ",
                    tensor.dim(), "-D");
}

void check_size(const char* name, const Tensor& tensor, int64_t dim, const c10::SymInt& expected, const char* meaning) {
  TORCH_CHECK_VALUE(tensor.sym_size(dim) == expected, name, " must have size ", expected, " (", meaning,
                    ") in dimension ", dim, ", but got shape ", tensor.sym_sizes());
}

void check_type(const char* name, const Tensor& tensor, const Tensor& query) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == query.scalar_type(), name, " must have the type of query, ",
                   query.scalar_type(), ", but got ", tensor.scalar_type());
}

void check_probability(const char* name, double p) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, name, " must be in [0, 1], but got ", p);
}

// Where a sequence of packed ones begins, and at last where the last one ends.
void check_starts(const char* name, const Tensor& starts, const c10::SymInt& total) {
  TORCH_CHECK_TYPE(starts.scalar_type() == at::kLong || starts.scalar_type() == at::kInt, name,
                   " must be int32 or int64, but got ", starts.scalar_type());
  TORCH_CHECK_VALUE(starts.dim() == 1 && starts.sym_size(0) >= 1, name, " must have shape [sequences + 1], but got ",
                    starts.sym_sizes());
  if (!starts.is_cpu()) return;  // a look at the values would wait for the device
  const Tensor values = starts.to(at::kLong).contiguous();
  const int64_t* data = values.const_data_ptr<int64_t>();
  const int64_t n = values.numel();
  TORCH_CHECK_VALUE(data[0] == 0 && data[n - 1] == total, name, " must begin with 0 and end with the positions, ",
                    total, ", but got ", data[0], " and ", data[n - 1]);
  for (int64_t i = 1; i < n; ++i) {
    TORCH_CHECK_VALUE(data[i] >= data[i - 1], name, " must not descend, but got ", data[i - 1], " before ", data[i]);
  }
}

}  // namespace

double Inputs::scale_or_default() const {
  if (scale.has_value()) return *scale;
  const int64_t columns = query.sym_size(3).guard_int(__FILE__, __LINE__);
  return columns == 0 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(columns));
}

void Inputs::check() const {
  check_rank("query", query);
  check_rank("key", key);
  check_rank("value", value);
  dtype_of(query, "query");
  check_type("key", key, query);
  check_type("value", value, query);
  check_same_device({{"query", &query}, {"key", &key}, {"value", &value}});
  check_size("key", key, 0, batch(), "the batch of query");
  check_size("value", value, 0, batch(), "the batch of query");
  check_size("key", key, 3, query.sym_size(3), "the columns of query");
  check_size("value", value, 1, key.sym_size(1), "the heads of key");
  check_size("value", value, 2, keys(), "the positions of key");
  const c10::SymInt kv_heads = key.sym_size(1);
  TORCH_CHECK_VALUE(kv_heads == heads() || (kv_heads > 0 && heads() % kv_heads == 0),
                    "key must have a number of heads that divides those of query, ", heads(), ", but got ", kv_heads);
  if (has_mask()) {
    const Tensor& mask = *attn_mask;
    check_same_device({{"query", &query}, {"attn_mask", &mask}});
    const auto type = mask.scalar_type();
    const bool wide = type == at::kFloat && query.scalar_type() != at::kDouble;
    TORCH_CHECK_TYPE(type == at::kBool || type == query.scalar_type() || wide,
                     "attn_mask must be bool, float32 or of query's type, ", query.scalar_type(), ", but got ", type);
    TORCH_CHECK_VALUE(mask.dim() == 4, "attn_mask must be 4-D here, but got ", mask.dim(), "-D");
    const c10::SymInt sizes[] = {batch(), heads(), queries(), keys()};
    for (int64_t d = 0; d < 4; ++d) {
      TORCH_CHECK_VALUE(mask.sym_size(d) == 1 || mask.sym_size(d) == sizes[d],
                        "attn_mask must broadcast to [batch, heads, queries, keys] = [", sizes[0], ", ", sizes[1], ", ",
                        sizes[2], ", ", sizes[3], "], but got ", mask.sym_sizes());
    }
  }
  if (autograd::defined(alibi_slopes)) {
    const Tensor& slopes = *alibi_slopes;
    check_same_device({{"query", &query}, {"alibi_slopes", &slopes}});
    TORCH_CHECK_TYPE(slopes.scalar_type() == at::kFloat, "alibi_slopes must be float32, but got ",
                     slopes.scalar_type());
    const bool fits = (slopes.dim() == 1 && slopes.sym_size(0) == heads()) ||
                      (slopes.dim() == 2 && slopes.sym_size(0) == batch() && slopes.sym_size(1) == heads());
    TORCH_CHECK_VALUE(fits, "alibi_slopes must have shape [heads] or [batch, heads], [", batch(), ", ", heads(),
                      "], but got ", slopes.sym_sizes());
  }
  TORCH_CHECK_VALUE(has_starts() == autograd::defined(cu_seqlens_k),
                    "cu_seqlens_q and cu_seqlens_k must be given together");
  if (has_starts()) {
    check_same_device({{"query", &query}, {"cu_seqlens_q", &*cu_seqlens_q}, {"cu_seqlens_k", &*cu_seqlens_k}});
    TORCH_CHECK_VALUE(batch() == 1, "query must have a batch of 1 where there are cu_seqlens, but got ", batch());
    TORCH_CHECK_VALUE(!has_mask(), "attn_mask must be None where there are cu_seqlens");
    check_starts("cu_seqlens_q", *cu_seqlens_q, queries());
    check_starts("cu_seqlens_k", *cu_seqlens_k, keys());
    TORCH_CHECK_VALUE(cu_seqlens_q->sym_size(0) == cu_seqlens_k->sym_size(0),
                      "cu_seqlens_q and cu_seqlens_k must be as long as one another, but got ",
                      cu_seqlens_q->sym_size(0), " and ", cu_seqlens_k->sym_size(0));
  }
  check_probability("dropout_p", dropout_p);
  TORCH_CHECK_VALUE(dropout_p == 0 || autograd::defined(dropout_key), "dropout_key must be given with a dropout_p");
  if (dropout_p > 0) check_key(*dropout_key, query.device(), "dropout_key");
  // Beyond it a float has no room for its product with anything.
  const double most = compute_type() == at::kDouble ? std::numeric_limits<double>::max() : 1e30;
  TORCH_CHECK_VALUE(!scale.has_value() || std::abs(*scale) <= most, "scale must be from ", -most, " to ", most,
                    " for a query of ", query.scalar_type(), ", but got ", *scale);
  TORCH_CHECK_VALUE(!softcap.has_value() || (*softcap > 0 && *softcap <= most), "softcap must be positive and at most ",
                    most, " for a query of ", query.scalar_type(), ", but got ", *softcap);
  for (const auto& [name, side] : {std::pair("window_left", window_left), std::pair("window_right", window_right)}) {
    TORCH_CHECK_VALUE(!side.has_value() || *side >= 0, name, " must be nonnegative, but got ", *side);
  }
}

void Inputs::check_lse_like(const char* name, const OptionalTensor& tensor) const {
  if (!autograd::defined(tensor)) return;
  check_same_device({{"query", &query}, {name, &*tensor}});
  TORCH_CHECK_TYPE(tensor->scalar_type() == compute_type(), name, " must be ", compute_type(), ", but got ",
                   tensor->scalar_type());
  check_shape(name, tensor->sym_sizes(), {batch(), heads(), queries()}, "[batch, heads, queries]");
}

void Inputs::check_output_like(const char* name, const OptionalTensor& tensor) const {
  if (!autograd::defined(tensor)) return;
  check_same_device({{"query", &query}, {name, &*tensor}});
  check_type(name, *tensor, query);
  check_shape(name, tensor->sym_sizes(), {batch(), heads(), queries(), value.sym_size(3)},
              "[batch, heads, queries, columns of value]");
}

void Tangents::check(const Inputs& in) const {
  const auto like = [](const char* name, const OptionalTensor& tangent, const Tensor& primal) {
    if (!autograd::defined(tangent)) return;
    check_same_device({{"query", &primal}, {name, &*tangent}});
    TORCH_CHECK_TYPE(tangent->scalar_type() == primal.scalar_type(), name, " must be ", primal.scalar_type(),
                     ", but got ", tangent->scalar_type());
    check_shape(name, tangent->sym_sizes(), primal.sym_sizes(), "that of its primal");
  };
  like("query_t", query, in.query);
  like("key_t", key, in.key);
  like("value_t", value, in.value);
  TORCH_CHECK_VALUE(!autograd::defined(attn_mask) || in.has_float_mask(),
                    "attn_mask_t must be None without an additive attn_mask");
  if (in.has_float_mask()) like("attn_mask_t", attn_mask, *in.attn_mask);
}

Outputs call_forward(const Inputs& in) {
  static const auto op = find_op<ForwardSignature>("lect11ext::attention");
  return op.call(ATTENTION_ARGUMENTS_OF(in));
}

Gradients call_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,
                        const Tensor& output, const Tensor& lse, GradientMask mask) {
  static const auto op = find_op<BackwardSignature>("lect11ext::attention_backward");
  return op.call(grad_output, grad_lse, ATTENTION_ARGUMENTS_OF(in), output, lse, mask);
}

Outputs call_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Tangents& t) {
  static const auto op = find_op<TangentSignature>("lect11ext::attention_tangent");
  return op.call(ATTENTION_ARGUMENTS_OF(in), output, lse, t.query, t.key, t.value, t.attn_mask);
}

Gradients call_backward_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Directions& along,
                                GradientMask mask) {
  static const auto op = find_op<BackwardTangentSignature>("lect11ext::attention_backward_tangent");
  const Tangents& t = along.tangents;
  return op.call(along.grad_output, along.grad_lse, ATTENTION_ARGUMENTS_OF(in), output, lse, along.grad_output_t,
                 along.grad_lse_t, t.query, t.key, t.value, t.attn_mask, along.output_t, along.lse_t, mask);
}

void check_dropout_mask(const Tensor& key, c10::SymIntArrayRef size, double p) {
  check_key(key, key.device());
  TORCH_CHECK_VALUE(size.size() > 0, "size must have a dimension, of keys, but got none");
  for (const auto& n : size) TORCH_CHECK_VALUE(n >= 0, "size must be nonnegative, but got ", size);
  check_probability("p", p);
}

Tensor call_dropout_mask(const Tensor& key, c10::SymIntArrayRef size, double p) {
  static const auto op =
      find_op<Tensor(const Tensor&, c10::SymIntArrayRef, double)>("lect11ext::attention_dropout_mask");
  return op.call(key, size, p);
}

}  // namespace lect11ext::attention_op
