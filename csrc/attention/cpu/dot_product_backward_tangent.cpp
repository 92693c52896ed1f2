// The tangent of dot-product attention's backward, which is its double backward too.
#include "attention/cpu/dot_product_gradients.h"

namespace lect11ext::CPU_CAPABILITY {

void attention_backward_tangent_kernel(const AttentionBackwardCpu& args, int64_t begin, int64_t end) {
  with_operands(args.dtype, args.plan.widens, [&](auto* type, auto* operand) {
    using S = std::remove_pointer_t<decltype(type)>;
    using P = std::remove_pointer_t<decltype(operand)>;
    Gradients<S, P, /*kTangent=*/true> gradients(args);
    for (int64_t item = begin; item < end; ++item) gradients.run(item);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
