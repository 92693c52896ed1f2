// The weights of dot-product attention on the CPU: what the kernels are given beyond dot_product_weights.h.
#pragma once

#include "attention/dot_product_cpu.h"
#include "attention/dot_product_weights.h"

namespace lect11ext {

// A work item is a tile of queries against a block of keys: of all heads where they are averaged, so that the average
// stays in the cache until it is stored; else of one head.
struct AttentionWeightsCpu : AttentionWeights {
  AttentionPlan plan;
  PackedOperand packed_key;
};

// The scores of so many keys stay in the cache, for all rows of a tile, until the sum of weights is known.
inline constexpr int64_t kOnePassKeys = 1024;

// A work item is `rows` queries with all heads of a sequence.
struct AttentionWithWeightsCpu : AttentionWithWeights {
  AttentionPlan plan;
  PackedOperand packed_key, packed_value;
  int64_t rows;
};

inline int64_t key_block_count(int64_t keys) { return (keys + kBlockKeys - 1) / kBlockKeys; }

// Work items as AttentionBackwardCpu has them; there are no values, and operands are of the type of the sums.
struct AttentionWeightsBackwardCpu : AttentionBackwardCpu {
  AttentionWeightsGradient gradient;
  double share;    // of a gradient: 1 / heads where weights are averaged, else 1
  void* lse_sums;  // C [parts][batch][heads][queries], added to: zero at first
};

LECT11EXT_CPU_KERNEL(attention_weights_kernel, AttentionWeightsCpu)
LECT11EXT_CPU_KERNEL(attention_with_weights_kernel, AttentionWithWeightsCpu)
LECT11EXT_CPU_KERNEL(attention_weights_backward_kernel, AttentionWeightsBackwardCpu)

}  // namespace lect11ext
