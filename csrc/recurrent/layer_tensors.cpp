#include "recurrent/layer_tensors.h"

#include <ATen/ops/empty.h>

#include "common/tensors.h"

namespace lect11ext::layer_op {
namespace {

Tensor dense(const OptionalTensor& t) { return autograd::defined(t) ? t->contiguous() : Tensor(); }

}  // namespace

TimeStrides strides_of(const Inputs& in, const Tensor& t) {
  if (!t.defined()) return {};
  return in.batch_first ? TimeStrides{t.stride(1), t.stride(0)} : TimeStrides{t.stride(0), t.stride(1)};
}

Common::Common(const Inputs& in)
    : hh(in.weight_hh),
      h(in.h.contiguous()),
      c(dense(in.c)),
      peephole(dense(in.weight_peephole)),
      norm(dense(in.layer_norm)),
      hidden_mask(dense(in.hidden_mask)),
      lengths(dense(in.lengths)),
      reset(autograd::tensor_or_none(in.reset)),
      zoneout_h(dense(in.zoneout_h)),
      zoneout_c(dense(in.zoneout_c)) {}

void Common::describe(const Inputs& in, LayerCommon& args) const {
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

Outputs empty_outputs(const Inputs& in, bool save, LayerOutputs& args) {
  const auto options = in.input.options();
  const auto [first, second] = in.order(args.steps, args.batch);
  const auto over_time = [&, first = first, second = second](bool wanted, int64_t parts) {
    return wanted ? empty_output({first, second, parts * args.hidden}, options) : Tensor();
  };
  Outputs out;
  const bool keeps = save && in.recompute == 0;
  out.out = over_time(true, 1);
  out.h = at::empty({args.batch, args.hidden}, options);
  if (in.is_lstm()) out.c = at::empty({args.batch, args.hidden}, options);
  out.gates = over_time(keeps, in.kept_gates());
  out.cells = over_time(keeps && in.is_lstm(), 1);
  if (save && in.recompute > 0 && in.is_lstm()) {
    args.cells_every = in.recompute;
    out.cells = at::empty({in.kept_cells().expect_int(), args.batch, args.hidden}, options);
  }
  out.normed = over_time(keeps && in.has_norm(), in.gates());
  if (out.normed.defined()) out.rstd = at::empty({first, second}, options.dtype(recurrent::compute_type(in.input)));
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
  return out;
}

}  // namespace lect11ext::layer_op
