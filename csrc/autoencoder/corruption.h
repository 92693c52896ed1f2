// The corruptions of denoising autoencoders (Vincent et al. 2008, 2010), in one pass.
//
//   drift:   out = input + deviation · ε            ε the Philox normals of `key`, element i taking normal number i
//   replace: out = word < pepper ? low : word <= last ? high : input
//                                                   element i taking 32-bit word number i of the stream, in every type
//
// Masking is a replacement by zero, and so are the derivatives of every replacement: what was replaced has none.
#pragma once

#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

// A tile is what one thread does at a time: consecutive elements, of whole Philox blocks whatever the type.
inline constexpr int64_t kCorruptionTile = 1024;  // three float buffers of this length fit the first-level cache

struct Corruption {
  Shape shape;
  View input;          // read; any type and strides
  const int64_t* key;  // [seed, offset]; on the device of the kernel
  void* out;           // written: numel elements, dense, of the input's type
  bool streams;        // whether the output is too large to stay in a CPU's caches
};

struct CorruptionDrift : Corruption {
  double deviation;
};

struct CorruptionReplace : Corruption {
  double low, high;  // rounded to the input's type
  bool* mask;        // written: numel elements, dense, true where input was replaced; null: not asked for
  uint32_t last;     // the largest word that replaces: a bound beyond would not fit where every word does
  uint32_t pepper;   // at most last + 1
};

LECT11EXT_CPU_KERNEL(corruption_drift_kernel, CorruptionDrift)
LECT11EXT_CPU_KERNEL(corruption_replace_kernel, CorruptionReplace)

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void corruption_drift(const CorruptionDrift& args, void* stream);
void corruption_replace(const CorruptionReplace& args, void* stream);

}  // namespace lect11ext::cuda
