// PyTorch side of corrupt: schema, kernels' arguments. Derivatives: corruption_autograd.cpp. Equations and kernels:
// corruption.h.
#include "autoencoder/corruption.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "autoencoder/corruption_inputs.h"
#include "autoencoder/corruption_ops.h"
#include "common/dispatch.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace corruption;

using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, OptionalTensor>;

#define CORRUPT_PARAMETERS                                                                                         \
  const Tensor &input, const Tensor &key, c10::string_view kind, double amount, double low, double high, bool return_mask

// --- meta ---------------------------------------------------------------------------------------------------------

Outputs meta_forward(CORRUPT_PARAMETERS) {
  Inputs{input, "input", parse_kind(kind), amount}.check(key);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          return_mask ? OptionalTensor(at::empty_symint(input.sym_sizes(), input.options().dtype(at::kBool)))
                      : std::nullopt};
}

Tensor meta_backward(const Tensor& grad, const Tensor& key, c10::string_view kind, double amount) {
  Inputs{grad, "grad", parse_kind(kind), amount}.check(key);
  return at::empty_symint(grad.sym_sizes(), grad.options());
}

// --- kernels ------------------------------------------------------------------------------------------------------

constexpr int64_t kTile = kCorruptionTile;

// Fills the common part of the struct, and runs the kernel.
template <auto kCpu, auto kCuda, class Args>
Tensor run(Args& args, const Tensor& input, const Tensor& key, int64_t tile_cost) {
  Tensor out = empty_output(input.sizes(), input.options());
  if (out.numel() == 0) return out;
  Operand held{input, &args.input};
  set_views(input.sizes(), args.shape, {&held});
  const Tensor dense_key = key.contiguous();
  args.key = dense_key.const_data_ptr<int64_t>();
  args.out = out.mutable_data_ptr();
  args.streams = 2 * input.nbytes() > kBeyondCaches;
  launch<kCpu, kCuda>(args, divide_up(args.shape.numel, kTile), tile_cost, input.device());
  return out;
}

Tensor replace(const Inputs& in, const Tensor& key, double low, double high, bool* mask) {
  CorruptionReplace args{};
  const uint64_t threshold = in.threshold();
  args.last = static_cast<uint32_t>(threshold - 1);
  args.pepper = in.kind == Kind::SaltAndPepper ? static_cast<uint32_t>(threshold / 2) : 0;
  args.low = low;
  args.high = high;
  args.mask = mask;
  return run<corruption_replace_kernel, LECT11EXT_CUDA_KERNEL(corruption_replace)>(
      args, in.input, key, /*tile_cost=*/kTile / 2);  // words cost half of what normals do
}

Outputs kernel_forward(CORRUPT_PARAMETERS) {
  const Inputs in{input, "input", parse_kind(kind), amount};
  in.check(key);
  const auto mask_options = input.options().dtype(at::kBool);
  if (in.kind == Kind::Gaussian) {
    CorruptionDrift args{};
    args.deviation = amount;
    Tensor out =
        run<corruption_drift_kernel, LECT11EXT_CUDA_KERNEL(corruption_drift)>(args, input, key, /*tile_cost=*/kTile);
    return {out, return_mask ? OptionalTensor(at::ones(input.sizes(), mask_options)) : std::nullopt};
  }
  if (in.threshold() == 0) {
    return {input.clone(at::MemoryFormat::Contiguous),
            return_mask ? OptionalTensor(at::zeros(input.sizes(), mask_options)) : std::nullopt};
  }
  const bool masks = in.kind == Kind::Masking;
  Tensor mask = return_mask ? empty_output(input.sizes(), mask_options) : Tensor();
  Tensor out =
      replace(in, key, masks ? 0 : low, masks ? 0 : high, return_mask ? mask.mutable_data_ptr<bool>() : nullptr);
  return {out, return_mask ? OptionalTensor(mask) : std::nullopt};
}

Tensor kernel_backward(const Tensor& grad, const Tensor& key, c10::string_view kind, double amount) {
  const Inputs in{grad, "grad", parse_kind(kind), amount};
  in.check(key);
  if (in.kind == Kind::Gaussian || in.threshold() == 0) return grad.clone(at::MemoryFormat::Contiguous);
  return replace(in, key, 0, 0, nullptr);
}

}  // namespace

// --- registration -------------------------------------------------------------------------------------------------

Outputs corrupt(CORRUPT_PARAMETERS) {
  static const auto op = find_op<Outputs(CORRUPT_PARAMETERS)>("lect11ext::corrupt");
  return op.call(input, key, kind, amount, low, high, return_mask);
}

Tensor corrupt_backward(const Tensor& grad, const Tensor& key, c10::string_view kind, double amount) {
  static const auto op = find_op<decltype(kernel_backward)>("lect11ext::corrupt_backward");
  return op.call(grad, key, kind, amount);
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def(
      "corrupt(Tensor input, Tensor key, str kind, float amount, float low, float high, bool return_mask)"
      " -> (Tensor output, Tensor? mask)",
      {at::Tag::pt2_compliant_tag});
  m.def("corrupt_backward(Tensor grad, Tensor key, str kind, float amount) -> Tensor", {at::Tag::pt2_compliant_tag});
}

static void add_kernels(torch::Library& m) {
  m.impl("corrupt", kernel_forward);
  m.impl("corrupt_backward", kernel_backward);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("corrupt", meta_forward);
  m.impl("corrupt_backward", meta_backward);
}

}  // namespace lect11ext
