#include "recurrent/layer_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include <algorithm>

#include "common/barrier.h"
#include "common/dispatch.h"
#include "common/tensors.h"
#include "common/workspace.h"
#include "recurrent/cell_common.h"
#include "recurrent/layer.h"
#include "recurrent/products.h"

namespace lect11ext::layer_op {
namespace {

const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

Tensor dense(const OptionalTensor& t) { return autograd::defined(t) ? t->contiguous() : Tensor(); }

// Strides of time and rows, wherever the input has them.
TimeStrides strides_of(const Inputs& in, const Tensor& t) {
  if (!t.defined()) return {};
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

// What forward and backward are given alike, with the tensors that their pointers borrow from.
struct Common {
  recurrent::Rows hh;
  Tensor h, c, peephole, norm, hidden_mask, lengths, reset, zoneout_h, zoneout_c;

  explicit Common(const Inputs& in)
      : hh(in.weight_hh),
        h(in.h.contiguous()),
        c(dense(in.c)),
        peephole(dense(in.weight_peephole)),
        norm(dense(in.weight_norm)),
        hidden_mask(dense(in.hidden_mask)),
        lengths(dense(in.lengths)),
        reset(autograd::tensor_or_none(in.reset)),
        zoneout_h(dense(in.zoneout_h)),
        zoneout_c(dense(in.zoneout_c)) {}

  void describe(const Inputs& in, LayerCommon& args) const {
    const auto zoneout = [&](const Tensor& mask, double rate) {
      return Zoneout{static_cast<const uint8_t*>(read(mask)), strides_of(in, mask), rate};
    };
    args.cell = in.is_lstm() ? LayerCell::Lstm : in.reset_after ? LayerCell::Gru : LayerCell::GruResetFirst;
    args.steps = in.input.size(in.time_dim());
    args.batch = h.size(0);
    args.hidden = h.size(1);
    args.dtype = dtype_of(in.input, "input");
    args.sigmoid_candidate = in.sigmoid_candidate();
    args.reverse = in.reverse;
    args.weight_hh = hh.data;
    args.weight_hh_stride = hh.stride;
    args.h = read(h);
    args.c = read(c);
    args.peephole = read(peephole);
    args.norm = read(norm);
    args.hidden_mask = read(hidden_mask);
    args.lengths = static_cast<const int64_t*>(read(lengths));
    args.reset = static_cast<const uint8_t*>(read(reset));
    args.reset_strides = strides_of(in, reset);
    args.zoneout_h = zoneout(zoneout_h, in.zoneout_rate_h);
    args.zoneout_c = zoneout(zoneout_c, in.zoneout_rate_c);
  }
};

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

int64_t element_size(const Inputs& in) {
  return in.input.scalar_type() == at::kDouble ? sizeof(double) : sizeof(float);
}

}  // namespace

// --- forward ------------------------------------------------------------------------------------------------------

Outputs cpu_forward(const Inputs& in, bool save) {
  in.check();
  if (!is_fused(in)) return step_by_step(in, save);
  const Common common(in);
  Layer args{};
  common.describe(in, args);
  const int64_t T = args.steps, B = args.batch, H = args.hidden, G = in.gates(), I = in.input.size(2);
  const int64_t blocks = unit_blocks(H), even_input = I + I % 2, even_hidden = H + H % 2;
  const auto options = in.input.options();
  const auto compute = options.dtype(recurrent::grad_pre_type(in.input));
  const auto [first, second] = in.order(T, B);
  const auto over_time = [&, first = first, second = second](bool wanted, int64_t size) {
    return wanted ? empty_output({first, second, size}, options) : Tensor();
  };

  const Tensor input = in.input.stride(2) == 1 || I <= 1 ? in.input : in.input.contiguous();
  std::optional<recurrent::Rows> ih;
  if (autograd::defined(in.weight_ih)) ih.emplace(*in.weight_ih);
  const recurrent::Bias bias_ih(in.bias_ih), bias_hh(in.bias_hh);

  Outputs out;
  const bool keeps = save && in.recompute == 0;
  out.out = over_time(true, H);
  out.h = at::empty({B, H}, options);
  if (in.is_lstm()) out.c = at::empty({B, H}, options);
  out.gates = over_time(keeps, in.kept_gates() * H);
  out.cells = over_time(keeps && in.is_lstm(), H);
  if (save && in.recompute > 0 && in.is_lstm()) {
    args.cells_every = in.recompute;
    out.cells = at::empty({in.kept_cells().expect_int(), B, H}, options);
  }
  out.normed = over_time(keeps && in.has_norm(), G * H);
  if (out.normed.defined()) out.rstd = at::empty({first, second}, compute);

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
  args.out = write(out.out);
  args.out_strides = strides_of(in, out.out);
  args.h_out = write(out.h);
  args.c_out = write(out.c);
  args.gates = write(out.gates);
  args.gates_strides = strides_of(in, out.gates);
  args.cells = write(out.cells);
  args.normed = write(out.normed);
  args.normed_strides = strides_of(in, out.normed);
  args.rstd = write(out.rstd);
  args.rstd_strides = strides_of(in, out.rstd);

  const bool halts = in.has_norm() || in.resets_first();  // in mid-step
  const bool packs = T * B >= kRowsWorthPacking || halts || !is_multiplied(in.input.scalar_type());
  args.shares = shares_for(B * G * H * H, H);
  // Enough rows that a panel of weight_ih is read from memory for many of them, few enough to find their sums in the
  // caches again.
  constexpr int64_t kChunkRows = 2 * kLayerRows;
  args.chunk = std::clamp<int64_t>(kChunkRows / std::max<int64_t>(B, 1), 1, std::max<int64_t>(T, 1));
  const int64_t element = element_size(in), state_bytes = B * even_hidden * element;
  Scratch scratch;
  scratch.add(args.panels_ih, blocks * even_input * kUnits * G * element, packs && ih.has_value());
  scratch.add(args.panels_hh, blocks * even_hidden * kUnits * G * element, packs);
  for (void*& exchange : args.exchange) scratch.add(exchange, state_bytes);
  for (void*& masked : args.masked) scratch.add(masked, state_bytes, args.hidden_mask != nullptr);
  scratch.add(args.reset_state, state_bytes, in.resets_first());
  scratch.add(args.cell_states, blocks * B * kUnits * element);
  scratch.add(args.pre, blocks * args.chunk * B * kUnits * G * element);
  scratch.add(args.staged, args.shares * kLayerRows * even_input * element);
  scratch.add(args.sums, blocks * B * kUnits * G * element, halts);
  scratch.add(args.moments, blocks * B * 2 * element, in.has_norm());
  scratch.place();
  Barrier barrier(args.shares);
  args.barrier = &barrier;
  run_shares(layer_kernel, args);
  return out;
}

// --- backward -----------------------------------------------------------------------------------------------------

namespace {

// The states before every step, [T, B, H] in the order of the input: those after the step before it, or the first.
Tensor before_steps(const Inputs& in, const Tensor& states, const Tensor& initial) {
  const int64_t time = in.time_dim(), T = states.size(time);
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

// Steps first_step … of a sequence of which `in` has a part.
Gradients backward_of_steps(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask,
                            int64_t first_step) {
  const Common common(in);
  LayerBackward args{};
  common.describe(in, args);
  const int64_t T = args.steps, B = args.batch, H = args.hidden, G = in.gates(), blocks = unit_blocks(H);
  const auto type = in.input.scalar_type();
  const auto options = in.input.options();
  const auto compute = options.dtype(recurrent::grad_pre_type(in.input));
  const auto [first, second] = in.order(T, B);
  const auto cast = [&](const Tensor& t) { return t.defined() ? t.to(type).contiguous() : Tensor(); };
  const Tensor grad_out = cast(grads.out), grad_h = cast(grads.h), grad_c = cast(grads.c);
  const Tensor grad_gates = cast(grads.gates), grad_cells = cast(grads.cells);
  const Tensor out = kept.out.contiguous(), gates = kept.gates.contiguous(), cells = cast(kept.cells);
  const Tensor normed = cast(kept.normed);
  const Tensor rstd = kept.rstd.defined() ? kept.rstd.to(compute).contiguous() : Tensor();
  const bool has_mask = common.hidden_mask.defined(), differs = in.has_norm() || (!in.is_lstm() && in.reset_after);

  Gradients result;
  const auto sums = [&, first = first, second = second](bool wanted) {
    return wanted ? empty_output({first, second, G * H}, compute) : Tensor();
  };
  if (mask[kH]) result[kH] = at::empty({B, H}, options);
  if (mask[kC] && in.is_lstm()) result[kC] = at::empty({B, H}, options);
  if (mask[kHiddenMask] && has_mask) result[kHiddenMask] = at::empty({B, H}, options);
  const Tensor pre = sums(true), hidden = sums(differs), after_norm = sums(in.has_norm() && !in.is_lstm());

  args.clip = in.clip();
  args.truncate = in.truncate;
  args.first_step = first_step;
  args.grad_out = read(grad_out);
  args.grad_h_out = read(grad_h);
  args.grad_c_out = read(grad_c);
  args.grad_gates = read(grad_gates);
  args.grad_cells = read(grad_cells);
  args.out = read(out);
  args.gates = read(gates);
  args.cells = read(cells);
  args.normed = read(normed);
  args.rstd = read(rstd);
  args.out_strides = strides_of(in, out);
  args.gates_strides = strides_of(in, gates);
  args.normed_strides = strides_of(in, normed);
  args.rstd_strides = strides_of(in, rstd);
  args.grad_pre = write(pre);
  args.grad_hidden = write(hidden);
  args.grad_normed = write(after_norm);
  args.grad_pre_strides = strides_of(in, pre);
  args.grad_h = write(result[kH]);
  args.grad_c = write(result[kC]);
  args.grad_mask = write(result[kHiddenMask]);
  args.shares = shares_for(B * G * H * H, H);
  const int64_t element = element_size(in), carry = B * blocks * kUnits * element;
  Scratch scratch;
  scratch.add(args.panels, blocks * G * H * kUnits * element);
  scratch.add(args.carry_h, carry);
  scratch.add(args.carry_c, carry, in.is_lstm());
  scratch.add(args.product, carry, has_mask || in.resets_first());
  scratch.add(args.carry_mask, carry, has_mask);
  scratch.add(args.moments, blocks * B * 2 * element, in.has_norm());
  scratch.place();
  Barrier barrier(args.shares);
  args.barrier = &barrier;
  run_shares(layer_backward_kernel, args);

  // What is left are products and sums over all steps at once.
  const auto as_rows = [&](const Tensor& t) { return t.view({T * B, t.size(2)}); };
  const Tensor rows = as_rows(pre), hidden_rows = differs ? as_rows(hidden) : rows;
  const Tensor bias_rows = after_norm.defined() ? as_rows(after_norm) : in.is_lstm() ? rows : hidden_rows;
  // What stands beyond the lengths must not reach the weights, not even times zero.
  const auto used_input = [&] {
    const Tensor x = autograd::defined(in.lengths) ? in.input.masked_fill(in.inactive().unsqueeze(-1), 0) : in.input;
    return as_rows(x.contiguous());
  };
  recurrent::Products products;
  const bool multiplies = autograd::defined(in.weight_ih);
  if (mask[kInput]) {
    result[kInput] = multiplies ? products.input_gradient(rows, *in.weight_ih).view(in.input.sizes()) : pre.to(type);
  }
  if (mask[kWeightIh] && multiplies) result[kWeightIh] = products.weight_gradient(rows, used_input());
  if (mask[kWeightHh]) {
    Tensor before = before_steps(in, out, common.h);
    if (has_mask) before = before * common.hidden_mask.unsqueeze(in.time_dim());
    if (in.resets_first()) {
      const Tensor reset = gates.narrow(2, 0, H) * before;
      Tensor& grad = result[kWeightHh] = empty_output(in.weight_hh.sizes(), options);
      products.weight_gradient(rows.narrow(1, 0, 2 * H), as_rows(before), grad.narrow(0, 0, 2 * H));
      products.weight_gradient(rows.narrow(1, 2 * H, H), as_rows(reset), grad.narrow(0, 2 * H, H));
    } else {
      result[kWeightHh] = products.weight_gradient(hidden_rows, as_rows(before));
    }
  }
  if (mask[kBiasIh] && autograd::defined(in.bias_ih)) result[kBiasIh] = products.bias_gradient(rows, type);
  if (mask[kBiasHh] && autograd::defined(in.bias_hh)) result[kBiasHh] = products.bias_gradient(bias_rows, type);
  products.run();
  const auto parts = [&](const Tensor& t, int64_t g) { return t.narrow(2, g * H, H); };
  if (mask[kPeephole] && common.peephole.defined()) {
    const Tensor before = before_steps(in, cells, common.c);
    const Tensor after = in.zones_out_c() ? parts(gates, 1) * before + parts(gates, 0) * parts(gates, 2) : cells;
    const auto sum = [&](int64_t g, const Tensor& c) { return sum_rows(parts(pre, g) * c); };
    result[kPeephole] = at::stack({sum(0, before), sum(1, before), sum(3, after)}).to(type);
  }
  if (mask[kNorm] && common.norm.defined()) {
    result[kNorm] = sum_rows((after_norm.defined() ? after_norm : pre) * normed).to(type);
  }
  return result;
}

// `count` steps from step `begin` on, as a sequence of their own.
class Part {
 public:
  Part(const Inputs& in, int64_t begin, int64_t count, const Tensor& h, const Tensor& c)
      : in_(in),
        low_(in.reverse ? in.input.size(in.time_dim()) - begin - count : begin),
        count_(count),
        input_(steps(in.input)),
        h_(h),
        c_(autograd::optional_of(c)),
        reset_(optional_steps(in.reset)),
        zoneout_h_(optional_steps(in.zoneout_h)),
        zoneout_c_(optional_steps(in.zoneout_c)) {
    if (autograd::defined(in.lengths)) lengths_ = *in.lengths - low_;
  }

  Tensor steps(const Tensor& t) const { return t.defined() ? t.narrow(in_.time_dim(), low_, count_) : t; }

  Inputs inputs() const {
    return {input_,
            h_,
            c_,
            in_.weight_ih,
            in_.weight_hh,
            in_.bias_ih,
            in_.bias_hh,
            in_.weight_hr,
            in_.weight_peephole,
            in_.weight_norm,
            in_.hidden_mask,
            lengths_,
            reset_,
            zoneout_h_,
            zoneout_c_,
            in_.candidate,
            in_.reset_after,
            in_.zoneout_rate_h,
            in_.zoneout_rate_c,
            in_.grad_clip,
            in_.truncate,
            /*recompute=*/0,
            in_.reverse,
            in_.batch_first};
  }

 private:
  OptionalTensor optional_steps(const OptionalTensor& t) const {
    return autograd::defined(t) ? OptionalTensor(steps(*t)) : std::nullopt;
  }

  const Inputs& in_;
  const int64_t low_, count_;
  const Tensor input_, h_;
  const OptionalTensor c_;
  OptionalTensor lengths_;
  const OptionalTensor reset_, zoneout_h_, zoneout_c_;
};

// A part of `recompute` steps at a time, from the last: its forward again, then its backward.
Gradients backward_in_parts(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  const int64_t time = in.time_dim(), T = in.input.size(time);
  OutputGradients carried = grads;
  Mask part_mask = mask;
  part_mask[kH] = part_mask[kC] = true;
  Gradients result;
  if (mask[kInput]) result[kInput] = empty_output(in.input.sizes(), in.input.options());
  for (int64_t begin = (std::max<int64_t>(T, 1) - 1) / in.recompute * in.recompute; begin >= 0; begin -= in.recompute) {
    const int64_t count = std::min(in.recompute, T - begin);
    Tensor h = in.h, c = in.is_lstm() ? *in.c : Tensor();
    if (begin > 0) {
      const int64_t t = in.reverse ? T - begin : begin - 1;
      h = kept.out.select(time, t);
      // A row that begins later, from its own end on, has its first state yet.
      if (in.reverse && autograd::defined(in.lengths)) h = at::where((*in.lengths <= t).unsqueeze(-1), in.h, h);
      if (c.defined()) c = kept.cells.select(0, begin / in.recompute - 1);
    }
    const Part part(in, begin, count, h, c);
    const Inputs inputs = part.inputs();
    const Outputs again = cpu_forward(inputs, /*save=*/true);
    carried.out = part.steps(grads.out);
    const auto found = backward_of_steps(carried, inputs, again, part_mask, begin);
    carried.h = found[kH];
    carried.c = found[kC];
    if (mask[kInput]) part.steps(result[kInput]).copy_(found[kInput]);
    for (size_t i = kWeightIh; i < kInputs; ++i) {
      if (!found[i].defined()) continue;
      result[i] = result[i].defined() ? result[i].add_(found[i]) : found[i];
    }
  }
  if (mask[kH]) result[kH] = carried.h;
  if (mask[kC]) result[kC] = carried.c;
  return result;
}

}  // namespace

Gradients cpu_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  check_backward(grads, in, kept);
  TORCH_CHECK_NOT_IMPLEMENTED(is_fused(in), "the fused backward has no projections");
  return in.recompute == 0 ? backward_of_steps(grads, in, kept, mask, /*first_step=*/0)
                           : backward_in_parts(grads, in, kept, mask);
}

}  // namespace lect11ext::layer_op
