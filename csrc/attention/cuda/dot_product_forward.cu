#include "attention/cuda/dot_product_forward.cuh"

#include "attention/cuda/dot_product_finite.cuh"
#include "attention/cuda/dot_product_hopper.h"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

template <class S, int kWidth, bool kPlain, bool kFinite>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(const __grid_constant__ AttentionForward args,
                   const __grid_constant__ typename ForwardShape<S, kWidth, kPlain>::Plan plan) {
  if (plan.only_if != nullptr && (*plan.only_if == 0) != kFinite) return;
  Forward<S, kWidth, kPlain, kFinite>(args, plan, dynamic_shared).run();
}

// A warp a row: out = Σ e^(m_s − m) · out_s / Σ e^(m_s − m) · l_s over the splits, in their order.
template <class S>
__global__ void __launch_bounds__(kMostThreads, 1)
    merge_kernel(const __grid_constant__ AttentionForward args, const __grid_constant__ ForwardSettings plan) {
  using C = Compute<S>;
  if (plan.only_if != nullptr && *plan.only_if == 0) return;
  const Lane lane;
  const int64_t rows = args.batch * args.heads * args.queries;
  const int64_t step = int64_t{gridDim.x} * kMostWarps;
  const C* const maxima = static_cast<const C*>(plan.partial_largest);
  const C* const sums = static_cast<const C*>(plan.partial_sum);
  const C* const outs = static_cast<const C*>(plan.partial_out);
  const C unit = C(plan.unit), kept = C(dropout_factor(args.dropout_p));
  for (int64_t row = int64_t{blockIdx.x} * kMostWarps + lane.warp; row < rows; row += step) {
    C largest = -infinity<C>(), sum = 0;
#pragma unroll 1
    for (int64_t s = 0; s < plan.splits; ++s) largest = std::fmax(largest, maxima[s * rows + row]);
    const C base = largest == -infinity<C>() ? C(0) : largest;
    const auto weight = [&](int64_t s) { return std::exp((maxima[s * rows + row] - base) * unit); };
    for (int64_t s = 0; s < plan.splits; ++s) sum += weight(s) * sums[s * rows + row];
    const bool none = sum == 0;
    if (lane.lane == 0) {
      static_cast<C*>(args.lse)[row] = none ? -infinity<C>() : rounded_product(largest, unit) + std::log(sum);
    }
    const int64_t head_of_all = divide(row, args.queries), batch = divide(head_of_all, args.heads);
    const int64_t head = head_of_all - batch * args.heads, query = row - head_of_all * args.queries;
    S* const out = static_cast<S*>(args.out) + batch * args.out_strides.batch + head * args.out_strides.head +
                   query * args.out_strides.position;
    for (int64_t column = lane.lane; column < args.value_dim; column += 32) {
      C value = 0;
      for (int64_t s = 0; s < plan.splits; ++s) {
        // A part of no key has weight zero and zeros; one of NaN has them everywhere.
        value += weight(s) * outs[(s * rows + row) * args.value_dim + column];
      }
      out[column] = to_storage<S>(none ? C(0) : value * (kept / sum));
    }
  }
}

template <class S, int kWidth, bool kPlain>
typename ForwardShape<S, kWidth, kPlain>::Plan make_plan(const AttentionForward& args) {
  using Shape = ForwardShape<S, kWidth, kPlain>;
  const auto mean = [&](int64_t all) {
    return args.query_starts == nullptr ? all : divide_up(all, std::max<int64_t>(args.sequences, 1));
  };
  constexpr int64_t kFew = 16;  // queries, for which neighbouring heads lie in one tile
  const int64_t group = args.heads / args.kv_heads, queries = mean(args.queries);
  typename Shape::Plan plan{};
  plan.packed = static_cast<int>(queries <= kFew && args.queries * group <= kMostPositions ? group : 1);
  plan.warps = static_cast<int>(std::clamp<int64_t>(divide_up(queries * plan.packed, Shape::kRows), 1, kMostWarps));
  plan.row = TileShape<Shape::kDim>::template of<S>(args.head_dim);
  plan.value = TileShape<Shape::kDim>::template of<S>(args.value_dim);
  const auto bytes = [&] {
    return static_cast<size_t>(plan.warps * Shape::kRows * plan.row.stride() +
                               Shape::kKeys * (plan.row.stride() + plan.value.stride())) *
           sizeof(S);
  };
  const auto most = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  while (bytes() > most) {
    if (plan.warps > 1) plan.warps /= 2;
    else throw std::runtime_error("attention needs more shared memory than this GPU has.");
  }
  plan.shared_bytes = bytes();
  plan.tiles = {args.query_starts, args.sequences, args.queries * plan.packed, plan.warps * Shape::kRows, plan.packed};
  plan.chunks = std::max<int64_t>(1, divide_up(args.value_dim, kWidth));
  plan.query_aligned = is_aligned<S>(args.query);
  plan.key_aligned = is_aligned<S>(args.key);
  plan.value_aligned = is_aligned<S>(args.value);
  plan.pairs_aligned = pairs_are_aligned<S>(args.out, args.out_strides);
  plan.mask_pairs = mask_pairs(args, 3);

  // Blocks that the device holds at a time, by registers and by shared memory. A split has a few tiles at least, and
  // the keys are cut only where that gives twice the blocks.
  constexpr int64_t kResidentWarps = 8, kLeastTiles = 2, kMostSplits = 128;
  const int64_t blocks = std::max<int64_t>(1, plan.tiles.count() * (args.heads / plan.packed) * plan.chunks);
  const int64_t resident =
      std::min<int64_t>(kResidentWarps / plan.warps, static_cast<int64_t>(most / plan.shared_bytes));
  const int64_t wanted = device_attribute(cudaDevAttrMultiProcessorCount) * resident / blocks;
  const int64_t tiles = std::min(divide_up(mean(args.keys), Shape::kKeys),
                                 args.window_left == kOpen ? kOpen : divide_up(args.window_left, Shape::kKeys) + 1);
  plan.splits = std::clamp<int64_t>(std::min(wanted, tiles / kLeastTiles), 1, kMostSplits);
  plan.unit = kPlain ? args.scale : 1;
  return plan;
}

template <class S, int kWidth, bool kPlain, bool kFinite>
void run(const AttentionForward& args, const typename ForwardShape<S, kWidth, kPlain>::Plan& plan, void* stream) {
  const int64_t blocks = plan.tiles.count() * (args.heads / plan.packed);
  if (blocks == 0) return;
  const dim3 grid(grid_size(blocks), static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.splits));
  reserve_shared(forward_kernel<S, kWidth, kPlain, kFinite>);
  launch(forward_kernel<S, kWidth, kPlain, kFinite>, grid, dim3(32 * plan.warps), plan.shared_bytes, stream, args,
         plan);
}

// Calls f with the storage type, the width of the value's columns that a block sums, and whether the kernel is plain.
template <class F>
void with_kernel(const AttentionForward& args, F f) {
  const bool plain = is_plain(args);
  with_type(args.dtype, [&](auto* type) {
    const auto with_plain = [&](auto width) {
      if constexpr (sizeof(*type) < 8) {
        if (plain) return f(type, width, std::true_type{});
      }
      f(type, width, std::false_type{});
    };
    // But for doubles it is a bound of head_dim too.
    const int64_t columns = sizeof(*type) < 8 ? std::max(args.head_dim, args.value_dim) : args.value_dim;
    if (columns <= 64) return with_plain(std::integral_constant<int, 64>{});
    if constexpr (sizeof(*type) < 8) {
      if (columns > 128) return with_plain(std::integral_constant<int, 256>{});
    }
    with_plain(std::integral_constant<int, 128>{});
  });
}

}  // namespace

int64_t attention_scratch(const AttentionForward& args) {
  if (args.batch == 0 || args.heads == 0 || args.queries == 0) return 0;
  int64_t bytes = 0;
  with_kernel(args, [&](auto* type, auto width, auto plain) {
    using S = std::remove_pointer_t<decltype(type)>;
    const int64_t splits = make_plan<S, width, plain>(args).splits;
    if (splits == 1) return;
    bytes = splits * args.batch * args.heads * args.queries * (args.value_dim + 2) *
            static_cast<int64_t>(sizeof(Compute<S>));
  });
  return bytes + hopper_scratch(args) + FloatScan(args).scratch();
}

void attention_forward(const AttentionForward& args, void* scratch, void* stream) {
  check_positions(args);
  if (args.batch == 0 || args.heads == 0 || args.queries == 0) return;
  const HopperRun hopper = hopper_forward(args, scratch, stream);
  if (hopper.started && hopper.flag == nullptr) return;
  const int* const non_finite = FloatScan(args).find(scratch, stream);
  if (hopper.started || non_finite != nullptr) scratch = static_cast<char*>(scratch) + kFlagBytes;
  with_kernel(args, [&](auto* type, auto width, auto plain) {
    using S = std::remove_pointer_t<decltype(type)>;
    using C = Compute<S>;
    auto plan = make_plan<S, width, plain>(args);
    const int64_t rows = args.batch * args.heads * args.queries;
    plan.partial_largest = scratch;
    plan.partial_sum = static_cast<C*>(scratch) + plan.splits * rows;
    plan.partial_out = static_cast<C*>(scratch) + 2 * plan.splits * rows;
    plan.only_if = hopper.started ? hopper.flag : non_finite;
    if constexpr (std::is_same_v<S, float> && width <= 128) {
      if (non_finite != nullptr) run<S, width, plain, true>(args, plan, stream);
    }
    run<S, width, plain, false>(args, plan, stream);
    if (plan.splits > 1) {
      plan.only_if = hopper.flag;
      launch(merge_kernel<S>, grid_stride_blocks(32 * rows, kMostThreads), kMostThreads, 0, stream, args, plan);
    }
  });
}

}  // namespace lect11ext::cuda
