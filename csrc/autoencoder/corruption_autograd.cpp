// Derivatives of corrupt, and autocast. The op is linear in the elements that it keeps, so that the derivative of the
// op and of its derivative is one and the same op.
#include <torch/library.h>

#include <string>

#include "autoencoder/corruption_ops.h"
#include "common/autograd.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using at::Tensor;

struct CorruptNode : autograd::Node {
  autograd::SavedVariable key_;
  std::string kind_;
  double amount_ = 0;

  std::string name() const override { return "CorruptBackward"; }

  void release_variables() override { key_.reset_data(); }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    if (!grads[0].defined() || kind_ == "gaussian") return {grads[0]};
    return {corrupt_backward(grads[0], key_.unpack(), kind_, amount_)};
  }
};

// Hangs the Node on `out`, and gives it the tangent of `in`.
void differentiate(const Tensor& in, const Tensor& out, const Tensor& key, c10::string_view kind, double amount) {
  if (autograd::needs_grad(in)) {
    auto node = autograd::make_node<CorruptNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(in));
    node->key_ = autograd::SavedVariable(key, false);
    node->kind_ = std::string(kind);
    node->amount_ = amount;
    torch::autograd::set_history(out, node);
  }
  const Tensor& tangent = in._fw_grad(/*level=*/0);
  if (tangent.defined()) {
    out._set_fw_grad(corrupt_backward(tangent, key, kind, amount), /*level=*/0, /*is_inplace_op=*/false);
  }
}

std::tuple<Tensor, std::optional<Tensor>> autograd_forward(const Tensor& input, const Tensor& key,
                                                           c10::string_view kind, double amount, double low,
                                                           double high, bool return_mask) {
  std::tuple<Tensor, std::optional<Tensor>> out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = corrupt(input, key, kind, amount, low, high, return_mask);
  }
  differentiate(input, std::get<0>(out), key, kind, amount);
  return out;
}

Tensor autograd_backward(const Tensor& grad, const Tensor& key, c10::string_view kind, double amount) {
  Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = corrupt_backward(grad, key, kind, amount);
  }
  differentiate(grad, out, key, kind, amount);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("corrupt", autograd_forward);
  m.impl("corrupt_backward", autograd_backward);
}

// Autocast changes no type here: an element leaves in the type in which it came.
static void keep_types(torch::Library& m) { fall_through(m, {"corrupt", "corrupt_backward"}); }

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) { keep_types(m); }
TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) { keep_types(m); }

}  // namespace lect11ext
