// PyTorch side of gaussian_rsample_kl: schema, kernels' arguments. Derivatives: variational_autograd.cpp. Equations and
// kernels: variational.h.
#include "autoencoder/variational.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "autoencoder/partial_sums.h"
#include "autoencoder/variational_inputs.h"
#include "autoencoder/variational_ops.h"
#include "common/autograd.h"
#include "common/dispatch.h"
#include "common/ops.h"
#include "common/random_ops.h"
#include "common/tensors.h"

namespace lect11ext {
namespace {

using namespace gaussian;

// --- meta ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> meta_forward(const Inputs& in) {
  in.check();
  return {at::empty_symint(in.z_size(), in.mean.options().dtype(in.z_dtype())),
          at::empty_symint(in.kl_size(), in.mean.options().dtype(in.compute_dtype()))};
}

Gradients meta_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Inputs& in,
                        std::array<bool, 4> mask) {
  in.check();
  in.check_gradients(grad_z, grad_kl);
  const auto like = [](bool wanted, const Tensor& t) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : Tensor();
  };
  return {like(mask[0], in.mean), like(mask[1], in.logvar), in.has_prior() ? like(mask[2], *in.prior_mean) : Tensor(),
          in.has_prior() ? like(mask[3], *in.prior_logvar) : Tensor()};
}

// --- kernels ------------------------------------------------------------------------------------------------------

// Tensors that the views of a Gaussian borrow from.
struct Held {
  Operand mean, logvar, prior_mean, prior_logvar, grad_kl;
  Tensor key;
};

// Fills the common part of the struct; `grad_kl` may be undefined.
void describe(const Inputs& in, const Tensor& grad_kl, View* grad_kl_view, Gaussian& args, Held& held) {
  const auto size = in.mean.sizes();
  const auto over_shape = [&](const OptionalTensor& t) { return autograd::defined(t) ? t->expand(size) : Tensor(); };
  held.mean = {in.mean, &args.mean};
  held.logvar = {in.logvar, &args.logvar};
  held.prior_mean = {over_shape(in.prior_mean), &args.prior_mean};
  held.prior_logvar = {over_shape(in.prior_logvar), &args.prior_logvar};
  held.grad_kl = {grad_kl, grad_kl_view};
  set_views(size, args.shape, {&held.mean, &held.logvar, &held.prior_mean, &held.prior_logvar, &held.grad_kl});
  held.key = in.key.contiguous();
  args.compute_double = in.compute_dtype() == at::kDouble;
  args.key = held.key.const_data_ptr<int64_t>();
  args.samples = in.num_samples.has_value() ? in.num_samples->guard_int(__FILE__, __LINE__) : 1;
  args.free_bits = in.free_bits;
  args.clamps = in.clamps();
  // Operands and outputs of a forward, against a usual last-level cache. At 4M elements, two threads: 14 % faster, and
  // so is a sum over z that follows.
  args.streams = in.mean.nbytes() * (args.samples + 2) > kBeyondCaches;
  args.low = in.logvar_min.value_or(-INFINITY);
  args.high = in.logvar_max.value_or(INFINITY);
}

RowTiles tiles_of(const Inputs& in) {
  const int64_t numel = in.mean.numel();
  const bool rows = in.reduction == Reduction::Rows && numel > 0;
  return rows ? RowTiles(numel / in.mean.size(-1), in.mean.size(-1)) : RowTiles(1, numel);
}

// About a nanosecond a normal and as much for the rest of an element.
int64_t tile_cost(const RowTiles& tiles, int64_t samples) { return elements_of(tiles) * (samples + 1); }

std::tuple<Tensor, Tensor> kernel_forward(const Inputs& in) {
  in.check();
  GaussianForward args{};
  Held held;
  describe(in, Tensor(), nullptr, args, held);
  args.tiles = tiles_of(in);
  const auto options = in.mean.options();
  const auto z_size = in.z_size(), kl_size = in.kl_size();
  Tensor z = empty_output(C10_AS_INTARRAYREF_SLOW(z_size), options.dtype(in.z_dtype()));
  if (args.tiles.count == 0) return {z, at::zeros_symint(kl_size, options.dtype(in.compute_dtype()))};

  args.kl_elements = in.reduction == Reduction::None;
  const bool partial = !args.kl_elements && args.tiles.tiles_per_row > 1;
  const auto size = C10_AS_INTARRAYREF_SLOW(kl_size);
  Tensor kl = partial ? at::empty({args.tiles.count}, options.dtype(in.compute_dtype()))
                      : empty_output(size, options.dtype(in.compute_dtype()));
  args.z = z.mutable_data_ptr();
  args.z_dtype = dtype_of(z, "z");
  args.kl = kl.mutable_data_ptr();
  launch<gaussian_forward_kernel, LECT11EXT_CUDA_KERNEL(gaussian_forward)>(
      args, args.tiles.count, tile_cost(args.tiles, args.samples), z.device());
  if (partial) kl = sum_tiles(kl, size, args.tiles);
  if (in.reduction == Reduction::BatchMean) kl.div_(in.mean.size(0));
  return {z, kl};
}

Gradients kernel_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Inputs& in,
                          std::array<bool, 4> mask) {
  in.check();
  in.check_gradients(grad_z, grad_kl);
  GaussianBackward args{};
  Held held;
  const Tensor weights = autograd::defined(grad_kl) ? expand_grad_kl(*grad_kl, in) : Tensor();
  describe(in, weights, &args.grad_kl, args, held);
  Operand sampled{autograd::tensor_or_none(grad_z), &args.grad_z};
  if (sampled.tensor.defined()) {
    set_views(sampled.tensor.sizes(), args.grad_z_shape, {&sampled});
  }
  args.grad_kl_scale = reduction_scale(in.mean, in.reduction);
  args.tiles = RowTiles(1, in.mean.numel());
  const auto options = in.mean.options();
  const auto make = [&](bool wanted, at::ScalarType type, void*& pointer) {
    if (!wanted) return Tensor();
    Tensor out = empty_output(in.mean.sizes(), options.dtype(type));
    pointer = out.mutable_data_ptr();
    return out;
  };
  const auto compute = in.compute_dtype();
  Tensor mean = make(mask[0], in.mean.scalar_type(), args.grad_mean);
  Tensor logvar = make(mask[1], in.logvar.scalar_type(), args.grad_logvar);
  Tensor prior_mean = make(mask[2] && in.has_prior(), compute, args.grad_prior_mean);
  Tensor prior_logvar = make(mask[3] && in.has_prior(), compute, args.grad_prior_logvar);
  args.grad_mean_dtype = dtype_of(in.mean, "mean");
  args.grad_logvar_dtype = dtype_of(in.logvar, "logvar");
  launch<gaussian_backward_kernel, LECT11EXT_CUDA_KERNEL(gaussian_backward)>(
      args, args.tiles.count, tile_cost(args.tiles, args.samples), in.mean.device());
  const auto reduce = [](const Tensor& grad, const OptionalTensor& prior) {
    return grad.defined() ? sum_broadcast(grad, prior->sym_sizes()).to(prior->scalar_type()) : grad;
  };
  return {mean, logvar, reduce(prior_mean, in.prior_mean), reduce(prior_logvar, in.prior_logvar)};
}

// --- registration -------------------------------------------------------------------------------------------------

template <std::tuple<Tensor, Tensor> (*body)(const Inputs&)>
std::tuple<Tensor, Tensor> forward_entry(GAUSSIAN_PARAMETERS) {
  return body(GAUSSIAN_INPUTS);
}

template <Gradients (*body)(const OptionalTensor&, const OptionalTensor&, const Inputs&, std::array<bool, 4>)>
Gradients backward_entry(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, GAUSSIAN_PARAMETERS,
                         std::array<bool, 4> mask) {
  return body(grad_z, grad_kl, GAUSSIAN_INPUTS, mask);
}

}  // namespace

std::tuple<Tensor, Tensor> gaussian_rsample_kl(GAUSSIAN_PARAMETERS) {
  static const auto op = find_op<ForwardSignature>("lect11ext::gaussian_rsample_kl");
  return op.call(GAUSSIAN_ARGUMENTS);
}

#define GAUSSIAN_SCHEMA                                                                                      \
  "Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor key, SymInt? num_samples, " \
  "float free_bits, float? logvar_min, float? logvar_max, str reduction"

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("gaussian_rsample_kl(" GAUSSIAN_SCHEMA ") -> (Tensor z, Tensor kl)", {at::Tag::pt2_compliant_tag});
  m.def("gaussian_rsample_kl_backward(Tensor? grad_z, Tensor? grad_kl, " GAUSSIAN_SCHEMA
        ", bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

static void add_kernels(torch::Library& m) {
  m.impl("gaussian_rsample_kl", forward_entry<kernel_forward>);
  m.impl("gaussian_rsample_kl_backward", backward_entry<kernel_backward>);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("gaussian_rsample_kl", forward_entry<meta_forward>);
  m.impl("gaussian_rsample_kl_backward", backward_entry<meta_backward>);
}

}  // namespace lect11ext
