#include "attention/cuda/additive_common.cuh"

namespace lect11ext::cuda {
namespace {

// --- gradients of the scores --------------------------------------------------------------------------------------

// de = α·(dα − Σ α·dα), in place of dα: a warp takes a row. Pairs of weight zero have no part in it.
template <class T>
__global__ void __launch_bounds__(kRowThreads) score_gradient_kernel(const __grid_constant__ AdditiveBackward args) {
  const int64_t row = int64_t{blockIdx.x} * (kRowThreads / kLanesOfWarp) + threadIdx.x / kLanesOfWarp;
  if (row >= args.batches.numel * args.queries) return;
  const T* const weights = static_cast<const T*>(args.weights) + row * args.keys;
  T* const grads = static_cast<T*>(args.grad_scores) + row * args.keys;
  const int lane = threadIdx.x % kLanesOfWarp;
  T sum = T(0);
  for (int64_t j = lane; j < args.keys; j += kLanesOfWarp) {
    if (weights[j] != 0) sum = std::fma(weights[j], grads[j], sum);
  }
  sum = combine_lanes(sum, [](T a, T b) { return a + b; });
  for (int64_t j = lane; j < args.keys; j += kLanesOfWarp) {
    grads[j] = weights[j] == 0 ? T(0) : weights[j] * (grads[j] - sum);
  }
}

// --- tanh ---------------------------------------------------------------------------------------------------------

// Gradients of the rows of one side, queries or keys, over all rows of the other:
//   grad[r][h] = w_h Σ_o de(r, o)·(1 − tanh²(x_rh + y_oh))       weight_sums[h] = Σ_ro de(r, o)·tanh
struct SideGradient {
  Shape batches;
  int64_t rows, others, hidden;
  Operand x, y, scores;  // de as [rows, others]
  const void* score_weight;
  void* grad;  // [B, rows, hidden], dense; null where only the sums are wanted
  DType grad_dtype;
  void* weight_sums;  // [B·tiles, hidden], of the arithmetic; or null
};

// A thread takes one hidden unit of eight rows, whose sums it keeps; the others go by in tiles, for which the block
// loads de into shared memory. That both sides' gradients are formed like this, and tanh twice, leaves no sums to be
// added between blocks.
constexpr int kRows = 8, kOthers = 32, kUnits = 128;

template <class S>
__global__ void __launch_bounds__(kUnits) side_kernel(const __grid_constant__ SideGradient args) {
  using T = Compute<S>;
  __shared__ T scores[kOthers][kRows];
  const int64_t across = (args.hidden + kUnits - 1) / kUnits, down = (args.rows + kRows - 1) / kRows;
  const int64_t line = divide(blockIdx.x, across), element = divide(line, down);
  const int64_t first = (line - element * down) * kRows, unit = (blockIdx.x - line * across) * kUnits + threadIdx.x;
  const bool inside = unit < args.hidden;
  const S* const x = static_cast<const S*>(args.x.data) + batch_offset(args.batches, args.x.strides, element) + unit;
  const S* const y = static_cast<const S*>(args.y.data) + batch_offset(args.batches, args.y.strides, element) + unit;
  const T* const from =
      static_cast<const T*>(args.scores.data) + batch_offset(args.batches, args.scores.strides, element);
  T scale[kRows], shift[kRows], sums[kRows] = {}, weight_sum = T(0);
  bool factored = true;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const T value = inside && first + r < args.rows ? from_storage<T>(x[(first + r) * args.x.row]) : T(0);
    const bool fits = within(value, kLargestFactored);
    factored = factored && fits;
    scale[r] = power(fits ? value : T(0), false);
    shift[r] = power(fits ? value : T(0), true);
  }
  for (int64_t o = 0; o < args.others; o += kOthers) {
    const int n = static_cast<int>(args.others - o < kOthers ? args.others - o : kOthers);
    for (int i = threadIdx.x; i < kOthers * kRows; i += kUnits) {
      // Neighbouring threads along the dimension of unit stride.
      const bool along = args.scores.column == 1;
      const int r = along ? i / kOthers : i % kRows, other = along ? i % kOthers : i / kRows;
      const bool exists = first + r < args.rows && other < n;
      scores[other][r] = exists ? from[(first + r) * args.scores.row + (o + other) * args.scores.column] : T(0);
    }
    __syncthreads();
    T tile[kRows] = {}, tile_weight = T(0);  // short sums lose fewer digits
    for (int other = 0; inside && other < n; ++other) {
      const T value = from_storage<T>(y[(o + other) * args.y.row]);
      if (factored && within(value, kLargestFactored)) {
        const bool small = within(value, kLargestSmall);
        const T factor = power(value, small);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const T score = scores[other][r], t = pair_tanh(scale[r], small ? shift[r] : T(-1), factor);
          const T part = score * t;
          tile_weight += part;
          tile[r] += std::fma(-part, t, score);
        }
      } else {
#pragma unroll 1
        for (int r = 0; r < kRows; ++r) {
          const T score = scores[other][r];
          if (score == 0) continue;  // of what a mask bars, which may be NaN, and of rows that do not exist
          const T t = std::tanh(from_storage<T>(x[(first + r) * args.x.row]) + value), part = score * t;
          tile_weight += part;
#pragma unroll
          for (int s = 0; s < kRows; ++s) tile[s] += s == r ? std::fma(-part, t, score) : T(0);
        }
      }
    }
    weight_sum += tile_weight;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] += tile[r];
    __syncthreads();
  }
  if (!inside) return;
  const T weight = from_storage<T>(static_cast<const S*>(args.score_weight)[unit]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (args.grad == nullptr || first + r >= args.rows) continue;
    write(args.grad, args.grad_dtype, (element * args.rows + first + r) * args.hidden + unit, sums[r] * weight);
  }
  if (args.weight_sums != nullptr) static_cast<T*>(args.weight_sums)[line * args.hidden + unit] = weight_sum;
}

int64_t side_tiles(int64_t rows) { return (rows + kRows - 1) / kRows; }

void launch_side(const SideGradient& args, DType dtype, void* stream) {
  const int64_t blocks = args.batches.numel * side_tiles(args.rows) * ((args.hidden + kUnits - 1) / kUnits);
  with_type(dtype, [&](auto* type) {
    launch_blocks(side_kernel<std::remove_pointer_t<decltype(type)>>, blocks, kUnits, stream, args);
  });
}

}  // namespace

int64_t additive_weight_rows(const Additive& args) { return args.batches.numel * side_tiles(args.queries); }

void additive_backward(const AdditiveBackward& args, void* stream) {
  const DType compute = compute_type(args.dtype);
  const Operand query = strided(args, args.query), key = strided(args, args.key), value = strided(args, args.value);
  const Operand grad_output = strided(args, args.grad_output);
  const Operand weights = dense(args, args.weights, compute, args.queries, args.keys);
  const Operand scores = dense(args, args.grad_scores, compute, args.queries, args.keys);
  multiply({args.batches, grad_output, transposed(value), args.grad_scores, compute, args.queries, args.keys,
            args.columns, /*skips_zeros=*/false},
           compute, stream);
  const int64_t rows = args.batches.numel * args.queries;
  launch_blocks(compute == DType::Double ? score_gradient_kernel<double> : score_gradient_kernel<float>,
                (rows * kLanesOfWarp + kRowThreads - 1) / kRowThreads, kRowThreads, stream, args);
  if (args.grad_value != nullptr) {
    multiply({args.batches, transposed(weights), grad_output, args.grad_value, args.grad_value_dtype, args.keys,
              args.columns, args.queries, /*skips_zeros=*/true},
             compute, stream);
  }
  if (args.grad_query != nullptr || args.grad_score_weight != nullptr) {
    launch_side({args.batches, args.queries, args.keys, args.hidden, query, key, scores, args.score_weight,
                 args.grad_query, args.grad_query_dtype, args.grad_score_weight},
                args.dtype, stream);
  }
  if (args.grad_key != nullptr) {
    launch_side({args.batches, args.keys, args.queries, args.hidden, key, query, transposed(scores), args.score_weight,
                 args.grad_key, args.grad_key_dtype, nullptr},
                args.dtype, stream);
  }
}

}  // namespace lect11ext::cuda
