// What a hand-written derivative needs, in the manner of PyTorch's generated code.
//
// An op's Autograd kernel calls the op again below autograd, hangs a Node on the outputs, and copies tangents from the
// op's definition in differentiable ATen ("composite"). A backward op has no Node of its own: where its inputs need a
// derivative, its Autograd kernel returns the composite definition, and ATen's derivatives are its derivatives, of any
// order. Values kept from the forward enter a composite only where they are outputs with derivatives of their own, as a
// layer's gates are: others would hide what they depend on.
//
// What an op gives must not depend on who needs a gradient, or a trace made for one would not fit the other: what only
// the Node keeps is taken out of the outputs again.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <optional>
#include <utility>

namespace lect11ext::autograd {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch's own error names neither compiled autograd nor whose Node it is.
struct Node : torch::autograd::Node {
  using torch::autograd::Node::Node;
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*args*/) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "lect11ext's ops have no compiled autograd (", name(),
                                "): leave torch._dynamo.config.compiled_autograd off, or use torch.nn here");
  }
};

// The pointer that owns a Node: std::shared_ptr up to torch 2.12, c10::intrusive_ptr afterwards.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class Ptr>
struct NodeMaker {
  template <class N>
  static auto make() {
    return c10::make_intrusive<N>();
  }
};

template <class Base>
struct NodeMaker<std::shared_ptr<Base>> {
  template <class N>
  static auto make() {
    // deleteNode takes a long chain of nodes apart without recursion. It is found by argument-dependent look-up, since
    // newer torch has no such function.
    return std::shared_ptr<N>(new N(), [](auto* node) { deleteNode(node); });
  }
};

template <class N>
auto make_node() {
  return NodeMaker<NodePtr>::template make<N>();
}

inline bool defined(const at::Tensor& t) { return t.defined(); }
inline bool defined(const std::optional<at::Tensor>& t) { return t.has_value() && t->defined(); }

inline at::Tensor tensor_or_none(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }

inline std::optional<at::Tensor> optional_of(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

// What f makes of a tensor that is there.
template <class F>
std::optional<at::Tensor> mapped(const std::optional<at::Tensor>& t, F f) {
  return defined(t) ? std::optional<at::Tensor>(f(*t)) : std::nullopt;
}

template <class... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

inline bool requires_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const std::optional<at::Tensor>& t) { return t.has_value() && requires_grad(*t); }

template <class... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// Gives `output` the tangent that the composite definition computed.
inline void copy_tangent(const at::Tensor& output, const at::Tensor& composite) {
  const at::Tensor& tangent = composite._fw_grad(/*level=*/0);
  if (tangent.defined()) output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

}  // namespace lect11ext::autograd
