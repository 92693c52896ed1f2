#include "attention/cuda/dot_product_hopper_forward.cuh"

namespace lect11ext::cuda {
namespace {

template <class S, int kColumns, HopperKind kKind>
__global__ void __launch_bounds__(HopperForward<S, kColumns, kKind>::kThreads, 1) hopper_forward_kernel(
    const __grid_constant__ AttentionForward args, const __grid_constant__ HopperForwardPlan plan) {
#if LECT11EXT_HOPPER_CODE
  HopperForward<S, kColumns, kKind>(args, plan).run();
#endif
}

// Few blocks with many keys each are better cut along the keys, as the kernels for all devices do. A guess.
bool is_cut(const AttentionForward& args, int64_t blocks) {
  constexpr int64_t kFewKeys = 2048, kPart = 4;
  return args.keys > kFewKeys && kPart * blocks < device_attribute(cudaDevAttrMultiProcessorCount);
}

template <class S, int kColumns, HopperKind kKind>
HopperRun run(const AttentionForward& args, void* scratch, void* stream) {
  using Kernel = HopperForward<S, kColumns, kKind>;
  HopperForwardPlan plan{};
  plan.tiles = tiles_of_head(args, args.query_starts, args.queries, Kernel::kQueries);
  const int64_t tiles = plan.tiles.count(), units = args.batch * args.heads;
  HopperRun result{};
  if (is_cut(args, tiles * units)) return result;
  const Span keys = keys_of_use(args), queries{0, args.queries};
  if (!map_operand(plan.query, args, args.query, args.heads, args.head_dim, queries, Kernel::kQueries) ||
      !map_operand(plan.key, args, args.key, args.kv_heads, args.head_dim, keys, Kernel::kKeys) ||
      !map_operand(plan.value, args, args.value, args.kv_heads, args.value_dim, keys, Kernel::kKeys)) {
    return result;
  }
  result.started = true;
  if (needs_finite(args)) {
    // Of keys that nobody sees scores are selected away.
    result.flag = find_non_finite<S>({scanned(args, args.value, args.kv_heads, args.value_dim, keys)}, scratch, stream);
  }
  plan.first_key = static_cast<int>(keys.first);
  plan.mask_pairs = mask_pairs(args, 3);
  plan.mask_tiles = MaskTiles::of(args, static_cast<char*>(scratch) + kFlagBytes);
  find_mask_tiles<S>(args, plan.mask_tiles, stream);
  plan.order = BlockOrder::of(args, tiles, units, 4 * args.keys * kColumns, args.heads / args.kv_heads);
  reserve_shared(hopper_forward_kernel<S, kColumns, kKind>);
  const auto blocks = std::min<int64_t>(tiles * units, device_attribute(cudaDevAttrMultiProcessorCount));
  launch(hopper_forward_kernel<S, kColumns, kKind>, grid_size(blocks), Kernel::kThreads, Kernel::kBytes, stream, args,
         plan);
  return result;
}

bool takes(const AttentionForward& args) {
  return hopper_is_chosen() && hopper_computes(args) && rows_are_aligned(args.out, args.out_strides);
}

}  // namespace

int64_t hopper_scratch(const AttentionForward& args) {
  return takes(args) && needs_finite(args) ? kFlagBytes + MaskTiles::of(args, nullptr).bytes() : 0;
}

HopperRun hopper_forward(const AttentionForward& args, void* scratch, void* stream) {
  if (!takes(args)) return {};
  return with_hopper_kernel<HopperKind::Dropped>(args, [&](auto* type, auto columns, auto kind) {
    return run<std::remove_pointer_t<decltype(type)>, columns, kind>(args, scratch, stream);
  });
}

}  // namespace lect11ext::cuda
