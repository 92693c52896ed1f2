// The forward kernel of sm_90a. One warpgroup has TMA load, the others compute, 64 queries each.
//
// Two things keep the tensor cores busy. Of a warpgroup, the products of the next tile's scores and of this tile's
// output are started before the softmax that lies between them in time; the next tile of the last keys is the first of
// the next queries. And the warpgroups of a block take turns: each starts its products only when the one before has
// started its own, so that one computes exponentials while another multiplies. Both after J. Shah et al.,
// FlashAttention-3 (2024).
#pragma once

#include "attention/cuda/dot_product_hopper_slope.cuh"
#include "attention/cuda/dot_product_hopper_softmax.cuh"
#include "attention/cuda/dot_product_hopper_work.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// Registers: the sums of the output, of scores, and the weights before them: 160 a thread at 128 columns, for which two
// warpgroups leave 240; 128 at 64 columns, where three leave 160 and exponentials, not products, are what bounds. With
// a mask and the like (not kPlain) two have the registers for these.
//
// A block stays on its multiprocessor and takes tile of queries after tile of queries: while the one is finished, the
// next one's queries, keys and values come.
template <class S, int kColumns, HopperKind kKind>
struct HopperForward : HopperForwardWork<kColumns, kKind> {
  using Base = HopperForwardWork<kColumns, kKind>;
  using Base::args, Base::plan, Base::first_sequence, Base::kPlain, Base::kGroups, Base::kQueries, Base::kKeys;
  using Base::next, Base::pass, Base::sequence_of;
  using typename Base::Work;
  static constexpr bool kProducts = kKind != HopperKind::Scored, kSloped = kKind == HopperKind::Sloped;
  static constexpr bool kDrops = kKind == HopperKind::Dropped || kKind == HopperKind::Scored;
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  // What shared memory has room for. Keys, which are asked for later than values, wait longest for memory.
  static constexpr int kQueryStages = 2, kKeyStages = kColumns == 64 ? 4 : 3, kValueStages = kColumns == 64 ? 4 : 2;
  static constexpr int kTiles = kKeys / 8, kOutTiles = kColumns / 8;
  using QueryTile = SlabTile<kQueries, kColumns>;
  using KeyTile = SlabTile<kKeys, kColumns>;
  static constexpr int kKeysAt = kQueryStages * QueryTile::kBytes, kValuesAt = kKeysAt + kKeyStages * KeyTile::kBytes;
  static constexpr int kBarriersAt = kValuesAt + kValueStages * KeyTile::kBytes;
  static constexpr int kBarriers = 2 * (kQueryStages + kKeyStages + kValueStages);
  static constexpr int kBytes = AlignedShared::kSlack + kBarriersAt + 8 * kBarriers;

  AlignedShared shared;
  Ring<kQueryStages> queries;
  Ring<kKeyStages> keys;
  Ring<kValueStages> values;

  __device__ HopperForward(const AttentionForward& args, const HopperForwardPlan& plan)
      : Base(args, plan), shared(dynamic_shared) {
    uint32_t barrier = shared.address + kBarriersAt;
    const auto take = [&](int stages) {
      barrier += 8 * stages;
      return barrier - 8 * stages;
    };
    queries.full = take(kQueryStages), queries.empty = take(kQueryStages);
    keys.full = take(kKeyStages), keys.empty = take(kKeyStages);
    values.full = take(kValueStages), values.empty = take(kValueStages);
  }

  __device__ uint32_t queries_at(int q) const { return shared.address + queries.stage(q) * QueryTile::kBytes; }
  __device__ uint32_t keys_at(int n) const { return shared.address + kKeysAt + keys.stage(n) * KeyTile::kBytes; }
  __device__ uint32_t values_at(int n) const { return shared.address + kValuesAt + values.stage(n) * KeyTile::kBytes; }

  // Queries and keys, by one thread, or values, by another: keys are not to wait until there is room for values.
  __device__ void load(bool of_values) const {
    const int group = static_cast<int>(args.heads / args.kv_heads);
    Work work;
    // Uses of the rings: n of keys and of values, q of queries.
    for (int round = 0, n = 0, q = 0; next(work, round, [](const Work&) {}); ++round, ++q) {
      const Sequence sequence = sequence_of(work);
      const int first_query = static_cast<int>(sequence.first_query), batch = static_cast<int>(sequence.batch);
      const int first_key = static_cast<int>(sequence.first_key) - plan.first_key;
      if (!of_values) {
        queries.wait_empty(q);
        barrier_arrive_expecting(queries.full_barrier(q), QueryTile::kBytes);
        QueryTile::load(queries_at(q), plan.query, queries.full_barrier(q), first_query + work.first_query, work.head,
                        batch);
      }
      for (bool more = true; more; more = pass(work), ++n) {
        const int position = first_key + work.key;
        const auto fill = [&](const auto& ring, const CUtensorMap& map, uint32_t to) {
          ring.wait_empty(n);
          barrier_arrive_expecting(ring.full_barrier(n), KeyTile::kBytes);
          KeyTile::load(to, map, ring.full_barrier(n), position, work.head / group, batch);
        };
        if (of_values) fill(values, plan.value, values_at(n));
        else fill(keys, plan.key, keys_at(n));
      }
    }
  }

  enum class View { None, Some, All };

  // Binary logarithms in what scores are counted in: products before they are scaled, or scores.
  __device__ float unit_of_scores() const { return static_cast<float>(kProducts ? args.scale * kLog2E : kLog2E); }

  // Products become scores, whoever sees them.
  __device__ void finish_scores(float (&scores)[kTiles][4], const Work& work, int query, View view,
                                const uint32_t (&seen)[2]) const {
    const bool whole = view == View::All;
    if (whole && args.softcap == 0 && args.alibi_slopes == nullptr) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        scores[i / 4][i % 4] = rounded_product(scores[i / 4][i % 4], static_cast<float>(args.scale));
      }
      return;
    }
    const Sequence sequence = sequence_of(work);
    const Scores<S> options{args, sequence, plan.mask_pairs};
    const GroupLane lane(unknown(static_cast<int>(threadIdx.x)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LaneRow row = options.row(work.head, query + lane.row + 8 * half, work.key + 2 * lane.q);
      const auto element = [&](int i) -> float& { return scores[i / 2][2 * half + i % 2]; };
      options.template finish<kTiles>(row, whole ? 0 : seen[half], element, [](int, float) {});
    }
  }

  // −∞ where a query does not see the key.
  __device__ static void bar(float (&scores)[kTiles][4], const uint32_t (&seen)[2]) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const bool sees = (seen[i % 4 / 2] >> (i / 4 * 2 + i % 2) & 1) != 0;
      scores[i / 4][i % 4] = sees ? scores[i / 4][i % 4] : -INFINITY;
    }
  }

  // Where tiles of keys begin of which all of a warpgroup's queries see all, as far as the window goes.
  __device__ Range whole_tiles(const Work& work, int own_row) const {
    const Sequence sequence = sequence_of(work);
    const int query = work.first_query + own_row;
    if (!kProducts && query + kGroupRows > sequence.queries) return {0, 0};
    const Range seen = keys_seen(sequence, query + kGroupRows - 1, query);  // by the last, and by the first
    return {seen.first, seen.last - kKeys + 1};
  }

  // What a warpgroup's queries see of a tile's keys; asked for ahead of the scores.
  __device__ View view_of(const Work& work, int own_row, const Range& whole) const {
    bool all = work.key >= whole.first && work.key < whole.last, none = false;
    if (!kPlain && args.mask.type != MaskType::None) {
      const int state = plan.mask_tiles.template state<1, kKeys / MaskTiles::kSize>(
          work.number, work.head, work.first_query + own_row, work.key);
      all = all && state == MaskTiles::kSeen;
      none = (state & MaskTiles::kSeen) == 0;
    }
    return static_cast<View>(unknown(static_cast<int>(none ? View::None : all ? View::All : View::Some)));
  }

  // Of a thread's two rows which keys they see, likewise: masks are read while products run.
  __device__ void find_seen(uint32_t (&seen)[2], const Work& work, int own_row, View view) const {
    if (kPlain) return;
    seen[0] = seen[1] = 0;
    if (view != View::Some) return;
    const Sequence sequence = sequence_of(work);
    const Scores<S> options{args, sequence, plan.mask_pairs};
    const GroupLane lane(unknown(static_cast<int>(threadIdx.x)));
    const int query = work.first_query + own_row + lane.row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      seen[half] =
          options.template seen<kTiles, kProducts>(options.row(work.head, query + 8 * half, work.key + 2 * lane.q));
      seen[half] = static_cast<uint32_t>(unknown(static_cast<int>(seen[half])));
    }
  }

  __device__ Slope slope_of(const Work& work) const {
    return kSloped ? Slope::of_head(args, sequence_of(work).batch, work.head) : Slope{};
  }

  // Products of 64 queries from row `own_row` of the block's on and of a tile of keys become scores.
  __device__ void score(float (&scores)[kTiles][4], Slope slope, const Work& work, int own_row, View view,
                        const uint32_t (&seen)[2]) const {
    const int query = work.first_query + own_row;
    if constexpr (kPlain) {
      if (view != View::All) cut(scores, query, work.key);
    } else {
      if constexpr (kSloped) {
        const GroupLane lane(unknown(static_cast<int>(threadIdx.x)));
        slope.take(scores, query + lane.row + sequence_of(work).diagonal - work.key - 2 * lane.q);
      }
      if (!kProducts && view != View::None) finish_scores(scores, work, query, view, seen);
      if (view != View::All) bar(scores, seen);
    }
  }

  // Of weights.
  __device__ void drop(float (&scores)[kTiles][4], const Work& work, int own_row) const {
    if (!kDrops || args.dropout_p == 0) return;
    const GroupLane lane(unknown(static_cast<int>(threadIdx.x)));
    const int low = work.first_query + own_row + lane.row;
    drop_weights(scores, Dropout(args, sequence_of(work)), work.head, low, work.head, low + 8, work.key, lane);
  }

  // Keys outside of a query's window get −∞.
  __device__ void cut(float (&scores)[kTiles][4], int query, int key) const {
    const Sequence& sequence = first_sequence;
    const GroupLane lane(unknown(static_cast<int>(threadIdx.x)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = query + lane.row + 8 * half + sequence.diagonal, column = key + 2 * lane.q;
      keep_between(scores, half, own - sequence.left - column,
                   std::min(own + sequence.right, sequence.keys - 1) - column, -INFINITY);
    }
  }

  // Of a warp's sixteen queries.
  __device__ OutRows<S> rows_of(const Work& work, const Sequence& sequence, int first_row) const {
    const AttentionStrides& strides = args.out_strides;
    S* const to = static_cast<S*>(args.out) + sequence.batch * strides.batch + work.head * strides.head;
    return {to + (sequence.first_query + first_row) * strides.position, strides.position, sequence.queries - first_row,
            static_cast<int>(args.value_dim) / 8};
  }
  __device__ float* lses_of(const Work& work, const Sequence& sequence) const {
    return static_cast<float*>(args.lse) + (sequence.batch * args.heads + work.head) * args.queries +
           sequence.first_query;
  }

  // What has been summed becomes output, by way of the queries' part of shared memory number q. Places of output are
  // not to take registers all along.
  __device__ void finish(const float (&out)[kOutTiles][4], const SoftmaxRows& rows, const Work& work, int own_row,
                         int q) const {
    const GroupLane lane(unknown(static_cast<int>(threadIdx.x)));
    const Sequence sequence = sequence_of(work);
    const int first_row = work.first_query + own_row;
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      factors[half] = sum == 0 ? 0.0f : (kDrops ? static_cast<float>(dropout_factor(args.dropout_p)) : 1) / sum;
      const int query = first_row + lane.row + 8 * half;
      if (lane.q == 0 && query < sequence.queries) {
        const float base = rows.base[half];
        lses_of(work, sequence)[query] =
            sum == 0 ? -INFINITY
                     : (kProducts ? rounded_product(base, static_cast<float>(args.scale)) : base) + std::log(sum);
      }
    }
    unsigned char* const tile = shared.data + queries.stage(q) * QueryTile::kBytes;
    write_rows<S, QueryTile>(out, factors, tile, own_row, lane, rows_of(work, sequence, first_row + 16 * lane.warp));
  }

  // The same of queries that see no key.
  __device__ void blank(const Work& work, int own_row) const {
    const GroupLane lane(unknown(static_cast<int>(threadIdx.x)));
    const Sequence sequence = sequence_of(work);
    const int first_row = work.first_query + own_row + 16 * lane.warp, query = first_row + lane.lane;
    if (lane.lane < 16 && query < sequence.queries) lses_of(work, sequence)[query] = -INFINITY;
    rows_of(work, sequence, first_row).template write<kOutTiles>(lane, [](int, int) { return uint4{0, 0, 0, 0}; });
  }

  // Turns: barrier 1 + g is where warpgroup g waits for the one before it. The last lets the first go at once, which at
  // the end waits for its last turn in vain.
  __device__ static void wait_turn(int group) { named_barrier_wait(1 + group, 2 * kWarpgroup); }
  __device__ static void give_turn(int group) { named_barrier_arrive(1 + group, 2 * kWarpgroup); }

  __device__ void start(float (&scores)[kTiles][4], int q, int n, int own_row) const {
    wgmma_fence();
    start_scores<S, QueryTile, KeyTile>(scores, queries_at(q), own_row, keys_at(n));
    wgmma_commit();
  }
  __device__ void start(float (&out)[kOutTiles][4], const uint32_t (&weights)[kTiles / 2][4], int n) const {
    wgmma_fence();
    start_columns<S, KeyTile>(out, weights, values_at(n));
    wgmma_commit();
  }

  __device__ bool go_on(Work& work, int& round, int group) const {
    return next(work, round, [&](const Work& none) { blank(none, group * kGroupRows); });
  }

  __device__ void compute(int group) const {
    const GroupLane lane;
    if (group == kGroups - 1) give_turn(0);
    Work work;
    int round = 0;
    if (go_on(work, round, group)) attend(work, round, group, lane);
    if (group == 0) wait_turn(0);
  }

  // All that a warpgroup does, from its first tile of queries on.
  __device__ void attend(Work work, int round, int group, const GroupLane& lane) const {
    const int own_row = group * kGroupRows;
    float out[kOutTiles][4] = {}, scores[kTiles][4];
    uint32_t weights[kTiles / 2][4];
    SoftmaxRows rows;
    Work now = work;   // what is summed
    int n = 0, q = 0;  // tiles of keys and of queries so far
    queries.wait_full(q);
    keys.wait_full(n);
    start(scores, q, n, own_row);
    Range whole = whole_tiles(work, own_row);
    View view = view_of(work, own_row, whole);
    uint32_t seen[2] = {};
    find_seen(seen, work, own_row, view);
    Slope slope = slope_of(work);
    wgmma_wait<0>();
    pin(scores);
    keys.release(n, lane);
    score(scores, slope, work, own_row, view, seen);
    weigh(scores, rows, find_powers(scores, rows, unit_of_scores()), unit_of_scores(), [] {});
    if (work.after != Work::kNone) keys.wait_full(n + 1);
    drop(scores, work, own_row);
    to_weights<S>(weights, scores);
#pragma unroll 1
    for (;; ++n) {
      const bool ends = !pass(work);  // then the next scores are other queries'
      if (__builtin_expect(ends, 0)) {
        now = work;
        if (!go_on(work, ++round, group)) break;
        whole = whole_tiles(work, own_row);
        slope = slope_of(work);
        queries.wait_full(++q);
        keys.wait_full(n + 1);
      }
      wait_turn(group);
      pin(out);
      pin(weights);
      start(scores, q, n + 1, own_row);
      view = view_of(work, own_row, whole);
      values.wait_full(n);
      start(out, weights, n);
      give_turn((group + 1) % kGroups);
      find_seen(seen, work, own_row, view);
      wgmma_wait<1>();
      pin(scores);
      if (__builtin_expect(ends, 0)) {
        wgmma_wait<0>();
        pin(out);
        finish(out, rows, now, own_row, q - 1);
        shared_is_written();
        __syncwarp();
        queries.release(q - 1, lane);
#pragma unroll
        for (int i = 0; i < 4 * kOutTiles; ++i) out[i / 4][i % 4] = 0;
        rows = SoftmaxRows{};
      }
      score(scores, slope, work, own_row, view, seen);
      const Powers powers = find_powers(scores, rows, unit_of_scores());
      keys.release(n + 1, lane);
      weigh(scores, rows, powers, unit_of_scores(), [&] {
        // The next keys, and a branch, without which ptxas would have the next wait before the weights above.
        if (work.after != Work::kNone) keys.wait_full(n + 2);
        wgmma_wait<0>();
        pin(out);
        values.release(n, lane);
        if (!powers.shrinks) return;
#pragma unroll
        for (int i = 0; i < 4 * kOutTiles; ++i) out[i / 4][i % 4] *= powers.shrink[i % 4 / 2];
      });
      drop(scores, work, own_row);
      to_weights<S>(weights, scores);
    }
    values.wait_full(n);
    pin(out);
    pin(weights);
    start(out, weights, n);
    wgmma_wait<0>();
    pin(out);
    values.release(n, lane);
    finish(out, rows, now, own_row, q);
  }

  __device__ void run() const {
    // From one lane, by which the compiler knows that a warp agrees.
    const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
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
      if (threadIdx.x == 0 || threadIdx.x == 32) load(threadIdx.x == 32);
    } else {
      take_registers<GroupRegisters<kGroups>::kCompute>();
      compute(group - 1);
    }
  }
};

}  // namespace lect11ext::cuda
