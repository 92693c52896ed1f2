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
    int64_t position = begin % args.queries, head = begin / args.queries % args.heads;
    int64_t batch = begin / args.queries / args.heads;
    for (int64_t row = begin; row < end; ++row) {
      C* sum = sums + row * columns;
      for (int64_t part = 1; part < args.parts; ++part) {
        const C* other = sums + (part * rows + row) * columns;
        for (int64_t c = 0; c < columns; ++c) sum[c] += other[c];
      }
      for (int64_t c = 0; c < columns; ++c) sum[c] *= static_cast<C>(args.scale);
      convert(sum, row_of<S>(args.grad_query, args.grad_query_strides, batch, head, position), args.head_dim);
      if (++position < args.queries) continue;
      position = 0;
      if (++head < args.heads) continue;
      head = 0;
      ++batch;
    }
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
