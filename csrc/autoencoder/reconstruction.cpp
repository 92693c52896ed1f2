// PyTorch side of reconstruction_loss: schema, kernels' arguments. Derivatives: reconstruction_autograd.cpp. Equations
// and kernels: reconstruction.h.
#include "autoencoder/reconstruction.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "autoencoder/partial_sums.h"
#include "autoencoder/reconstruction_inputs.h"
#include "common/dispatch.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace reconstruction;

// --- meta ---------------------------------------------------------------------------------------------------------

Tensor meta_forward(const Inputs& in) {
  in.check();
  return at::empty_symint(in.loss_size(), in.input.options().dtype(in.compute_dtype()));
}

Gradients meta_backward(const Tensor& grad, const Inputs& in, std::array<bool, 4> mask) {
  in.check();
  in.check_gradient(grad);
  const auto like = [](bool wanted, const Tensor& t) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : Tensor();
  };
  return {like(mask[0], in.input), like(mask[1], in.target), in.has_logvar() ? like(mask[2], *in.logvar) : Tensor(),
          in.has_weight() ? like(mask[3], *in.weight) : Tensor()};
}

// --- kernels ------------------------------------------------------------------------------------------------------

// Tensors that the views borrow from.
struct Held {
  Operand input, target, logvar, weight, grad;
};

void describe(const Inputs& in, Reconstruction& args, Held& held) {
  const auto size = in.input.sizes();
  const auto over_shape = [&](const OptionalTensor& t) { return autograd::defined(t) ? t->expand(size) : Tensor(); };
  held.input = {in.input, &args.input};
  held.target = {in.target, &args.target};
  held.logvar = {over_shape(in.logvar), &args.logvar};
  held.weight = {over_shape(in.weight), &args.weight};
  set_views(size, args.shape, {&held.input, &held.target, &held.logvar, &held.weight, &held.grad});
  args.compute_double = in.compute_dtype() == at::kDouble;
  args.likelihood = in.likelihood;
  args.streams = 3 * in.input.nbytes() > kBeyondCaches;
}

constexpr int64_t kElementCost = 1;  // nanoseconds, about

Tensor kernel_forward(const Inputs& in) {
  in.check();
  ReconstructionForward args{};
  Held held;
  describe(in, args, held);
  const auto options = in.input.options().dtype(in.compute_dtype());
  const auto sym_size = in.loss_size();
  const auto size = C10_AS_INTARRAYREF_SLOW(sym_size);
  const int64_t numel = in.input.numel();
  if (numel == 0) return at::zeros(size, options);
  const bool by_rows = in.reduction == Reduction::Rows;
  args.tiles = by_rows ? RowTiles(numel / in.input.size(-1), in.input.size(-1)) : RowTiles(1, numel);
  args.loss_elements = in.reduction == Reduction::None;
  const bool partial = !args.loss_elements && args.tiles.tiles_per_row > 1;
  Tensor loss = partial ? at::empty({args.tiles.count}, options) : empty_output(size, options);
  args.loss = loss.mutable_data_ptr();
  launch<reconstruction_forward_kernel, LECT11EXT_CUDA_KERNEL(reconstruction_forward)>(
      args, args.tiles.count, elements_of(args.tiles) * kElementCost, loss.device());
  if (partial) loss = sum_tiles(loss, size, args.tiles);
  if (in.reduction == Reduction::BatchMean) loss.div_(in.input.size(0));
  return loss;
}

Gradients kernel_backward(const Tensor& grad, const Inputs& in, std::array<bool, 4> mask) {
  in.check();
  in.check_gradient(grad);
  ReconstructionBackward args{};
  Held held;
  held.grad = {expand_reduced(grad, in.input.sym_sizes(), in.reduction), &args.grad};
  describe(in, args, held);
  args.tiles = RowTiles(1, in.input.numel());
  args.grad_scale = reduction_scale(in.input, in.reduction);
  const auto make = [&](bool wanted, at::ScalarType type, void*& pointer) {
    if (!wanted) return Tensor();
    Tensor out = empty_output(in.input.sizes(), in.input.options().dtype(type));
    pointer = out.mutable_data_ptr();
    return out;
  };
  const auto compute = in.compute_dtype();
  Tensor input = make(mask[0], in.input.scalar_type(), args.grad_input);
  Tensor target = make(mask[1], in.target.scalar_type(), args.grad_target);
  Tensor logvar = make(mask[2] && in.has_logvar(), compute, args.grad_logvar);
  Tensor weight = make(mask[3] && in.has_weight(), compute, args.grad_weight);
  args.grad_input_dtype = dtype_of(in.input, "input");
  args.grad_target_dtype = dtype_of(in.target, "target");
  launch<reconstruction_backward_kernel, LECT11EXT_CUDA_KERNEL(reconstruction_backward)>(
      args, args.tiles.count, elements_of(args.tiles) * kElementCost, in.input.device());
  const auto reduce = [](const Tensor& grad, const OptionalTensor& like) {
    return grad.defined() ? sum_broadcast(grad, like->sym_sizes()).to(like->scalar_type()) : grad;
  };
  return {input, target, reduce(logvar, in.logvar), reduce(weight, in.weight)};
}

// --- registration -------------------------------------------------------------------------------------------------

template <Tensor (*body)(const Inputs&)>
Tensor forward_entry(RECONSTRUCTION_PARAMETERS) {
  return body(RECONSTRUCTION_INPUTS);
}

template <Gradients (*body)(const Tensor&, const Inputs&, std::array<bool, 4>)>
Gradients backward_entry(const Tensor& grad, RECONSTRUCTION_PARAMETERS, std::array<bool, 4> mask) {
  return body(grad, RECONSTRUCTION_INPUTS, mask);
}

}  // namespace

Tensor reconstruction::call_forward(RECONSTRUCTION_PARAMETERS) {
  static const auto op = find_op<ForwardSignature>("lect11ext::reconstruction_loss");
  return op.call(RECONSTRUCTION_ARGUMENTS);
}

#define RECONSTRUCTION_SCHEMA \
  "Tensor input, Tensor target, Tensor? logvar, Tensor? weight, str likelihood, str reduction"

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("reconstruction_loss(" RECONSTRUCTION_SCHEMA ") -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("reconstruction_loss_backward(Tensor grad, " RECONSTRUCTION_SCHEMA
        ", bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

static void add_kernels(torch::Library& m) {
  m.impl("reconstruction_loss", forward_entry<kernel_forward>);
  m.impl("reconstruction_loss_backward", backward_entry<kernel_backward>);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("reconstruction_loss", forward_entry<meta_forward>);
  m.impl("reconstruction_loss_backward", backward_entry<meta_backward>);
}

}  // namespace lect11ext
