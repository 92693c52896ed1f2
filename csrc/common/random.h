// Normals of the Philox stream as a tensor: what the fused kernels draw inside.
#pragma once

#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

struct PhiloxNormal {
  const int64_t* key;  // [seed, offset], 64 unsigned bits each
  void* out;           // numel dense elements, written
  DType dtype;
  int64_t numel;
};

// Work items of the CPU kernel are chunks of this many elements.
inline constexpr int64_t kNormalChunk = 4096;

LECT11EXT_CPU_KERNEL(philox_normal_kernel, PhiloxNormal)

// Where CUDA's generator keeps its state: values, or device pointers while a graph is captured. The kernel that takes
// it writes the key in use, so that nothing of it passes through the host.
struct PhiloxReservation {
  bool captured;
  uint64_t seed, offset;                 // not captured; the offset counts 32-bit values
  const int64_t *seed_ptr, *offset_ptr;  // captured
  uint64_t offset_intragraph;
  int64_t* key;  // [seed, offset / 4], written
};

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void philox_key(const PhiloxReservation& reservation, void* stream);
void philox_normal(const PhiloxNormal& args, void* stream);

}  // namespace lect11ext::cuda
