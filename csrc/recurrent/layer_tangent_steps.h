// The recurrence of a layer's tangents: the op layer_tangents, and its definition in differentiable ATen. A step is
// linear in the tangents of its sums and of the states, with the factors that layer.h tells; they come for all steps at
// once, as does what of the sums does not depend on the state. Tensors over time have the steps first.
#pragma once

#include <functional>
#include <vector>

#include "recurrent/layer_composite.h"

namespace lect11ext::layer_op {

struct TangentOutputs {
  Tensor out, h, c, sums, cells;
};

// The tangents of the states from step to step.
class TangentStates {
 public:
  explicit TangentStates(const Inputs& in);

  Tensor h, c;  // c of an LSTM only

  int64_t count() const { return steps_.known_count(); }
  int64_t time(int64_t s) const { return steps_.time(s); }
  Tensor masked_h() const { return steps_.masked(h); }

  // Step s finds them.
  void begin(int64_t s);

  // And leaves them, but for zoneout and for rows whose step does not take place.
  void end(int64_t t, Tensor new_h, Tensor new_c = {});

  // After the last step; `sums` of every step, of so many columns.
  TangentOutputs outputs(const std::vector<Tensor>& sums, int64_t columns) const;

 private:
  const Steps steps_;
  const KeptShare keep_h_, keep_c_;
  std::vector<Tensor> all_h_, all_c_;
};

// The sums' tangents at time t, of the state's.
using TangentProduct = std::function<Tensor(int64_t t, const Tensor& masked_h)>;

// From `in`, a layer whose input is multiplied already: that is what the op adds to a product, and no more than a shape
// to the definition.
TangentOutputs composite_tangents(const Inputs& in, const TangentProduct& product);

// The op, through the dispatcher: product is in.input[t] + masked_h · weight_hhᵀ.
TangentOutputs call_tangents(const Inputs& in);

}  // namespace lect11ext::layer_op
