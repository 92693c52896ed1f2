#include "autoencoder/corruption.h"

#include "autoencoder/cuda/quads.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/memory.cuh"
#include "common/cuda/normal.cuh"

namespace lect11ext::cuda {
namespace {

constexpr int kThreads = 256;

// Both kernels load and store an element once: 8 bytes in float, 4 in bf16, beside a quarter of a Philox block (some
// 25 integer instructions). A thread's four elements are one block's words, or in float its normals.
__device__ inline int64_t first_of_thread() { return kQuad * (int64_t{kThreads} * blockIdx.x + threadIdx.x); }

template <class T, class Access>
__global__ void __launch_bounds__(kThreads) drift_kernel(const __grid_constant__ CorruptionDrift args) {
  const int64_t first = first_of_thread();
  if (first >= args.shape.numel) return;
  const Quad quad(first, 0, args.shape.numel);
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  T x[kQuad], noise[kQuad];
  Access::load(args.shape, args.input, first, quad, x);
  four_normals</*Aligned=*/true>(seed, offset, first, noise);
  const T deviation = T(args.deviation);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) x[i] = std::fma(deviation, noise[i], x[i]);
  Access::store(args.out, args.input.dtype, first, quad, x);
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
__global__ void __launch_bounds__(kThreads) replace_kernel(const __grid_constant__ CorruptionReplace args) {
  const int64_t first = first_of_thread();
  if (first >= args.shape.numel) return;
  const Quad quad(first, 0, args.shape.numel);
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  T x[kQuad];
  Access::load(args.shape, args.input, first, quad, x);
  const PhiloxBlock block = philox(seed, offset + static_cast<uint64_t>(first / kQuad));
  const T low = T(args.low), high = T(args.high);
  bool replaced[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    replaced[i] = block.x[i] <= args.last;
    if (replaced[i]) x[i] = block.x[i] < args.pepper ? low : high;
  }
  Access::store(args.out, args.input.dtype, first, quad, x);
  if (args.mask != nullptr) store_mask(args.mask, first, quad, replaced);
}

// --- which kernel -------------------------------------------------------------------------------------------------

template <class T, class Access>
auto kernel_for(const CorruptionDrift&) {
  return drift_kernel<T, Access>;
}

template <class T, class Access>
auto kernel_for(const CorruptionReplace&) {
  return replace_kernel<T, Access>;
}

template <class Args>
void run(const Args& args, void* stream) {
  if (args.shape.numel == 0) return;
  constexpr int64_t kElements = int64_t{kThreads} * kQuad;
  const dim3 grid(static_cast<unsigned>((args.shape.numel + kElements - 1) / kElements));
  with_type(args.input.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const bool fits = Vectors<S>::fits(args.shape, args.input) && Vectors<S>::fits(args.out, args.input.dtype);
    const auto kernel = fits ? kernel_for<T, Vectors<S>>(args) : kernel_for<T, Elements>(args);
    launch(kernel, grid, kThreads, 0, stream, args);
  });
}

}  // namespace

void corruption_drift(const CorruptionDrift& args, void* stream) { run(args, stream); }

void corruption_replace(const CorruptionReplace& args, void* stream) { run(args, stream); }

}  // namespace lect11ext::cuda
