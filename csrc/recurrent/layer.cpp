// PyTorch side of lstm_layer and gru_layer: one layer, one direction, all steps. The recurrence: layer.h. Derivatives:
// layer_autograd.cpp.
#include "recurrent/layer.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "common/autograd.h"
#include "common/barrier.h"
#include "common/dispatch.h"
#include "common/tensors.h"
#include "common/workspace.h"
#include "recurrent/cell_common.h"
#include "recurrent/layer_inputs.h"
#include "recurrent/products.h"

namespace lect11ext {
namespace layer_op {

void Inputs::check() const {
  TORCH_CHECK_VALUE(candidate == "tanh" || candidate == "sigmoid", "candidate must be 'tanh' or 'sigmoid', but got '",
                    candidate, "'");
  TORCH_CHECK_VALUE(clip() >= 0, "grad_clip must be nonnegative, but got ", clip());
  TORCH_CHECK_VALUE(input.dim() == 3, "input must be 3-D, but got ", input.dim(), "-D");
  const Tensor by_time = batch_first ? input.transpose(0, 1) : input;
  const Tensor* cell = is_lstm() ? &*c : nullptr;
  const recurrent::CellInputs as_cell{by_time, h, weight_ih, weight_hh, bias_ih, bias_hh, gates(), /*rank=*/3, cell};
  if (has_projection()) {
    check_shape("weight_hr", weight_hr->sym_sizes(), {h.sym_size(-1), as_cell.hidden()}, "size of h, hidden_size");
  }
  as_cell.check();
  if (is_lstm()) recurrent::check_state("c", *c, as_cell);
  TORCH_CHECK_VALUE(has_projection() || h.sym_size(1) == as_cell.hidden(),
                    "h must have hidden_size columns where there is no weight_hr: ", as_cell.hidden(), ", but got ",
                    h.sym_size(1));
  if (has_projection()) {
    TORCH_CHECK_TYPE(weight_hr->scalar_type() == input.scalar_type(), "weight_hr must have the type of input, ",
                     input.scalar_type(), ", but got ", weight_hr->scalar_type());
    check_same_device({{"input", &input}, {"weight_hr", &*weight_hr}});
  }
  if (autograd::defined(lengths)) {
    TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong, "lengths must be int64, but got ", lengths->scalar_type());
    check_shape("lengths", lengths->sym_sizes(), {batch()}, "batch");
    check_same_device({{"input", &input}, {"lengths", &*lengths}});
  }
  if (autograd::defined(reset)) {
    TORCH_CHECK_TYPE(reset->scalar_type() == at::kBool, "reset must be bool, but got ", reset->scalar_type());
    check_shape("reset", reset->sym_sizes(), order(steps(), batch()), batch_first ? "batch, steps" : "steps, batch");
    check_same_device({{"input", &input}, {"reset", &*reset}});
  }
}

Tensor Inputs::inactive() const {
  const Tensor t = at::arange(steps(), lengths->options());
  return batch_first ? t.unsqueeze(0) >= lengths->unsqueeze(1) : t.unsqueeze(1) >= lengths->unsqueeze(0);
}

bool is_fused(const Inputs& in) { return !in.input.is_cuda() && !in.has_projection(); }

void check_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept) {
  in.check();
  const auto [first, second] = in.order(in.steps(), in.batch());
  const auto over_time = [&, first = first, second = second](const char* name, const Tensor& tensor, int64_t parts) {
    if (tensor.defined())
      check_shape(name, tensor.sym_sizes(), {first, second, in.hidden() * parts}, "as the output's");
  };
  const auto state = [&](const char* name, const Tensor& tensor) {
    if (tensor.defined()) check_shape(name, tensor.sym_sizes(), {in.batch(), in.hidden()}, "batch, hidden_size");
  };
  TORCH_CHECK_VALUE(kept.gates.defined() && kept.out.defined() && (kept.cells.defined() || !in.is_lstm()),
                    "output, gates and cells must be those of a forward with save=True");
  over_time("grad_output", grads.out, 1);
  over_time("grad_gates", grads.gates, 4);
  over_time("grad_cells", grads.cells, 1);
  over_time("output", kept.out, 1);
  over_time("gates", kept.gates, 4);
  over_time("cells", kept.cells, 1);
  state("grad_h", grads.h);
  state("grad_c", grads.c);
  for (const auto& [name, tensor] :
       {std::pair("output", &kept.out), std::pair("gates", &kept.gates), std::pair("cells", &kept.cells)}) {
    TORCH_CHECK_TYPE(!tensor->defined() || tensor->scalar_type() == in.input.scalar_type(), name,
                     " must have the type of input, ", in.input.scalar_type(), ", but got ", tensor->scalar_type());
  }
  for (const auto& [name, tensor] :
       {std::pair("grad_output", &grads.out), std::pair("grad_h", &grads.h), std::pair("grad_c", &grads.c),
        std::pair("grad_gates", &grads.gates), std::pair("grad_cells", &grads.cells), std::pair("output", &kept.out),
        std::pair("gates", &kept.gates), std::pair("cells", &kept.cells)}) {
    check_same_device({{"input", &in.input}, {name, tensor}});
  }
}

}  // namespace layer_op

namespace {

using namespace layer_op;

// --- meta ---------------------------------------------------------------------------------------------------------

Outputs meta_forward(const Inputs& in, bool save) {
  in.check();
  const auto options = in.input.options();
  const auto over_time = [&](const c10::SymInt& size) {
    const auto [first, second] = in.order(in.steps(), in.batch());
    return at::empty_symint({first, second, size}, options);
  };
  const bool keeps = save && !in.has_projection();
  return {over_time(in.h.sym_size(1)), at::empty_symint(in.h.sym_sizes(), options),
          in.is_lstm() ? at::empty_symint(in.c->sym_sizes(), options) : Tensor(),
          keeps ? over_time(in.hidden() * 4) : Tensor(), keeps && in.is_lstm() ? over_time(in.hidden()) : Tensor()};
}

Gradients meta_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  check_backward(grads, in, kept);
  const auto like = [&](bool wanted, const OptionalTensor& t) {
    return wanted && autograd::defined(t) ? at::empty_symint(t->sym_sizes(), t->options()) : Tensor();
  };
  return {like(mask[0], in.input),     like(mask[1], in.h),       like(mask[2], in.c),      like(mask[3], in.weight_ih),
          like(mask[4], in.weight_hh), like(mask[5], in.bias_ih), like(mask[6], in.bias_hh)};
}

// --- CPU ----------------------------------------------------------------------------------------------------------

const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// Strides of time and rows, wherever the input has them.
TimeStrides strides_of(const Inputs& in, const Tensor& t) {
  return in.batch_first ? TimeStrides{t.stride(1), t.stride(0)} : TimeStrides{t.stride(0), t.stride(1)};
}

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

// Whether weights can be multiplied as they lie; else they are laid out as panels, converted.
bool is_multiplied(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble ||
         (type == at::kBFloat16 && capability() == Capability::AVX512_BF16);
}

// Rows for which it pays to lay weights out as panels first, which are streamed at twice the speed.
constexpr int64_t kRowsWorthPacking = 32;

Outputs cpu_forward(const Inputs& in, bool save) {
  in.check();
  if (!is_fused(in)) return step_by_step(in);
  const int64_t T = in.steps().expect_int(), B = in.batch().expect_int(), H = in.h.size(1), I = in.input.size(2);
  const int64_t G = in.gates(), blocks = unit_blocks(H), even_input = I + I % 2, even_hidden = H + H % 2;
  const auto options = in.input.options();
  const auto compute = recurrent::grad_pre_type(in.input);
  const auto [first, second] = in.order(T, B);

  const Tensor input = in.input.stride(2) == 1 || I <= 1 ? in.input : in.input.contiguous();
  const recurrent::Rows ih(in.weight_ih), hh(in.weight_hh);
  const recurrent::Bias bias_ih(in.bias_ih), bias_hh(in.bias_hh);
  const Tensor h = in.h.contiguous(), c = in.is_lstm() ? in.c->contiguous() : Tensor();
  const Tensor lengths = autograd::defined(in.lengths) ? in.lengths->contiguous() : Tensor();
  const Tensor reset = autograd::tensor_or_none(in.reset);

  Outputs out{empty_output({first, second, H}, options), at::empty({B, H}, options),
              in.is_lstm() ? at::empty({B, H}, options) : Tensor(),
              save ? empty_output({first, second, 4 * H}, options) : Tensor(),
              save && in.is_lstm() ? empty_output({first, second, H}, options) : Tensor()};

  const bool packs = T * B >= kRowsWorthPacking || !is_multiplied(in.input.scalar_type());
  const int64_t shares = shares_for(B * G * H * H, H);
  // Enough rows that a panel of weight_ih is read from memory for many of them, few enough to find their sums in the
  // caches again.
  constexpr int64_t kChunkRows = 2 * kLayerRows;
  const int64_t chunk = std::clamp<int64_t>(kChunkRows / std::max<int64_t>(B, 1), 1, std::max<int64_t>(T, 1));
  Workspace space;
  const int64_t element = compute == at::kDouble ? sizeof(double) : sizeof(float);
  const auto panels_ih = space.reserve(packs ? blocks * even_input * kUnits * G * element : 0);
  const auto panels_hh = space.reserve(packs ? blocks * even_hidden * kUnits * G * element : 0);
  const size_t exchange[2] = {space.reserve(B * even_hidden * element), space.reserve(B * even_hidden * element)};
  const auto cell_states = space.reserve(blocks * B * kUnits * element);
  const auto pre = space.reserve(blocks * chunk * B * kUnits * G * element);
  const auto staged = space.reserve(shares * kLayerRows * even_input * element);
  Barrier barrier(shares);
  const Layer args{
      .cell = in.is_lstm() ? LayerCell::Lstm : LayerCell::Gru,
      .steps = T,
      .batch = B,
      .input_size = I,
      .hidden = H,
      .dtype = dtype_of(in.input, "input"),
      .sigmoid_candidate = in.sigmoid_candidate(),
      .reverse = in.reverse,
      .input = read(input),
      .input_strides = strides_of(in, input),
      .weight_ih = ih.data,
      .weight_hh = hh.data,
      .weight_ih_stride = ih.stride,
      .weight_hh_stride = hh.stride,
      .bias_ih = bias_ih.data(),
      .bias_hh = bias_hh.data(),
      .h = read(h),
      .c = read(c),
      .lengths = static_cast<const int64_t*>(read(lengths)),
      .reset = static_cast<const uint8_t*>(read(reset)),
      .reset_strides = reset.defined() ? strides_of(in, reset) : TimeStrides{},
      .out = write(out.out),
      .out_strides = strides_of(in, out.out),
      .h_out = write(out.h),
      .c_out = write(out.c),
      .gates = write(out.gates),
      .cells = write(out.cells),
      .gates_strides = save ? strides_of(in, out.gates) : TimeStrides{},
      .panels_ih = packs ? space.at(panels_ih) : nullptr,
      .panels_hh = packs ? space.at(panels_hh) : nullptr,
      .exchange = {space.at(exchange[0]), space.at(exchange[1])},
      .cell_states = space.at(cell_states),
      .pre = space.at(pre),
      .staged = space.at(staged),
      .chunk = chunk,
      .shares = shares,
      .barrier = &barrier,
  };
  run_shares(layer_kernel, args);
  return out;
}

// The states before every step, [T, B, H] in the order of the input: those after the step before it, or the first.
Tensor before_steps(const Inputs& in, const Tensor& states, const Tensor& initial) {
  const int64_t time = in.batch_first ? 1 : 0, T = states.size(time);
  Tensor before = at::empty(states.sizes(), states.options());
  if (T == 0) return before;
  before.select(time, in.reverse ? T - 1 : 0).copy_(initial);
  before.narrow(time, in.reverse ? 0 : 1, T - 1).copy_(states.narrow(time, in.reverse ? 1 : 0, T - 1));
  if (in.reverse && autograd::defined(in.lengths)) {  // rows begin at their own end
    const Tensor last = (*in.lengths - 1).clamp(0, T - 1).unsqueeze(time).unsqueeze(-1);
    const Tensor start = initial.unsqueeze(time);
    before.scatter_(time, last.expand(start.sizes()), start);
  }
  if (autograd::defined(in.reset)) before.masked_fill_(in.reset->unsqueeze(-1), 0);
  return before;
}

Gradients cpu_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  check_backward(grads, in, kept);
  TORCH_CHECK_NOT_IMPLEMENTED(is_fused(in), "the fused backward has no projections");
  const int64_t T = in.steps().expect_int(), B = in.batch().expect_int(), H = in.h.size(1), G = in.gates();
  const int64_t blocks = unit_blocks(H);
  const auto options = in.input.options();
  const auto compute = options.dtype(recurrent::grad_pre_type(in.input));
  const auto [first, second] = in.order(T, B);

  const auto dense = [&](const Tensor& t) {
    return t.defined() ? t.to(in.input.scalar_type()).contiguous() : Tensor();
  };
  const Tensor grad_out = dense(grads.out), grad_h = dense(grads.h), grad_c = dense(grads.c);
  const Tensor grad_gates = dense(grads.gates), grad_cells = dense(grads.cells);
  const Tensor out = kept.out.contiguous(), gates = kept.gates.contiguous(), cells = dense(kept.cells);
  const recurrent::Rows hh(in.weight_hh);
  const Tensor h = in.h.contiguous(), c = in.is_lstm() ? in.c->contiguous() : Tensor();
  const Tensor lengths = autograd::defined(in.lengths) ? in.lengths->contiguous() : Tensor();
  const Tensor reset = autograd::tensor_or_none(in.reset);

  Gradients result;
  if (mask[1]) result[1] = at::empty({B, H}, options);
  if (mask[2] && in.is_lstm()) result[2] = at::empty({B, H}, options);
  const Tensor pre = empty_output({first, second, G * H}, compute);
  const Tensor pre_hidden = in.is_lstm() ? Tensor() : empty_output({first, second, G * H}, compute);
  Workspace space;
  const int64_t element = pre.element_size();
  const auto panels = space.reserve(blocks * G * H * kUnits * element);
  const auto carry_h = space.reserve(B * blocks * kUnits * element);
  const auto carry_c = space.reserve(B * blocks * kUnits * element);
  const int64_t shares = shares_for(B * G * H * H, H);
  Barrier barrier(shares);
  const LayerBackward args{
      .cell = in.is_lstm() ? LayerCell::Lstm : LayerCell::Gru,
      .steps = T,
      .batch = B,
      .hidden = H,
      .dtype = dtype_of(in.input, "input"),
      .sigmoid_candidate = in.sigmoid_candidate(),
      .reverse = in.reverse,
      .clip = in.clip(),
      .grad_out = read(grad_out),
      .grad_h_out = read(grad_h),
      .grad_c_out = read(grad_c),
      .grad_gates = read(grad_gates),
      .grad_cells = read(grad_cells),
      .weight_hh = hh.data,
      .weight_hh_stride = hh.stride,
      .h = read(h),
      .c = read(c),
      .lengths = static_cast<const int64_t*>(read(lengths)),
      .reset = static_cast<const uint8_t*>(read(reset)),
      .reset_strides = reset.defined() ? strides_of(in, reset) : TimeStrides{},
      .out = read(out),
      .gates = read(gates),
      .cells = read(cells),
      .out_strides = strides_of(in, out),
      .gates_strides = strides_of(in, gates),
      .grad_pre = write(pre),
      .grad_pre_hidden = write(pre_hidden),
      .grad_pre_strides = strides_of(in, pre),
      .grad_h = write(result[1]),
      .grad_c = write(result[2]),
      .panels = space.at(panels),
      .carry_h = space.at(carry_h),
      .carry_c = space.at(carry_c),
      .shares = shares,
      .barrier = &barrier,
  };
  run_shares(layer_backward_kernel, args);

  // What is left are products over all steps at once.
  const Tensor rows = pre.view({T * B, G * H});
  // What stands beyond the lengths must not reach the weights, not even times zero.
  const auto used_input = [&] {
    const Tensor x = autograd::defined(in.lengths) ? in.input.masked_fill(in.inactive().unsqueeze(-1), 0) : in.input;
    return x.contiguous().view({T * B, x.size(2)});
  };
  const Tensor hidden_rows = in.is_lstm() ? rows : pre_hidden.view({T * B, G * H});
  const auto type = in.input.scalar_type();
  recurrent::Products products;
  if (mask[0]) result[0] = products.input_gradient(rows, in.weight_ih).view(in.input.sizes());
  if (mask[3]) result[3] = products.weight_gradient(rows, used_input());
  if (mask[4]) result[4] = products.weight_gradient(hidden_rows, before_steps(in, out, h).view({T * B, H}));
  if (mask[5] && autograd::defined(in.bias_ih)) result[5] = products.bias_gradient(rows, type);
  if (mask[6] && autograd::defined(in.bias_hh)) result[6] = products.bias_gradient(hidden_rows, type);
  products.run();
  return result;
}

// CUDA has no kernel of the layer yet.
[[maybe_unused]] Outputs steps_forward(const Inputs& in, bool) {
  in.check();
  return step_by_step(in);
}

// --- registration -------------------------------------------------------------------------------------------------

#define LAYER_OPTIONS "float? grad_clip=None, bool reverse=False, bool batch_first=False"
#define LSTM_LAYER_SCHEMA                                                                                    \
  "Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, "             \
  "Tensor? bias_hh=None, Tensor? weight_hr=None, Tensor? lengths=None, Tensor? reset=None, "                 \
  "str candidate='tanh', " LAYER_OPTIONS
#define GRU_LAYER_SCHEMA                                                                                     \
  "Tensor input, Tensor h, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, Tensor? bias_hh=None, " \
  "Tensor? lengths=None, Tensor? reset=None, " LAYER_OPTIONS
// The same arguments in a backward, where nothing is left out.
#define LSTM_LAYER_BACKWARD_SCHEMA                                                                           \
  "Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, " \
  "Tensor? weight_hr, Tensor? lengths, Tensor? reset, str candidate, float? grad_clip, bool reverse, "       \
  "bool batch_first"
#define GRU_LAYER_BACKWARD_SCHEMA                                                                            \
  "Tensor input, Tensor h, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "           \
  "Tensor? lengths, Tensor? reset, float? grad_clip, bool reverse, bool batch_first"

}  // namespace

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("lstm_layer(" LSTM_LAYER_SCHEMA
        ", bool save=False) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "lstm_layer_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor? grad_gates, "
      "Tensor? grad_cells, " LSTM_LAYER_BACKWARD_SCHEMA
      ", Tensor output, Tensor gates, Tensor cells, bool[7] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("gru_layer(" GRU_LAYER_SCHEMA ", bool save=False) -> (Tensor output, Tensor h_n, Tensor gates)",
        {at::Tag::pt2_compliant_tag});
  m.def("gru_layer_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_gates, " GRU_LAYER_BACKWARD_SCHEMA
        ", Tensor output, Tensor gates, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("lstm_layer", lstm_forward<cpu_forward>);
  m.impl("lstm_layer_backward", lstm_backward<cpu_backward>);
  m.impl("gru_layer", gru_forward<cpu_forward>);
  m.impl("gru_layer_backward", gru_backward<cpu_backward>);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("lstm_layer", lstm_forward<steps_forward>);
  m.impl("gru_layer", gru_forward<steps_forward>);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("lstm_layer", lstm_forward<meta_forward>);
  m.impl("lstm_layer_backward", lstm_backward<meta_backward>);
  m.impl("gru_layer", gru_forward<meta_forward>);
  m.impl("gru_layer_backward", gru_backward<meta_backward>);
}

}  // namespace lect11ext
