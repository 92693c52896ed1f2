// Dot-product attention in differentiable ATen: what derivatives of third order and beyond are made of, and what
// kernels do not cover. Equations: dot_product.h. All in the type of the sums, with all weights in memory.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "attention/dot_product.h"
#include "attention/dot_product_weights_inputs.h"

namespace lect11ext::attention_op {
namespace {

Tensor plus(const Tensor& a, const Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }
Tensor times(const Tensor& a, const Tensor& b) { return a.defined() && b.defined() ? a * b : Tensor(); }
Tensor product(const Tensor& a, const Tensor& b) { return a.defined() && b.defined() ? at::matmul(a, b) : Tensor(); }
Tensor transposed(const Tensor& a) { return a.defined() ? a.transpose(-2, -1) : a; }
Tensor sum_rows(const Tensor& a) { return a.defined() ? a.sum({-1}, /*keepdim=*/true) : a; }

// Positions within their sequences, and which sequence that is.
struct Positions {
  Tensor local, sequence;

  Positions(const c10::SymInt& count, const OptionalTensor& starts, const at::TensorOptions& options)
      : local(at::arange(count.guard_int(__FILE__, __LINE__), options)) {
    if (!autograd::defined(starts)) return;
    const Tensor bounds = starts->to(at::kLong);
    sequence = at::searchsorted(bounds.slice(0, 1), local, /*out_int32=*/false, /*right=*/true);
    local = local - bounds.index_select(0, sequence);
  }
};

// The forward, with everything that its derivatives share.
class Composite {
 public:
  explicit Composite(const Inputs& in)
      : in_(in), type_(in.compute_type()), group_(in.key.sym_size(1) == 0 ? 1 : in.heads() / in.key.sym_size(1)) {
    const auto indices = in.query.options().dtype(at::kLong).requires_grad(false);
    const Positions q(in.queries(), in.cu_seqlens_q, indices), k(in.keys(), in.cu_seqlens_k, indices);
    barred_ = find_barred(q, k);
    const Tensor dead = at::logical_not(at::logical_not(barred_).any(-2));  // keys that no query sees
    const Tensor unused = dead.unsqueeze(-1);
    query = in.query.to(type_);
    key = without(unused, spread(in.key));
    value = without(unused, spread(in.value));
    scale_ = in.scale_or_default();
    const Tensor raw = at::matmul(query, transposed(key)) * scale_;
    Tensor scores = raw;
    if (in.softcap.has_value()) {
      const Tensor ratio = at::tanh(raw / *in.softcap);
      scores = ratio * *in.softcap;
      slope_ = 1 - ratio * ratio;
      bend_ = ratio * slope_ * (-2 / *in.softcap);
    }
    if (autograd::defined(in.alibi_slopes)) {
      const Tensor slopes = in.alibi_slopes->to(type_).unsqueeze(-1).unsqueeze(-1);
      scores = scores - slopes * distance_.abs().to(type_);
    }
    if (in.has_float_mask()) scores = scores + without_bars(in.attn_mask->to(type_));
    const Tensor low = at::scalar_tensor(-INFINITY, scores.options());
    scores = at::where(barred_, low, scores);
    const bool no_keys = in.keys() == 0;
    const Tensor top = no_keys ? sum_rows(scores) : scores.detach().amax({-1}, /*keepdim=*/true);
    const Tensor shift = at::where(top.isfinite(), top, at::zeros_like(top));
    const Tensor weights = at::where(barred_, at::zeros_like(scores), at::exp(scores - shift));
    const Tensor sum = sum_rows(weights);
    const Tensor none = sum == 0;
    const Tensor safe = at::where(none, at::ones_like(sum), sum);
    p = weights / safe;
    lse = at::where(none, low, at::log(safe) + shift);
    if (in.dropout_p > 0) keep_ = find_kept(k);
    output = at::matmul(times_kept(p), value);
  }

  Tensor query, key, value;  // heads of the keys and values repeated
  Tensor p, output, lse;     // lse [B, H, L, 1]

  Tensor times_kept(const Tensor& t) const { return keep_.defined() && t.defined() ? t * keep_ : t; }
  Tensor slope(const Tensor& t) const { return slope_.defined() && t.defined() ? t * slope_ : t; }
  Tensor bend(const Tensor& t) const { return bend_.defined() && t.defined() ? t * bend_ : Tensor(); }
  Tensor scaled(const Tensor& t) const { return t.defined() ? t * scale_ : t; }

  // A tangent of the query, or of the key or value, as the members of these names are.
  Tensor of_query(const OptionalTensor& t) const { return autograd::defined(t) ? t->to(type_) : Tensor(); }
  Tensor of_key(const OptionalTensor& t) const { return autograd::defined(t) ? spread(*t) : Tensor(); }
  Tensor of_lse(const OptionalTensor& t) const { return autograd::defined(t) ? t->to(type_).unsqueeze(-1) : Tensor(); }
  Tensor of_mask(const OptionalTensor& t) const {
    return autograd::defined(t) ? without_barred(t->to(type_)) : Tensor();
  }
  Tensor without_barred(const Tensor& t) const { return at::where(barred_, at::zeros_like(p), t); }
  // Gradients as their inputs are.
  Tensor to_key(const Tensor& grad, const Tensor& like) const {
    if (!grad.defined()) return at::zeros_like(like);
    const Tensor gathered = group_ == 1 ? grad : grad.unflatten_symint(1, {like.sym_size(1), group_}).sum({2});
    return gathered.to(like.scalar_type());
  }

 private:
  Tensor spread(const Tensor& t) const {
    const Tensor wide = t.to(type_);
    if (group_ == 1) return wide;
    const auto size = wide.sym_sizes();
    return wide.unsqueeze(2).expand_symint({size[0], size[1], group_, size[2], size[3]}).flatten(1, 2);
  }
  static Tensor without(const Tensor& unused, const Tensor& t) { return at::where(unused, at::zeros_like(t), t); }
  Tensor without_bars(const Tensor& mask) const { return at::where(mask == -INFINITY, at::zeros_like(mask), mask); }

  Tensor find_barred(const Positions& q, const Positions& k) {
    Tensor diagonal = at::scalar_tensor(0, q.local.options());
    if (in_.bottom_right) {
      diagonal = in_.has_starts()
                     ? lengths(*in_.cu_seqlens_k, q) - lengths(*in_.cu_seqlens_q, q)
                     : at::scalar_tensor((in_.keys() - in_.queries()).guard_int(__FILE__, __LINE__), q.local.options());
    }
    distance_ = (q.local + diagonal).unsqueeze(-1) - k.local;
    Tensor barred = distance_ != distance_;
    if (in_.window_left.has_value()) barred = at::logical_or(barred, distance_ > *in_.window_left);
    if (in_.window_right.has_value()) barred = at::logical_or(barred, distance_ < -*in_.window_right);
    if (in_.has_starts()) barred = at::logical_or(barred, q.sequence.unsqueeze(-1) != k.sequence);
    if (in_.has_mask()) {
      const Tensor& mask = *in_.attn_mask;
      barred = at::logical_or(barred, in_.has_float_mask() ? mask == -INFINITY : at::logical_not(mask));
    }
    return barred.expand_symint({in_.batch(), in_.heads(), in_.queries(), in_.keys()});
  }

  static Tensor lengths(const Tensor& starts, const Positions& positions) {
    return starts.to(at::kLong).diff().index_select(0, positions.sequence);
  }

  Tensor find_kept(const Positions& k) const {
    Tensor kept = call_dropout_mask(*in_.dropout_key, barred_.sym_sizes(), in_.dropout_p);
    if (k.sequence.defined()) kept = kept.index_select(-1, k.local);
    return kept.to(type_) * dropout_factor(in_.dropout_p);
  }

  const Inputs& in_;
  const at::ScalarType type_;
  const c10::SymInt group_;
  double scale_;
  Tensor barred_, distance_;    // i + diagonal − j
  Tensor slope_, bend_, keep_;  // first and second derivative of the softcap; z
};

// ṫ before and after the softcap's slope.
struct ScoreTangents {
  Tensor raw, full;

  ScoreTangents(const Composite& c, const Tangents& t, const Tensor& query_t, const Tensor& key_t)
      : raw(c.scaled(plus(product(query_t, transposed(c.key)), product(c.query, transposed(key_t))))),
        full(plus(c.slope(raw), c.of_mask(t.attn_mask))) {}
};

}  // namespace

Outputs composite_forward(const Inputs& in) {
  const Composite c(in);
  return {c.output.to(in.query.scalar_type()), c.lse.squeeze(-1)};
}

Outputs composite_tangent(const Inputs& in, const Tangents& t) {
  const Composite c(in);
  const Tensor value_t = c.of_key(t.value);
  const ScoreTangents score(c, t, c.of_query(t.query), c.of_key(t.key));
  const Tensor weighted = times(c.p, score.full);
  const Tensor lse_t = weighted.defined() ? sum_rows(weighted) : at::zeros_like(c.lse);
  const Tensor output_t = plus(product(c.times_kept(weighted), c.value), product(c.times_kept(c.p), value_t));
  return {plus(output_t, -(lse_t * c.output)).to(in.query.scalar_type()), lse_t.squeeze(-1)};
}

namespace {

// Of gradients of the scores, before scale and softcap, and of the values, those of the inputs.
Gradients finish(const Composite& c, const Inputs& in, const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor& bias, GradientMask mask) {
  Gradients result;
  if (mask[0]) {
    std::get<0>(result) = query.defined() ? c.scaled(query).to(in.query.scalar_type()) : at::zeros_like(in.query);
  }
  if (mask[1]) std::get<1>(result) = c.to_key(c.scaled(key), in.key);
  if (mask[2]) std::get<2>(result) = c.to_key(value, in.value);
  if (mask[3] && in.has_float_mask()) {
    const Tensor& like = *in.attn_mask;
    std::get<3>(result) =
        bias.defined() ? at::sum_to(bias, like.sym_sizes()).to(like.scalar_type()) : at::zeros_like(like);
  }
  return result;
}

Tensor minus(const Tensor& a) { return a.defined() ? -a : a; }

}  // namespace

Gradients composite_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,
                             GradientMask mask) {
  const Composite c(in);
  const Tensor grad = c.of_query(grad_output);
  const Tensor delta = plus(sum_rows(times(grad, c.output)), minus(c.of_lse(grad_lse)));
  const Tensor full = times(c.p, plus(c.times_kept(product(grad, transposed(c.value))), minus(delta)));
  const Tensor raw = c.slope(full);
  return finish(c, in, product(raw, c.key), product(transposed(raw), c.query),
                product(transposed(c.times_kept(c.p)), grad), full, mask);
}

Gradients composite_backward_tangent(const Inputs& in, const Directions& along, GradientMask mask) {
  const Composite c(in);
  const Tangents& t = along.tangents;
  const Tensor query_t = c.of_query(t.query), key_t = c.of_key(t.key), value_t = c.of_key(t.value);
  const Tensor grad = c.of_query(along.grad_output), grad_t = c.of_query(along.grad_output_t);
  const Tensor grad_lse = c.of_lse(along.grad_lse), grad_lse_t = c.of_lse(along.grad_lse_t);
  const ScoreTangents score(c, t, query_t, key_t);

  // The forward's tangents, from the inputs rather than from what was given, so that they can be differentiated.
  const Tensor weighted = times(c.p, score.full);
  const Tensor lse_t = weighted.defined() ? sum_rows(weighted) : at::zeros_like(c.lse);
  const Tensor p_t = plus(weighted, -(c.p * lse_t));
  const Tensor output_t = plus(product(c.times_kept(p_t), c.value), product(c.times_kept(c.p), value_t));

  const Tensor delta = plus(sum_rows(times(grad, c.output)), minus(grad_lse));
  const Tensor delta_t =
      plus(plus(sum_rows(times(grad_t, c.output)), sum_rows(times(grad, output_t))), minus(grad_lse_t));
  const Tensor inner = plus(c.times_kept(product(grad, transposed(c.value))), minus(delta));
  const Tensor inner_t = plus(
      c.times_kept(plus(product(grad_t, transposed(c.value)), product(grad, transposed(value_t)))), minus(delta_t));
  const Tensor full = times(c.p, inner), full_t = plus(times(p_t, inner), times(c.p, inner_t));
  const Tensor raw = c.slope(full), raw_t = plus(c.slope(full_t), c.bend(times(full, score.raw)));

  return finish(c, in, plus(product(raw_t, c.key), product(raw, key_t)),
                plus(product(transposed(raw_t), c.query), product(transposed(raw), query_t)),
                plus(product(transposed(c.times_kept(p_t)), grad), product(transposed(c.times_kept(c.p)), grad_t)),
                full_t, mask);
}

namespace {

// Weights before dropout, [B, H, L, S]: those of the lse that is given, which is an input of its own.
Tensor given_lse_weights(const Composite& c, const Tensor& lse) {
  const Tensor given = lse.to(c.lse.scalar_type()).unsqueeze(-1);
  const Tensor none = at::logical_or(c.lse == -INFINITY, given == -INFINITY);
  const Tensor zero = at::zeros_like(c.lse), difference = at::where(none, zero, c.lse - given);
  return at::where(none, at::zeros_like(c.p), c.without_barred(c.p * at::exp(difference)));
}

}  // namespace

Tensor composite_weights(const WeightsInputs& w) {
  const Composite c(w.in);
  const Tensor weights = c.times_kept(given_lse_weights(c, w.lse));
  return (w.average ? weights.mean({1}) : weights).to(w.in.query.scalar_type());
}

Gradients composite_weights_backward(const Tensor& grad, const WeightsInputs& w, GradientMask mask) {
  const Composite c(w.in);
  Tensor given = grad.to(c.lse.scalar_type());
  if (w.average) given = (given / w.in.heads()).unsqueeze(1);
  const Tensor full = c.times_kept(given_lse_weights(c, w.lse)) * given, raw = c.scaled(c.slope(full));
  Gradients result;
  if (mask[0]) std::get<0>(result) = product(raw, c.key).to(w.in.query.scalar_type());
  if (mask[1]) std::get<1>(result) = c.to_key(product(transposed(raw), c.query), w.in.key);
  if (mask[2]) std::get<2>(result) = -full.sum({-1});
  if (mask[3] && w.in.has_float_mask()) {
    const Tensor& like = *w.in.attn_mask;
    std::get<3>(result) = at::sum_to(full, like.sym_sizes()).to(like.scalar_type());
  }
  return result;
}

}  // namespace lect11ext::attention_op
