// Dot-product attention and its derivatives as ops: schemas, checks, shapes. Equations: dot_product.h; devices:
// dot_product_cpu.cpp and dot_product_cuda.cpp; what differentiates what: dot_product_autograd.cpp.
#include "attention/dot_product.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention/dot_product_describe.h"
#include "attention/dot_product_devices.h"

namespace lect11ext {
namespace {

using namespace attention_op;

void check_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,
                    const Tensor& output, const Tensor& lse) {
  in.check();
  in.check_output_like("grad_output", grad_output);
  in.check_output_like("output", output);
  in.check_lse_like("grad_lse", grad_lse);
  in.check_lse_like("lse", lse);
}

void check_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Tangents& tangents) {
  in.check();
  in.check_output_like("output", output);
  in.check_lse_like("lse", lse);
  tangents.check(in);
}

void check_backward_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Directions& along) {
  check_backward(along.grad_output, along.grad_lse, in, output, lse);
  in.check_output_like("grad_output_t", along.grad_output_t);
  in.check_lse_like("grad_lse_t", along.grad_lse_t);
  in.check_output_like("output_t", along.output_t);
  in.check_lse_like("lse_t", along.lse_t);
  along.tangents.check(in);
}

Outputs empty_outputs(const Inputs& in) { return {empty_output(in), empty_lse(in)}; }

Gradients empty_gradients(const Inputs& in, GradientMask mask) {
  const auto like = [](bool wanted, const Tensor& t) { return wanted ? empty_gradient(t) : Tensor(); };
  Gradients result{like(mask[0], in.query), like(mask[1], in.key), like(mask[2], in.value), Tensor()};
  if (mask[3] && in.has_float_mask()) {
    std::get<3>(result) = at::empty_symint(in.attn_mask->sym_sizes(), in.attn_mask->options());
  }
  return result;
}

// --- by device: what each has beside the shared checks ------------------------------------------------------------

using ForwardKernel = Outputs (*)(const Inputs&);
template <ForwardKernel kernel>
Outputs forward(ATTENTION_PARAMETERS) {
  const Inputs in = ATTENTION_INPUTS;
  in.check();
  return kernel(in);
}

using BackwardKernel = Gradients (*)(const OptionalTensor&, const OptionalTensor&, const Inputs&, const Tensor&,
                                     const Tensor&, GradientMask);
template <BackwardKernel kernel>
Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, ATTENTION_PARAMETERS,
                   const Tensor& output, const Tensor& lse, GradientMask mask) {
  const Inputs in = ATTENTION_INPUTS;
  check_backward(grad_output, grad_lse, in, output, lse);
  return kernel(grad_output, grad_lse, in, output, lse, mask);
}

using TangentKernel = Outputs (*)(const Inputs&, const Tensor&, const Tensor&, const Tangents&);
template <TangentKernel kernel>
Outputs tangent(ATTENTION_PARAMETERS, const Tensor& output, const Tensor& lse, ATTENTION_TANGENT_PARAMETERS) {
  const Inputs in = ATTENTION_INPUTS;
  const Tangents tangents = ATTENTION_TANGENTS;
  check_tangent(in, output, lse, tangents);
  return kernel(in, output, lse, tangents);
}

using BackwardTangentKernel = Gradients (*)(const Inputs&, const Tensor&, const Tensor&, const Directions&,
                                            GradientMask);
template <BackwardTangentKernel kernel>
Gradients backward_tangent(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, ATTENTION_PARAMETERS,
                           const Tensor& output, const Tensor& lse, const OptionalTensor& grad_output_t,
                           const OptionalTensor& grad_lse_t, ATTENTION_TANGENT_PARAMETERS, const Tensor& output_t,
                           const Tensor& lse_t, GradientMask mask) {
  const Inputs in = ATTENTION_INPUTS;
  const Directions along{grad_output, grad_lse, grad_output_t, grad_lse_t, ATTENTION_TANGENTS, output_t, lse_t};
  check_backward_tangent(in, output, lse, along);
  return kernel(in, output, lse, along, mask);
}

Gradients meta_backward(const OptionalTensor&, const OptionalTensor&, const Inputs& in, const Tensor&, const Tensor&,
                        GradientMask mask) {
  return empty_gradients(in, mask);
}

Outputs meta_tangent(const Inputs& in, const Tensor&, const Tensor&, const Tangents&) { return empty_outputs(in); }

Gradients meta_backward_tangent(const Inputs& in, const Tensor&, const Tensor&, const Directions&, GradientMask mask) {
  return empty_gradients(in, mask);
}

using DropoutMaskKernel = Tensor (*)(const Tensor&, c10::SymIntArrayRef, double);
template <DropoutMaskKernel kernel>
Tensor dropout_mask(const Tensor& key, c10::SymIntArrayRef size, double p) {
  check_dropout_mask(key, size, p);
  return kernel(key, size, p);
}

Tensor meta_dropout_mask(const Tensor& key, c10::SymIntArrayRef size, double p) {
  return at::empty_symint(size, key.options().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("attention(" ATTENTION_SCHEMA ") -> (Tensor output, Tensor lse)", {at::Tag::pt2_compliant_tag});
  m.def("attention_backward(Tensor? grad_output, Tensor? grad_lse, " ATTENTION_SCHEMA
        ", Tensor output, Tensor lse, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def("attention_tangent(" ATTENTION_SCHEMA
        ", Tensor output, Tensor lse, Tensor? query_t, Tensor? key_t, Tensor? value_t, Tensor? attn_mask_t)"
        " -> (Tensor output_t, Tensor lse_t)",
        {at::Tag::pt2_compliant_tag});
  m.def("attention_backward_tangent(Tensor? grad_output, Tensor? grad_lse, " ATTENTION_SCHEMA
        ", Tensor output, Tensor lse, Tensor? grad_output_t, Tensor? grad_lse_t, Tensor? query_t, Tensor? key_t, "
        "Tensor? value_t, Tensor? attn_mask_t, Tensor output_t, Tensor lse_t, bool[4] output_mask)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def("attention_dropout_mask(Tensor key, SymInt[] size, float p) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("attention", forward<on_cpu::forward>);
  m.impl("attention_backward", backward<on_cpu::backward>);
  m.impl("attention_tangent", tangent<on_cpu::tangent>);
  m.impl("attention_backward_tangent", backward_tangent<on_cpu::backward_tangent>);
  m.impl("attention_dropout_mask", dropout_mask<dropout_mask_cpu>);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("attention", forward<on_cuda::forward>);
  m.impl("attention_backward", backward<on_cuda::backward>);
  m.impl("attention_tangent", tangent<on_cuda::tangent>);
  m.impl("attention_backward_tangent", backward_tangent<on_cuda::backward_tangent>);
  m.impl("attention_dropout_mask", dropout_mask<dropout_mask_cuda>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("attention", forward<empty_outputs>);
  m.impl("attention_backward", backward<meta_backward>);
  m.impl("attention_tangent", tangent<meta_tangent>);
  m.impl("attention_backward_tangent", backward_tangent<meta_backward_tangent>);
  m.impl("attention_dropout_mask", dropout_mask<meta_dropout_mask>);
}

}  // namespace lect11ext
