// The forward kernel of sm_90a. One warpgroup has TMA load, the others compute, 64 queries each.
//
// Two things keep the tensor cores busy. Of a warpgroup, the products of the next tile's scores and of this tile's
// output are started before the softmax that lies between them in time. And the warpgroups of a block take turns: each
// starts its products only when the one before has started its own, so that one computes exponentials while another
// multiplies. Both after J. Shah et al., FlashAttention-3 (2024).
#include "attention/cuda/dot_product_hopper_tile.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

struct HopperForwardPlan {
  CUtensorMap query, key, value;
  BlockOrder order;
  int first_key;  // of those that are mapped
};

// Registers: the sums of the output, of scores, and the weights before them: 160 a thread at 128 columns, for which two
// warpgroups leave 240; 128 at 64 columns, where three leave 160 and exponentials, not products, are what bounds.
//
// A block stays on its multiprocessor and takes tile of queries after tile of queries: while the one is finished, the
// next one's queries, keys and values come.
template <class S, int kColumns>
struct HopperForward {
  static constexpr int kGroups = kColumns == 64 ? 3 : 2, kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kQueries = kGroups * kGroupRows, kKeys = 128, kStages = 2;
  static constexpr int kTiles = kKeys / 8, kOutTiles = kColumns / 8;
  using QueryTile = SlabTile<kQueries, kColumns>;
  using KeyTile = SlabTile<kKeys, kColumns>;
  static constexpr int kKeysAt = QueryTile::kBytes, kValuesAt = kKeysAt + kStages * KeyTile::kBytes;
  static constexpr int kOutAt = kValuesAt + kStages * KeyTile::kBytes, kBarriersAt = kOutAt + QueryTile::kBytes;
  static constexpr int kBytes = AlignedShared::kSlack + kBarriersAt + 8 * (2 + 4 * kStages);

  // A tile of queries, and the tiles of keys that it sees.
  struct Work {
    int head, batch, first_query, first_key, tiles;

    // From the last keys on: the first tile that a warpgroup takes is, where attention is causal, the cut one.
    __device__ int key_of_tile(int t) const { return first_key + (tiles - 1 - t) * kKeys; }
  };

  const AttentionForward& args;
  const HopperForwardPlan& plan;
  const Sequence& sequence;
  AlignedShared shared;
  Ring<1> queries;
  Ring<kStages> keys, values;

  __device__ HopperForward(const AttentionForward& args, const HopperForwardPlan& plan, const Sequence& sequence)
      : args(args), plan(plan), sequence(sequence), shared(dynamic_shared) {
    const uint32_t barriers = shared.address + kBarriersAt;
    queries = {barriers, barriers + 8};
    keys = {barriers + 16, barriers + 8 * (2 + kStages)};
    values = {barriers + 8 * (2 + 2 * kStages), barriers + 8 * (2 + 3 * kStages)};
  }

  __device__ bool find(Work& work, int round) const {
    const unsigned number = BlockOrder::in_round(round);
    if (number >= plan.order.blocks()) return false;
    const BlockOrder::Block block = plan.order.find(number);
    work.batch = block.unit / static_cast<int>(args.heads);
    work.head = block.unit - work.batch * static_cast<int>(args.heads);
    // The last queries of a causal attention have the most to do and come first.
    work.first_query = (plan.order.tiles - 1 - block.tile) * kQueries;
    const int last_query = std::min(work.first_query + kQueries, sequence.queries) - 1;
    const Range range = keys_seen(sequence, work.first_query, last_query);
    work.first_key = range.first;
    work.tiles = range.empty() ? 0 : (range.last - range.first + kKeys - 1) / kKeys;
    return true;
  }

  __device__ uint32_t keys_at(int n) const { return shared.address + kKeysAt + keys.stage(n) * KeyTile::kBytes; }
  __device__ uint32_t values_at(int n) const { return shared.address + kValuesAt + values.stage(n) * KeyTile::kBytes; }

  __device__ void load() const {
    const int group = static_cast<int>(args.heads / args.kv_heads);
    Work work;
    // Uses of the rings: n of keys and of values, q of queries, which a tile without keys does not need.
    for (int round = 0, n = 0, q = 0; find(work, round); ++round) {
      for (int t = 0; t < work.tiles; ++t, ++n) {
        const int position = work.key_of_tile(t) - plan.first_key;
        const auto fill = [&](const Ring<kStages>& ring, const CUtensorMap& map, uint32_t to) {
          ring.wait_empty(n);
          barrier_arrive_expecting(ring.full_barrier(n), KeyTile::kBytes);
          KeyTile::load(to, map, ring.full_barrier(n), position, work.head / group, work.batch);
        };
        fill(keys, plan.key, keys_at(n));
        if (t == 0) {  // there is room for keys before there is for the queries
          queries.wait_empty(q);
          barrier_arrive_expecting(queries.full_barrier(q), QueryTile::kBytes);
          QueryTile::load(shared.address, plan.query, queries.full_barrier(q), work.first_query, work.head, work.batch);
          ++q;
        }
        fill(values, plan.value, values_at(n));
      }
    }
  }

  // What a thread carries along the keys, of its two rows.
  struct Rows {
    float largest[2], sum[2];
  };

  // Scores of 64 queries from `query` on and of a tile of keys from `key` on become weights; `shrink` is what has been
  // summed to be multiplied by.
  __device__ void weigh(float (&scores)[kTiles][4], Rows& rows, float (&shrink)[2], int query, int key,
                        const GroupLane& lane) const {
    const float unit = static_cast<float>(args.scale * kLog2E);
    if (!all_see(sequence, query, kGroupRows, key, kKeys)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = query + lane.row + 8 * half + sequence.diagonal, column = key + 2 * lane.q;
        keep_between(scores, half, own - sequence.left - column,
                     std::min(own + sequence.right, sequence.keys - 1) - column, -INFINITY);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = rows.largest[half];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) largest = std::fmax(largest, scores[i / 2][2 * half + i % 2]);
      largest = std::fmax(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = std::fmax(largest, __shfl_xor_sync(~0u, largest, 2));
      // As long as a row has seen nothing its maximum is −∞, from which nothing can be subtracted.
      const float base = largest == -INFINITY ? 0.0f : largest * unit;
      shrink[half] = power_of_two(std::fma(rows.largest[half], unit, -base));
      float sums[2] = {};  // two, since each addition waits for the one before
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        float& score = scores[i / 2][2 * half + i % 2];
        score = power_of_two(std::fma(score, unit, -base));
        sums[i % 2] += score;
      }
      rows.largest[half] = largest;
      rows.sum[half] = std::fma(rows.sum[half], shrink[half], sums[0] + sums[1]);
    }
  }

  // Of one warpgroup. Beforehand `n` tiles of keys have come by, and `q` of queries.
  __device__ void attend(float (&out)[kOutTiles][4], Rows& rows, const Work& work, int n, int q, int group,
                         const GroupLane& lane) const {
    const int own_row = group * kGroupRows, query = work.first_query + own_row;
    float scores[kTiles][4], shrink[2];
    uint32_t weights[kTiles / 2][4];
    queries.wait_full(q);
    keys.wait_full(n);
    wgmma_fence();
    start_scores<S, QueryTile, KeyTile>(scores, shared.address, own_row, keys_at(n));
    wgmma_commit();
    wgmma_wait<0>();
    pin(scores);
    keys.release(n, lane);
    if (work.tiles == 1) queries.release(q, lane);
    weigh(scores, rows, shrink, query, work.key_of_tile(0), lane);  // nothing has been summed yet
    to_weights<S>(weights, scores);
#pragma unroll 1
    for (int t = 1; t < work.tiles; ++t) {
      ++n;
      keys.wait_full(n);
      named_barrier_wait(1 + group, kTurns);
      pin(out);
      pin(weights);
      wgmma_fence();
      start_scores<S, QueryTile, KeyTile>(scores, shared.address, own_row, keys_at(n));
      wgmma_commit();
      values.wait_full(n - 1);
      wgmma_fence();
      start_columns<S, KeyTile>(out, weights, values_at(n - 1));
      wgmma_commit();
      named_barrier_arrive(1 + (group + 1) % kGroups, kTurns);
      wgmma_wait<1>();
      pin(scores);
      keys.release(n, lane);
      if (t == work.tiles - 1) queries.release(q, lane);
      weigh(scores, rows, shrink, query, work.key_of_tile(t), lane);
      wgmma_wait<0>();
      pin(out);
      values.release(n - 1, lane);
#pragma unroll
      for (int i = 0; i < 4 * kOutTiles; ++i) out[i / 4][i % 4] *= shrink[i % 4 / 2];
      to_weights<S>(weights, scores);
    }
    values.wait_full(n);
    pin(out);
    pin(weights);
    wgmma_fence();
    start_columns<S, KeyTile>(out, weights, values_at(n));
    wgmma_commit();
    wgmma_wait<0>();
    pin(out);
    values.release(n, lane);
  }

  __device__ void finish(const float (&out)[kOutTiles][4], const Rows& rows, const Work& work, int group,
                         const GroupLane& lane) const {
    const int first_row = work.first_query + group * kGroupRows;
    const int64_t first = (work.batch * args.heads + work.head) * args.queries;
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      factors[half] = sum == 0 ? 0.0f : 1 / sum;
      const int query = first_row + lane.row + 8 * half;
      if (lane.q == 0 && query < sequence.queries) {
        static_cast<float*>(args.lse)[first + query] =
            sum == 0 ? -INFINITY : rows.largest[half] * static_cast<float>(args.scale) + std::log(sum);
      }
    }
    const AttentionStrides& strides = args.out_strides;
    S* const to = static_cast<S*>(args.out) + work.batch * strides.batch + work.head * strides.head;
    write_rows<S, QueryTile>(out, factors, shared.data + kOutAt, group * kGroupRows, lane, [&](int i) {
      const int query = first_row + i;
      return query < sequence.queries ? to + query * strides.position : nullptr;
    });
  }

  // Turns: barrier 1 + g is where warpgroup g waits for the one before it. The last lets the first go at once, which at
  // the end waits for its last turn in vain.
  [[maybe_unused]] static constexpr int kTurns = 2 * kWarpgroup;

  __device__ void compute(int group) const {
    const GroupLane lane;
    if (group == kGroups - 1) named_barrier_arrive(1, kTurns);
    Work work;
    for (int round = 0, n = 0, q = 0; find(work, round); ++round) {
      float out[kOutTiles][4] = {};
      Rows rows{{-INFINITY, -INFINITY}, {0, 0}};
      if (work.tiles > 0) attend(out, rows, work, n, q++, group, lane);
      n += work.tiles;
      finish(out, rows, work, group, lane);
    }
    if (group == 0) named_barrier_wait(1, kTurns);
  }

  __device__ void run() const {
    const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
    if (threadIdx.x == 0) {
      for (const CUtensorMap* map : {&plan.query, &plan.key, &plan.value}) prefetch_map(*map);
      queries.init(1, 4 * kGroups);
      keys.init(1, 4 * kGroups);
      values.init(1, 4 * kGroups);
      barrier_init_done();
    }
    __syncthreads();
    if (group == 0) {
      give_registers<GroupRegisters<kGroups>::kLoader>();
      if (threadIdx.x == 0) load();
    } else {
      take_registers<GroupRegisters<kGroups>::kCompute>();
      compute(group - 1);
    }
  }
};

template <class S, int kColumns>
__global__ void __launch_bounds__(HopperForward<S, kColumns>::kThreads, 1) hopper_forward_kernel(
    const __grid_constant__ AttentionForward args, const __grid_constant__ HopperForwardPlan plan) {
#if LECT11EXT_HOPPER_CODE
  const Sequence sequence(args, 0);  // all are alike
  HopperForward<S, kColumns>(args, plan, sequence).run();
#endif
}

// Few blocks with many keys each are better cut along the keys, as the kernels for all devices do. A guess.
bool is_cut(const AttentionForward& args, int64_t blocks) {
  constexpr int64_t kFewKeys = 2048, kPart = 4;
  return args.keys > kFewKeys && kPart * blocks < device_attribute(cudaDevAttrMultiProcessorCount);
}

template <class S, int kColumns>
bool run(const AttentionForward& args, void* stream) {
  using Kernel = HopperForward<S, kColumns>;
  const int64_t tiles = ceil_divide(args.queries, Kernel::kQueries), units = args.batch * args.heads;
  if (is_cut(args, tiles * units)) return false;
  HopperForwardPlan plan{};
  const Span keys = keys_of_use(args), queries{0, args.queries};
  if (!map_operand(plan.query, args, args.query, args.heads, queries, Kernel::kQueries) ||
      !map_operand(plan.key, args, args.key, args.kv_heads, keys, Kernel::kKeys) ||
      !map_operand(plan.value, args, args.value, args.kv_heads, keys, Kernel::kKeys)) {
    return false;
  }
  plan.first_key = static_cast<int>(keys.first);
  plan.order = BlockOrder::of(tiles, units, 4 * args.keys * kColumns, args.heads / args.kv_heads);
  reserve_shared(hopper_forward_kernel<S, kColumns>);
  const auto blocks = std::min<int64_t>(tiles * units, device_attribute(cudaDevAttrMultiProcessorCount));
  launch(hopper_forward_kernel<S, kColumns>, static_cast<unsigned>(blocks), Kernel::kThreads, Kernel::kBytes, stream,
         args, plan);
  return true;
}

}  // namespace

bool hopper_forward(const AttentionForward& args, void* stream) {
  if (!hopper_is_chosen() || !hopper_computes(args) || !rows_are_aligned(args.out, args.out_strides)) return false;
  const bool narrow = args.head_dim == 64;
  if (args.dtype == DType::BFloat16) {
    return narrow ? run<__nv_bfloat16, 64>(args, stream) : run<__nv_bfloat16, 128>(args, stream);
  }
  return narrow ? run<__half, 64>(args, stream) : run<__half, 128>(args, stream);
}

}  // namespace lect11ext::cuda
