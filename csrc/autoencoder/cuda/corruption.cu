#include "autoencoder/corruption.h"

#include "autoencoder/cuda/quads.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/memory.cuh"
#include "common/cuda/normal.cuh"

namespace lect11ext::cuda {
namespace {

// Both kernels load and store an element once: 8 bytes in float, 4 in bf16, beside a quarter of a Philox block (some
// 25 integer instructions). A quad's elements are one block's words, or in float its normals.
template <class Access>
using Work = Share<Access, 2, 1024>;

template <class T, class Access>
__global__ void __launch_bounds__(kFlatThreads, Work<Access>::kThreads / kFlatThreads)
    drift_kernel(const __grid_constant__ CorruptionDrift args) {
  constexpr int kQuads = Work<Access>::kQuads;
  const FlatRange<kQuads> range(args.shape.numel);
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  typename Access::template Loaded<T> x[kQuads] = {};
  T noise[kQuads][kQuad];
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad = range.quad(j);
    if (!quad.empty()) x[j] = Access::template load<T>(Spot(args.shape, quad.first), args.input, quad);
  }
#pragma unroll
  for (int j = 0; j < kQuads; ++j) four_normals</*Aligned=*/true>(seed, offset, range.quad(j).first, noise[j]);
  const T deviation = T(args.deviation);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad = range.quad(j);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) noise[j][i] = std::fma(deviation, noise[j][i], T(x[j][i]));
    Access::store(args.out, args.input.dtype, quad.first, quad, noise[j]);
  }
}

__device__ inline void store_mask(bool* mask, int64_t first, const Quad& quad, const bool* values) {
  if (quad.whole() && reinterpret_cast<uintptr_t>(mask) % kQuad == 0) {
    uint32_t word;
    memcpy(&word, values, sizeof(word));
    *reinterpret_cast<uint32_t*>(mask + first) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (quad.holds(i)) mask[first + i] = values[i];
  }
}

template <class T, class Access>
__global__ void __launch_bounds__(kFlatThreads, Work<Access>::kThreads / kFlatThreads)
    replace_kernel(const __grid_constant__ CorruptionReplace args) {
  constexpr int kQuads = Work<Access>::kQuads;
  const FlatRange<kQuads> range(args.shape.numel);
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  typename Access::template Loaded<T> in[kQuads] = {};
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad = range.quad(j);
    if (!quad.empty()) in[j] = Access::template load<T>(Spot(args.shape, quad.first), args.input, quad);
  }
  const T low = T(args.low), high = T(args.high);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const Quad quad = range.quad(j);
    const PhiloxBlock block = philox(seed, offset + static_cast<uint64_t>(quad.first) / kQuad);
    T x[kQuad];
    bool replaced[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      replaced[i] = block.x[i] <= args.last;
      x[i] = !replaced[i] ? T(in[j][i]) : block.x[i] < args.pepper ? low : high;
    }
    Access::store(args.out, args.input.dtype, quad.first, quad, x);
    if (args.mask != nullptr) store_mask(args.mask, quad.first, quad, replaced);
  }
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class T, class Access>
void start(const CorruptionDrift& args, dim3 grid, void* stream) {
  launch(drift_kernel<T, Access>, grid, kFlatThreads, 0, stream, args);
}

template <class T, class Access>
void start(const CorruptionReplace& args, dim3 grid, void* stream) {
  launch(replace_kernel<T, Access>, grid, kFlatThreads, 0, stream, args);
}

template <class T, class Access, class Args>
void start(const Args& args, void* stream) {
  start<T, Access>(args, FlatRange<Work<Access>::kQuads>::grid(args.shape.numel), stream);
}

template <class Args>
void run(const Args& args, void* stream) {
  if (args.shape.numel == 0) return;
  with_type(args.input.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const auto fits = [&](auto access) {
      return access.fits(args.shape, args.input) && access.fits(args.out, args.input.dtype);
    };
    if (fits(Dense<S>())) start<Compute<S>, Dense<S>>(args, stream);
    else if (fits(Vectors<S>())) start<Compute<S>, Vectors<S>>(args, stream);
    else start<Compute<S>, Elements>(args, stream);
  });
}

}  // namespace

void corruption_drift(const CorruptionDrift& args, void* stream) { run(args, stream); }

void corruption_replace(const CorruptionReplace& args, void* stream) { run(args, stream); }

}  // namespace lect11ext::cuda
