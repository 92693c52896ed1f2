// PyTorch side of additive_attention: schema, kernels' arguments. Derivatives: additive_autograd.cpp. Equations and
// kernels: additive.h.
#include "attention/additive.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "attention/additive_inputs.h"
#include "attention/additive_ops.h"
#include "common/dispatch.h"
#include "common/ops.h"
#include "common/workspace.h"

#ifdef LECT11EXT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#endif

namespace lect11ext {
namespace {

using namespace additive_op;

// --- meta ---------------------------------------------------------------------------------------------------------

Outputs meta_forward(const Inputs& in, bool save_weights) {
  in.check();
  const auto options = in.query.options();
  return {at::empty_symint(in.output_size(), options),
          save_weights ? OptionalTensor(at::empty_symint(in.weights_size(), options.dtype(in.compute_dtype())))
                       : std::nullopt};
}

Gradients meta_backward(const Tensor& grad_output, const Inputs& in, const Tensor& weights, const Wanted& wanted) {
  in.check_backward(grad_output, weights);
  const auto like = [](bool asked, const Tensor& t) {
    return asked ? at::empty_symint(t.sym_sizes(), t.options()) : Tensor();
  };
  return {like(wanted[0], in.query), like(wanted[1], in.key), like(wanted[2], in.value),
          like(wanted[3], in.score_weight), in.additive() ? like(wanted[4], *in.attn_mask) : Tensor()};
}

// --- arguments ----------------------------------------------------------------------------------------------------

// What the struct borrows from.
struct Held {
  Tensor query, key, value, score_weight, mask, grad_output;
};

at::DimVector concrete(const c10::SymDimVector& size) {
  at::DimVector out;
  for (const auto& n : size) out.push_back(n.guard_int(__FILE__, __LINE__));
  return out;
}

// The batch's dimensions, merged where all operands allow it. Strides behind the ones that are merged away are unused.
void set_batches(at::IntArrayRef size, Additive& args, const std::vector<std::pair<Tensor, int64_t*>>& operands) {
  Shape& shape = args.batches;
  shape.ndim = 0;
  shape.numel = 1;
  for (int64_t d = 0; d < static_cast<int64_t>(size.size()); ++d) {
    shape.numel *= size[d];
    if (size[d] == 1) continue;
    bool merges = shape.ndim > 0;
    for (const auto& [tensor, strides] : operands) {
      merges = merges && strides[shape.ndim - 1] == tensor.stride(d) * size[d];
    }
    TORCH_INTERNAL_ASSERT(merges || shape.ndim < kMaxDims);
    if (!merges) shape.sizes[shape.ndim++] = 1;
    shape.sizes[shape.ndim - 1] *= size[d];
    for (const auto& [tensor, strides] : operands) strides[shape.ndim - 1] = tensor.stride(d);
  }
  if (shape.ndim == 0) shape.sizes[shape.ndim++] = 1;
}

// Rows with unit stride, expanded over the batch. More dimensions than a struct holds are made one by a copy.
Tensor as_matrices(const Tensor& tensor, at::IntArrayRef batch, bool fold) {
  const bool unit = tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
  at::DimVector size(batch.begin(), batch.end());
  size.push_back(tensor.size(-2));
  size.push_back(tensor.size(-1));
  const Tensor out = (unit ? tensor : tensor.contiguous()).expand(size);
  return fold ? out.contiguous().flatten(0, -3) : out;
}

// Fills the common part of the struct.
void describe(const Inputs& in, const Tensor& grad_output, Matrices* grads, Additive& args, Held& held) {
  const at::DimVector batch = concrete(in.batch());
  const bool fold = batch.size() > static_cast<size_t>(kMaxDims);
  args.queries = in.query.size(-2);
  args.keys = in.key.size(-2);
  args.hidden = in.query.size(-1);
  args.columns = in.value.size(-1);
  args.dtype = dtype_of(in.query, "query");
  held.query = as_matrices(in.query, batch, fold);
  held.key = as_matrices(in.key, batch, fold);
  held.value = as_matrices(in.value, batch, fold);
  held.score_weight = in.score_weight.contiguous();
  args.score_weight = held.score_weight.const_data_ptr();
  std::vector<std::pair<Tensor, int64_t*>> operands{{held.query, args.query.strides},
                                                    {held.key, args.key.strides},
                                                    {held.value, args.value.strides}};
  if (grad_output.defined()) {
    held.grad_output = as_matrices(grad_output, batch, fold);
    grads->data = held.grad_output.const_data_ptr();
    grads->row = held.grad_output.stride(-2);
    operands.emplace_back(held.grad_output, grads->strides);
  }
  if (in.masked()) {
    at::DimVector size(batch.begin(), batch.end());
    size.push_back(args.queries);
    size.push_back(args.keys);
    held.mask = in.attn_mask->expand(size);
    if (fold) held.mask = held.mask.contiguous().flatten(0, -3);
    args.mask.kind = in.additive() ? MaskKind::Additive : MaskKind::Bool;
    if (in.additive()) args.mask.dtype = dtype_of(held.mask, "attn_mask");
    args.mask.data = held.mask.const_data_ptr();
    args.mask.row = held.mask.stride(-2);
    args.mask.column = held.mask.stride(-1);
    operands.emplace_back(held.mask, args.mask.strides);
  }
  for (const auto& [matrices, tensor] :
       {std::pair(&args.query, &held.query), std::pair(&args.key, &held.key), std::pair(&args.value, &held.value)}) {
    matrices->data = tensor->const_data_ptr();
    matrices->row = tensor->stride(-2);
  }
  set_batches(fold ? held.query.sizes().slice(0, 1) : at::IntArrayRef(batch), args, operands);
}

// --- CPU ----------------------------------------------------------------------------------------------------------

// A pair costs about a third of a nanosecond for each vector of hidden units, once the vectors are 16 wide.
int64_t pairs_cost(const Additive& args, int64_t queries, int64_t keys) {
  return queries * keys * (args.hidden / 8 + args.columns / 32 + 2);
}

// What a call on the CPU needs for each element of the batch, in bytes.
struct Needs {
  int64_t key_panels, value_rows, key_sums, value_sums;

  // Of as many elements at a time as the memory that is kept from call to call allows.
  int64_t elements(int64_t batch) const {
    constexpr int64_t kBytes = int64_t{32} << 20;
    const int64_t bytes = key_panels + value_rows + key_sums + value_sums;
    return std::clamp<int64_t>(bytes > 0 ? kBytes / bytes : batch, 1, std::max<int64_t>(batch, 1));
  }
};

// Whether rows of whole vectors, of the arithmetic, are dense rows of the type.
bool are_whole(int64_t columns, DType dtype) {
  return (dtype == DType::Float || dtype == DType::Double) && columns == padded_columns(columns);
}

// `shared`: whether several work items, or rounds of one, look at the same keys.
Needs needs_of(const Additive& args, bool shared) {
  const int64_t item = compute_size(args.dtype);
  return {shared ? item * key_blocks(args.keys) * panel_size(args.hidden) : 0,
          are_whole(args.columns, args.dtype) ? 0 : item * args.keys * padded_columns(args.columns), 0, 0};
}

// Calls body(memory for key_sums, for value_sums) for chunk after chunk of the batch.
template <class Body>
void for_each_chunk(AdditivePanels& args, const Needs& needs, Body body) {
  const int64_t blocks = key_blocks(args.keys), most = needs.elements(args.batches.numel);
  Workspace space;
  const auto panels = space.reserve(most * needs.key_panels), forms = space.reserve(most * blocks),
             rows = space.reserve(most * needs.value_rows), key_sums = space.reserve(most * needs.key_sums),
             value_sums = space.reserve(most * needs.value_sums);
  const auto at = [&](size_t part, int64_t bytes) { return bytes > 0 ? space.at(part) : nullptr; };
  args.key_panels = at(panels, needs.key_panels);
  args.forms = static_cast<int8_t*>(at(forms, needs.key_panels));
  args.value_rows = at(rows, needs.value_rows);
  for (args.first = 0; args.first < args.batches.numel; args.first += args.count) {
    args.count = std::min(most, args.batches.numel - args.first);
    if (args.key_panels != nullptr || args.value_rows != nullptr) {
      run_parallel<AdditivePanels>(additive_prepare_kernel, args, args.count * blocks,
                                   kKeyBlock * (args.hidden + args.columns / 2));
    }
    body(at(key_sums, needs.key_sums), at(value_sums, needs.value_sums));
  }
}

// The sum over the dimensions in which `size` is broadcast, in an order that threads have no part in.
Tensor reduce_cpu(const Tensor& dense, at::IntArrayRef size) {
  if (dense.sizes() == size) return dense;
  const int64_t lead = dense.dim() - static_cast<int64_t>(size.size());
  at::DimVector order, kept;
  for (int64_t d = 0; d < dense.dim(); ++d) {
    const bool summed = d < lead || (size[d - lead] == 1 && dense.size(d) != 1);
    (summed ? order : kept).push_back(d);
  }
  AdditiveSum args{1, 1, dtype_of(dense, "gradient"), nullptr, nullptr};
  for (const int64_t d : order) args.m *= dense.size(d);
  for (const int64_t d : kept) args.n *= dense.size(d);
  order.append(kept.begin(), kept.end());
  const Tensor rows = dense.permute(order).contiguous();
  Tensor out = at::empty(size, dense.options());
  args.a = rows.const_data_ptr();
  args.out = out.mutable_data_ptr();
  run_parallel(additive_sum_kernel, args, (args.n + kAdditiveSumColumns - 1) / kAdditiveSumColumns,
               args.m * kAdditiveSumColumns / 8);
  return out;
}

void launch_cpu(AdditiveForward& args) {
  const int64_t groups = (args.queries + kForwardRows - 1) / kForwardRows;
  for_each_chunk(args, needs_of(args, groups > 1), [&](void*, void*) {
    run_parallel(additive_forward_kernel, args, args.count * groups,
                 pairs_cost(args, std::min(args.queries, kForwardRows), args.keys));
  });
}

void launch_cpu(AdditiveBackward& args) {
  Needs needs = needs_of(args, args.queries > kBackwardRows);
  const auto sums = [&](const void* grad, int64_t columns, DType dtype) -> int64_t {
    if (grad == nullptr || (args.parts == 1 && are_whole(columns, dtype))) return 0;
    return args.parts * args.keys * padded_columns(columns) * compute_size(args.dtype);
  };
  needs.key_sums = sums(args.grad_key, args.hidden, args.grad_key_dtype);
  needs.value_sums = sums(args.grad_value, args.columns, args.grad_value_dtype);
  for_each_chunk(args, needs, [&](void* key_sums, void* value_sums) {
    args.key_sums = key_sums;
    args.value_sums = value_sums;
    run_parallel(additive_backward_kernel, args, args.count * args.parts,
                 2 * pairs_cost(args, std::min(args.queries, args.part_rows), args.keys));
    if (key_sums == nullptr && value_sums == nullptr) return;
    run_parallel(additive_finish_kernel, args, args.count * key_blocks(args.keys),
                 args.parts * kKeyBlock * (args.hidden + args.columns) / 4);
  });
}

// --- both ---------------------------------------------------------------------------------------------------------

Outputs kernel_forward(const Inputs& in, bool save_weights) {
  in.check();
  const auto options = in.query.options();
  const bool cuda = in.query.is_cuda();
  Tensor output = empty_output(concrete(in.output_size()), options);
  Tensor weights;
  if (save_weights || cuda) weights = empty_output(concrete(in.weights_size()), options.dtype(in.compute_dtype()));
  if (output.numel() == 0 && (!weights.defined() || weights.numel() == 0))
    return {output, autograd::optional_of(weights)};
  AdditiveForward args{};
  Held held;
  describe(in, Tensor(), nullptr, args, held);
  args.weights = weights.defined() ? weights.mutable_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  if (!cuda) launch_cpu(args);
#ifdef LECT11EXT_WITH_CUDA
  else cuda::additive_forward(args, current_stream());
#endif
  return {output, save_weights ? OptionalTensor(weights) : std::nullopt};
}

// How the queries of an element of the batch are divided: enough parts for the processors of a large machine where the
// batch is small, and few enough that their sums cost little to add.
void set_parts(AdditiveBackward& args) {
  constexpr int64_t kWanted = 16, kLeastRows = 64;
  const int64_t most = (args.queries + kLeastRows - 1) / kLeastRows;
  const int64_t wanted = std::clamp<int64_t>((kWanted + args.batches.numel - 1) / args.batches.numel, 1, most);
  const int64_t rows = (args.queries + wanted - 1) / wanted;
  args.part_rows = (rows + kBackwardRows - 1) / kBackwardRows * kBackwardRows;
  args.parts = (args.queries + args.part_rows - 1) / args.part_rows;
}

Gradients kernel_backward(const Tensor& grad_output, const Inputs& in, const Tensor& weights, Wanted wanted) {
  in.check_backward(grad_output, weights);
  wanted[4] = wanted[4] && in.additive();
  const auto storage = in.query.scalar_type(), compute = in.compute_dtype();
  const bool cuda = in.query.is_cuda();
  if (weights.numel() == 0) {
    const auto zeros = [](bool asked, const Tensor& t) { return asked ? at::zeros(t.sizes(), t.options()) : Tensor(); };
    return {zeros(wanted[0], in.query), zeros(wanted[1], in.key), zeros(wanted[2], in.value),
            zeros(wanted[3], in.score_weight), wanted[4] ? zeros(true, *in.attn_mask) : Tensor()};
  }
  AdditiveBackward args{};
  Held held;
  describe(in, grad_output.to(storage), &args.grad_output, args, held);
  const Tensor kept = weights.contiguous();
  args.weights = kept.const_data_ptr();
  set_parts(args);

  const auto options = in.query.options();
  // In the type of the arithmetic where more is to be summed.
  const auto make = [&](bool asked, const Tensor& like, const c10::SymDimVector& size, void*& pointer, DType& dtype) {
    if (!asked) return Tensor();
    const auto full = concrete(size);
    Tensor out = empty_output(full, options.dtype(like.sizes() == at::IntArrayRef(full) ? storage : compute));
    pointer = out.mutable_data_ptr();
    dtype = dtype_of(out, "gradient");
    return out;
  };
  Tensor query = make(wanted[0], in.query, in.size(in.queries(), in.hidden()), args.grad_query, args.grad_query_dtype);
  Tensor key = make(wanted[1], in.key, in.size(in.keys(), in.hidden()), args.grad_key, args.grad_key_dtype);
  Tensor value = make(wanted[2], in.value, in.size(in.keys(), in.columns()), args.grad_value, args.grad_value_dtype);
  Tensor scores, score_weight;
  if (wanted[4] || cuda) {
    scores = empty_output(kept.sizes(), options.dtype(compute));
    args.grad_scores = scores.mutable_data_ptr();
  }
  if (wanted[3]) {
    int64_t rows = args.batches.numel * args.parts;
#ifdef LECT11EXT_WITH_CUDA
    if (cuda) rows = cuda::additive_weight_rows(args);
#endif
    score_weight = at::empty({rows, args.hidden}, options.dtype(compute));
    args.grad_score_weight = score_weight.mutable_data_ptr();
  }
  if (!cuda) launch_cpu(args);
#ifdef LECT11EXT_WITH_CUDA
  else cuda::additive_backward(args, current_stream());
#endif
  const auto finish = [&](const Tensor& grad, bool asked, const Tensor& like) {
    if (!asked) return Tensor();
    return (cuda ? at::sum_to(grad, like.sizes()) : reduce_cpu(grad, like.sizes())).to(like.scalar_type());
  };
  return {finish(query, wanted[0], in.query), finish(key, wanted[1], in.key), finish(value, wanted[2], in.value),
          finish(score_weight, wanted[3], in.score_weight), wanted[4] ? finish(scores, true, *in.attn_mask) : Tensor()};
}

#ifdef LECT11EXT_WITH_CUDA
Outputs cuda_forward(const Inputs& in, bool save_weights) {
  const c10::cuda::CUDAGuard guard(in.query.device());
  return kernel_forward(in, save_weights);
}

Gradients cuda_backward(const Tensor& grad_output, const Inputs& in, const Tensor& weights, Wanted wanted) {
  const c10::cuda::CUDAGuard guard(in.query.device());
  return kernel_backward(grad_output, in, weights, wanted);
}
#endif

// --- registration -------------------------------------------------------------------------------------------------

template <Outputs (*body)(const Inputs&, bool)>
Outputs forward_entry(ADDITIVE_PARAMETERS, bool save_weights) {
  return body(Inputs{ADDITIVE_ARGUMENTS}, save_weights);
}

template <auto body>
Gradients backward_entry(const Tensor& grad_output, ADDITIVE_PARAMETERS, const Tensor& weights, Wanted wanted) {
  return body(grad_output, Inputs{ADDITIVE_ARGUMENTS}, weights, wanted);
}

}  // namespace

Outputs additive_attention(ADDITIVE_PARAMETERS, bool save_weights) {
  static const auto op = find_op<ForwardSignature>("lect11ext::additive_attention");
  return op.call(ADDITIVE_ARGUMENTS, save_weights);
}

#define ADDITIVE_SCHEMA "Tensor query, Tensor key, Tensor value, Tensor score_weight, Tensor? attn_mask"

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("additive_attention(" ADDITIVE_SCHEMA ", bool save_weights) -> (Tensor output, Tensor? weights)",
        {at::Tag::pt2_compliant_tag});
  m.def("additive_attention_backward(Tensor grad_output, " ADDITIVE_SCHEMA
        ", Tensor weights, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("additive_attention", forward_entry<kernel_forward>);
  m.impl("additive_attention_backward", backward_entry<kernel_backward>);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("additive_attention", forward_entry<cuda_forward>);
  m.impl("additive_attention_backward", backward_entry<cuda_backward>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("additive_attention", forward_entry<meta_forward>);
  m.impl("additive_attention_backward", backward_entry<meta_backward>);
}

}  // namespace lect11ext
