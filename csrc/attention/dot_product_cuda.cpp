// Dot-product attention on CUDA, from tensors to the kernels of dot_product.h.
#ifdef LECT11EXT_WITH_CUDA
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include "attention/dot_product_describe.h"
#include "attention/dot_product_devices.h"
#include "common/dispatch.h"

namespace lect11ext::attention_op {
namespace {

// Runs a kernel with the scratch that it asks for.
template <class Args>
void run(void (*kernel)(const Args&, void*, void*), const Args& args, const at::TensorOptions& options) {
  const Tensor scratch = at::empty({cuda::attention_scratch(args)}, options.dtype(at::kByte));
  kernel(args, scratch.mutable_data_ptr(), current_stream());
}

// What the kernels' tiles have room for; wider ones go through ATen.
bool fits(const Inputs& in) {
  constexpr int64_t kMostColumns = 256;
  return in.query.size(3) <= kMostColumns && in.value.size(3) <= kMostColumns;
}

}  // namespace

namespace on_cuda {

Outputs forward(const Inputs& in) {
  if (!fits(in)) return composite_forward(in);
  const c10::cuda::CUDAGuard guard(in.query.device());
  AttentionForward args{};
  const Describer described(in, args);
  Outputs result{empty_output(in), empty_lse(in)};
  args.out = std::get<0>(result).mutable_data_ptr();
  args.out_strides = strides_of(std::get<0>(result));
  args.lse = std::get<1>(result).mutable_data_ptr();
  run(cuda::attention_forward, args, in.query.options());
  return result;
}

Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,
                   const Tensor& output, const Tensor& lse, GradientMask mask) {
  if (!fits(in)) return composite_backward(grad_output, grad_lse, in, mask);
  const c10::cuda::CUDAGuard guard(in.query.device());
  AttentionBackward args{};
  Describer described(in, args);
  described.saved(output, lse, args);
  described.gradients(grad_output, grad_lse, args);
  const GradientTensors gradients(in, mask, args, in.compute_type());
  run(cuda::attention_backward, args, in.query.options());
  return gradients.finish(in);
}

Outputs tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Tangents& tangents) {
  if (!fits(in)) return composite_tangent(in, tangents);
  const c10::cuda::CUDAGuard guard(in.query.device());
  AttentionTangent args{};
  Describer described(in, args);
  described.saved(output, lse, args);
  described.tangents(tangents, args);
  Outputs result{empty_output(in), empty_lse(in)};
  args.out_t = std::get<0>(result).mutable_data_ptr();
  args.out_t_strides = strides_of(std::get<0>(result));
  args.lse_t = std::get<1>(result).mutable_data_ptr();
  run(cuda::attention_tangent, args, in.query.options());
  return result;
}

Gradients backward_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Directions& along,
                           GradientMask mask) {
  if (!fits(in)) return composite_backward_tangent(in, along, mask);
  const c10::cuda::CUDAGuard guard(in.query.device());
  AttentionBackwardTangent args{};
  Describer described(in, args);
  described.saved(output, lse, args);
  described.gradients(along.grad_output, along.grad_lse, args);
  described.directions(along, args);
  const GradientTensors gradients(in, mask, args, in.compute_type());
  run(cuda::attention_backward_tangent, args, in.query.options());
  return gradients.finish(in);
}

}  // namespace on_cuda

Tensor dropout_mask_cuda(const Tensor& key, c10::SymIntArrayRef size, double p) {
  const c10::cuda::CUDAGuard guard(key.device());
  const Tensor mask = at::empty_symint(size, key.options().dtype(at::kBool)), dense = key.contiguous();
  const int64_t columns = mask.size(-1), rows = columns == 0 ? 0 : mask.numel() / columns;
  const DropoutMask args{mask.mutable_data_ptr<bool>(), dense.const_data_ptr<int64_t>(), rows, columns, p};
  cuda::attention_dropout_mask(args, current_stream());
  return mask;
}

}  // namespace lect11ext::attention_op
#endif
