// The layers' ops on CUDA, from tensors to the kernels of layer_cuda.h.
#ifdef LECT11EXT_WITH_CUDA
#include "recurrent/layer_cuda.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "common/dispatch.h"
#include "recurrent/layer_tensors.h"

namespace lect11ext::layer_op {
namespace {

// Whether float may be multiplied as TF32: what torch.backends.cudnn says of recurrent layers.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) ==
         at::Float32Precision::TF32;
}

// A kernel's scratch in one tensor: parts are named by where their pointer goes, and put there once all are known.
class Scratch {
 public:
  void add(void*& pointer, int64_t bytes, bool wanted = true) {
    if (!wanted) return;
    parts_.push_back({&pointer, bytes_});
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  void place(const at::TensorOptions& options, bool zeros) {
    const auto bytes = options.dtype(at::kByte);
    memory_ = zeros ? at::zeros({bytes_}, bytes) : at::empty({bytes_}, bytes);
    for (const auto& [pointer, at] : parts_) *pointer = memory_.mutable_data_ptr<uint8_t>() + at;
  }

 private:
  static constexpr int64_t kAlignment = 256;  // as the allocator's
  Tensor memory_;
  int64_t bytes_ = 0;
  c10::SmallVector<std::pair<void**, int64_t>, 8> parts_;
};

// The input's part of the sums, with bias_ih.
Tensor input_sums(const Inputs& in) {
  if (autograd::defined(in.weight_ih)) return at::linear(in.input, *in.weight_ih, in.bias_ih);
  const Tensor sums = autograd::defined(in.bias_ih) ? in.input + *in.bias_ih : in.input;
  return sums.stride(2) == 1 ? sums : sums.contiguous();
}

}  // namespace

Outputs cuda_forward(const Inputs& in, bool save) {
  in.check();
  if (!is_fused(in)) return step_by_step(in, save);
  const c10::cuda::CUDAGuard guard(in.input.device());
  const Common common(in);
  LayerCuda args{};
  common.describe(in, args);
  const Outputs out = empty_outputs(in, save, args);
  const Tensor pre = input_sums(in);
  const recurrent::Bias bias_hh(in.bias_hh);
  args.pre = read(pre);
  args.pre_strides = strides_of(in, pre);
  args.bias_hh = bias_hh.data();
  args.tensor_cores = allows_tf32();

  const int64_t B = args.batch, H = args.hidden, G = in.gates(), tiles = cuda_tiles(H);
  const int64_t element = storage_size(args.dtype), compute = compute_size(args.dtype);
  const int64_t operand = B * cuda_depth(H, element) * element;
  Scratch zeros, scratch;
  for (void*& exchange : args.exchange) zeros.add(exchange, operand);
  zeros.add(args.reset_state, operand, in.resets_first());
  zeros.add(args.arrivals, cuda_arrivals(B) * sizeof(int64_t));
  zeros.place(in.input.options(), /*zeros=*/true);
  scratch.add(args.panels, tiles * kCudaTileUnits * G * cuda_depth(H, element) * element);
  scratch.add(args.state_h, B * H * element);
  scratch.add(args.state_c, B * H * compute, in.is_lstm());
  scratch.add(args.sums, B * G * H * compute, in.has_norm() || in.resets_first());
  scratch.add(args.moments, tiles * B * 2 * compute, in.has_norm());
  scratch.place(in.input.options(), /*zeros=*/false);
  cuda::layer_forward(args, current_stream());
  return out;
}

namespace {

void run_backward(const LayerGradients& gradients, const at::TensorOptions& options) {
  LayerCudaBackward args{};
  static_cast<LayerGradients&>(args) = gradients;
  args.tensor_cores = allows_tf32();
  const bool is_lstm = args.cell == LayerCell::Lstm;
  const int64_t B = args.batch, H = args.hidden, G = gates_of(args.cell), tiles = cuda_tiles(H);
  const int64_t element = storage_size(args.dtype), compute = compute_size(args.dtype), carry = B * H * compute;
  const int64_t depth = G * cuda_depth(H, element);
  Scratch zeros, scratch;
  for (void*& exchange : args.exchange) zeros.add(exchange, B * depth * element);
  zeros.add(args.arrivals, cuda_arrivals(B) * sizeof(int64_t));
  zeros.place(options, /*zeros=*/true);
  scratch.add(args.panels, tiles * kCudaTileUnits * depth * element);
  scratch.add(args.carry_h, carry);
  scratch.add(args.carry_c, carry, is_lstm);
  scratch.add(args.product, carry, args.cell == LayerCell::GruResetFirst);
  scratch.add(args.carry_mask, carry, args.hidden_mask != nullptr);
  scratch.add(args.moments, tiles * B * 2 * compute, args.norm != nullptr);
  scratch.place(options, /*zeros=*/false);
  cuda::layer_backward(args, current_stream());
}

}  // namespace

Gradients cuda_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  const c10::cuda::CUDAGuard guard(in.input.device());
  return fused_backward({cuda_forward, run_backward}, grads, in, kept, mask);
}

}  // namespace lect11ext::layer_op
#endif
