// The kernel of derivatives of sm_90a, five products of it: a block owns a tile of keys and values in shared memory,
// and tiles of queries with their output's gradients come by. One warpgroup has TMA load and add, two compute, 64 keys
// each.
//
// Scores and the derivatives of weights are computed with keys as rows, so that what is made of them is, as it lies in
// registers, the left operand of the products that are summed over queries. The scores' derivatives go to shared memory
// besides, for the part of the queries' gradients that these keys have. It is added to the others' in memory by TMA, in
// the order of the keys: a block waits until all before it that see a tile of queries have added their parts to it, so
// that runs agree bit for bit (after J. Shah et al., FlashAttention-3, 2024).
//
// No block waits for ever: each takes a number when it begins, waits only for lower ones, and blocks that lower ones
// wait for are lower still. None waits for long, since all go through the queries in the same order, from the last ones
// on: these see the first keys too, where attention is causal.
#pragma once

#include "attention/cuda/dot_product_hopper_backward_options.cuh"
#include "attention/cuda/dot_product_hopper_slope.cuh"
#include "attention/cuda/dot_product_hopper_steps.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// Registers of a thread: 128 of sums at 128 columns, 64 of 64 × 64 scores and derivatives, 32 of both as left operands,
// 32 of queries' gradients. At 64 columns a step has 128 queries, taken by halves, so that each warpgroup has 64 × 64
// of the queries' gradients as its part of that product, as it has half of the columns at 128.
template <class S, int kColumns, HopperKind kKind>
struct HopperBackward : HopperBackwardSteps<kColumns, kKind == HopperKind::Plain> {
  static constexpr bool kPlain = kKind == HopperKind::Plain, kProducts = kKind != HopperKind::Scored;
  using Base = HopperBackwardSteps<kColumns, kPlain>;
  using Base::args, Base::plan, Base::sequence, Base::kKeys, Base::kQueries, Base::kHalf;
  using Base::first_step, Base::after, Base::is_over, Base::seen_between, Base::seen_from, Base::query_of,
      Base::tile_of_all;
  using Base::kv_head, Base::first_key, Base::steps;
  using typename Base::Own, typename Base::Step;
  static constexpr int kGroups = 2, kThreads = (kGroups + 1) * kWarpgroup, kStages = 2;
  static_assert(kKeys == kGroups * kGroupRows);
  static constexpr int kHalves = kQueries / kHalf, kTiles = kHalf / 8, kOutTiles = kColumns / 8;
  static constexpr int kSums = kQueries * kColumns;  // floats of a tile of queries
  static_assert(kSums == kGroups * 64 * 64);
  using KeyTile = SlabTile<kKeys, kColumns>;
  using KeySlab = SlabTile<kKeys, 64>;
  using QueryTile = SlabTile<kQueries, kColumns>;
  using HalfTile = SlabTile<kHalf, kColumns>;
  using GradTile = SlabTile<kKeys, kHalf>;  // derivatives of scores
  static_assert(kHalves == 1 || QueryTile::kSlabs == 1);
  // What is known of queries: lses, with a word behind them, and deltas.
  static constexpr int kLsesBytes = 4 * HopperBackwardScratch::lses_of_tile(kColumns);
  static constexpr int kNumbersBytes = kLsesBytes + 4 * kQueries;
  static constexpr int kStageBytes = 2 * QueryTile::kBytes + kNumbersBytes;
  static constexpr int kQueriesAt = 2 * KeyTile::kBytes, kGradsAt = kQueriesAt + 2 * kStages * QueryTile::kBytes;
  static constexpr int kSumsAt = kGradsAt + kHalves * GradTile::kBytes, kSumsBytes = 4 * kSums;
  static constexpr int kNumbersAt = kSumsAt + 2 * kSumsBytes;
  static constexpr int kBarriersAt = kNumbersAt + kStages * kNumbersBytes;
  static constexpr int kBytes = AlignedShared::kSlack + kBarriersAt + 8 * (1 + 2 * kStages + 1 + 4);

  AlignedShared shared;
  uint32_t keys_full, grads_read;
  Ring<kStages> ring;  // of queries
  Ring<2> sums;        // of queries' gradients on their way to memory

  __device__ HopperBackward(const AttentionBackward& args, const HopperBackwardPlan& plan, const Sequence& sequence,
                            const Own& own)
      : Base(args, plan, sequence, own), shared(dynamic_shared) {
    keys_full = shared.address + kBarriersAt;
    grads_read = keys_full + 8;
    ring = {grads_read + 8, grads_read + 8 * (1 + kStages)};
    sums = {grads_read + 8 * (1 + 2 * kStages), grads_read + 8 * (3 + 2 * kStages)};
  }

  __device__ uint32_t keys_at() const { return shared.address; }
  __device__ uint32_t values_at() const { return shared.address + KeyTile::kBytes; }
  // Queries, 0, and gradients of the output, 1.
  __device__ uint32_t queries_at(int n, int which) const {
    return shared.address + kQueriesAt + (2 * ring.stage(n) + which) * QueryTile::kBytes;
  }
  __device__ uint32_t half_at(int n, int which, int half) const {
    return queries_at(n, which) + half * kHalf * QueryTile::kRowBytes;
  }
  __device__ int lses_at(int n) const { return kNumbersAt + ring.stage(n) * kNumbersBytes; }
  __device__ int deltas_at(int n) const { return lses_at(n) + kLsesBytes; }
  // Those of them that a lane has: of queries 8t + 2q and the next in elements 2t and 2t + 1.
  __device__ const float* numbers(int at, int half, const GroupLane& lane) const {
    return reinterpret_cast<const float*>(shared.data + at) + half * kHalf + 2 * kTiles * lane.q;
  }
  using Numbers = float[2 * kTiles];
  __device__ static void read(Numbers& numbers, const float* from) {
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from)[i];
      numbers[4 * i] = four.x, numbers[4 * i + 1] = four.y, numbers[4 * i + 2] = four.z, numbers[4 * i + 3] = four.w;
    }
  }
  __device__ bool is_exact(int n) const {
    return *reinterpret_cast<const float*>(shared.data + lses_at(n) + 4 * kQueries) != 0;
  }
  __device__ uint32_t grads_at(int half) const { return shared.address + kGradsAt + half * GradTile::kBytes; }
  __device__ int sums_at(int n) const { return kSumsAt + sums.stage(n) * kSumsBytes; }

  __device__ void load() const {
    const int batch = static_cast<int>(sequence.batch);
    const int own_keys = static_cast<int>(sequence.first_key) + first_key - plan.first_key;
    const int first_query = static_cast<int>(sequence.first_query) - plan.first_query;
    barrier_arrive_expecting(keys_full, 2 * KeyTile::kBytes);
    KeyTile::load(keys_at(), plan.key, keys_full, own_keys, kv_head, batch);
    KeyTile::load(values_at(), plan.value, keys_full, own_keys, kv_head, batch);
    Step step = seen_from(first_step());
    for (int n = 0; !is_over(step); ++n, step = seen_from(after(step))) {
      const int position = first_query + query_of(step, 0);
      const int64_t tile = tile_of_all(step);
      const uint32_t full = ring.full_barrier(n);
      ring.wait_empty(n);
      barrier_arrive_expecting(full, kStageBytes);
      QueryTile::load(queries_at(n, 0), plan.query, full, position, step.head, batch);
      load_bytes(shared.address + lses_at(n), plan.scratch.lses + tile * (kLsesBytes / 4), full, kLsesBytes);
      QueryTile::load(queries_at(n, 1), plan.grad_out, full, position, step.head, batch);
      load_bytes(shared.address + deltas_at(n), plan.scratch.deltas + tile * kQueries, full, 4 * kQueries);
    }
  }

  // Adds to memory what has come of queries' gradients, of every other step: two threads take turns, since one waits
  // longer for memory than a step takes.
  __device__ void add(int which) const {
    Step step = seen_from(first_step());
    for (int n = 0; !is_over(step); ++n, step = seen_from(after(step))) {
      if (n % 2 != which) continue;
      const int64_t tile = tile_of_all(step);
      const int first = std::max(0, step.tile * kQueries + sequence.diagonal - sequence.left) / kKeys;
      const int before = seen_between(step, first, first_key / kKeys);  // tiles of keys that add to this one
      float* const to = plan.scratch.sums + tile * kSums;
      if (before > 0) count_wait(plan.scratch.counts + tile, before);
      sums.wait_full(n);
      if (before > 0) add_floats(to, shared.address + sums_at(n), kSums);
      else store_floats(to, shared.address + sums_at(n), kSums);
      floats_read();
      barrier_arrive(sums.empty + 8 * sums.stage(n));
      floats_written();
      count_up(plan.scratch.counts + tile);
    }
  }

  __device__ float scale() const { return static_cast<float>(args.scale); }
  __device__ float unit() const { return static_cast<float>(args.scale * kLog2E); }

  __device__ float kept() const { return kProducts ? 1.0f : static_cast<float>(dropout_factor(args.dropout_p)); }

  // Scores become weights. Queries beyond the last have weight zero by their lse. Exponents are multiply-adds but of a
  // tile with an lse so large that these would lose its digits: there they are differences, as of the options' kernel.
  __device__ void weigh(float (&scores)[kTiles][4], const Numbers& lses, bool exact) const {
    if (__builtin_expect(exact, 0)) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        const float score = rounded_product(scores[i / 4][i % 4], scale());
        scores[i / 4][i % 4] = weight_of(score - lses[i / 4 * 2 + i % 2]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& score = scores[i / 4][i % 4];
      score = power_of_two(std::fma(score, unit(), -lses[i / 4 * 2 + i % 2]));
    }
  }

  // The weights' derivatives become the scores', of weights in `scores`.
  __device__ void derive(float (&grads)[kTiles][4], const float (&scores)[kTiles][4], const Numbers& deltas) const {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& grad = grads[i / 4][i % 4];
      grad = scores[i / 4][i % 4] * std::fma(grad, scale(), -deltas[i / 4 * 2 + i % 2]);
    }
  }

  // What no query sees of its key becomes zero, and all of keys beyond the last.
  __device__ void cut(float (&sums)[kTiles][4], int query, int own_row, const GroupLane& lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = first_key + own_row + lane.row + 8 * i, key = own - sequence.diagonal;
      const int column = query + 2 * lane.q;
      keep_between(sums, i, key - sequence.right - column, own < sequence.keys ? key + sequence.left - column : -1,
                   0.0f);
    }
  }

  // The same, or what a mask bars.
  __device__ void bar(float (&sums)[kTiles][4], const typename HopperBackwardOptions<S>::Marks& marks, int query,
                      int own_row, const GroupLane& lane) const {
    if constexpr (kPlain) {
      cut(sums, query, own_row, lane);
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) sums[i / 4][i % 4] = marks.counts(i) ? sums[i / 4][i % 4] : 0.0f;
    }
  }

  __device__ void start_scores_of(float (&scores)[kTiles][4], int n, int half, int own_row) const {
    wgmma_fence();
    start_scores<S, KeyTile, HalfTile>(scores, keys_at(), own_row, half_at(n, 0, half));
    wgmma_commit();
  }

  // Derivatives of scores to shared memory, as they are: keys as rows. Sixteen rows and columns at a time.
  __device__ void keep(const uint32_t (&derivatives)[kTiles / 2][4], int half, int own_row,
                       const GroupLane& lane) const {
    unsigned char* const tile = shared.data + kGradsAt + half * GradTile::kBytes;
    const int row = own_row + 16 * lane.warp + lane.lane % 16;
#pragma unroll
    for (int part = 0; part < kTiles / 2; ++part) {
      store_matrices(tile + GradTile::offset(row, 16 * part + lane.lane / 16 * 8), derivatives[part]);
    }
  }

  // Starts a warpgroup's 64 × 64 of the queries' gradients: its half of the queries, or of the columns.
  __device__ void start_sums(float (&part)[8][4], int group) const {
    const uint32_t grads = grads_at(kHalves == 1 ? 0 : group);
    const uint32_t columns = keys_at() + (kHalves == 1 ? group : 0) * KeySlab::kBytes;
    wgmma_fence();
    wgmma_of_shared<S, 64, false, true>(part, GradTile::down(grads, 0), KeySlab::down(columns, 0));
#pragma unroll
    for (int i = 1; i < KeySlab::kRowParts; ++i) {
      wgmma_of_shared<S, 64, true, true>(part, GradTile::down(grads, i), KeySlab::down(columns, i));
    }
    wgmma_commit();
  }

  // Puts them where TMA takes them: sixteen bytes of each thread one behind the other.
  __device__ void put(const float (&part)[8][4], int n, int group, const GroupLane& lane) const {
    auto* const to = reinterpret_cast<float4*>(shared.data + sums_at(n)) + group * 8 * kWarpgroup;
    sums.wait_empty(n);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i * kWarpgroup + 32 * lane.warp + lane.lane] = make_float4(part[i][0], part[i][1], part[i][2], part[i][3]);
    }
  }
  // After shared_is_written, which waits long if it comes at once.
  __device__ void tell(int n, const GroupLane& lane) const {
    __syncwarp();
    if (lane.lane == 0) barrier_arrive(sums.full_barrier(n));
  }

  // Of a warpgroup's 64 keys, over one step at least. Products are started in this order, and end in it: of a half, the
  // weights' derivatives, the values' sums, the keys'; then the queries' part, and the next scores, which come while
  // the part is put away. No product is left to end in the next turn of the loop: ptxas would make all of them wait.
  // What is read of shared memory is read ahead of a wait: products keep that memory busy.
  __device__ void sum(float (&key_sums)[kOutTiles][4], float (&value_sums)[kOutTiles][4], Step step, int group,
                      const GroupLane& lane) const {
    const int own_row = group * kGroupRows;
    float all[kHalves][kTiles][4];
    Numbers lses[kHalves];
    bool exact = false;
    const auto read_lses = [&](int n) {
      if (!kProducts) return;  // for want of registers
      exact = is_exact(n);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) read(lses[half], numbers(lses_at(n), half, lane));
    };
    ring.wait_full(0);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) start_scores_of(all[half], 0, half, own_row);
    read_lses(0);
    wgmma_wait<0>();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) pin(all[half]);
    int n = 0;
    bool more = true;
#pragma unroll 1
    for (; kPlain ? n < steps : more; ++n) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int query = query_of(step, half);
        bool whole = kPlain && unknown(all_see(sequence, query, kHalf, first_key + own_row, kGroupRows)) != 0;
        float grads[kTiles][4];
        Numbers deltas;
        auto& scores = all[half];
        uint32_t weights[kTiles / 2][4], derivatives[kTiles / 2][4];
        wgmma_fence();
        start_scores<S, KeyTile, HalfTile>(grads, values_at(), own_row, half_at(n, 1, half));
        wgmma_commit();
        typename HopperBackwardOptions<S>::Marks marks;
        const HopperBackwardOptions<S> options{args, sequence, plan.mask_tiles, plan.mask_pairs};
        if constexpr (kProducts) {
          if (!kPlain) whole = options.find(marks, step.head, query, first_key + own_row, lane);
          if constexpr (kKind == HopperKind::Sloped) {
            const int key = first_key + own_row + lane.row;
            Slope::of_head(args, sequence.batch, step.head).take(scores, key - sequence.diagonal - query - 2 * lane.q);
          }
          weigh(scores, lses[half], exact);
          if (!whole) bar(scores, marks, query, own_row, lane);
        } else {
          options.weigh(scores, marks, numbers(lses_at(n), half, lane), step.head, query, first_key + own_row, lane);
        }
        if (half > 0) wgmma_wait<1>();  // for the sums of the half before, whose operands are where these come
        if constexpr (kProducts) to_weights<S>(weights, scores);
        else to_weights<S>(weights, scores, [&](int i) { return marks.keeps(i); });
        pin(weights);
        pin(value_sums);
        if (kProducts) read(deltas, numbers(deltas_at(n), half, lane));
        wgmma_fence();
        start_columns<S, HalfTile>(value_sums, weights, half_at(n, 1, half));
        wgmma_commit();
        wgmma_wait<1>();
        pin(grads);
        if constexpr (kProducts) {
          derive(grads, scores, deltas);
          if (!whole) bar(grads, marks, query, own_row, lane);
        } else {
          options.derive(grads, scores, marks, numbers(deltas_at(n), half, lane));
        }
        to_weights<S>(derivatives, grads);
        if (half == 0) barrier_wait(grads_read, (n & 1) ^ 1);  // those of the step before, by both warpgroups
        keep(derivatives, half, own_row, lane);
        shared_is_written();
        pin(derivatives);
        pin(key_sums);
        wgmma_fence();
        start_columns<S, HalfTile>(key_sums, derivatives, half_at(n, 0, half));
        wgmma_commit();
      }
      named_barrier_wait(1, kGroups * kWarpgroup);
      float part[8][4];
      start_sums(part, group);
      if (n > 0) tell(n - 1, lane);
      wgmma_wait<1>();
      pin(value_sums);
      pin(key_sums);
      __syncwarp();  // all lanes have read what is known of the queries
      ring.release(n, lane);
      // In two forms, since ptxas has the registers for the plain kernel in this one alone.
      step = after(step);
      int next = std::min(n + 1, steps - 1);  // after the last step its own once more, for nothing
      if constexpr (!kPlain) {
        step = seen_from(step);
        more = !is_over(step);
        next = more ? n + 1 : n;
      }
      ring.wait_full(next);
      read_lses(next);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) start_scores_of(all[half], next, half, own_row);
      wgmma_wait<kHalves>();
      pin(part);
      if (lane.lane == 0) barrier_arrive(grads_read);
      put(part, n, group, lane);
      wgmma_wait<0>();
#pragma unroll
      for (int half = 0; half < kHalves; ++half) pin(all[half]);
    }
    shared_is_written();
    tell(kPlain ? steps - 1 : n - 1, lane);
  }

  __device__ void compute(int group) const {
    const GroupLane lane;
    const int own_row = group * kGroupRows;
    float key_sums[kOutTiles][4] = {}, value_sums[kOutTiles][4] = {};
    barrier_wait(keys_full, 0);
    const Step step = seen_from(first_step());
    if (kPlain ? steps > 0 : !is_over(step)) sum(key_sums, value_sums, step, group, lane);
    named_barrier_wait(1, kGroups * kWarpgroup);  // all have read the keys
    write(args.grad_key, args.grad_key_strides, key_sums, 1, 0, own_row, lane);
    write(args.grad_value, args.grad_value_strides, value_sums, kept(), 1, own_row, lane);
  }

  // Sums become rows of an output, if it is asked for, by way of the tile of keys, 0, or of values, 1.
  __device__ void write(void* to, const AttentionStrides& strides, const float (&sums)[kOutTiles][4], float factor,
                        int which, int own_row, const GroupLane& lane) const {
    if (to == nullptr) return;
    const int row = first_key + own_row + 16 * lane.warp;
    S* const first = static_cast<S*>(to) + sequence.batch * strides.batch + kv_head * strides.head +
                     (sequence.first_key + row) * strides.position;
    const float factors[2] = {factor, factor};
    const int columns = static_cast<int>(which == 0 ? args.head_dim : args.value_dim);
    write_rows<S, KeyTile>(sums, factors, shared.data + which * KeyTile::kBytes, own_row, lane,
                           OutRows<S>{first, strides.position, sequence.keys - row, columns / 8});
  }

  __device__ void run() const {
    // From one lane, by which the compiler knows that a warp agrees.
    const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    if (threadIdx.x == 0) {
      for (const CUtensorMap* map : {&plan.key, &plan.value, &plan.query, &plan.grad_out}) prefetch_map(*map);
      barrier_init(keys_full, 1);
      barrier_init(grads_read, 4 * kGroups);
      ring.init(1, 4 * kGroups);
      sums.init(4 * kGroups, 1);
      barrier_init_done();
    }
    __syncthreads();
    if (group == 0) {
      give_registers<GroupRegisters<kGroups>::kLoader>();
      if (threadIdx.x == 0) load();
      if (threadIdx.x == 32 || threadIdx.x == 64) add(threadIdx.x / 64);
    } else {
      take_registers<GroupRegisters<kGroups>::kCompute>();
      compute(group - 1);
    }
  }
};

}  // namespace lect11ext::cuda
