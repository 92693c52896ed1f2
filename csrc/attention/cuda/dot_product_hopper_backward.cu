#include "attention/cuda/dot_product_hopper_backward.cuh"

namespace lect11ext::cuda {
namespace {

template <class S, int kColumns>
__global__ void __launch_bounds__(HopperKeys<S, kColumns>::kThreads, 1) hopper_keys_kernel(
    const __grid_constant__ AttentionBackward args, const __grid_constant__ HopperBackwardPlan plan) {
#if LECT11EXT_HOPPER_CODE
  const Sequence sequence(args, 0);  // all are alike
  const HopperKeys<S, kColumns> kernel(args, plan, sequence);
  constexpr int kFullArrivals = 33;  // of the thread that starts TMA, and of the warp that brings numbers
  kernel.run(kFullArrivals, [&] { kernel.load(); }, [&](int group) { kernel.compute(group); });
#endif
}

template <class S, int kColumns>
__global__ void __launch_bounds__(HopperQueries<S, kColumns>::kThreads, 1) hopper_queries_kernel(
    const __grid_constant__ AttentionBackward args, const __grid_constant__ HopperBackwardPlan plan) {
#if LECT11EXT_HOPPER_CODE
  const Sequence sequence(args, 0);
  const HopperQueries<S, kColumns> kernel(args, plan, sequence);
  kernel.run(1, [&] { kernel.load(); }, [&](int group) { kernel.compute(group); });
#endif
}

// The maps of a side, `rows` in a box.
bool map_queries(CUtensorMap (&maps)[2], const AttentionBackward& args, int rows) {
  const Span span = queries_of_use(args);
  return map_operand(maps[0], args, args.query, args.heads, span, rows) &&
         map_operand(maps[1], args, args.grad_out, args.heads, span, rows);
}

bool map_keys(CUtensorMap (&maps)[2], const AttentionBackward& args, int rows) {
  const Span span = keys_of_use(args);
  return map_operand(maps[0], args, args.key, args.kv_heads, span, rows) &&
         map_operand(maps[1], args, args.value, args.kv_heads, span, rows);
}

// Both kernels, or none.
template <class S, int kColumns>
bool run(const AttentionBackward& args, const float* correction, void* stream) {
  using Keys = HopperKeys<S, kColumns>;
  using Queries = HopperQueries<S, kColumns>;
  HopperBackwardPlan of_keys{}, of_queries{};
  if (!map_keys(of_keys.own, args, Keys::kRows) || !map_queries(of_keys.passing, args, Keys::kQueries) ||
      !map_queries(of_queries.own, args, Queries::kRows) || !map_keys(of_queries.passing, args, Queries::kKeys)) {
    return false;
  }
  for (HopperBackwardPlan* plan : {&of_keys, &of_queries}) {
    plan->first_query = static_cast<int>(queries_of_use(args).first);
    plan->first_key = static_cast<int>(keys_of_use(args).first);
    plan->correction = correction;
  }
  const int64_t group = args.heads / args.kv_heads;
  if (args.grad_query != nullptr) {
    of_queries.order = BlockOrder::of(ceil_divide(args.queries, Queries::kRows), args.batch * args.heads,
                                      4 * args.keys * kColumns, group);
    reserve_shared(hopper_queries_kernel<S, kColumns>);
    launch(hopper_queries_kernel<S, kColumns>, of_queries.order.blocks(), Queries::kThreads, Queries::kBytes, stream,
           args, of_queries);
  }
  if (args.grad_key != nullptr || args.grad_value != nullptr) {
    of_keys.order = BlockOrder::of(ceil_divide(args.keys, Keys::kRows), args.batch * args.kv_heads,
                                   4 * args.queries * kColumns * group, 1);
    reserve_shared(hopper_keys_kernel<S, kColumns>);
    launch(hopper_keys_kernel<S, kColumns>, of_keys.order.blocks(), Keys::kThreads, Keys::kBytes, stream, args,
           of_keys);
  }
  return true;
}

}  // namespace

bool hopper_backward(const AttentionBackward& args, const float* correction, void* stream) {
  const auto aligned = [](const void* data, const AttentionStrides& strides) {
    return data == nullptr || rows_are_aligned(data, strides);
  };
  if (!hopper_is_chosen() || !hopper_computes(args) || args.grad_out.data == nullptr || args.grad_mask != nullptr ||
      !aligned(args.grad_query, args.grad_query_strides) || !aligned(args.grad_key, args.grad_key_strides) ||
      !aligned(args.grad_value, args.grad_value_strides)) {
    return false;
  }
  const bool narrow = args.head_dim == 64;
  if (args.dtype == DType::BFloat16) {
    return narrow ? run<__nv_bfloat16, 64>(args, correction, stream)
                  : run<__nv_bfloat16, 128>(args, correction, stream);
  }
  return narrow ? run<__half, 64>(args, correction, stream) : run<__half, 128>(args, correction, stream);
}

}  // namespace lect11ext::cuda
