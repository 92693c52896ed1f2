// Derivatives of sparse_decode, sparse_dots and sparse_outer, and autocast.
//
// Each is the partial derivative of one form F(v, g, W), linear in each operand (sparse_code.h), with respect to one of
// them, at the other two. A cotangent of the result takes the place of that operand, and the gradient of another one is
// the partial derivative with respect to it; a tangent of another takes its own place. So one Node is enough, and every
// order of derivative is a call of one of the three.
#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>

#include "autoencoder/partial_sums.h"
#include "autoencoder/sparse_code_inputs.h"
#include "autoencoder/sparse_code_ops.h"
#include "common/autograd.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace sparse_code;

enum Operand { kValues, kDense, kWeight };
constexpr std::array kOperands{kValues, kDense, kWeight};
using Operands = std::array<Tensor, 3>;

// ∂F/∂(of) at the other two, and what two of them add to it.
Tensor partial(Operand of, const Operands& at, const Tensor& indices, const c10::SymInt& atoms,
               const OptionalTensor& bias = std::nullopt) {
  switch (of) {
    case kValues: return sparse_dots(at[kDense], indices, at[kWeight], bias);
    case kDense: return sparse_decode(at[kValues], indices, at[kWeight], bias);
    default: return sparse_outer(at[kValues], indices, at[kDense], atoms);
  }
}

// The bias of sparse_decode is added to every row; that of sparse_dots is one more column of W, whose column of g is
// one.
Tensor bias_gradient(Operand of, const Tensor& grad, const Tensor& indices, const c10::SymInt& atoms) {
  if (of == kValues) {
    const Tensor ones = at::ones({1}, grad.options()).expand_symint(size_with(indices, 1));
    return sparse_outer(grad, indices, ones, atoms).squeeze(1);
  }
  if (grad.dim() == 1) return grad;
  return sum_broadcast(grad, grad.sym_sizes().slice(grad.dim() - 1));
}

Tensor bias_tangent(Operand of, const Tensor& tangent, const Tensor& out, const Tensor& indices) {
  if (of == kDense) return at::zeros_like(out.detach()) + tangent;
  const Tensor ones = at::ones({1}, tangent.options()).expand_symint(size_with(indices, 1));
  return sparse_dots(ones, indices, tangent.unsqueeze(1), std::nullopt);
}

struct SparseCodeNode : autograd::Node {
  Operand of_;
  std::array<autograd::SavedVariable, 3> operands_;
  std::array<at::ScalarType, 4> types_;  // of the operands and the bias
  autograd::SavedVariable indices_;
  c10::SymInt atoms_;

  std::string name() const override {
    constexpr std::array kNames{"SparseDotsBackward", "SparseDecodeBackward", "SparseOuterBackward"};
    return kNames[of_];
  }

  void release_variables() override {
    for (auto& saved : operands_) saved.reset_data();
    indices_.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    autograd::variable_list out(4);
    if (!grads[0].defined()) return out;
    Operands at;
    for (const Operand i : kOperands) at[i] = i == of_ ? grads[0] : operands_[i].unpack();
    const Tensor indices = indices_.unpack();
    for (const Operand i : kOperands) {
      if (i != of_ && task_should_compute_output(i)) out[i] = partial(i, at, indices, atoms_).to(types_[i]);
    }
    if (task_should_compute_output(3)) out[3] = bias_gradient(of_, grads[0], indices, atoms_).to(types_[3]);
    return out;
  }
};

Tensor differentiable(Operand of, const Operands& at, const Tensor& indices, const c10::SymInt& atoms,
                      const OptionalTensor& bias = std::nullopt) {
  Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = partial(of, at, indices, atoms, bias);
  }
  if (autograd::needs_grad(at[kValues], at[kDense], at[kWeight], bias)) {
    auto node = autograd::make_node<SparseCodeNode>();
    const Tensor added = autograd::tensor_or_none(bias);
    node->set_next_edges(torch::autograd::collect_next_edges(at[kValues], at[kDense], at[kWeight], added));
    node->of_ = of;
    for (const Operand i : kOperands) {
      node->operands_[i] = autograd::SavedVariable(at[i], /*is_output=*/false);
      if (at[i].defined()) node->types_[i] = at[i].scalar_type();
    }
    if (added.defined()) node->types_[3] = added.scalar_type();
    node->indices_ = autograd::SavedVariable(indices, /*is_output=*/false);
    node->atoms_ = atoms;
    torch::autograd::set_history(out, node);
  }
  Tensor tangent;
  const auto add = [&](const Tensor& term) {
    const Tensor same = term.to(out.scalar_type());
    tangent = tangent.defined() ? tangent + same : same;
  };
  for (const Operand moving : kOperands) {
    if (!autograd::has_tangent(at[moving])) continue;
    Operands direction;
    for (const Operand i : kOperands) {
      if (i == moving) direction[i] = at[i]._fw_grad(/*level=*/0);
      else direction[i] = autograd::has_tangent(at[i]) ? at[i]._fw_primal(/*level=*/0) : at[i];
    }
    add(partial(of, direction, indices, atoms));
  }
  if (autograd::defined(bias) && autograd::has_tangent(*bias)) {
    add(bias_tangent(of, bias->_fw_grad(/*level=*/0), out, indices));
  }
  if (tangent.defined()) out._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  return out;
}

// Of a scalar, which is refused later, none.
c10::SymInt atoms_of(const Tensor& weight) { return weight.dim() > 0 ? weight.sym_size(0) : 0; }

Tensor autograd_decode(const Tensor& values, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  return differentiable(kDense, {values, Tensor(), weight}, indices, atoms_of(weight), bias);
}

Tensor autograd_dots(const Tensor& dense, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  return differentiable(kValues, {Tensor(), dense, weight}, indices, atoms_of(weight), bias);
}

Tensor autograd_outer(const Tensor& values, const Tensor& indices, const Tensor& dense, c10::SymInt atoms) {
  return differentiable(kWeight, {values, dense, Tensor()}, indices, atoms);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("sparse_decode", autograd_decode);
  m.impl("sparse_dots", autograd_dots);
  m.impl("sparse_outer", autograd_outer);
}

// Autocast changes no type: what binds is memory, and the sums are in float32 or better whatever comes in.
static void keep_types(torch::Library& m) { fall_through(m, {"sparse_decode", "sparse_dots", "sparse_outer"}); }

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) { keep_types(m); }
TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) { keep_types(m); }

}  // namespace lect11ext
