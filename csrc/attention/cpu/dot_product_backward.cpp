// The backward of dot-product attention.
#include "attention/cpu/dot_product_gradients.h"

namespace lect11ext::CPU_CAPABILITY {

void attention_backward_kernel(const AttentionBackwardCpu& args, int64_t begin, int64_t end) {
  with_operands(args.dtype, args.plan.widens, [&](auto* type, auto* operand) {
    using S = std::remove_pointer_t<decltype(type)>;
    using P = std::remove_pointer_t<decltype(operand)>;
    Gradients<S, P, /*kTangent=*/false> gradients(args);
    for (int64_t item = begin; item < end; ++item) gradients.run(item);
  });
}

void attention_query_gradient_kernel(const AttentionBackwardCpu& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using C = Compute<S>;
    const int64_t columns = round_up(args.head_dim, kColumnStep), rows = args.batch * args.heads * args.queries;
    C* sums = static_cast<C*>(args.query_sums);
    for (int64_t row = begin; row < end; ++row) {
      C* sum = sums + row * columns;
      for (int64_t part = 1; part < args.parts; ++part) {
        const C* other = sums + (part * rows + row) * columns;
        for (int64_t c = 0; c < columns; ++c) sum[c] += other[c];
      }
      for (int64_t c = 0; c < columns; ++c) sum[c] *= static_cast<C>(args.scale);
      const int64_t position = row % args.queries, head = row / args.queries % args.heads;
      const int64_t batch = row / args.queries / args.heads;
      convert(sum, row_of<S>(args.grad_query, args.grad_query_strides, batch, head, position), args.head_dim);
    }
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
