// Derivatives of semantic hashing's ops: binarize passes gradients and tangents on as they come, as if it were the
// identity (straight through); the others have none, for codes and distances are integers. Autocast.
#include <torch/library.h>

#include "autoencoder/hashing_ops.h"
#include "common/autograd.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using at::Tensor;

struct BinarizeNode : autograd::Node {
  std::string name() const override { return "BinarizeBackward"; }

  autograd::variable_list apply(autograd::variable_list&& grads) override { return {grads[0]}; }
};

Tensor autograd_binarize(const Tensor& input, double threshold) {
  Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = binarize(input, threshold);
  }
  if (autograd::needs_grad(input)) {
    auto node = autograd::make_node<BinarizeNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input));
    torch::autograd::set_history(out, node);
  }
  if (autograd::has_tangent(input)) {
    out._set_fw_grad(input._fw_grad(/*level=*/0), /*level=*/0, /*is_inplace_op=*/false);
  }
  return out;
}

template <auto op, class... Args>
auto without_derivative(Args... args) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return op(args...);
}

}  // namespace

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("binarize", autograd_binarize);
  m.impl("pack_bits", without_derivative<pack_bits, const Tensor&, double>);
  m.impl("unpack_bits", without_derivative<unpack_bits, const Tensor&, std::optional<c10::SymInt>, at::ScalarType>);
  m.impl("hamming_distance", without_derivative<hamming_distance, const Tensor&, const Tensor&>);
  m.impl("hamming_topk", without_derivative<hamming_topk, const Tensor&, const Tensor&, c10::SymInt>);
  m.impl("hamming_radius", without_derivative<hamming_radius, const Tensor&, const Tensor&, int64_t>);
}

// Autocast changes no type: a bit does not depend on it.
static void keep_types(torch::Library& m) {
  fall_through(m, {"binarize", "pack_bits", "unpack_bits", "hamming_distance", "hamming_topk", "hamming_radius"});
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) { keep_types(m); }
TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) { keep_types(m); }

}  // namespace lect11ext
