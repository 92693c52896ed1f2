// How derivatives are started: plans, what is found of every query before, scratch.
#pragma once

#include "attention/cuda/dot_product_finite.cuh"
#include "attention/cuda/dot_product_hopper.h"
#include "attention/cuda/dot_product_mask.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

// D = Σ grad_out · out − grad_lse of every query, and its tangent: a warp a query.
template <class S, bool kTangent>
__global__ void __launch_bounds__(kMostThreads, 1) delta_kernel(
    const __grid_constant__ DerivativeArgs args, Compute<S>* delta, Compute<S>* delta_t, const int* only_if) {
  if (only_if != nullptr && *only_if == 0) return;
  using C = Compute<S>;
  const Lane lane;
  const int64_t rows = args.batch * args.heads * args.queries;
  const int64_t step = int64_t{gridDim.x} * kMostWarps;
  for (int64_t row = int64_t{blockIdx.x} * kMostWarps + lane.warp; row < rows; row += step) {
    const int64_t head_of_all = divide(row, args.queries), batch = divide(head_of_all, args.heads);
    const int64_t head = head_of_all - batch * args.heads, query = row - head_of_all * args.queries;
    const auto dot = [&](const AttentionOperand& a, const AttentionOperand& b) {
      C sum = 0;
      if (a.data == nullptr || b.data == nullptr) return sum;
      const S *x = row_of<S>(a, batch, head, query), *y = row_of<S>(b, batch, head, query);
      for (int64_t i = lane.lane; i < args.value_dim; i += 32) sum += from_storage<C>(x[i]) * from_storage<C>(y[i]);
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      return sum;
    };
    const auto number = [&](const void* data) { return data == nullptr ? C(0) : static_cast<const C*>(data)[row]; };
    const C sum = dot(args.grad_out, args.out);
    C sum_t = 0;
    if constexpr (kTangent) sum_t = dot(args.grad_out_t, args.out) + dot(args.grad_out, args.out_t);
    if (lane.lane != 0) continue;
    delta[row] = sum - number(args.grad_lse);
    if constexpr (kTangent) delta_t[row] = sum_t - number(args.grad_lse_t);
  }
}

template <class S, Part kPart, int kBound>
using PlanOf = typename Derivative<S, kPart, kBound>::Plan;

template <class S, Part kPart, int kBound, bool kFinite>
__global__ void __launch_bounds__(kMostThreads, 1) derivative_kernel(
    const __grid_constant__ DerivativeArgs args, const __grid_constant__ PlanOf<S, kPart, kBound> plan) {
  if (plan.only_if != nullptr && (*plan.only_if == 0) != kFinite) return;
  Derivative<S, kPart, kBound, kFinite>(args, plan, dynamic_shared).run();
}

template <class S, Part kPart, int kBound>
__global__ void __launch_bounds__(kMostThreads, 1)
    mask_kernel(const __grid_constant__ DerivativeArgs args, const __grid_constant__ PlanOf<S, kPart, kBound> plan) {
  MaskGradient<S, kPart, kBound>(args, plan, dynamic_shared).run();
}

template <class C>
__global__ void __launch_bounds__(kMostThreads)
    sum_parts_kernel(const C* parts, C* out, int64_t numel, int64_t splits) {
  for (int64_t i = int64_t{blockIdx.x} * kMostThreads + threadIdx.x; i < numel;
       i += int64_t{gridDim.x} * kMostThreads) {
    C sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += parts[s * numel + i];
    out[i] = sum;
  }
}

// All but the outputs of Part::Tangent and of the mask.
template <class S, Part kPart, int kBound>
PlanOf<S, kPart, kBound> make_plan(const DerivativeArgs& args) {
  using P = Pairs<S, kPart>;
  using Kernel = Derivative<S, kPart, kBound>;
  const int64_t rows = P::kKeysAreRows ? args.keys : args.queries;
  const int64_t mean = args.query_starts == nullptr ? rows : divide_up(rows, std::max<int64_t>(args.sequences, 1));
  PlanOf<S, kPart, kBound> plan{};
  plan.shape[0] = TileShape<Kernel::kDim>::template of<S>(args.head_dim);
  plan.shape[1] = TileShape<Kernel::kDim>::template of<S>(args.value_dim);
  plan.stages = Kernel::kStages;
  plan.warps = static_cast<int>(std::clamp<int64_t>(divide_up(mean, Kernel::kRows), 1, kMostWarps));
  plan.rows_shared = true;
  plan.plain = args.mask.type <= MaskType::Bool && args.mask_t.type == MaskType::None && args.alibi_slopes == nullptr &&
               args.softcap == 0 && args.dropout_p <= 0;
  plan.mask_pairs = mask_pairs(args, P::kKeysAreRows ? 2 : 3);
  for (int kind = 0; kind < kKinds; ++kind) {
    plan.query_side_aligned[kind] = is_aligned<S>(P::query_side(args, kind));
    plan.key_side_aligned[kind] = is_aligned<S>(P::key_side(args, kind));
  }
  const auto bytes = [&] {
    const auto place = [&](KindOffsets& offsets, bool used, const AttentionOperand& operand, int kind, int count,
                           int& size) {
      const bool there = used && operand.data != nullptr;
      offsets.of[kind] = there ? size : -1;
      if (there) size += count * plan.shape[kind % 2].stride();
    };
    plan.rows_size = plan.stage_size = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      place(plan.rows, P::uses_row(kind), P::row(args, kind), kind, Kernel::kRows * plan.warps, plan.rows_size);
      place(plan.columns, P::uses_column(kind), P::column(args, kind), kind, Kernel::kCols, plan.stage_size);
    }
    if (!plan.rows_shared) plan.rows_size = 0;
    const int numbers = P::kKeysAreRows ? Kernel::kNumbersBytes : 0;
    const int tiles = static_cast<int>(sizeof(S)) * (plan.rows_size + plan.stages * plan.stage_size);
    constexpr int kOfWarps = kMostWarps * Kernel::kCols * static_cast<int>(sizeof(Compute<S>));
    return static_cast<size_t>(plan.stages * numbers + std::max(tiles, kOfWarps));
  };
  const auto most = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  while ((plan.shared_bytes = bytes()) > most) {
    if (plan.stages > 1) plan.stages = 1;
    else if (plan.warps > 1) plan.warps /= 2;
    else if (plan.rows_shared && !kIsHalf<S>) plan.rows_shared = false;
    else throw std::runtime_error("attention needs more shared memory than this GPU has.");
  }
  plan.tiles = {P::kKeysAreRows ? args.key_starts : args.query_starts, args.sequences, rows, Kernel::kRows * plan.warps,
                1};
  return plan;
}

// Where the mask's gradient is asked for: which blocks, and how many splits.
template <class S, Part kPart, int kBound>
PlanOf<S, kPart, kBound> make_mask_plan(const DerivativeArgs& args) {
  auto plan = make_plan<S, kPart, kBound>(args);
  const int64_t sizes[4] = {args.batch, args.heads, args.queries, args.keys};
  for (int d = 0; d < 4; ++d) plan.mask_sizes[d] = args.grad_mask_strides[d] == 0 ? 1 : sizes[d];
  const MaskWalk walk(args, plan, Derivative<S, kPart, kBound>::kCols);
  constexpr int64_t kResidentBlocks = 4, kMostSplits = 64;
  const int64_t wanted =
      device_attribute(cudaDevAttrMultiProcessorCount) * kResidentBlocks / std::max<int64_t>(walk.blocks(), 1);
  plan.splits = std::clamp<int64_t>(std::min(wanted, walk.steps()), 1, kMostSplits);
  return plan;
}

inline int64_t mask_numel(const DerivativeSettings& plan) {
  return plan.mask_sizes[0] * plan.mask_sizes[1] * plan.mask_sizes[2] * plan.mask_sizes[3];
}

// Calls f with the kBound for sums of `columns`, or for head_dim and value_dim; the mask's kernel has no sums.
template <class S, Part kPart, class F>
void with_bound(const DerivativeArgs& args, int64_t columns, F f) {
  constexpr bool kWide = kIsHalf<S> || (sizeof(S) == 4 && kPart != Part::KeyTangent && !Pairs<S, kPart>::kOfMask);
  if constexpr (kBoundsRows<S, kPart>) {
    columns = std::max(args.head_dim, args.value_dim);
    if (columns > 128) return f(std::integral_constant<int, 256>{});
  }
  if constexpr (kWide) {
    if (columns > 64) return f(std::integral_constant<int, 128>{});
  }
  f(std::integral_constant<int, 64>{});
}

// `columns` of each of its sums: as many at a time as registers hold. `fill` completes the plan.
template <class S, Part kPart, class Fill>
void run_derivative(const DerivativeArgs& args, int64_t columns, void* stream, Fill fill) {
  with_bound<S, kPart>(args, columns, [&](auto bound) {
    constexpr int kBound = bound;
    auto plan = make_plan<S, kPart, kBound>(args);
    fill(plan);
    plan.chunks = std::max<int64_t>(1, divide_up(columns, Derivative<S, kPart, kBound>::kWidth));
    const int64_t units = Pairs<S, kPart>::kKeysAreRows ? args.kv_heads : args.heads;
    const int64_t blocks = plan.tiles.count() * units;
    if (blocks == 0) return;
    const dim3 grid(grid_size(blocks), static_cast<unsigned>(plan.chunks));
    const auto start = [&](auto* kernel) {
      reserve_shared(kernel);
      launch(kernel, grid, dim3(32 * plan.warps), plan.shared_bytes, stream, args, plan);
    };
    if constexpr (kFloatBackward<S, kPart> && kBound <= 128) {
      if (plan.only_if != nullptr) start(derivative_kernel<S, kPart, kBound, true>);
    }
    start(derivative_kernel<S, kPart, kBound, false>);
  });
}

template <class S, Part kPart, int kBound>
void run_mask(const DerivativeArgs& args, const PlanOf<S, kPart, kBound>& plan, void* stream) {
  using C = Compute<S>;
  const int64_t numel = mask_numel(plan);
  const int64_t blocks = MaskWalk(args, plan, Derivative<S, kPart, kBound>::kCols).blocks();
  if (numel == 0) return;
  reserve_shared(mask_kernel<S, kPart, kBound>);
  launch(mask_kernel<S, kPart, kBound>, dim3(grid_size(blocks), static_cast<unsigned>(plan.splits)),
         dim3(32 * plan.warps), plan.shared_bytes, stream, args, plan);
  if (plan.splits == 1) return;
  launch(sum_parts_kernel<C>, grid_stride_blocks(numel, kMostThreads), kMostThreads, 0, stream,
         static_cast<const C*>(plan.mask_parts), static_cast<C*>(args.grad_mask), numel, plan.splits);
}

// The backward, or its tangent: D and its tangent in scratch, then the mask's parts.
template <bool kTangent>
struct BackwardRun {
  static constexpr Part kQuery = kTangent ? Part::QueryTangent : Part::Query;
  static constexpr Part kKey = kTangent ? Part::KeyTangent : Part::Key;
  static constexpr Part kMask = kTangent ? Part::MaskTangent : Part::Mask;

  static int64_t rows(const DerivativeArgs& args) { return args.batch * args.heads * args.queries; }

  static int64_t scratch(const DerivativeArgs& args) {
    int64_t bytes = 0;
    with_type(args.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      int64_t numbers = rows(args) * (kTangent ? 2 : 1);
      if (args.grad_mask != nullptr) {
        with_bound<S, kMask>(args, 0, [&](auto bound) {
          const auto plan = make_mask_plan<S, kMask, bound>(args);
          if (plan.splits > 1) numbers += plan.splits * mask_numel(plan);
        });
      }
      bytes = numbers * static_cast<int64_t>(sizeof(Compute<S>));
      if constexpr (!kTangent && kIsHalf<S>) bytes = std::max(bytes + kFlagBytes, hopper_scratch(args));
      if constexpr (!kTangent && std::is_same_v<S, float>) bytes += FloatScan(args, args.grad_out).scratch();
    });
    return bytes;
  }

  static void run(const DerivativeArgs& args, void* scratch, void* stream) {
    check_positions(args);
    with_type(args.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      using C = Compute<S>;
      const int *hopper_flag = nullptr, *non_finite = nullptr;
      if constexpr (!kTangent && kIsHalf<S>) {
        const HopperRun hopper = hopper_backward(args, scratch, stream);
        if (hopper.started && hopper.flag == nullptr) return;
        hopper_flag = hopper.flag;
        scratch = static_cast<char*>(scratch) + kFlagBytes;
      }
      if constexpr (!kTangent && std::is_same_v<S, float>) {
        non_finite = FloatScan(args, args.grad_out).find(scratch, stream);
        if (non_finite != nullptr) scratch = static_cast<char*>(scratch) + kFlagBytes;
      }
      C* const delta = static_cast<C*>(scratch);
      C* const delta_t = kTangent ? delta + rows(args) : nullptr;
      C* const parts = delta + rows(args) * (kTangent ? 2 : 1);
      if (rows(args) > 0) {
        launch(delta_kernel<S, kTangent>, grid_stride_blocks(32 * rows(args), kMostThreads), kMostThreads, 0, stream,
               args, delta, delta_t, hopper_flag);
      }
      const auto fill = [&](DerivativeSettings& plan) {
        plan.delta = delta;
        plan.delta_t = delta_t;
        plan.mask_parts = parts;
        plan.only_if = non_finite != nullptr ? non_finite : hopper_flag;
      };
      if (args.grad_query != nullptr) {
        run_derivative<S, kQuery>(args, args.head_dim, stream, [&](DerivativeSettings& plan) {
          fill(plan);
          plan.pairs_aligned[0] = pairs_are_aligned<S>(args.grad_query, args.grad_query_strides);
        });
      }
      if (args.grad_key != nullptr || args.grad_value != nullptr) {
        run_derivative<S, kKey>(args, std::max(args.head_dim, args.value_dim), stream, [&](DerivativeSettings& plan) {
          fill(plan);
          plan.pairs_aligned[0] = pairs_are_aligned<S>(args.grad_key, args.grad_key_strides);
          plan.pairs_aligned[1] = pairs_are_aligned<S>(args.grad_value, args.grad_value_strides);
        });
      }
      if (args.grad_mask != nullptr) {
        with_bound<S, kMask>(args, 0, [&](auto bound) {
          auto plan = make_mask_plan<S, kMask, bound>(args);
          fill(plan);
          run_mask<S, kMask, bound>(args, plan, stream);
        });
      }
    });
  }
};

}  // namespace
}  // namespace lect11ext::cuda
