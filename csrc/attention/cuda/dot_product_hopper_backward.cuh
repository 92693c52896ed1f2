// The kernels of derivatives of sm_90a: a block owns a tile of keys, or of queries, in shared memory, and pairs of
// tiles of the other side come by. One warpgroup has TMA load, two compute, 64 rows of the block's own tile each.
//
// Scores and the derivatives of weights are computed with the own rows as rows, so that what is made of them is, as it
// lies in registers, the left operand of the products that are summed (for keys after J. Shah et al., FlashAttention-3,
// 2024, which adds the query's gradients up in memory; here they have a kernel of their own, and every sum one order).
#pragma once

#include "attention/cuda/dot_product_hopper_tile.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

struct HopperBackwardPlan {
  CUtensorMap own[2], passing[2];  // query and grad_out, or key and value: the block's own, and what comes by
  BlockOrder order;
  int first_query, first_key;  // of those that are mapped
  const float* correction;     // [batch, heads, queries]: D
};

// What the kernels share: 128 own rows of two tensors, of which tiles of kPassing rows of two others come by. kNumbers:
// with two numbers of each of these rows, which are queries.
template <int kPassing, int kColumns, bool kNumbers>
struct HopperPairs {
  static constexpr int kGroups = 2, kThreads = (kGroups + 1) * kWarpgroup, kRows = kGroups * kGroupRows, kStages = 2;
  static constexpr int kTiles = kPassing / 8, kOutTiles = kColumns / 8;
  using RowTile = SlabTile<kRows, kColumns>;
  using PassingTile = SlabTile<kPassing, kColumns>;
  static constexpr int kStageBytes = 2 * PassingTile::kBytes;
  static constexpr int kPassingAt = 2 * RowTile::kBytes, kNumbersAt = kPassingAt + kStages * kStageBytes;
  static constexpr int kNumbersBytes = kNumbers ? 2 * kPassing * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kBarriersAt = kNumbersAt + kStages * kNumbersBytes;
  static constexpr int kBytes = AlignedShared::kSlack + kBarriersAt + 8 * (1 + 2 * kStages);

  const AttentionBackward& args;
  const HopperBackwardPlan& plan;
  AlignedShared shared;
  uint32_t rows_full;
  Ring<kStages> ring;

  __device__ HopperPairs(const AttentionBackward& args, const HopperBackwardPlan& plan)
      : args(args), plan(plan), shared(dynamic_shared) {
    rows_full = shared.address + kBarriersAt;
    ring = {rows_full + 8, rows_full + 8 * (1 + kStages)};
  }

  __device__ uint32_t rows_at(int which) const { return shared.address + which * RowTile::kBytes; }
  __device__ uint32_t passing_at(int n, int which) const {
    return shared.address + kPassingAt + ring.stage(n) * kStageBytes + which * PassingTile::kBytes;
  }
  __device__ float* numbers_at(int n, int which) const {
    return reinterpret_cast<float*>(shared.data + kNumbersAt + ring.stage(n) * kNumbersBytes) + which * kPassing;
  }

  __device__ void load_rows(int position, int head, int batch) const {
    barrier_arrive_expecting(rows_full, 2 * RowTile::kBytes);
    for (int i = 0; i < 2; ++i) RowTile::load(rows_at(i), plan.own[i], rows_full, position, head, batch);
  }
  __device__ void load_passing(int n, int position, int head, int batch) const {
    barrier_arrive_expecting(ring.full_barrier(n), kStageBytes);
    for (int i = 0; i < 2; ++i) {
      PassingTile::load(passing_at(n, i), plan.passing[i], ring.full_barrier(n), position, head, batch);
    }
  }

  // What a query's scores lose before they are weights, in binary logarithms: +∞ for one that sees nothing.
  __device__ float shift_of(int64_t query) const {
    const float lse = static_cast<const float*>(args.lse)[query];
    return lse == -INFINITY ? INFINITY : lse * static_cast<float>(kLog2E);
  }
  __device__ float correction_of(int64_t query) const { return plan.correction[query] * scale(); }
  __device__ float scale() const { return static_cast<float>(args.scale); }
  __device__ float unit() const { return static_cast<float>(args.scale * kLog2E); }
  __device__ int64_t first_of_head(int batch, int head) const { return (batch * args.heads + head) * args.queries; }

  // Starts both products of own rows with tile n.
  template <class S>
  __device__ void start_both(float (&scores)[kTiles][4], float (&grads)[kTiles][4], int own_row, int n) const {
    wgmma_fence();
    start_scores<S, RowTile, PassingTile>(scores, rows_at(0), own_row, passing_at(n, 0));
    wgmma_commit();
    start_scores<S, RowTile, PassingTile>(grads, rows_at(1), own_row, passing_at(n, 1));
    wgmma_commit();
  }

  // Sums become rows of an output, if it is asked for, by way of own tile number `which`.
  template <class S>
  __device__ void write(void* to, const AttentionStrides& strides, const float (&sums)[kOutTiles][4], int which,
                        int batch, int head, int own_row, int first_row, int count, const GroupLane& lane) const {
    if (to == nullptr) return;
    S* const first = static_cast<S*>(to) + batch * strides.batch + head * strides.head;
    const float factors[2] = {1, 1};
    write_rows<S, RowTile>(sums, factors, shared.data + which * RowTile::kBytes, own_row, lane, [&](int i) {
      const int row = first_row + own_row + i;
      return row < count ? first + row * strides.position : nullptr;
    });
  }

  template <class Load, class Compute>
  __device__ void run(int full_arrivals, Load load, Compute compute) const {
    const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) prefetch_map(plan.own[i]), prefetch_map(plan.passing[i]);
      barrier_init(rows_full, 1);
      ring.init(full_arrivals, 4 * kGroups);
      barrier_init_done();
    }
    __syncthreads();
    if (group == 0) {
      give_registers<GroupRegisters<kGroups>::kLoader>();
      load();
    } else {
      take_registers<GroupRegisters<kGroups>::kCompute>();
      compute(group - 1);
    }
  }

  // All of a warpgroup have read their own rows.
  __device__ static void rows_are_free(int group) { named_barrier_wait(1 + group, kWarpgroup); }
};

// --- gradients of keys and values ---------------------------------------------------------------------------------

// Registers of a thread, at 128 columns: 128 of sums, 64 of a tile's two products, 32 of weights. At 64 columns 128
// queries at a time would take 256, of which there are 240.
template <class S, int kColumns>
struct HopperKeys : HopperPairs<64, kColumns, true> {
  static constexpr int kQueries = 64;
  using Base = HopperPairs<kQueries, kColumns, true>;
  using Base::args, Base::plan, Base::ring, Base::kTiles, Base::kOutTiles, Base::passing_at, Base::numbers_at;
  using typename Base::PassingTile;

  const Sequence& sequence;
  int kv_head, batch, first_key, first_query, tiles, heads;

  __device__ HopperKeys(const AttentionBackward& args, const HopperBackwardPlan& plan, const Sequence& sequence)
      : Base(args, plan), sequence(sequence) {
    // The first keys of a causal attention have the most to do and come first.
    const BlockOrder::Block block = plan.order.find(blockIdx.x);
    batch = block.unit / static_cast<int>(args.kv_heads);
    kv_head = block.unit - batch * static_cast<int>(args.kv_heads);
    heads = static_cast<int>(args.heads / args.kv_heads);
    first_key = block.tile * Base::kRows;
    const Range range = queries_seen(sequence, first_key, std::min(first_key + Base::kRows, sequence.keys) - 1);
    first_query = range.first;
    tiles = range.empty() ? 0 : (range.last - range.first + kQueries - 1) / kQueries;
  }

  __device__ int head_of(int n) const { return kv_head * heads + n / tiles; }
  __device__ int query_of(int n) const { return first_query + n % tiles * kQueries; }

  // Two warps: the one has TMA bring tiles, the other brings what is known of their queries.
  __device__ void load() const {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x >= 64) return;
    if (threadIdx.x >= 32) return load_numbers(lane);
    if (lane != 0) return;
    Base::load_rows(first_key - plan.first_key, kv_head, batch);
    for (int n = 0; n < tiles * heads; ++n) {
      ring.wait_empty(n);
      Base::load_passing(n, query_of(n) - plan.first_query, head_of(n), batch);
    }
  }

  __device__ void load_numbers(int lane) const {
#pragma unroll 1
    for (int n = 0; n < tiles * heads; ++n) {
      ring.wait_empty(n);
      const int64_t first = Base::first_of_head(batch, head_of(n));
#pragma unroll 1
      for (int i = lane; i < kQueries; i += 32) {
        const int query = query_of(n) + i;
        const bool there = query < sequence.queries;
        numbers_at(n, 0)[i] = there ? Base::shift_of(first + query) : INFINITY;
        numbers_at(n, 1)[i] = there ? Base::correction_of(first + query) : 0.0f;
      }
      barrier_arrive(ring.full_barrier(n));
    }
  }

  // Of a tile: scores become weights. Queries beyond the last have weight zero by their shift.
  __device__ void weigh(float (&scores)[kTiles][4], int n, const GroupLane& lane) const {
    const float* const shifts = numbers_at(n, 0) + 2 * lane.q;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& score = scores[i / 4][i % 4];
      score = power_of_two(std::fma(score, Base::unit(), -shifts[i / 4 * 8 + i % 2]));
    }
  }

  // The weights' derivatives become the scores', of weights in `scores`.
  __device__ void derive(float (&grads)[kTiles][4], const float (&scores)[kTiles][4], int n,
                         const GroupLane& lane) const {
    const float* const corrections = numbers_at(n, 1) + 2 * lane.q;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& grad = grads[i / 4][i % 4];
      grad = scores[i / 4][i % 4] * std::fma(grad, Base::scale(), -corrections[i / 4 * 8 + i % 2]);
    }
  }

  // What no query sees of its key becomes zero.
  __device__ void cut(float (&sums)[kTiles][4], int n, int own_row, const GroupLane& lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + own_row + lane.row + 8 * half - sequence.diagonal;
      const int column = query_of(n) + 2 * lane.q;
      keep_between(sums, half, key - sequence.right - column, key + sequence.left - column, 0.0f);
    }
  }

  __device__ void compute(int group) const {
    const GroupLane lane;
    const int own_row = group * kGroupRows;
    float key_sums[kOutTiles][4] = {}, value_sums[kOutTiles][4] = {};
    float scores[kTiles][4], grads[kTiles][4];
    uint32_t weights[kTiles / 2][4];
    barrier_wait(Base::rows_full, 0);
#pragma unroll 1
    for (int n = 0; n < tiles * heads; ++n) {
      ring.wait_full(n);
      Base::template start_both<S>(scores, grads, own_row, n);
      const bool whole = all_see(sequence, query_of(n), kQueries, first_key + own_row, kGroupRows);
      wgmma_wait<1>();
      pin(scores);
      weigh(scores, n, lane);
      if (!whole) cut(scores, n, own_row, lane);
      to_weights<S>(weights, scores);
      pin(weights);
      pin(value_sums);
      wgmma_fence();
      start_columns<S, PassingTile>(value_sums, weights, passing_at(n, 1));
      wgmma_commit();
      wgmma_wait<1>();
      pin(grads);
      derive(grads, scores, n, lane);
      if (!whole) cut(grads, n, own_row, lane);
      uint32_t derivatives[kTiles / 2][4];
      to_weights<S>(derivatives, grads);
      pin(derivatives);
      pin(key_sums);
      wgmma_fence();
      start_columns<S, PassingTile>(key_sums, derivatives, passing_at(n, 0));
      wgmma_commit();
      wgmma_wait<0>();
      pin(value_sums);
      pin(key_sums);
      ring.release(n, lane);
    }
    Base::rows_are_free(group);
    Base::template write<S>(args.grad_key, args.grad_key_strides, key_sums, 0, batch, kv_head, own_row, first_key,
                            sequence.keys, lane);
    Base::template write<S>(args.grad_value, args.grad_value_strides, value_sums, 1, batch, kv_head, own_row, first_key,
                            sequence.keys, lane);
  }
};

// --- gradients of queries -----------------------------------------------------------------------------------------

template <class S, int kColumns>
struct HopperQueries : HopperPairs<128, kColumns, false> {
  static constexpr int kKeys = 128;
  using Base = HopperPairs<kKeys, kColumns, false>;
  using Base::args, Base::plan, Base::ring, Base::kTiles, Base::kOutTiles, Base::passing_at;
  using typename Base::PassingTile;

  const Sequence& sequence;
  int head, batch, first_query, first_key, tiles;

  __device__ HopperQueries(const AttentionBackward& args, const HopperBackwardPlan& plan, const Sequence& sequence)
      : Base(args, plan), sequence(sequence) {
    const BlockOrder::Block block = plan.order.find(blockIdx.x);
    batch = block.unit / static_cast<int>(args.heads);
    head = block.unit - batch * static_cast<int>(args.heads);
    // The last queries of a causal attention have the most to do and come first.
    first_query = (plan.order.tiles - 1 - block.tile) * Base::kRows;
    const Range range = keys_seen(sequence, first_query, std::min(first_query + Base::kRows, sequence.queries) - 1);
    first_key = range.first;
    tiles = range.empty() ? 0 : (range.last - range.first + kKeys - 1) / kKeys;
  }

  __device__ void load() const {
    if (threadIdx.x != 0) return;
    const int kv_head = head / static_cast<int>(args.heads / args.kv_heads);
    Base::load_rows(first_query - plan.first_query, head, batch);
    for (int n = 0; n < tiles; ++n) {
      ring.wait_empty(n);
      Base::load_passing(n, first_key + n * kKeys - plan.first_key, kv_head, batch);
    }
  }

  __device__ void compute(int group) const {
    const GroupLane lane;
    const int own_row = group * kGroupRows, first_row = first_query + own_row;
    float shifts[2], corrections[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_row + lane.row + 8 * half;
      const int64_t number = Base::first_of_head(batch, head) + query;
      const bool there = query < sequence.queries;
      shifts[half] = there ? Base::shift_of(number) : INFINITY;
      corrections[half] = there ? Base::correction_of(number) : 0.0f;
    }
    float sums[kOutTiles][4] = {}, scores[kTiles][4], grads[kTiles][4];
    uint32_t derivatives[kTiles / 2][4];
    barrier_wait(Base::rows_full, 0);
#pragma unroll 1
    for (int n = 0; n < tiles; ++n) {
      ring.wait_full(n);
      Base::template start_both<S>(scores, grads, own_row, n);
      const int key = first_key + n * kKeys;
      wgmma_wait<1>();
      pin(scores);
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        float& score = scores[i / 4][i % 4];
        score = power_of_two(std::fma(score, Base::unit(), -shifts[i % 4 / 2]));
      }
      wgmma_wait<0>();
      pin(grads);
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        float& grad = grads[i / 4][i % 4];
        grad = scores[i / 4][i % 4] * std::fma(grad, Base::scale(), -corrections[i % 4 / 2]);
      }
      if (!all_see(sequence, first_row, kGroupRows, key, kKeys)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int own = first_row + lane.row + 8 * half + sequence.diagonal, column = key + 2 * lane.q;
          keep_between(grads, half, own - sequence.left - column,
                       std::min(own + sequence.right, sequence.keys - 1) - column, 0.0f);
        }
      }
      to_weights<S>(derivatives, grads);
      pin(derivatives);
      pin(sums);
      wgmma_fence();
      start_columns<S, PassingTile>(sums, derivatives, passing_at(n, 0));
      wgmma_commit();
      wgmma_wait<0>();
      pin(sums);
      ring.release(n, lane);
    }
    Base::rows_are_free(group);
    Base::template write<S>(args.grad_query, args.grad_query_strides, sums, 0, batch, head, own_row, first_query,
                            sequence.queries, lane);
  }
};

}  // namespace lect11ext::cuda
