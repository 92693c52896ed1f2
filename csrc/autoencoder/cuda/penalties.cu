#include "autoencoder/penalties.h"

#include "autoencoder/cuda/activation.cuh"
#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/cuda/row_sums.cuh"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {
namespace {

template <Penalty kPenalty, class T>
__device__ inline T summand(const Activated<T>& h) {
  if constexpr (kPenalty == Penalty::L1) return std::abs(h.value);
  return kPenalty == Penalty::Contractive ? h.slope * h.slope : h.value;
}

template <Penalty kPenalty, class T>
__device__ inline T summand_slope(const Activated<T>& h) {
  if constexpr (kPenalty == Penalty::Contractive) return T(2) * h.slope * h.curvature;
  if constexpr (kPenalty == Penalty::Mean) return h.slope;
  return h.value > T(0) ? h.slope : h.value < T(0) ? -h.slope : T(0);
}

// Calls f with the activation and the penalty as constants: one branch for all elements of a thread, where all threads
// go the same way.
template <class F>
__device__ inline void with_kind(const PenalizedActivation& args, F f) {
  with_activation(args.activation, [&](auto activation) {
    switch (args.penalty) {
      case Penalty::L1: return f(activation, std::integral_constant<Penalty, Penalty::L1>());
      case Penalty::Contractive: return f(activation, std::integral_constant<Penalty, Penalty::Contractive>());
      case Penalty::Mean: return f(activation, std::integral_constant<Penalty, Penalty::Mean>());
    }
  });
}

// Some quads of a thread, from their loads to what is to be summed up.
template <class T, class Access, int kQuads, class Args>
struct Quads;

template <class T, class Access, int kQuads>
struct Quads<T, Access, kQuads, PenaltyForward> {
  typename Access::template Loaded<T> input[kQuads] = {};
  typename Arithmetic<Access, T>::template Loaded<T> scale[kQuads] = {};

  __device__ void load(const PenaltyForward& args, int j, const Quad& quad) {
    const Spot spot(args.shape, quad.first);
    input[j] = Access::template load<T>(spot, args.input, quad);
    if (args.scale.data != nullptr) scale[j] = Arithmetic<Access, T>::template load<T>(spot, args.scale, quad);
  }

  // Writes the output. A mean is summed over the columns, and nothing else is.
  template <bool kOverColumns, class QuadOf>
  __device__ void run(const PenaltyForward& args, QuadOf quad_of, T (*sums)[kQuad]) const {
    T output[kQuads][kQuad];
    with_kind(args, [&](auto activation, auto penalty) {
      if constexpr (kOverColumns == (decltype(penalty)::value == Penalty::Mean)) {
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            const auto h = activate<activation, T>(input[j][i]);
            output[j][i] = h.value;
            sums[j][i] = summand<penalty>(h);
          }
        }
      }
    });
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Quad quad = quad_of(j);
      Access::store(args.output, args.output_dtype, quad.first, quad, output[j]);
      if (args.scale.data == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sums[j][i] *= scale[j][i];
    }
  }
};

template <class T, class Access, int kQuads>
struct Quads<T, Access, kQuads, PenaltyBackward> {
  using Sums = Arithmetic<Access, T>;
  typename Access::template Loaded<T> input[kQuads] = {}, grad_output[kQuads] = {};
  typename Sums::template Loaded<T> scale[kQuads] = {}, weight[kQuads] = {};

  __device__ void load(const PenaltyBackward& args, int j, const Quad& quad) {
    const Spot spot(args.shape, quad.first);
    input[j] = Access::template load<T>(spot, args.input, quad);
    grad_output[j] = load_or<Access>(T(0), spot, args.grad_output, quad);
    if (args.grad_penalty.data == nullptr) return;
    weight[j] = Sums::template load<T>(spot, args.grad_penalty, quad);
    scale[j] = load_or<Sums>(T(1), spot, args.scale, quad);
  }

  // Writes the gradient of the input.
  template <bool kOverColumns, class QuadOf>
  __device__ void run(const PenaltyBackward& args, QuadOf quad_of, T (*sums)[kQuad]) const {
    T grad[kQuads][kQuad];
    const T factor = T(args.grad_penalty_scale);
    const bool penalizes = args.grad_penalty.data != nullptr;
    with_kind(args, [&](auto activation, auto penalty) {
      constexpr Activation kActivation = decltype(activation)::value;
      // Where the penalty has no gradient there is no product, which an infinite weight would make NaN.
      constexpr bool kLinear = kActivation == Activation::Identity || kActivation == Activation::Relu;
      constexpr bool kMoves = !(kLinear && decltype(penalty)::value == Penalty::Contractive);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const auto h = activate<kActivation, T>(input[j][i]);
          const T w = factor * weight[j][i];
          sums[j][i] = penalizes ? w * summand<penalty>(h) : T(0);
          grad[j][i] = grad_output[j][i] * h.slope;
          if (kMoves && penalizes) grad[j][i] = std::fma(w * scale[j][i], summand_slope<penalty>(h), grad[j][i]);
          // A relu's gradients are dropped, not multiplied by zero, which makes NaN of an infinite one.
          if (kActivation == Activation::Relu && h.slope == T(0)) grad[j][i] = T(0);
        }
      }
    });
    if (args.grad_input == nullptr) return;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Quad quad = quad_of(j);
      Access::store(args.grad_input, args.grad_input_dtype, quad.first, quad, grad[j]);
    }
  }
};

// All before the first is used.
template <int kQuads, class Loaded, class Args, class QuadOf>
__device__ inline void load_all(Loaded& quads, const Args& args, QuadOf quad_of) {
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    if (!quad_of(j).empty()) quads.load(args, j, quad_of(j));
  }
}

template <class Access>
using RowsWork = Share<Access, 2, 1024>;

// A block takes a tile: a load and a store of the input's type an element, 8 bytes in float, 4 in 16 bits.
template <class T, class Access>
__global__ void __launch_bounds__(kTileThreads, RowsWork<Access>::kThreads / kTileThreads)
    rows_kernel(const __grid_constant__ PenaltyForward args) {
  constexpr int kQuads = RowsWork<Access>::kQuads;
  __shared__ T shared[kRowTile];
  const TileRange<Access> range(args.tiles, blockIdx.x);
  const int passes = range.template passes<kQuads>();
  for (int pass = 0; pass < passes; ++pass) {
    const auto quad_of = [&](int j) { return range.quad(pass * kQuads + j); };
    Quads<T, Access, kQuads, PenaltyForward> quads;
    T sums[kQuads][kQuad];
    load_all<kQuads>(quads, args, quad_of);
    quads.template run<false>(args, quad_of, sums);
#pragma unroll
    for (int j = 0; j < kQuads; ++j) range.put(quad_of(j), sums[j], shared);
  }
  range.sum(shared, static_cast<T*>(args.sums));
}

// One quad a thread, and more threads: 0.92 of the time of two.
template <class Access>
using FlatWork = Share<Access, 1, 1536>;

// Where nothing is summed.
template <class T, class Access>
__global__ void __launch_bounds__(kFlatThreads, FlatWork<Access>::kThreads / kFlatThreads)
    flat_kernel(const __grid_constant__ PenaltyBackward args) {
  constexpr int kQuads = FlatWork<Access>::kQuads;
  const FlatRange<kQuads> range(args.shape.numel);
  const auto quad_of = [&](int j) { return range.quad(j); };
  Quads<T, Access, kQuads, PenaltyBackward> quads;
  T sums[kQuads][kQuad];
  load_all<kQuads>(quads, args, quad_of);
  quads.template run<false>(args, quad_of, sums);
}

// Sums over the columns: a block takes 128 of them and the rows of a run, a warp every eighth row of these, some of
// them at a time. The warps' sums are added in their order.
constexpr int kColumnThreads = 256;
constexpr int kLines = kColumnThreads / kWarp;
constexpr int kColumns = kWarp * kQuad;

template <class Access, class Args>
using ColumnWork = Share<Access, std::is_same_v<Args, PenaltyForward> ? 4 : 2, 768>;

template <class T, class Access, class Args>
__global__ void __launch_bounds__(kColumnThreads, ColumnWork<Access, Args>::kThreads / kColumnThreads)
    columns_kernel(const __grid_constant__ Args args, void* out) {
  constexpr int kQuads = ColumnWork<Access, Args>::kQuads;
  __shared__ T shared[kLines][kColumns];
  const ColumnBlocks& blocks = args.blocks;
  const int line = threadIdx.x / kWarp, place = kQuad * (threadIdx.x % kWarp);
  const int64_t column = int64_t{kColumns} * blockIdx.x + place;
  const int64_t begin = blocks.rows_per_run * blockIdx.y;
  const int64_t end = begin + blocks.rows_per_run < blocks.rows ? begin + blocks.rows_per_run : blocks.rows;
  const int left = static_cast<int>(blocks.cols - column < kQuad ? blocks.cols - column : kQuad);
  T total[kQuad] = {};
  if (left > 0) {
    for (int64_t row = begin + line; row < end; row += kQuads * kLines) {
      const auto quad_of = [&](int j) {
        const int64_t at = row + j * kLines;
        return Quad(at * blocks.cols + column, 0, at < end ? left : 0);
      };
      Quads<T, Access, kQuads, Args> quads;
      T sums[kQuads][kQuad];
      load_all<kQuads>(quads, args, quad_of);
      quads.template run<true>(args, quad_of, sums);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) total[i] += quad_of(j).holds(i) ? sums[j][i] : T(0);
      }
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

template <class Access>
bool fits(const PenaltyForward& args) {
  return Access::fits(args.shape, args.input) && Vectors<float>::fits(args.shape, args.scale) &&
         Access::fits(args.output, args.output_dtype) && TileRange<Access>::fits(args.tiles) &&
         args.blocks.cols % kQuad == 0;
}

template <class Access>
bool fits(const PenaltyBackward& args) {
  return Access::fits(args.shape, args.input) && Vectors<float>::fits(args.shape, args.scale) &&
         Access::fits(args.shape, args.grad_output) && Vectors<float>::fits(args.shape, args.grad_penalty) &&
         Access::fits(args.grad_input, args.grad_input_dtype) && args.blocks.cols % kQuad == 0;
}

template <class Args, class F>
void with_access(const Args& args, F f) {
  cuda::with_access(args.compute_double, [&](auto access) { return fits<decltype(access)>(args); }, f);
}

template <class Args>
void launch_columns(const Args& args, void* out, void* stream) {
  const unsigned pieces = grid_size(divide_up(args.blocks.cols, kColumns));
  with_access(args, [&](auto type, auto access) {
    launch(columns_kernel<decltype(type), decltype(access), Args>,
           dim3(pieces, static_cast<unsigned>(args.blocks.runs)), kColumnThreads, 0, stream, args, out);
  });
}

}  // namespace

void penalty_forward(const PenaltyForward& args, void* stream) {
  if (args.penalty == Penalty::Mean) return launch_columns(args, args.sums, stream);
  with_access(args, [&](auto type, auto access) {
    launch(rows_kernel<decltype(type), decltype(access)>, dim3(grid_size(args.tiles.count)), kTileThreads, 0, stream,
           args);
  });
}

void penalty_backward(const PenaltyBackward& args, void* stream) {
  if (args.grad_scale != nullptr) return launch_columns(args, args.grad_scale, stream);
  with_access(args, [&](auto type, auto access) {
    const dim3 grid = FlatRange<FlatWork<decltype(access)>::kQuads>::grid(args.shape.numel);
    launch(flat_kernel<decltype(type), decltype(access)>, grid, kFlatThreads, 0, stream, args);
  });
}

}  // namespace lect11ext::cuda
