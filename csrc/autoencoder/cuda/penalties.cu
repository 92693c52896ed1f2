#include "autoencoder/penalties.h"

#include "autoencoder/cuda/activation.cuh"
#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/cuda/row_sums.cuh"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {
namespace {

template <class T>
__device__ inline T summand(Penalty penalty, const Activated<T>& h) {
  if (penalty == Penalty::L1) return std::abs(h.value);
  return penalty == Penalty::Contractive ? h.slope * h.slope : h.value;
}

template <class T>
__device__ inline T summand_slope(Penalty penalty, const Activated<T>& h) {
  if (penalty == Penalty::Contractive) return T(2) * h.slope * h.curvature;
  if (penalty == Penalty::Mean) return h.slope;
  return h.value > T(0) ? h.slope : h.value < T(0) ? -h.slope : T(0);
}

template <class T, class Access>
__device__ inline void load_scale(const PenalizedActivation& args, const Quad& quad, T* scale) {
  if (args.scale.data != nullptr) {
    Arithmetic<Access, T>::load(args.shape, args.scale, quad.first, quad, scale);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) scale[i] = T(1);
  }
}

// Four elements: writes them, returns what is to be summed up in `sums`.
template <class T, class Access>
__device__ inline void run_quad(const PenaltyForward& args, const Quad& quad, T* sums) {
  T input[kQuad], scale[kQuad], output[kQuad];
  Access::load(args.shape, args.input, quad.first, quad, input);
  load_scale<T, Access>(args, quad, scale);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const Activated<T> h = activate(args.activation, input[i]);
    output[i] = h.value;
    sums[i] = scale[i] * summand(args.penalty, h);
  }
  Access::store(args.output, args.output_dtype, quad.first, quad, output);
}

template <class T, class Access>
__device__ inline void run_quad(const PenaltyBackward& args, const Quad& quad, T* sums) {
  T input[kQuad], scale[kQuad], grad_output[kQuad] = {}, weight[kQuad] = {}, grad[kQuad];
  Access::load(args.shape, args.input, quad.first, quad, input);
  load_scale<T, Access>(args, quad, scale);
  if (args.grad_output.data != nullptr) {
    Access::load(args.shape, args.grad_output, quad.first, quad, grad_output);
  }
  const bool penalizes = args.grad_penalty.data != nullptr;
  if (penalizes) Arithmetic<Access, T>::load(args.shape, args.grad_penalty, quad.first, quad, weight);
  const T factor = T(args.grad_penalty_scale);
  // Where the penalty has no gradient there is no product, which an infinite weight would make NaN.
  const bool is_linear = args.activation == Activation::Identity || args.activation == Activation::Relu;
  const bool moves = penalizes && !(is_linear && args.penalty == Penalty::Contractive);
  // A relu's gradients are dropped, not multiplied by zero, which makes NaN of an infinite one.
  const bool selects = args.activation == Activation::Relu;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const Activated<T> h = activate(args.activation, input[i]);
    const T w = factor * weight[i];
    sums[i] = penalizes ? w * summand(args.penalty, h) : T(0);
    grad[i] = grad_output[i] * h.slope;
    if (moves) grad[i] = std::fma(w * scale[i], summand_slope(args.penalty, h), grad[i]);
    if (selects && h.slope == T(0)) grad[i] = T(0);
  }
  if (args.grad_input != nullptr) Access::store(args.grad_input, args.grad_input_dtype, quad.first, quad, grad);
}

// A block takes a tile: a load and a store of the input's type an element, 8 bytes in float, 4 in 16 bits.
template <class T, class Access>
__global__ void __launch_bounds__(kThreads, Access::kBlocks) rows_kernel(const __grid_constant__ PenaltyForward args) {
  __shared__ T shared[kTile];
  const TileRange range(args.tiles, blockIdx.x);
  for (int64_t first = range.first_quad(); first < range.end; first += kTile) {
    const Quad quad(first, range.begin, range.end);
    T sums[kQuad];
    run_quad<T, Access>(args, quad, sums);
    range.put(quad, sums, shared);
  }
  range.sum(shared, static_cast<T*>(args.sums));
}

// Where nothing is summed.
template <class T, class Access>
__global__ void __launch_bounds__(kThreads, Access::kBlocks) flat_kernel(const __grid_constant__ PenaltyBackward args) {
  const int64_t first = kQuad * (int64_t{kThreads} * blockIdx.x + threadIdx.x);
  if (first >= args.shape.numel) return;
  T sums[kQuad];
  run_quad<T, Access>(args, Quad(first, 0, args.shape.numel), sums);
}

// Sums over the columns: a block takes 128 of them and the rows of a run, a warp every eighth row of these. The warps'
// sums are added in their order.
constexpr int kLines = kThreads / kWarp;
constexpr int kColumns = kWarp * kQuad;

template <class T, class Access, class Args>
__global__ void __launch_bounds__(kThreads, Access::kBlocks)
    columns_kernel(const __grid_constant__ Args args, void* out) {
  __shared__ T shared[kLines][kColumns];
  const ColumnBlocks& blocks = args.blocks;
  const int line = threadIdx.x / kWarp, place = kQuad * (threadIdx.x % kWarp);
  const int64_t column = int64_t{kColumns} * blockIdx.x + place;
  const int64_t begin = blocks.rows_per_run * blockIdx.y;
  const int64_t end = begin + blocks.rows_per_run < blocks.rows ? begin + blocks.rows_per_run : blocks.rows;
  T total[kQuad] = {};
  if (column < blocks.cols) {
    for (int64_t row = begin + line; row < end; row += kLines) {
      const int64_t first = row * blocks.cols + column;
      const Quad quad(first, first, (row + 1) * blocks.cols);
      T sums[kQuad];
      run_quad<T, Access>(args, quad, sums);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) total[i] += sums[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) shared[line][place + i] = total[i];
  __syncthreads();
  const int64_t mine = int64_t{kColumns} * blockIdx.x + threadIdx.x;
  if (threadIdx.x >= kColumns || mine >= blocks.cols) return;
  T sum = T(0);
#pragma unroll
  for (int i = 0; i < kLines; ++i) sum += shared[i][threadIdx.x];
  static_cast<T*>(out)[blockIdx.y * blocks.cols + mine] = sum;
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class S>
bool fits(const PenaltyForward& args) {
  return Vectors<S>::fits(args.shape, args.input) && Vectors<float>::fits(args.shape, args.scale) &&
         Vectors<S>::fits(args.output, args.output_dtype) && args.blocks.cols % kQuad == 0;
}

template <class S>
bool fits(const PenaltyBackward& args) {
  return Vectors<S>::fits(args.shape, args.input) && Vectors<float>::fits(args.shape, args.scale) &&
         Vectors<S>::fits(args.shape, args.grad_output) && Vectors<float>::fits(args.shape, args.grad_penalty) &&
         Vectors<S>::fits(args.grad_input, args.grad_input_dtype) && args.blocks.cols % kQuad == 0;
}

// Calls f with the arithmetic's type and the access.
template <class Args, class F>
void with_access(const Args& args, F f) {
  if (args.compute_double) return f(0.0, Elements());
  if (fits<float>(args)) return f(0.0f, Vectors<float>());
  if (fits<__nv_bfloat16>(args)) return f(0.0f, Vectors<__nv_bfloat16>());
  if (fits<__half>(args)) return f(0.0f, Vectors<__half>());
  f(0.0f, Elements());
}

template <class Args>
void launch_columns(const Args& args, void* out, void* stream) {
  const auto pieces = static_cast<unsigned>((args.blocks.cols + kColumns - 1) / kColumns);
  with_access(args, [&](auto type, auto access) {
    launch(columns_kernel<decltype(type), decltype(access), Args>,
           dim3(pieces, static_cast<unsigned>(args.blocks.runs)), kThreads, 0, stream, args, out);
  });
}

}  // namespace

void penalty_forward(const PenaltyForward& args, void* stream) {
  if (args.penalty == Penalty::Mean) return launch_columns(args, args.sums, stream);
  with_access(args, [&](auto type, auto access) {
    launch(rows_kernel<decltype(type), decltype(access)>, dim3(static_cast<unsigned>(args.tiles.count)), kThreads, 0,
           stream, args);
  });
}

void penalty_backward(const PenaltyBackward& args, void* stream) {
  if (args.grad_scale != nullptr) return launch_columns(args, args.grad_scale, stream);
  const int64_t blocks = (args.shape.numel + kTile - 1) / kTile;
  with_access(args, [&](auto type, auto access) {
    launch(flat_kernel<decltype(type), decltype(access)>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
           args);
  });
}

}  // namespace lect11ext::cuda
