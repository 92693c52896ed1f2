#include "attention/cuda/additive_common.cuh"

namespace lect11ext::cuda {
namespace {

// --- scores -------------------------------------------------------------------------------------------------------

// A block forms the scores of 32 queries with 64 keys, a thread those of four with four; hidden units go through shared
// memory, 32 at a time. A thread loads 13 numbers there, in four accesses, for 16 pairs.
constexpr int kQueryTile = 32, kKeyTile = 64, kDepth = 32, kSide = 4;
constexpr int kScoreThreads = kQueryTile * kKeyTile / (kSide * kSide), kKeyThreads = kKeyTile / kSide;

template <class T>
struct ScoreTile {
  T scale[kDepth][kQueryTile + kSide], shift[kDepth][kQueryTile + kSide], factor[kDepth][kKeyTile + kSide];
  T weight[kDepth];
  int beyond[2];  // whether any number is too large to be factored, any key too large to be small
};

// Rows first … of a matrix, hidden units h …, to [kDepth][rows + kSide]; zeros beyond its edges.
template <class S, int kRows, class T>
__device__ inline void load_tile(const Operand& from, int64_t offset, int64_t first, int64_t rows, int64_t h,
                                 int64_t hidden, T (*to)[kRows + kSide], int* beyond) {
  for (int i = threadIdx.x; i < kRows * kDepth; i += kScoreThreads) {
    const int row = i / kDepth, unit = i % kDepth;
    T x = T(0);
    if (first + row < rows && h + unit < hidden) {
      x = from_storage<T>(static_cast<const S*>(from.data)[offset + (first + row) * from.row + h + unit]);
    }
    to[unit][row] = x;
    if (!within(x, kLargestFactored)) beyond[0] = 1;
    if (kRows == kKeyTile && !within(x, kLargestSmall)) beyond[1] = 1;
  }
}

template <class T>
__device__ inline void add_pairs(const ScoreTile<T>& tile, int query, int key, T (&sums)[kSide][kSide]) {
#pragma unroll 2
  for (int h = 0; h < kDepth; ++h) {
    T scale[kSide], shift[kSide], factor[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      scale[i] = tile.scale[h][query + i];
      shift[i] = tile.shift[h][query + i];
      factor[i] = tile.factor[h][key + i];
    }
    const T weight = tile.weight[h];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j)
        sums[i][j] = std::fma(pair_tanh(scale[i], shift[i], factor[j]), weight, sums[i][j]);
    }
  }
}

// The same of q and k as they are. It is rare, and not unrolled: sixteen times a tanh would take many registers.
template <class T>
__device__ inline void add_plain_pairs(const ScoreTile<T>& tile, int query, int key, T (&sums)[kSide][kSide]) {
#pragma unroll 1
  for (int step = 0; step < kDepth * kSide * kSide; ++step) {
    const int h = step / (kSide * kSide), pair = step % (kSide * kSide);
    const T x = tile.scale[h][query + pair / kSide] + tile.factor[h][key + pair % kSide];
    const T part = std::tanh(x) * tile.weight[h];
#pragma unroll
    for (int i = 0; i < kSide * kSide; ++i) {
      if (i == pair) sums[i / kSide][i % kSide] += part;
    }
  }
}

template <class T>
__device__ inline T masked_score(const PairMask& mask, int64_t offset, T score) {
  if (mask.kind == MaskKind::None) return score;
  if (mask.kind == MaskKind::Bool) return static_cast<const bool*>(mask.data)[offset] ? score : T(-INFINITY);
  const T bias = read<T>(mask.data, mask.dtype, offset);
  return bias == T(-INFINITY) ? bias : score + bias;
}

template <class S>
__global__ void __launch_bounds__(kScoreThreads)
    score_kernel(const __grid_constant__ AdditiveForward args, const __grid_constant__ Operand queries,
                 const __grid_constant__ Operand keys) {
  using T = Compute<S>;
  __shared__ ScoreTile<T> tile;
  const int64_t across = (args.keys + kKeyTile - 1) / kKeyTile, down = (args.queries + kQueryTile - 1) / kQueryTile;
  const int64_t line = divide(blockIdx.x, across), element = divide(line, down);
  const int64_t first_key = (blockIdx.x - line * across) * kKeyTile, first_query = (line - element * down) * kQueryTile;
  const int64_t query_offset = batch_offset(args.batches, queries.strides, element);
  const int64_t key_offset = batch_offset(args.batches, keys.strides, element);
  const int key = threadIdx.x % kKeyThreads * kSide, query = threadIdx.x / kKeyThreads * kSide;
  T sums[kSide][kSide] = {};
  for (int64_t h = 0; h < args.hidden; h += kDepth) {
    if (threadIdx.x < 2) tile.beyond[threadIdx.x] = 0;
    __syncthreads();
    load_tile<S, kQueryTile>(queries, query_offset, first_query, args.queries, h, args.hidden, tile.scale, tile.beyond);
    load_tile<S, kKeyTile>(keys, key_offset, first_key, args.keys, h, args.hidden, tile.factor, tile.beyond);
    if (threadIdx.x < kDepth) {
      const int64_t unit = h + threadIdx.x;
      tile.weight[threadIdx.x] =
          unit < args.hidden ? from_storage<T>(static_cast<const S*>(args.score_weight)[unit]) : T(0);
    }
    __syncthreads();
    const bool plain = tile.beyond[0] != 0, small = tile.beyond[1] == 0;
    if (!plain) {
      // Every thread changes what it has loaded.
      for (int i = threadIdx.x; i < kQueryTile * kDepth; i += kScoreThreads) {
        T& q = tile.scale[i % kDepth][i / kDepth];
        tile.shift[i % kDepth][i / kDepth] = small ? power(q, true) : T(-1);
        q = power(q, false);
      }
      for (int i = threadIdx.x; i < kKeyTile * kDepth; i += kScoreThreads) {
        T& k = tile.factor[i % kDepth][i / kDepth];
        k = power(k, small);
      }
      __syncthreads();
    }
    if (plain) add_plain_pairs(tile, query, key, sums);
    else add_pairs(tile, query, key, sums);
    __syncthreads();
  }
  const int64_t mask_offset = batch_offset(args.batches, args.mask.strides, element);
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    const int64_t row = first_query + query + i;
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      const int64_t column = first_key + key + j;
      if (row >= args.queries || column >= args.keys) continue;
      const int64_t place = mask_offset + row * args.mask.row + column * args.mask.column;
      static_cast<T*>(args.weights)[(element * args.queries + row) * args.keys + column] =
          masked_score(args.mask, place, sums[i][j]);
    }
  }
}

// Scores to weights, in place: a warp takes a row. One without keys gets zeros.
template <class T>
__global__ void __launch_bounds__(kRowThreads) softmax_kernel(const __grid_constant__ AdditiveForward args) {
  const int64_t row = int64_t{blockIdx.x} * (kRowThreads / kLanesOfWarp) + threadIdx.x / kLanesOfWarp;
  if (row >= args.batches.numel * args.queries) return;
  T* const scores = static_cast<T*>(args.weights) + row * args.keys;
  const int lane = threadIdx.x % kLanesOfWarp;
  const auto larger = [](T a, T b) { return a > b || a != a ? a : b; };
  T most = T(-INFINITY);
  for (int64_t j = lane; j < args.keys; j += kLanesOfWarp) most = larger(scores[j], most);
  most = combine_lanes(most, larger);
  if (most == T(-INFINITY)) {
    for (int64_t j = lane; j < args.keys; j += kLanesOfWarp) scores[j] = T(0);
    return;
  }
  T sum = T(0);
  for (int64_t j = lane; j < args.keys; j += kLanesOfWarp) sum += scores[j] = std::exp(scores[j] - most);
  const T inverse = 1 / combine_lanes(sum, [](T a, T b) { return a + b; });
  for (int64_t j = lane; j < args.keys; j += kLanesOfWarp) scores[j] *= inverse;
}

}  // namespace

void additive_forward(const AdditiveForward& args, void* stream) {
  const DType compute = compute_type(args.dtype);
  const int64_t rows = args.batches.numel * args.queries;
  const int64_t tiles = ((args.queries + kQueryTile - 1) / kQueryTile) * ((args.keys + kKeyTile - 1) / kKeyTile);
  if (args.batches.numel * tiles > 0) {
    with_type(args.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      launch(score_kernel<S>, dim3(grid_size(args.batches.numel * tiles)), kScoreThreads, 0, stream, args,
             strided(args, args.query), strided(args, args.key));
    });
  }
  const int64_t blocks = (rows * kLanesOfWarp + kRowThreads - 1) / kRowThreads;
  launch_blocks(compute == DType::Double ? softmax_kernel<double> : softmax_kernel<float>, args.keys > 0 ? blocks : 0,
                kRowThreads, stream, args);
  multiply({args.batches, dense(args, args.weights, compute, args.queries, args.keys), strided(args, args.value),
            args.output, args.dtype, args.queries, args.columns, args.keys,
            /*skips_zeros=*/args.mask.kind != MaskKind::None},
           compute, stream);
}

}  // namespace lect11ext::cuda
