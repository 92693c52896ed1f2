// The layers' ops on the CPU, from tensors to the kernels of layer.h.
#include <ATen/Parallel.h>

#include <algorithm>

#include "common/barrier.h"
#include "common/workspace.h"
#include "recurrent/layer_tensors.h"

namespace lect11ext::layer_op {
namespace {

// How many threads share the hidden units, given a step's multiply-adds. Below some microseconds a step, waiting for
// other threads costs more than they bring.
int64_t shares_for(int64_t multiply_adds, int64_t hidden) {
  constexpr int64_t kWorthAShare = 32 * 3000;  // a core does about 32 a nanosecond
#if AT_PARALLEL_OPENMP
  const int64_t most = std::min<int64_t>(unit_blocks(hidden), at::in_parallel_region() ? 1 : at::get_num_threads());
#else
  const int64_t most = 1;  // nothing else promises that all shares run at the same time
#endif
  return std::clamp<int64_t>(multiply_adds / kWorthAShare, 1, std::max<int64_t>(most, 1));
}

template <class Args>
void run_shares(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  if (args.batch == 0 || args.hidden == 0) return;
  const auto run = [&](int64_t begin, int64_t end) { kernel(args, begin, end); };
  args.shares == 1 ? run(0, 1) : at::parallel_for(0, args.shares, 1, run);
}

// Rows for which it pays to lay weights out as panels first, which are streamed at twice the speed.
constexpr int64_t kRowsWorthPacking = 32;

// Rows of a step for which bfloat16 is multiplied as float, where the processor prefers that: fewer are bound by
// reading the weights, and so by their bytes.
constexpr int64_t kRowsWorthFloat = 4;

// Whether weights can be multiplied as they lie; else they are laid out as panels, converted.
bool is_multiplied(at::ScalarType type, int64_t steps, int64_t rows) {
  if (type == at::kFloat || type == at::kDouble) return true;
  if (type != at::kBFloat16 || capability() < Capability::AVX512_BF16) return false;
  return !prefers_float_products() || rows < kRowsWorthFloat || steps * rows < kRowsWorthPacking;
}

// The build of a kernel. Where bfloat16 is multiplied as float though there are dot products of it, the build for
// processors that have none does so.
template <class Kernel>
Kernel* build_of(Kernel* best, Kernel* without_dots, at::ScalarType type, const LayerCommon& args) {
  const bool as_float =
      type == at::kBFloat16 && capability() >= Capability::AVX512_BF16 && !is_multiplied(type, args.steps, args.batch);
  return as_float ? without_dots : best;
}

#if LECT11EXT_X86_BUILDS
namespace without_dots = AVX512;
#else
namespace without_dots = DEFAULT;
#endif

// A kernel's scratch: parts are named by where their pointer goes, and put there once all are known.
class Scratch {
 public:
  void add(void*& pointer, int64_t bytes, bool wanted = true) {
    if (wanted) parts_.push_back({&pointer, space_.reserve(bytes)});
  }
  void place() {
    for (const auto& [pointer, at] : parts_) *pointer = space_.at(at);
  }

 private:
  Workspace space_;
  c10::SmallVector<std::pair<void**, size_t>, 16> parts_;
};

}  // namespace

Outputs cpu_forward(const Inputs& in, bool save) {
  in.check();
  if (!is_fused(in)) return step_by_step(in, save);
  const Common common(in);
  Layer args{};
  common.describe(in, args);
  const int64_t T = args.steps, B = args.batch, H = args.hidden, G = in.gates(), I = in.input.size(2);
  const int64_t blocks = unit_blocks(H), even_input = I + I % 2, even_hidden = H + H % 2;
  const Tensor input = in.input.stride(2) == 1 || I <= 1 ? in.input : in.input.contiguous();
  std::optional<recurrent::Rows> ih;
  if (autograd::defined(in.weight_ih)) ih.emplace(*in.weight_ih);
  const recurrent::Bias bias_ih(in.bias_ih), bias_hh(in.bias_hh);

  const Outputs out = empty_outputs(in, save, args);

  args.input_size = I;
  args.input = read(input);
  args.input_strides = strides_of(in, input);
  args.is_multiplied = !ih.has_value();
  if (ih.has_value()) {
    args.weight_ih = ih->data;
    args.weight_ih_stride = ih->stride;
  }
  args.bias_ih = bias_ih.data();
  args.bias_hh = bias_hh.data();
  if (in.factors.defined()) {
    args.factors = read(in.factors);
    args.factors_strides = strides_of(in, in.factors);
    args.truncate = in.truncate;
  }

  const bool halts = in.has_norm() || in.resets_first();  // in mid-step
  const bool packs = T * B >= kRowsWorthPacking || halts || !is_multiplied(in.input.scalar_type(), T, B);
  args.shares = shares_for(B * G * H * H, H);
  // Enough rows that a panel of weight_ih is read from memory for many of them, few enough to find their sums in the
  // caches again.
  constexpr int64_t kChunkRows = 2 * kLayerRows;
  args.chunk = std::clamp<int64_t>(kChunkRows / std::max<int64_t>(B, 1), 1, std::max<int64_t>(T, 1));
  const int64_t element = compute_size(args.dtype), state_bytes = B * even_hidden * element;
  Scratch scratch;
  scratch.add(args.panels_ih, blocks * even_input * kUnits * G * element, packs && ih.has_value());
  scratch.add(args.panels_hh, blocks * even_hidden * kUnits * G * element, packs);
  for (void*& exchange : args.exchange) scratch.add(exchange, state_bytes);
  for (void*& masked : args.masked) scratch.add(masked, state_bytes, args.hidden_mask != nullptr);
  scratch.add(args.reset_state, state_bytes, in.resets_first());
  scratch.add(args.cell_states, blocks * B * kUnits * element, in.is_lstm());
  scratch.add(args.pre, blocks * args.chunk * B * kUnits * G * element);
  scratch.add(args.staged, args.shares * kLayerRows * even_input * element, packs && ih.has_value());
  scratch.add(args.sums, blocks * B * kUnits * G * element, halts);
  scratch.add(args.moments, blocks * B * 2 * element, in.has_norm());
  scratch.place();
  Barrier barriers[kBatchParts] = {Barrier(args.shares), Barrier(args.shares)};
  args.barriers = barriers;
  run_shares(build_of(layer_kernel, without_dots::layer_kernel, in.input.scalar_type(), args), args);
  return out;
}

namespace {

void run_backward(const LayerGradients& gradients, const at::TensorOptions& options) {
  LayerBackward args{};
  static_cast<LayerGradients&>(args) = gradients;
  const bool is_lstm = args.cell == LayerCell::Lstm, has_norm = args.norm != nullptr;
  const bool has_mask = args.hidden_mask != nullptr, resets_first = args.cell == LayerCell::GruResetFirst;
  const int64_t B = args.batch, H = args.hidden, G = is_lstm ? 4 : 3, blocks = unit_blocks(H);
  args.shares = shares_for(B * G * H * H, H);
  const int64_t element = compute_size(args.dtype), carry = B * blocks * kUnits * element;
  const int64_t even_columns = G * H + G * H % 2;
  const at::ScalarType type = options.dtype().toScalarType();
  const bool exchanges = is_multiplied(type, args.steps, B) && options.dtype().itemsize() == 2 && !args.rounds;
  Scratch scratch;
  scratch.add(args.panels, blocks * even_columns * kUnits * element);
  for (void*& exchange : args.exchange) scratch.add(exchange, B * even_columns * element, exchanges);
  scratch.add(args.carry_h, carry);
  scratch.add(args.carry_c, carry, is_lstm);
  scratch.add(args.product, carry, has_mask || resets_first);
  scratch.add(args.carry_mask, carry, has_mask);
  scratch.add(args.moments, blocks * B * 2 * element, has_norm);
  scratch.place();
  Barrier barriers[kBatchParts] = {Barrier(args.shares), Barrier(args.shares)};
  args.barriers = barriers;
  run_shares(build_of(layer_backward_kernel, without_dots::layer_backward_kernel, type, args), args);
}

}  // namespace

Gradients cpu_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  return fused_backward({cpu_forward, run_backward}, grads, in, kept, mask);
}

}  // namespace lect11ext::layer_op
