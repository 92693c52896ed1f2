#include "autoencoder/variational.h"

#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/normal.cuh"

namespace lect11ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kQuad = 4;  // consecutive elements of a thread: one Philox block, 16 bytes of float
constexpr int kTile = static_cast<int>(GaussianTiles::kElements);
static_assert(kTile == kThreads * kQuad);

// Four consecutive elements, the first a multiple of four, of which [low, high) belong to the block's tile.
struct Quad {
  int64_t first;
  int low, high;

  __device__ Quad(int64_t first, int64_t begin, int64_t end)
      : first(first),
        low(first < begin ? static_cast<int>(begin - first) : 0),
        high(first + kQuad > end ? static_cast<int>(end - first) : kQuad) {}
  __device__ bool holds(int i) const { return low <= i && i < high; }
  __device__ bool whole() const { return low == 0 && high == kQuad; }
};

// How a thread reaches four elements. Vectors: every operand is of type S and a quad of it is either consecutive and
// aligned or one value repeated, so that all loads of a thread are under way before the first is used.
template <class S>
struct Vectors {
  // On a multiprocessor at a time, one less with a prior: as many as leave enough registers that none is spilled.
  // Four have 32 KiB of loads under way in float, of which some 20 KiB cover the latency of the memory.
  static constexpr int kBlocks = 4;
  static constexpr bool kAligned = true;  // numel is a multiple of four, so that every sample begins at one

  template <class T>
  static __device__ void load(const Shape& shape, const View& view, int64_t first, const Quad&, T* out) {
    const S* from = static_cast<const S*>(view.data) + locate(shape, view, first).offset;
    if (view.strides[shape.ndim - 1] == 0) {
      const T value = from_storage<T>(*from);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) out[i] = value;
    } else {
      const auto pack = Pack<S, kQuad>::load(from);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) out[i] = pack[i];
    }
  }

  template <class T>
  static __device__ void store(void* data, DType, int64_t first, const Quad& quad, const T* values) {
    S* to = static_cast<S*>(data) + first;
    if (quad.whole()) {
      Pack<S, kQuad> pack;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) pack.set(i, values[i]);
      pack.store(to);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (quad.holds(i)) to[i] = to_storage<S>(values[i]);
      }
    }
  }

  // Whether View, over Shape, can be loaded so.
  static bool fits(const Shape& shape, const View& view) {
    if (view.data == nullptr) return true;
    const int last = shape.ndim - 1;
    if (view.dtype != kDType<S> || shape.sizes[last] % kQuad != 0) return false;
    if (view.strides[last] == 0) return true;
    if (view.strides[last] != 1 || !is_aligned<S, kQuad>(view.data)) return false;
    return std::all_of(view.strides, view.strides + last, [](int64_t stride) { return stride % kQuad == 0; });
  }

  static bool fits(const void* dense, DType dtype) {
    return dense == nullptr || (dtype == kDType<S> && is_aligned<S, kQuad>(dense));
  }
};

// Any types, strides and alignment, one element at a time.
struct Elements {
  static constexpr int kBlocks = 2;
  static constexpr bool kAligned = false;

  template <class T>
  static __device__ void load(const Shape& shape, const View& view, int64_t first, const Quad& quad, T* out) {
    const int last = shape.ndim - 1;
    Place place{};
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      out[i] = T(0);
      if (!quad.holds(i)) continue;
      if (i == quad.low || place.column == shape.sizes[last]) place = locate(shape, view, first + i);
      out[i] = read<T>(view.data, view.dtype, place.offset);
      place.offset += view.strides[last];
      ++place.column;
    }
  }

  template <class T>
  static __device__ void store(void* data, DType dtype, int64_t first, const Quad& quad, const T* values) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (quad.holds(i)) write(data, dtype, first + i, values[i]);
    }
  }
};

// The access to what is of the arithmetic's type whatever the operands are of: kl and its gradients.
template <class Access, class T>
using Arithmetic = std::conditional_t<Access::kAligned, Vectors<T>, Elements>;

template <class T>
struct Element {
  T scale;                             // e^(logvar/2)
  T kl;                                // before free bits
  T d_mean, d_logvar, d_prior_logvar;  // derivatives of kl
  bool inside;                         // logvar was not clamped
};

template <bool PriorGiven, class T>
__device__ inline Element<T> element(const Gaussian& args, T mean, T raw, T prior_mean, T prior_logvar) {
  const T half = T(0.5), logvar = args.clamps ? clamp(raw, T(args.low), T(args.high)) : raw;
  Element<T> e;
  e.inside = !args.clamps || raw == logvar;
  if constexpr (PriorGiven) {
    const HalfExp<T> d = half_exp(logvar - prior_logvar);
    const T precision_root = root_exp(-prior_logvar), t = (mean - prior_mean) * precision_root;
    e.scale = root_exp(logvar);
    e.kl = half * std::fma(t, t, d.expm1_less_x);
    e.d_mean = t * precision_root;
    e.d_logvar = half * d.expm1;
    e.d_prior_logvar = -half * std::fma(t, t, d.expm1);
  } else {
    const HalfExp<T> d = half_exp(logvar);
    e.scale = d.root;
    e.kl = half * std::fma(mean, mean, d.expm1_less_x);
    e.d_mean = mean;
    e.d_logvar = half * d.expm1;
    e.d_prior_logvar = T(0);
  }
  return e;
}

// The four elements of a thread.
template <class T>
struct Operands {
  T mean[kQuad], logvar[kQuad], prior_mean[kQuad] = {}, prior_logvar[kQuad] = {};

  template <class Access, bool PriorGiven>
  __device__ void load(const Gaussian& args, const Quad& quad) {
    Access::load(args.shape, args.mean, quad.first, quad, mean);
    Access::load(args.shape, args.logvar, quad.first, quad, logvar);
    if constexpr (PriorGiven) {
      Access::load(args.shape, args.prior_mean, quad.first, quad, prior_mean);
      Access::load(args.shape, args.prior_logvar, quad.first, quad, prior_logvar);
    }
  }

  template <bool PriorGiven>
  __device__ Element<T> at(const Gaussian& args, int i) const {
    return element<PriorGiven>(args, mean[i], logvar[i], prior_mean[i], prior_logvar[i]);
  }
};

// Sums of `rows` consecutive rows of `width` values each, in an order that depends on `width` alone: neighbouring lanes
// of a warp share a row, each adds every lanes-th value of it, and the lanes' sums are added as a tree.
template <class T>
__device__ inline void sum_rows(const T* values, int rows, int width, T* out) {
  int lanes = 1;
  while (lanes < width && lanes < kWarp) lanes *= 2;
  const int lane = threadIdx.x % lanes, rows_at_once = kThreads / lanes;
  // All threads of a warp stay in the loop for as long as one of them has a row, as the shuffles require.
  for (int base = 0; base < rows; base += rows_at_once) {
    const int row = base + threadIdx.x / lanes;
    T sum = T(0);
    if (row < rows) {
      for (int i = lane; i < width; i += lanes) sum += values[row * width + i];
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0 && row < rows) out[row] = sum;
  }
}

// A block takes a tile. An element costs two loads and a store of its type for each sample (12 bytes in float, 6 in
// bf16), about as long as the noise and the exponential take to compute; the KL goes through shared memory.
template <class T, class Access, bool PriorGiven>
__global__ void __launch_bounds__(kThreads, Access::kBlocks - PriorGiven)
    forward_kernel(const __grid_constant__ GaussianForward args) {
  __shared__ T shared[kTile];
  const GaussianTiles& tiles = args.tiles;
  const int64_t t = blockIdx.x;
  int64_t row, begin, end;
  int rows = 1;
  if (tiles.tiles_per_row > 1) {
    row = divide(t, tiles.tiles_per_row);
    const int64_t within = (t - row * tiles.tiles_per_row) * kTile;
    begin = row * tiles.cols + within;
    end = begin + (tiles.cols - within < kTile ? tiles.cols - within : kTile);
    row = t;  // one sum a tile
  } else {
    row = t * tiles.rows_per_tile;
    const int64_t left = tiles.rows - row;
    rows = static_cast<int>(left < tiles.rows_per_tile ? left : tiles.rows_per_tile);
    begin = row * tiles.cols;
    end = begin + rows * tiles.cols;
  }
  // Then every quad is whole and of one row, and its sum is formed in registers.
  const bool quads_in_rows = tiles.cols % kQuad == 0;
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  const T free_bits = T(args.free_bits);

  // One pass, and a second for one thread where the tile begins inside a quad.
  for (int64_t first = begin / kQuad * kQuad + kQuad * threadIdx.x; first < end; first += kTile) {
    const Quad quad(first, begin, end);
    Operands<T> operands;
    operands.template load<Access, PriorGiven>(args, quad);
    T scale[kQuad], kl[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const Element<T> e = operands.template at<PriorGiven>(args, i);
      scale[i] = e.scale;
      kl[i] = args.free_bits > 0 && e.kl < free_bits ? free_bits : e.kl;
    }
    if (args.kl_elements) {
      Arithmetic<Access, T>::store(args.kl, kDType<T>, first, quad, kl);
    } else if (quads_in_rows) {
      shared[(first - begin) / kQuad] = (kl[0] + kl[1]) + (kl[2] + kl[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (quad.holds(i)) shared[first - begin + i] = kl[i];
      }
    }
    for (int64_t k = 0; k < args.samples; ++k) {
      const int64_t number = k * args.shape.numel + first;
      T z[kQuad];
      four_normals<Access::kAligned>(seed, offset, number, z);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) z[i] = std::fma(scale[i], z[i], operands.mean[i]);
      Access::store(args.z, args.z_dtype, number, quad, z);
    }
  }
  if (args.kl_elements) return;
  __syncthreads();
  const int width = static_cast<int>((end - begin) / rows) / (quads_in_rows ? kQuad : 1);
  sum_rows(shared, rows, width, static_cast<T*>(args.kl) + row);
}

// Nothing is summed over elements here, so a block takes 1024 consecutive ones whatever their rows. An element costs
// two loads, one of grad_z for each sample, and two stores: 20 bytes in float, 10 in bf16. The noise is drawn again.
template <class T, class Access, bool PriorGiven>
__global__ void __launch_bounds__(kThreads, Access::kBlocks - PriorGiven)
    backward_kernel(const __grid_constant__ GaussianBackward args) {
  const int64_t numel = args.shape.numel;
  const int64_t first = kQuad * (int64_t{kThreads} * blockIdx.x + threadIdx.x);
  if (first >= numel) return;
  const Quad quad(first, 0, numel);
  Operands<T> operands;
  operands.template load<Access, PriorGiven>(args, quad);
  const bool sampled = args.grad_z.data != nullptr, diverges = args.grad_kl.data != nullptr;
  T weight[kQuad] = {}, plain[kQuad] = {}, noisy[kQuad] = {};  // the last two: sums of grad_z and of grad_z·ε
  if (diverges) Arithmetic<Access, T>::load(args.shape, args.grad_kl, first, quad, weight);
  if (sampled) {
    const bool noise_needed = args.grad_logvar != nullptr;
    const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
    for (int64_t k = 0; k < args.samples; ++k) {
      T grad[kQuad], noise[kQuad] = {};
      Access::load(args.grad_z_shape, args.grad_z, k * numel + first, quad, grad);
      if (noise_needed) four_normals<Access::kAligned>(seed, offset, k * numel + first, noise);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        plain[i] += grad[i];
        noisy[i] = std::fma(grad[i], noise[i], noisy[i]);
      }
    }
  }
  T d_mean[kQuad], d_logvar[kQuad], d_prior_mean[kQuad], d_prior_logvar[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const Element<T> e = operands.template at<PriorGiven>(args, i);
    d_mean[i] = plain[i];
    d_prior_mean[i] = d_prior_logvar[i] = T(0);
    d_logvar[i] = sampled ? T(0.5) * e.scale * noisy[i] : T(0);
    // Skipped, not weighted by zero, which makes NaN of an infinite factor.
    if (diverges && (args.free_bits <= 0 || e.kl >= T(args.free_bits))) {
      const T w = T(args.grad_kl_scale) * weight[i];
      d_mean[i] = std::fma(w, e.d_mean, d_mean[i]);
      d_logvar[i] = std::fma(w, e.d_logvar, d_logvar[i]);
      if constexpr (PriorGiven) {
        d_prior_mean[i] = -(w * e.d_mean);
        d_prior_logvar[i] = w * e.d_prior_logvar;
      }
    }
    if (!e.inside) d_logvar[i] = T(0);
  }
  if (args.grad_mean != nullptr) Access::store(args.grad_mean, args.grad_mean_dtype, first, quad, d_mean);
  if (args.grad_logvar != nullptr) Access::store(args.grad_logvar, args.grad_logvar_dtype, first, quad, d_logvar);
  if constexpr (PriorGiven) {
    if (args.grad_prior_mean != nullptr) {
      Arithmetic<Access, T>::store(args.grad_prior_mean, kDType<T>, first, quad, d_prior_mean);
    }
    if (args.grad_prior_logvar != nullptr) {
      Arithmetic<Access, T>::store(args.grad_prior_logvar, kDType<T>, first, quad, d_prior_logvar);
    }
  }
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class S>
bool operands_fit(const Gaussian& args) {
  return Vectors<S>::fits(args.shape, args.mean) && Vectors<S>::fits(args.shape, args.logvar) &&
         Vectors<S>::fits(args.shape, args.prior_mean) && Vectors<S>::fits(args.shape, args.prior_logvar);
}

template <class S>
bool fits(const GaussianForward& args) {
  return operands_fit<S>(args) && Vectors<S>::fits(args.z, args.z_dtype) && is_aligned<float, kQuad>(args.kl);
}

template <class S>
bool fits(const GaussianBackward& args) {
  return operands_fit<S>(args) && Vectors<S>::fits(args.grad_z_shape, args.grad_z) &&
         Vectors<float>::fits(args.shape, args.grad_kl) && Vectors<S>::fits(args.grad_mean, args.grad_mean_dtype) &&
         Vectors<S>::fits(args.grad_logvar, args.grad_logvar_dtype) && is_aligned<float, kQuad>(args.grad_prior_mean) &&
         is_aligned<float, kQuad>(args.grad_prior_logvar);
}

template <class T, class Access, bool PriorGiven>
auto kernel_for(const GaussianForward&) {
  return forward_kernel<T, Access, PriorGiven>;
}

template <class T, class Access, bool PriorGiven>
auto kernel_for(const GaussianBackward&) {
  return backward_kernel<T, Access, PriorGiven>;
}

template <bool PriorGiven, class Args>
void run(const Args& args, int64_t blocks, void* stream) {
  auto kernel = kernel_for<float, Elements, PriorGiven>(args);
  if (args.compute_double) kernel = kernel_for<double, Elements, PriorGiven>(args);
  else if (fits<float>(args)) kernel = kernel_for<float, Vectors<float>, PriorGiven>(args);
  else if (fits<__nv_bfloat16>(args)) kernel = kernel_for<float, Vectors<__nv_bfloat16>, PriorGiven>(args);
  else if (fits<__half>(args)) kernel = kernel_for<float, Vectors<__half>, PriorGiven>(args);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, args);
}

}  // namespace

void gaussian_forward(const GaussianForward& args, void* stream) {
  if (args.tiles.count == 0) return;
  args.prior_mean.data != nullptr ? run<true>(args, args.tiles.count, stream)
                                  : run<false>(args, args.tiles.count, stream);
}

void gaussian_backward(const GaussianBackward& args, void* stream) {
  if (args.shape.numel == 0) return;
  const int64_t blocks = (args.shape.numel + kTile - 1) / kTile;
  args.prior_mean.data != nullptr ? run<true>(args, blocks, stream) : run<false>(args, blocks, stream);
}

}  // namespace lect11ext::cuda
