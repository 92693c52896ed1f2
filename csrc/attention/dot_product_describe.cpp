#include "attention/dot_product_describe.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "common/tensors.h"

namespace lect11ext::attention_op {

AttentionStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

Tensor& Describer::keep(Tensor tensor) {
  kept_.push_back(std::move(tensor));
  return kept_.back();
}

AttentionOperand Describer::operand(const Tensor& tensor) {
  const bool unit = tensor.stride(3) == 1 || tensor.size(3) <= 1;
  const Tensor& t = keep(unit ? tensor : tensor.contiguous());
  return {t.const_data_ptr(), strides_of(t)};
}

AttentionOperand Describer::operand(const OptionalTensor& tensor) {
  return autograd::defined(tensor) ? operand(*tensor) : AttentionOperand{};
}

AttentionMask Describer::mask(const OptionalTensor& tensor) {
  if (!autograd::defined(tensor)) return {nullptr, MaskType::None, {}};
  const Tensor& t = keep(*tensor);
  AttentionMask mask{t.const_data_ptr(), MaskType::Storage, {}};
  if (t.scalar_type() == at::kBool) mask.type = MaskType::Bool;
  else if (t.scalar_type() == at::kFloat && t.scalar_type() != kept_[0].scalar_type()) mask.type = MaskType::Float;
  for (int64_t d = 0; d < 4; ++d) mask.strides[d] = t.size(d) == 1 ? 0 : t.stride(d);
  return mask;
}

const void* Describer::dense(const OptionalTensor& tensor) {
  return autograd::defined(tensor) ? keep(tensor->contiguous()).const_data_ptr() : nullptr;
}

void Describer::saved(const Tensor& output, const Tensor& lse, AttentionSaved& args) {
  args.out = operand(output);
  args.lse = dense(lse);
}

void Describer::gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, AttentionBackward& args) {
  args.grad_out = operand(grad_output);
  args.grad_lse = dense(grad_lse);
}

void Describer::directions(const Directions& along, AttentionBackwardTangent& args) {
  tangents(along.tangents, args);
  args.grad_out_t = operand(along.grad_output_t);
  args.grad_lse_t = dense(along.grad_lse_t);
  args.out_t = operand(along.output_t);
  args.lse_t = dense(along.lse_t);
}

Describer::Describer(const Inputs& in, Attention& args) {
  args.batch = in.query.size(0);
  args.heads = in.query.size(1);
  args.kv_heads = std::max<int64_t>(in.key.size(1), 1);  // of no heads too: what follows divides by it
  args.queries = in.query.size(2);
  args.keys = in.key.size(2);
  args.head_dim = in.query.size(3);
  args.value_dim = in.value.size(3);
  args.dtype = dtype_of(in.query, "query");
  args.query = operand(in.query);
  args.key = operand(in.key);
  args.value = operand(in.value);
  args.mask = mask(in.attn_mask);
  if (autograd::defined(in.alibi_slopes)) {
    const Tensor& slopes = keep(*in.alibi_slopes);
    args.alibi_slopes = slopes.const_data_ptr<float>();
    args.alibi_strides[0] = slopes.dim() == 2 ? slopes.stride(0) : 0;
    args.alibi_strides[1] = slopes.stride(-1);
  }
  args.sequences = args.batch;
  if (in.has_starts()) {
    args.query_starts = keep(in.cu_seqlens_q->to(at::kLong).contiguous()).const_data_ptr<int64_t>();
    args.key_starts = keep(in.cu_seqlens_k->to(at::kLong).contiguous()).const_data_ptr<int64_t>();
    args.sequences = in.cu_seqlens_q->size(0) - 1;
  }
  args.scale = in.scale_or_default();
  args.softcap = in.softcap.value_or(0);
  args.window_left = std::min(in.window_left.value_or(kOpen), kOpen);
  args.window_right = std::min(in.window_right.value_or(kOpen), kOpen);
  args.bottom_right = in.bottom_right;
  args.dropout_p = in.dropout_p;
  if (in.dropout_p > 0) args.dropout_key = keep(in.dropout_key->contiguous()).const_data_ptr<int64_t>();
}

Tensor empty_output(const Inputs& in) {
  const c10::SymInt size[] = {in.batch(), in.queries(), in.heads(), in.value.sym_size(3)};
  return at::empty_symint(size, in.query.options()).transpose(1, 2);
}

Tensor empty_lse(const Inputs& in) {
  const c10::SymInt size[] = {in.batch(), in.heads(), in.queries()};
  return at::empty_symint(size, in.query.options().dtype(in.compute_type()));
}

Tensor empty_gradient(const Tensor& like) {
  const Tensor grad = at::empty_like(like);
  return grad.sym_size(3) <= 1 || grad.sym_stride(3) == 1 ? grad : at::empty_symint(like.sym_sizes(), like.options());
}

GradientTensors::GradientTensors(const Inputs& in, GradientMask wanted, AttentionBackward& args,
                                 at::ScalarType mask_type) {
  const auto allocate = [](bool is_wanted, const Tensor& like, Tensor& grad, void*& data, AttentionStrides& strides) {
    if (!is_wanted) return;
    grad = empty_gradient(like);
    data = grad.mutable_data_ptr();
    strides = strides_of(grad);
  };
  auto& [query, key, value, attn_mask] = grads;
  allocate(wanted[0], in.query, query, args.grad_query, args.grad_query_strides);
  allocate(wanted[1], in.key, key, args.grad_key, args.grad_key_strides);
  allocate(wanted[2], in.value, value, args.grad_value, args.grad_value_strides);
  if (!wanted[3] || !in.has_float_mask()) return;
  mask = at::zeros(in.attn_mask->sizes(), in.query.options().dtype(mask_type));
  args.grad_mask = mask.mutable_data_ptr();
  for (int64_t d = 0; d < 4; ++d) args.grad_mask_strides[d] = mask.size(d) == 1 ? 0 : mask.stride(d);
}

Gradients GradientTensors::finish(const Inputs& in) const {
  Gradients result = grads;
  if (mask.defined()) std::get<3>(result) = mask.to(in.attn_mask->scalar_type());
  return result;
}

}  // namespace lect11ext::attention_op
