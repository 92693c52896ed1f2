// PyTorch side of topk_code: schema, kernels' arguments, derivatives. The kernels: sparse_code.h.
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "autoencoder/sparse_code.h"
#include "autoencoder/sparse_code_inputs.h"
#include "autoencoder/sparse_code_ops.h"
#include "common/dispatch.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace sparse_code;
using Code = std::tuple<Tensor, Tensor>;

// --- meta ---------------------------------------------------------------------------------------------------------

Code meta_topk(const Tensor& input, c10::SymInt k, c10::string_view activation) {
  check_topk(input, k);
  rectifies(activation);
  const auto size = size_with(input, k);
  return {at::empty_symint(size, input.options()), at::empty_symint(size, input.options().dtype(at::kLong))};
}

Tensor meta_scatter(const Tensor& grad_values, const Tensor& indices, c10::SymInt length) {
  check_topk_backward(grad_values, indices, length);
  return at::empty_symint(size_with(indices, length), grad_values.options());
}

// --- kernels ------------------------------------------------------------------------------------------------------

at::DimVector with_columns(const Tensor& t, int64_t columns) {
  at::DimVector size(t.sizes().begin(), t.sizes().end());
  size.back() = columns;
  return size;
}

// By sorting whole rows: what the CUDA kernel does not take.
Code sorted_topk(const Tensor& input, int64_t k, bool rectify) {
  auto [values, indices] = at::sort(input, /*stable=*/true, /*dim=*/-1, /*descending=*/true);
  values = values.narrow(-1, 0, k);
  return {rectify ? values.clamp_min(0) : values.contiguous(), indices.narrow(-1, 0, k).contiguous()};
}

Code kernel_topk(const Tensor& input, c10::SymInt symbolic_k, c10::string_view activation) {
  check_topk(input, symbolic_k);
  const int64_t k = symbolic_k.guard_int(__FILE__, __LINE__), length = input.size(-1);
  TORCH_CHECK_VALUE(length <= std::numeric_limits<int32_t>::max(),
                    "input must have less than 2^31 elements in its last dimension, but got ", length);
  TopkCode args{};
  args.rectify = rectifies(activation);
  // The kernel's positions run beyond the last element by less than kStep.
  constexpr int64_t kStep = 4096;
  const bool fits = k <= cuda::kMostSelected && length <= std::numeric_limits<int32_t>::max() - kStep;
  if (!input.is_cpu() && !fits) return sorted_topk(input, k, args.rectify);
  args.rows = rows_of(input);
  args.length = length;
  args.k = k;
  const auto size = with_columns(input, k);
  Tensor values = at::empty(size, input.options()), indices = at::empty(size, input.options().dtype(at::kLong));
  if (values.numel() == 0) return {values, indices};
  Tensor rows = input.reshape({args.rows, length});
  if (length > 1 && rows.stride(1) != 1) rows = rows.contiguous();
  args.input = rows.const_data_ptr();
  args.dtype = dtype_of(input, "input");
  args.stride = rows.stride(0);
  args.values = values.mutable_data_ptr();
  args.indices = indices.mutable_data_ptr<int64_t>();
  launch<topk_code_kernel, LECT11EXT_CUDA_KERNEL(topk_code)>(args, args.rows, /*cost=*/length / 2 + 20 * k,
                                                             input.device());
  return {values, indices};
}

Tensor kernel_scatter(const Tensor& grad_values, const Tensor& indices, c10::SymInt symbolic_length) {
  check_topk_backward(grad_values, indices, symbolic_length);
  ScatterCode args{};
  args.length = symbolic_length.guard_int(__FILE__, __LINE__);
  args.k = indices.size(-1);
  args.rows = rows_of(indices);
  const auto size = with_columns(indices, args.length);
  if (indices.numel() == 0) return at::zeros(size, grad_values.options());
  const Tensor values = grad_values.contiguous(), places = indices.to(at::kLong).contiguous();
  args.element_bytes = static_cast<int64_t>(values.element_size());
  args.values = values.const_data_ptr();
  args.indices = places.const_data_ptr<int64_t>();
  const bool on_cpu = values.is_cpu();  // whose kernel writes zeros too
  if (on_cpu) {
    for (int64_t i = 0; i < places.numel(); ++i) {
      TORCH_CHECK_INDEX(args.indices[i] >= 0 && args.indices[i] < args.length, "indices must be in [0, ", args.length,
                        "), but got ", args.indices[i]);
    }
  }
  Tensor out = on_cpu ? empty_output(size, grad_values.options()) : at::zeros(size, grad_values.options());
  args.out = out.mutable_data_ptr();
  launch<scatter_code_kernel, LECT11EXT_CUDA_KERNEL(scatter_code)>(
      args, args.rows, /*cost=*/args.length * args.element_bytes / 16 + args.k, values.device());
  return out;
}

// --- autograd -----------------------------------------------------------------------------------------------------

// Gathering and scattering at distinct places are each other's derivatives.
struct TopkCodeNode : autograd::Node {
  autograd::SavedVariable indices_;
  autograd::SavedVariable values_;  // for the activation: undefined without one
  c10::SymInt length_;

  std::string name() const override { return "TopkCodeBackward"; }

  void release_variables() override {
    indices_.reset_data();
    values_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    Tensor grad = grads[0];
    if (!grad.defined()) return {Tensor()};
    const Tensor values = values_.unpack();
    if (values.defined()) grad = at::threshold_backward(grad, values, 0);
    return {topk_code_backward(grad, indices_.unpack(), length_)};
  }
};

struct ScatterCodeNode : autograd::Node {
  autograd::SavedVariable indices_;

  std::string name() const override { return "TopkCodeBackwardBackward"; }
  void release_variables() override { indices_.reset_data(); }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor()};
    return {at::gather(grads[0], -1, indices_.unpack().to(at::kLong))};
  }
};

Code autograd_topk(const Tensor& input, c10::SymInt k, c10::string_view activation) {
  Code out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = topk_code(input, std::move(k), activation);
  }
  const auto& [values, indices] = out;
  // Detached: only its sign is of use, and a Node that holds its own output is never freed.
  const Tensor signs = rectifies(activation) ? values.detach() : Tensor();
  if (autograd::needs_grad(input)) {
    auto node = autograd::make_node<TopkCodeNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input));
    node->indices_ = autograd::SavedVariable(indices, /*is_output=*/false);
    node->values_ = autograd::SavedVariable(signs, /*is_output=*/false);
    node->length_ = input.sym_size(-1);
    torch::autograd::set_history(values, node);
  }
  if (autograd::has_tangent(input)) {
    Tensor tangent = at::gather(input._fw_grad(/*level=*/0), -1, indices);
    if (signs.defined()) tangent = at::threshold_backward(tangent, signs, 0);
    values._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  }
  return out;
}

Tensor autograd_scatter(const Tensor& grad_values, const Tensor& indices, c10::SymInt length) {
  Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = topk_code_backward(grad_values, indices, length);
  }
  if (autograd::needs_grad(grad_values)) {
    auto node = autograd::make_node<ScatterCodeNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(grad_values));
    node->indices_ = autograd::SavedVariable(indices, /*is_output=*/false);
    torch::autograd::set_history(out, node);
  }
  if (autograd::has_tangent(grad_values)) {
    out._set_fw_grad(topk_code_backward(grad_values._fw_grad(/*level=*/0), indices, length), /*level=*/0,
                     /*is_inplace_op=*/false);
  }
  return out;
}

}  // namespace

// --- registration -------------------------------------------------------------------------------------------------

Code topk_code(const Tensor& input, c10::SymInt k, c10::string_view activation) {
  static const auto op = find_op<Code(const Tensor&, c10::SymInt, c10::string_view)>("lect11ext::topk_code");
  return op.call(input, std::move(k), activation);
}

Tensor topk_code_backward(const Tensor& grad_values, const Tensor& indices, c10::SymInt length) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, c10::SymInt)>("lect11ext::topk_code_backward");
  return op.call(grad_values, indices, std::move(length));
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("topk_code(Tensor input, SymInt k, str activation) -> (Tensor values, Tensor indices)",
        {at::Tag::pt2_compliant_tag});
  m.def("topk_code_backward(Tensor grad_values, Tensor indices, SymInt length) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

static void add_kernels(torch::Library& m) {
  m.impl("topk_code", kernel_topk);
  m.impl("topk_code_backward", kernel_scatter);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("topk_code", meta_topk);
  m.impl("topk_code_backward", meta_scatter);
}

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("topk_code", autograd_topk);
  m.impl("topk_code_backward", autograd_scatter);
}

// Autocast changes no type: elements are compared and copied.
static void keep_types(torch::Library& m) { fall_through(m, {"topk_code", "topk_code_backward"}); }

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) { keep_types(m); }
TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) { keep_types(m); }

}  // namespace lect11ext
