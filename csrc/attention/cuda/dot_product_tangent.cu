#include "attention/cuda/dot_product_launch.cuh"

namespace lect11ext::cuda {
namespace {

DerivativeArgs widen(const AttentionTangent& args) {
  DerivativeArgs wide{};
  static_cast<AttentionSaved&>(wide) = args;
  wide.query_t = args.query_t;
  wide.key_t = args.key_t;
  wide.value_t = args.value_t;
  wide.mask_t = args.mask_t;
  return wide;
}

}  // namespace

int64_t attention_scratch(const AttentionTangent&) { return 0; }

void attention_tangent(const AttentionTangent& args, void*, void* stream) {
  check_positions(args);
  const DerivativeArgs wide = widen(args);
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    run_derivative<S, Part::Tangent>(wide, args.value_dim, stream, [&](DerivativeSettings& plan) {
      plan.out_t = args.out_t;
      plan.out_t_strides = args.out_t_strides;
      plan.lse_t = args.lse_t;
      plan.pairs_aligned[0] = pairs_are_aligned<S>(args.out_t, args.out_t_strides);
    });
  });
}

}  // namespace lect11ext::cuda
