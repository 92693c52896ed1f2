// clip_gradient: the identity, whose gradient is clamped. Tangents pass unchanged.
#include <ATen/ops/clamp.h>
#include <torch/library.h>

#include <cmath>

#include "common/autograd.h"
#include "common/ops.h"
#include "recurrent/cells_ops.h"

namespace lect11ext {
namespace {

struct ClipGradientNode : autograd::Node {
  double limit_;

  std::string name() const override { return "ClipGradientBackward"; }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    return {grads[0].defined() ? at::clamp(grads[0], -limit_, limit_) : at::Tensor()};
  }
};

at::Tensor forward(const at::Tensor& x, double limit) {
  TORCH_CHECK_VALUE(limit >= 0, "limit must be nonnegative, but got ", limit);
  return x.clone();
}

at::Tensor autograd_forward(const at::Tensor& x, double limit) {
  at::Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = clip_gradient(x, limit);
  }
  if (autograd::needs_grad(x)) {
    auto node = autograd::make_node<ClipGradientNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    node->limit_ = limit;
    torch::autograd::set_history(out, node);
  }
  if (autograd::has_tangent(x)) out._set_fw_grad(x._fw_grad(/*level=*/0), /*level=*/0, /*is_inplace_op=*/false);
  return out;
}

}  // namespace

at::Tensor clip_gradient(const at::Tensor& x, double limit) {
  if (std::isinf(limit)) return x;
  static const auto op = find_op<decltype(forward)>("lect11ext::clip_gradient");
  return op.call(x, limit);
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("clip_gradient(Tensor x, float limit) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { m.impl("clip_gradient", forward); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { m.impl("clip_gradient", forward); }
#endif
TORCH_LIBRARY_IMPL(lect11ext, Meta, m) { m.impl("clip_gradient", forward); }
TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) { m.impl("clip_gradient", autograd_forward); }

}  // namespace lect11ext
