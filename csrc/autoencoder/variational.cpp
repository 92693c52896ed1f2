// PyTorch side of gaussian_rsample_kl: schema, checks, autograd. Equations and kernels: variational.h.
#include "autoencoder/variational.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "autoencoder/variational_ops.h"
#include "common/autograd.h"
#include "common/dispatch.h"
#include "common/random_ops.h"
#include "common/tensors.h"

#ifdef LECT11EXT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace lect11ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

enum class Reduction { None, SumLatent, BatchMean, Sum };

Reduction parse_reduction(c10::string_view name) {
  if (name == "sum_latent") return Reduction::SumLatent;
  if (name == "none") return Reduction::None;
  if (name == "batchmean") return Reduction::BatchMean;
  if (name == "sum") return Reduction::Sum;
  TORCH_CHECK_VALUE(false, "reduction must be one of 'none', 'sum_latent', 'batchmean', 'sum', but got '", name, "'");
}

// The arguments that are the same for the forward and its derivatives.
struct Inputs {
  const Tensor &mean, &logvar;
  const OptionalTensor &prior_mean, &prior_logvar;
  const Tensor& key;
  const std::optional<c10::SymInt>& num_samples;
  double free_bits;
  std::optional<double> logvar_min, logvar_max;
  Reduction reduction;

  bool has_prior() const { return autograd::defined(prior_mean); }
  bool clamps() const { return logvar_min.has_value() || logvar_max.has_value(); }
  at::ScalarType z_dtype() const { return c10::promoteTypes(mean.scalar_type(), logvar.scalar_type()); }

  at::ScalarType compute_dtype() const {
    at::ScalarType type = c10::promoteTypes(z_dtype(), at::kFloat);
    if (has_prior()) {
      type = c10::promoteTypes(type, prior_mean->scalar_type());
      type = c10::promoteTypes(type, prior_logvar->scalar_type());
    }
    return type;
  }

  c10::SymDimVector z_size() const {
    c10::SymDimVector size;
    if (num_samples.has_value()) size.push_back(*num_samples);
    size.append(mean.sym_sizes().begin(), mean.sym_sizes().end());
    return size;
  }

  c10::SymDimVector kl_size() const {
    const auto size = mean.sym_sizes();
    if (reduction == Reduction::None) return c10::SymDimVector(size.begin(), size.end());
    if (reduction == Reduction::SumLatent) return c10::SymDimVector(size.begin(), size.end() - 1);
    return {};
  }

  void check() const {
    for (const auto& [name, tensor] : {std::pair("mean", &mean), std::pair("logvar", &logvar)}) {
      TORCH_CHECK_TYPE(is_kernel_dtype(tensor->scalar_type()), name,
                       " must be float32, float64, bfloat16 or float16, but got ", tensor->scalar_type());
    }
    check_shape("logvar", logvar.sym_sizes(), mean.sym_sizes(), "that of mean");
    check_same_device({{"mean", &mean}, {"logvar", &logvar}});
    TORCH_CHECK_VALUE(has_prior() == autograd::defined(prior_logvar),
                      "prior_mean and prior_logvar must be given "
                      "together, but got only ",
                      has_prior() ? "prior_mean" : "prior_logvar");
    if (has_prior()) {
      check_same_device({{"mean", &mean}, {"prior_mean", &*prior_mean}, {"prior_logvar", &*prior_logvar}});
      check_prior("prior_mean", *prior_mean);
      check_prior("prior_logvar", *prior_logvar);
    }
    check_key(key, mean.device());
    TORCH_CHECK_VALUE(!num_samples.has_value() || *num_samples >= 1, "num_samples must be at least 1, but got ",
                      *num_samples);
    TORCH_CHECK_VALUE(free_bits >= 0, "free_bits must be nonnegative, but got ", free_bits);
    TORCH_CHECK_VALUE(!clamps() || logvar_min.value_or(-INFINITY) <= logvar_max.value_or(INFINITY),
                      "logvar_range must be (low, high) with low <= high, but got (", logvar_min.value_or(-INFINITY),
                      ", ", logvar_max.value_or(INFINITY), ")");
    TORCH_CHECK_VALUE(mean.dim() > 0 || reduction == Reduction::None || reduction == Reduction::Sum,
                      "mean must have at least one dimension for this reduction, but got a scalar");
  }

 private:
  void check_prior(const char* name, const Tensor& prior) const {
    TORCH_CHECK_TYPE(is_kernel_dtype(prior.scalar_type()), name,
                     " must be float32, float64, bfloat16 or float16, but got ", prior.scalar_type());
    bool fits = prior.dim() <= mean.dim();
    for (int64_t d = 1; fits && d <= prior.dim(); ++d) {
      fits = prior.sym_size(-d) == mean.sym_size(-d) || prior.sym_size(-d) == 1;
    }
    TORCH_CHECK_VALUE(fits, name, " must broadcast to the shape of mean, ", mean.sym_sizes(), ", but got ",
                      prior.sym_sizes());
  }
};

// --- the definition in differentiable ATen: tangents, derivatives of the backward ---------------------------------

struct Terms {
  Tensor mean, logvar, root;    // in the type of the arithmetic; logvar clamped; e^(logvar/2)
  Tensor u, precision_root, d;  // mean − prior_mean, e^(−prior_logvar/2), logvar − prior_logvar
  Tensor kl;                    // per element, before free bits
};

Terms composite_terms(const Inputs& in) {
  const auto type = in.compute_dtype();
  Terms t;
  t.mean = in.mean.to(type);
  t.logvar = in.logvar.to(type);
  if (in.clamps()) {
    const auto bound = [](std::optional<double> b) { return b ? std::optional<at::Scalar>(*b) : std::nullopt; };
    t.logvar = at::clamp(t.logvar, bound(in.logvar_min), bound(in.logvar_max));
  }
  t.root = at::exp(t.logvar * 0.5);
  t.u = t.mean;
  t.d = t.logvar;
  Tensor scaled = t.u;
  if (in.has_prior()) {
    const Tensor prior_logvar = in.prior_logvar->to(type);
    t.u = t.mean - in.prior_mean->to(type);
    t.d = t.logvar - prior_logvar;
    t.precision_root = at::exp(prior_logvar * -0.5);
    scaled = t.u * t.precision_root;
  }
  t.kl = (scaled * scaled + at::expm1(t.d) - t.d) * 0.5;
  return t;
}

Tensor composite_noise(const Inputs& in) { return philox_normal(in.key, in.z_size(), in.compute_dtype()); }

std::tuple<Tensor, Tensor> composite_forward(const Inputs& in) {
  const Terms t = composite_terms(in);
  const Tensor z = (t.mean + t.root * composite_noise(in)).to(in.z_dtype());
  Tensor kl = in.free_bits > 0 ? at::clamp(t.kl, in.free_bits) : t.kl;
  if (in.reduction == Reduction::SumLatent) kl = kl.sum(-1);
  if (in.reduction == Reduction::Sum || in.reduction == Reduction::BatchMean) kl = kl.sum();
  if (in.reduction == Reduction::BatchMean) kl = kl / at::Scalar(in.mean.sym_size(0));
  return {z, kl};
}

// grad_kl as a view over the shape of mean, before the scale of batchmean.
Tensor expand_grad_kl(const Tensor& grad_kl, const Inputs& in) {
  return (in.reduction == Reduction::SumLatent ? grad_kl.unsqueeze(-1) : grad_kl).expand_symint(in.mean.sym_sizes());
}

Gradients composite_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Inputs& in,
                             std::array<bool, 4> mask) {
  const auto type = in.compute_dtype();
  const Terms t = composite_terms(in);
  Tensor mean, logvar, prior_mean, prior_logvar;
  const auto add = [](const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; };
  if (autograd::defined(grad_z)) {
    const Tensor g = grad_z->to(type), noisy = g * composite_noise(in);
    const bool many = in.num_samples.has_value();
    mean = many ? g.sum(0) : g;
    logvar = t.root * (many ? noisy.sum(0) : noisy) * 0.5;
  }
  if (autograd::defined(grad_kl)) {
    Tensor w = expand_grad_kl(grad_kl->to(type), in);
    if (in.reduction == Reduction::BatchMean) w = w / at::Scalar(in.mean.sym_size(0));
    if (in.free_bits > 0) w = w * (t.kl >= in.free_bits).to(type);
    const Tensor precision = in.has_prior() ? t.precision_root * t.precision_root : Tensor();
    const Tensor d_mean = in.has_prior() ? w * t.u * precision : w * t.u;
    const Tensor d_logvar = w * at::expm1(t.d) * 0.5;
    mean = add(mean, d_mean);
    logvar = add(logvar, d_logvar);
    if (in.has_prior()) {
      prior_mean = -d_mean;
      prior_logvar = -(d_logvar + w * t.u * t.u * precision * 0.5);
    }
  }
  if (in.clamps() && logvar.defined()) {
    logvar = logvar * (in.logvar.to(type) == t.logvar).to(type);
  }
  const auto finish = [](bool wanted, const Tensor& grad, const Tensor& like) {
    if (!wanted) return Tensor();
    return grad.defined() ? at::sum_to(grad, like.sym_sizes()).to(like.scalar_type()) : at::zeros_like(like);
  };
  return {finish(mask[0], mean, in.mean), finish(mask[1], logvar, in.logvar),
          in.has_prior() ? finish(mask[2], prior_mean, *in.prior_mean) : Tensor(),
          in.has_prior() ? finish(mask[3], prior_logvar, *in.prior_logvar) : Tensor()};
}

// --- meta ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> meta_forward(const Inputs& in) {
  in.check();
  return {at::empty_symint(in.z_size(), in.mean.options().dtype(in.z_dtype())),
          at::empty_symint(in.kl_size(), in.mean.options().dtype(in.compute_dtype()))};
}

Gradients meta_backward(const OptionalTensor&, const OptionalTensor&, const Inputs& in, std::array<bool, 4> mask) {
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
  args.low = in.logvar_min.value_or(-INFINITY);
  args.high = in.logvar_max.value_or(INFINITY);
}

GaussianTiles tiles_of(const Inputs& in) {
  const int64_t numel = in.mean.numel();
  const bool rows = in.reduction == Reduction::SumLatent && numel > 0;
  return rows ? GaussianTiles(numel / in.mean.size(-1), in.mean.size(-1)) : GaussianTiles(1, numel);
}

// About a nanosecond a normal and as much for the rest of an element.
int64_t tile_cost(const GaussianTiles& tiles, int64_t samples) {
  const int64_t elements = tiles.tiles_per_row > 1 ? GaussianTiles::kElements : tiles.rows_per_tile * tiles.cols;
  return elements * (samples + 1);
}

void launch(const GaussianForward& args, c10::Device device) {
  if (device.is_cpu()) {
    return run_parallel(gaussian_forward_kernel, args, args.tiles.count, tile_cost(args.tiles, args.samples));
  }
#ifdef LECT11EXT_WITH_CUDA
  if (args.tiles.count > 0) cuda::gaussian_forward(args, c10::cuda::getCurrentCUDAStream().stream());
#endif
}

void launch(const GaussianBackward& args, c10::Device device) {
  if (device.is_cpu()) {
    return run_parallel(gaussian_backward_kernel, args, args.tiles.count, tile_cost(args.tiles, args.samples));
  }
#ifdef LECT11EXT_WITH_CUDA
  if (args.tiles.count > 0) cuda::gaussian_backward(args, c10::cuda::getCurrentCUDAStream().stream());
#endif
}

// Sums of `count` neighbours each, in order and in double: at::sum's order depends on the number of threads.
template <class T>
void sum_partials(const T* partials, T* out, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(partials[row * count + i]);
    out[row] = static_cast<T>(sum);
  }
}

Tensor sum_tiles(const Tensor& partials, at::IntArrayRef size, const GaussianTiles& tiles) {
  if (!partials.is_cpu()) return partials.view({tiles.rows, tiles.tiles_per_row}).sum(-1).view(size);
  Tensor out = at::empty(size, partials.options());
  if (partials.scalar_type() == at::kDouble) {
    sum_partials(partials.const_data_ptr<double>(), out.mutable_data_ptr<double>(), tiles.rows, tiles.tiles_per_row);
  } else {
    sum_partials(partials.const_data_ptr<float>(), out.mutable_data_ptr<float>(), tiles.rows, tiles.tiles_per_row);
  }
  return out;
}

std::tuple<Tensor, Tensor> kernel_forward(const Inputs& in) {
  in.check();
  GaussianForward args{};
  Held held;
  describe(in, Tensor(), nullptr, args, held);
  args.tiles = tiles_of(in);
  const auto options = in.mean.options();
  const auto z_size = in.z_size(), kl_size = in.kl_size();
  Tensor z = at::empty_symint(z_size, options.dtype(in.z_dtype()));
  if (args.tiles.count == 0) return {z, at::zeros_symint(kl_size, options.dtype(in.compute_dtype()))};

  args.kl_elements = in.reduction == Reduction::None;
  const bool partial = !args.kl_elements && args.tiles.tiles_per_row > 1;
  const auto size = C10_AS_INTARRAYREF_SLOW(kl_size);
  Tensor kl = partial ? at::empty({args.tiles.count}, options.dtype(in.compute_dtype()))
                      : at::empty(size, options.dtype(in.compute_dtype()));
  args.z = z.mutable_data_ptr();
  args.z_dtype = dtype_of(z, "z");
  args.kl = kl.mutable_data_ptr();
  launch(args, z.device());
  if (partial) kl = sum_tiles(kl, size, args.tiles);
  if (in.reduction == Reduction::BatchMean) kl.div_(in.mean.size(0));
  return {z, kl};
}

Gradients kernel_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Inputs& in,
                          std::array<bool, 4> mask) {
  in.check();
  GaussianBackward args{};
  Held held;
  const Tensor weights = autograd::defined(grad_kl) ? expand_grad_kl(*grad_kl, in) : Tensor();
  describe(in, weights, &args.grad_kl, args, held);
  Operand sampled{autograd::tensor_or_none(grad_z), &args.grad_z};
  if (sampled.tensor.defined()) {
    TORCH_CHECK_VALUE(sampled.tensor.sym_sizes().equals(in.z_size()), "grad_z must have the shape of z, but got ",
                      sampled.tensor.sym_sizes());
    set_views(sampled.tensor.sizes(), args.grad_z_shape, {&sampled});
  }
  args.grad_kl_scale = in.reduction == Reduction::BatchMean ? 1.0 / static_cast<double>(in.mean.size(0)) : 1.0;
  args.tiles = GaussianTiles(1, in.mean.numel());
  const auto options = in.mean.options();
  const auto make = [&](bool wanted, at::ScalarType type, void*& pointer) {
    if (!wanted) return Tensor();
    Tensor out = at::empty(in.mean.sizes(), options.dtype(type));
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
  launch(args, in.mean.device());
  const auto reduce = [](const Tensor& grad, const OptionalTensor& prior) {
    return grad.defined() ? at::sum_to(grad, prior->sizes()).to(prior->scalar_type()) : grad;
  };
  return {mean, logvar, reduce(prior_mean, in.prior_mean), reduce(prior_logvar, in.prior_logvar)};
}

// --- registration -------------------------------------------------------------------------------------------------

// The schema's argument list, shared by all registrations of the two ops.
#define GAUSSIAN_PARAMETERS                                                                                      \
  const Tensor &mean, const Tensor &logvar, const OptionalTensor &prior_mean, const OptionalTensor &prior_logvar, \
      const Tensor &key, std::optional<c10::SymInt> num_samples, double free_bits,                              \
      std::optional<double> logvar_min, std::optional<double> logvar_max, c10::string_view reduction
#define GAUSSIAN_INPUTS                                                                             \
  Inputs {                                                                                          \
    mean, logvar, prior_mean, prior_logvar, key, num_samples, free_bits, logvar_min, logvar_max,    \
        parse_reduction(reduction)                                                                  \
  }
#define GAUSSIAN_ARGUMENTS \
  mean, logvar, prior_mean, prior_logvar, key, num_samples, free_bits, logvar_min, logvar_max, reduction

template <std::tuple<Tensor, Tensor> (*body)(const Inputs&)>
std::tuple<Tensor, Tensor> forward_entry(GAUSSIAN_PARAMETERS) {
  return body(GAUSSIAN_INPUTS);
}

template <Gradients (*body)(const OptionalTensor&, const OptionalTensor&, const Inputs&, std::array<bool, 4>)>
Gradients backward_entry(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, GAUSSIAN_PARAMETERS,
                         std::array<bool, 4> mask) {
  return body(grad_z, grad_kl, GAUSSIAN_INPUTS, mask);
}

using ForwardSignature = std::tuple<Tensor, Tensor>(GAUSSIAN_PARAMETERS);
using BackwardSignature = Gradients(const OptionalTensor&, const OptionalTensor&, GAUSSIAN_PARAMETERS,
                                    std::array<bool, 4>);

Gradients call_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, GAUSSIAN_PARAMETERS,
                        std::array<bool, 4> mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lect11ext::gaussian_rsample_kl_backward", "")
                             .typed<BackwardSignature>();
  return op.call(grad_z, grad_kl, GAUSSIAN_ARGUMENTS, mask);
}

struct GaussianNode : autograd::Node {
  autograd::SavedVariable mean_, logvar_, prior_mean_, prior_logvar_, key_;
  std::optional<c10::SymInt> num_samples_;
  double free_bits_ = 0;
  std::optional<double> logvar_min_, logvar_max_;
  std::string reduction_;

  std::string name() const override { return "GaussianRsampleKlBackward"; }

  void release_variables() override {
    for (auto* saved : {&mean_, &logvar_, &prior_mean_, &prior_logvar_, &key_}) saved->reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    std::array<bool, 4> mask{};
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(i);
    if (!grads[0].defined() && !grads[1].defined()) return autograd::variable_list(mask.size());
    const auto [mean, logvar, prior_mean, prior_logvar] = call_backward(
        autograd::optional_of(grads[0]), autograd::optional_of(grads[1]), mean_.unpack(), logvar_.unpack(),
        autograd::optional_of(prior_mean_.unpack()), autograd::optional_of(prior_logvar_.unpack()), key_.unpack(),
        num_samples_, free_bits_, logvar_min_, logvar_max_, reduction_, mask);
    return {mean, logvar, prior_mean, prior_logvar};
  }
};

std::tuple<Tensor, Tensor> autograd_forward(GAUSSIAN_PARAMETERS) {
  std::tuple<Tensor, Tensor> out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = gaussian_rsample_kl(GAUSSIAN_ARGUMENTS);
  }
  const auto& [z, kl] = out;
  if (autograd::needs_grad(mean, logvar, prior_mean, prior_logvar)) {
    auto node = autograd::make_node<GaussianNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(mean, logvar, prior_mean, prior_logvar));
    node->mean_ = autograd::SavedVariable(mean, false);
    node->logvar_ = autograd::SavedVariable(logvar, false);
    node->prior_mean_ = autograd::SavedVariable(prior_mean, false);
    node->prior_logvar_ = autograd::SavedVariable(prior_logvar, false);
    node->key_ = autograd::SavedVariable(key, false);
    node->num_samples_ = num_samples;
    node->free_bits_ = free_bits;
    node->logvar_min_ = logvar_min;
    node->logvar_max_ = logvar_max;
    node->reduction_ = std::string(reduction);
    torch::autograd::set_history(z, node);
    torch::autograd::set_history(kl, node);
  }
  if (autograd::has_tangent(mean, logvar, prior_mean, prior_logvar)) {
    const auto [composite_z, composite_kl] = composite_forward(GAUSSIAN_INPUTS);
    autograd::copy_tangent(z, composite_z);
    autograd::copy_tangent(kl, composite_kl);
  }
  return out;
}

Gradients autograd_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, GAUSSIAN_PARAMETERS,
                            std::array<bool, 4> mask) {
  if (autograd::needs_grad(grad_z, grad_kl, mean, logvar, prior_mean, prior_logvar) ||
      autograd::has_tangent(grad_z, grad_kl, mean, logvar, prior_mean, prior_logvar)) {
    return composite_backward(grad_z, grad_kl, GAUSSIAN_INPUTS, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_z, grad_kl, GAUSSIAN_ARGUMENTS, mask);
}

#ifdef LECT11EXT_WITH_CUDA
std::tuple<Tensor, Tensor> cuda_forward(const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.mean.device());
  return kernel_forward(in);
}

Gradients cuda_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Inputs& in,
                        std::array<bool, 4> mask) {
  const c10::cuda::CUDAGuard guard(in.mean.device());
  return kernel_backward(grad_z, grad_kl, in, mask);
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> gaussian_rsample_kl(GAUSSIAN_PARAMETERS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::gaussian_rsample_kl", "").typed<ForwardSignature>();
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

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("gaussian_rsample_kl", forward_entry<kernel_forward>);
  m.impl("gaussian_rsample_kl_backward", backward_entry<kernel_backward>);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("gaussian_rsample_kl", forward_entry<cuda_forward>);
  m.impl("gaussian_rsample_kl_backward", backward_entry<cuda_backward>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("gaussian_rsample_kl", forward_entry<meta_forward>);
  m.impl("gaussian_rsample_kl_backward", backward_entry<meta_backward>);
}

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("gaussian_rsample_kl", autograd_forward);
  m.impl("gaussian_rsample_kl_backward", autograd_backward);
}

// Autocast changes no type here: the arithmetic is in float32 or better whatever comes in.
TORCH_LIBRARY_IMPL(lect11ext, Autocast, m) {
  m.impl("gaussian_rsample_kl", torch::CppFunction::makeFallthrough());
  m.impl("gaussian_rsample_kl_backward", torch::CppFunction::makeFallthrough());
}

}  // namespace lect11ext
