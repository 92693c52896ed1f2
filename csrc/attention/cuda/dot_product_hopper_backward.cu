#include "attention/cuda/dot_product_hopper_backward.cuh"

namespace lect11ext::cuda {
namespace {

constexpr int kSideThreads = 256;

// Before: what is known of every query, a block for a tile of them, and zeros where blocks count.
template <class S, int kColumns, HopperKind kKind>
__global__ void __launch_bounds__(kSideThreads)
    hopper_prepare_kernel(const __grid_constant__ AttentionBackward args, const HopperBackwardScratch scratch) {
  constexpr int kElements = 8, kLanes = kColumns / kElements;  // of sixteen bytes, of a row
  constexpr int kQueries = HopperBackwardScratch::queries_of_tile(kColumns), kRows = kSideThreads / kLanes;
  constexpr int kLses = HopperBackwardScratch::lses_of_tile(kColumns);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  if (blockIdx.x == 0 && threadIdx.x == 0) *scratch.taken = 0;
  for (int64_t tile = blockIdx.x; tile < scratch.units * scratch.tiles; tile += gridDim.x) {
    const int64_t unit = divide(tile, scratch.tiles), batch = divide(unit, args.heads);
    const int64_t head = unit - batch * args.heads;
    const HopperBackwardScratch::Queries queries = scratch.queries_of(args, tile - unit * scratch.tiles);
    float lses[kQueries / kRows], deltas[kQueries / kRows];
    bool large = kKind == HopperKind::Scored;
#pragma unroll
    for (int n = 0; n < kQueries / kRows; ++n) {
      const int place = n * kRows + static_cast<int>(threadIdx.x) / kLanes;
      const int64_t query = queries.first + place;
      const bool there = place < queries.count;
      float sum = 0;
      if (there && lane < args.value_dim / kElements) {
        const auto piece = [&](const AttentionOperand& operand) {
          const S* const from = static_cast<const S*>(operand.data) + batch * operand.strides.batch +
                                head * operand.strides.head + query * operand.strides.position;
          return __ldg(reinterpret_cast<const uint4*>(from) + lane);
        };
        const uint4 a = piece(args.out), b = piece(args.grad_out);
        const S *x = reinterpret_cast<const S*>(&a), *y = reinterpret_cast<const S*>(&b);
#pragma unroll
        for (int k = 0; k < kElements; ++k) sum += from_storage<float>(x[k]) * from_storage<float>(y[k]);
      }
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      const int64_t number = unit * args.queries + query;
      const float lse = there ? static_cast<const float*>(args.lse)[number] : -INFINITY;
      if (there && args.grad_lse != nullptr) sum -= static_cast<const float*>(args.grad_lse)[number];
      lses[n] = lse == -INFINITY ? INFINITY : lse;
      deltas[n] = sum * static_cast<float>(args.scale);
      large |= lse != -INFINITY && !(std::abs(lse) <= kLargeExponent);
    }
    const bool exact = __syncthreads_count(large) > 0;
    if (lane == 0) {
#pragma unroll
      for (int n = 0; n < kQueries / kRows; ++n) {
        const int place = HopperBackwardScratch::place_of(n * kRows + static_cast<int>(threadIdx.x) / kLanes);
        scratch.lses[tile * kLses + place] = exact ? lses[n] : lses[n] * static_cast<float>(kLog2E);
        scratch.deltas[tile * kQueries + place] = deltas[n];
      }
    }
    if (threadIdx.x == 0) {
      scratch.lses[tile * kLses + kQueries] = exact ? 1.0f : 0.0f;
      scratch.counts[tile] = 0;
    }
  }
}

template <class S, int kColumns, HopperKind kKind>
__global__ void __launch_bounds__(HopperBackward<S, kColumns, kKind>::kThreads, 1) hopper_backward_kernel(
    const __grid_constant__ AttentionBackward args, const __grid_constant__ HopperBackwardPlan plan) {
#if LECT11EXT_HOPPER_CODE
  __shared__ int number;
  if (threadIdx.x == 0) number = atomicAdd(plan.scratch.taken, 1);
  __syncthreads();
  using Kernel = HopperBackward<S, kColumns, kKind>;
  const typename Kernel::Own own = Kernel::find(args, plan, number);
  const Sequence sequence(args, own.sequence);
  if (own.tile * Kernel::kKeys >= sequence.keys) return;
  Kernel(args, plan, sequence, own).run();
#endif
}

// After: sums of the queries' gradients become rows. A thread has two rows of eight columns, which lie in 64 bytes.
template <class S, int kColumns>
__global__ void __launch_bounds__(kSideThreads)
    hopper_round_kernel(const __grid_constant__ AttentionBackward args, const HopperBackwardScratch scratch) {
  using Kernel = HopperBackward<S, kColumns, HopperKind::Plain>;
  constexpr int kPieces = Kernel::kSums / 16;
  const int64_t pieces = scratch.units * scratch.tiles * kPieces, step = int64_t{gridDim.x} * kSideThreads;
  for (int64_t i = int64_t{blockIdx.x} * kSideThreads + threadIdx.x; i < pieces; i += step) {
    const int64_t tile = i / kPieces, unit = divide(tile, scratch.tiles), batch = divide(unit, args.heads);
    const int piece = static_cast<int>(i % kPieces), column_tile = piece % 8, g = piece / 8 % 8, warp = piece / 64 % 4;
    const int group = piece / 256;
    float4 sums[4] = {};
    if (scratch.counts[tile] > 0) {  // else nothing has come there
      const auto* const from = reinterpret_cast<const float4*>(scratch.sums + tile * Kernel::kSums) +
                               (8 * group + column_tile) * kWarpgroup + 32 * warp + 4 * g;
#pragma unroll
      for (int q = 0; q < 4; ++q) sums[q] = from[q];
    }
    const AttentionStrides& strides = args.grad_query_strides;
    const HopperBackwardScratch::Queries queries = scratch.queries_of(args, tile - unit * scratch.tiles);
    const int query = (Kernel::kHalves == 1 ? 0 : 64 * group) + 16 * warp + g;
    S* const to = static_cast<S*>(args.grad_query) + batch * strides.batch +
                  (unit - batch * args.heads) * strides.head + (queries.first + query) * strides.position +
                  (Kernel::kHalves == 1 ? 64 * group : 0) + 8 * column_tile;
    const auto word = [](float low, float high) { return round_pair<S>(low, high); };
    const bool any = (Kernel::kHalves == 1 ? 64 * group : 0) + 8 * column_tile < args.head_dim;
    if (any && query < queries.count) {
      *reinterpret_cast<uint4*>(to) = make_uint4(word(sums[0].x, sums[0].y), word(sums[1].x, sums[1].y),
                                                 word(sums[2].x, sums[2].y), word(sums[3].x, sums[3].y));
    }
    if (any && query + 8 < queries.count) {
      *reinterpret_cast<uint4*>(to + 8 * strides.position) =
          make_uint4(word(sums[0].z, sums[0].w), word(sums[1].z, sums[1].w), word(sums[2].z, sums[2].w),
                     word(sums[3].z, sums[3].w));
    }
  }
}

template <class S, int kColumns, HopperKind kKind>
HopperRun run(const AttentionBackward& args, void* scratch, void* stream) {
  using Kernel = HopperBackward<S, kColumns, kKind>;
  HopperRun result{};
  const Span queries = queries_of_use(args), keys = keys_of_use(args);
  HopperBackwardPlan plan{};
  if (!map_operand(plan.key, args, args.key, args.kv_heads, args.head_dim, keys, Kernel::kKeys) ||
      !map_operand(plan.value, args, args.value, args.kv_heads, args.value_dim, keys, Kernel::kKeys) ||
      !map_operand(plan.query, args, args.query, args.heads, args.head_dim, queries, Kernel::kQueries) ||
      !map_operand(plan.grad_out, args, args.grad_out, args.heads, args.value_dim, queries, Kernel::kQueries)) {
    return result;
  }
  result.started = true;
  if (needs_finite(args)) {
    // Of barred keys and queries that see nothing scores and weights are selected away, but not what these multiply.
    result.flag = find_non_finite<S>({scanned(args, args.query, args.heads, args.head_dim, queries),
                                      scanned(args, args.grad_out, args.heads, args.value_dim, queries),
                                      scanned(args, args.key, args.kv_heads, args.head_dim, keys)},
                                     scratch, stream);
  }
  plan.first_query = static_cast<int>(queries.first);
  plan.first_key = static_cast<int>(keys.first);
  plan.mask_pairs = mask_pairs(args, 2);
  plan.mask_tiles = MaskTiles::of(args, static_cast<char*>(scratch) + kFlagBytes);
  find_mask_tiles<S>(args, plan.mask_tiles, stream);
  char* const ranks = static_cast<char*>(scratch) + kFlagBytes + plan.mask_tiles.bytes();
  plan.mask_ranks = MaskRanks::of(plan.mask_tiles, Kernel::kQueries, Kernel::kKeys, ranks);
  find_mask_ranks(plan.mask_tiles, plan.mask_ranks, stream);
  plan.scratch = HopperBackwardScratch::of(args, ranks + plan.mask_ranks.bytes(plan.mask_tiles));
  plan.tiles = tiles_of_head(args, args.key_starts, args.keys, Kernel::kKeys);
  plan.order = BlockOrder::of(args, plan.tiles.count(), args.batch * args.kv_heads,
                              4 * args.queries * kColumns * (args.heads / args.kv_heads), 1);
  const int64_t rows = plan.scratch.rows(kColumns);
  launch(hopper_prepare_kernel<S, kColumns, kKind>, grid_stride_blocks(plan.scratch.units * plan.scratch.tiles, 1),
         kSideThreads, 0, stream, args, plan.scratch);
  reserve_shared(hopper_backward_kernel<S, kColumns, kKind>);
  launch(hopper_backward_kernel<S, kColumns, kKind>, plan.order.blocks(), Kernel::kThreads, Kernel::kBytes, stream,
         args, plan);
  if (args.grad_query != nullptr) {
    launch(hopper_round_kernel<S, kColumns>, grid_stride_blocks(rows * kColumns / 16, kSideThreads), kSideThreads, 0,
           stream, args, plan.scratch);
  }
  return result;
}

bool takes(const AttentionBackward& args) {
  const auto aligned = [](const void* data, const AttentionStrides& strides) {
    return data == nullptr || rows_are_aligned(data, strides);
  };
  return hopper_is_chosen() && hopper_computes(args) && args.softcap == 0 && args.grad_out.data != nullptr &&
         args.grad_mask == nullptr && aligned(args.out.data, args.out.strides) &&
         aligned(args.grad_out.data, args.grad_out.strides) && aligned(args.grad_query, args.grad_query_strides) &&
         aligned(args.grad_key, args.grad_key_strides) && aligned(args.grad_value, args.grad_value_strides);
}

}  // namespace

int64_t hopper_scratch(const AttentionBackward& args) {
  if (!takes(args)) return 0;
  const int columns = hopper_columns(args);
  const MaskTiles tiles = MaskTiles::of(args, nullptr);
  const MaskRanks ranks = MaskRanks::of(tiles, HopperBackwardScratch::queries_of_tile(columns),
                                        HopperBackwardScratch::kKeysOfTile, nullptr);
  return kFlagBytes + tiles.bytes() + ranks.bytes(tiles) + HopperBackwardScratch::of(args, nullptr).bytes(columns);
}

HopperRun hopper_backward(const AttentionBackward& args, void* scratch, void* stream) {
  if (!takes(args)) return {};
  // With dropout among what a kernel of products has, it has too few registers: 0.87 of the rate.
  return with_hopper_kernel<HopperKind::Scored>(args, [&](auto* type, auto columns, auto kind) {
    return run<std::remove_pointer_t<decltype(type)>, columns, kind>(args, scratch, stream);
  });
}

}  // namespace lect11ext::cuda
