#include "common/random.h"

#include "common/cuda/launch.h"
#include "common/cuda/memory.cuh"
#include "common/cuda/normal.cuh"

namespace lect11ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerBlock = 4;  // of 32 bits, which is what a generator's offset counts

// Runs inside a captured graph too, where seed and offset are known only when the graph is replayed.
__global__ void key_kernel(const __grid_constant__ PhiloxReservation from) {
  const uint64_t seed = from.captured ? static_cast<uint64_t>(*from.seed_ptr) : from.seed;
  const uint64_t offset =
      from.captured ? static_cast<uint64_t>(*from.offset_ptr) + from.offset_intragraph : from.offset;
  from.key[0] = static_cast<int64_t>(seed);
  from.key[1] = static_cast<int64_t>(offset / kWordsPerBlock);
}

// A thread writes four consecutive normals at a time, which in float are one Philox block. Bound by arithmetic: it
// reads nothing and writes 2 to 8 bytes a normal.
template <class S>
__global__ void __launch_bounds__(kThreads) normal_kernel(const __grid_constant__ PhiloxNormal args, bool aligned) {
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  S* out = static_cast<S*>(args.out);
  const int64_t step = int64_t{4} * kThreads * gridDim.x;
  for (int64_t first = 4 * (int64_t{kThreads} * blockIdx.x + threadIdx.x); first < args.numel; first += step) {
    Compute<S> values[4];
    four_normals<true>(seed, offset, first, values);
    if (aligned && first + 4 <= args.numel) {
      Pack<S, 4> pack;
#pragma unroll
      for (int i = 0; i < 4; ++i) pack.set(i, values[i]);
      pack.store(out + first);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < args.numel) out[first + i] = to_storage<S>(values[i]);
      }
    }
  }
}

}  // namespace

void philox_key(const PhiloxReservation& reservation, void* stream) {
  launch(key_kernel, 1, 1, 0, stream, reservation);
}

void philox_normal(const PhiloxNormal& args, void* stream) {
  if (args.numel == 0) return;
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    launch(normal_kernel<S>, grid_stride_blocks((args.numel + 3) / 4, kThreads), kThreads, 0, stream, args,
           is_aligned<S, 4>(args.out));
  });
}

}  // namespace lect11ext::cuda
