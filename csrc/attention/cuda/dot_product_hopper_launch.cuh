// When the kernels of sm_90a are taken, and what they are told.
#pragma once

#include <cstdlib>
#include <cstring>

#include "attention/cuda/dot_product_hopper.h"
#include "attention/cuda/dot_product_tile.cuh"
#include "common/cuda/tensor_map.h"

namespace lect11ext::cuda {

// Until they are proven on a GPU they are for those who ask for them. The one place to change then.
inline bool hopper_is_chosen() {
#ifdef LECT11EXT_SM90A  // built in
  const char* const wish = std::getenv("LECT11EXT_ATTENTION_HOPPER");
  return wish != nullptr && std::strcmp(wish, "1") == 0 && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#else
  return false;
#endif
}

// What the kernels compute. A few queries are better cut along the keys.
inline bool hopper_computes(const Attention& args) {
  constexpr double kLeastScale = 1e-30;  // one that a float holds
  constexpr int64_t kFew = 16;
  const bool plain = args.mask.type == MaskType::None && args.alibi_slopes == nullptr && args.softcap == 0 &&
                     args.dropout_p <= 0 && args.query_starts == nullptr && args.scale > kLeastScale;
  const bool sizes = (args.head_dim == 64 || args.head_dim == 128) && args.value_dim == args.head_dim &&
                     args.queries > kFew && args.keys > 0 && args.batch > 0 && args.heads > 0;
  const bool some = args.window_left + args.window_right >= 0;  // else no query sees a key
  return plain && sizes && some && (args.dtype == DType::BFloat16 || args.dtype == DType::Half);
}

// Positions from `first` to `last` − 1.
struct Span {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// The keys that some query sees, and the queries that see some key. What is outside may be NaN and is never read:
// tensor maps end there, beyond which there are zeros.
inline Span keys_of_use(const Attention& args) {
  const int64_t diagonal = args.bottom_right ? args.keys - args.queries : 0;
  const int64_t first = std::clamp<int64_t>(diagonal - args.window_left, 0, args.keys);
  return {first, std::clamp<int64_t>(args.queries + diagonal + args.window_right, first, args.keys)};
}

inline Span queries_of_use(const Attention& args) {
  const int64_t diagonal = args.bottom_right ? args.keys - args.queries : 0;
  const int64_t first = std::clamp<int64_t>(-diagonal - args.window_right, 0, args.queries);
  return {first, std::clamp<int64_t>(args.keys - diagonal + args.window_left, first, args.queries)};
}

inline bool map_operand(CUtensorMap& map, const Attention& args, const AttentionOperand& operand, int64_t heads,
                        const Span& span, int rows) {
  const AttentionStrides& strides = operand.strides;
  const char* const data = static_cast<const char*>(operand.data) + 2 * span.first * strides.position;
  // Of an empty span nothing is read.
  const MappedTensor tensor{args.dtype,
                            data,
                            {args.batch, heads, std::max<int64_t>(span.size(), 1), args.head_dim},
                            {strides.batch, strides.head, strides.position}};
  return make_tensor_map(map, tensor, rows);
}

// Whether rows may be written in pieces of 16 bytes.
inline bool rows_are_aligned(const void* data, const AttentionStrides& strides) {
  return is_aligned<__half>(AttentionOperand{data, strides});
}

// --- the order of blocks ------------------------------------------------------------------------------------------

// In which order tiles of `units`, which are heads of all batches, are taken. `side` units go side by side, tile by
// tile from the one with the most work on: long ones first, so that none is left to the end; and few units at a time,
// so that what their tiles share, K and V or Q and dO, is still in the L2 cache.
struct BlockOrder {
  int tiles, units, side;

  // bytes: what a unit's tiles share; `together`: units that share it
  static BlockOrder of(int64_t tiles, int64_t units, int64_t bytes, int64_t together) {
    constexpr int64_t kCache = 24 << 20;  // about half of the L2 cache of an H100
    const int64_t side = std::clamp<int64_t>(kCache / std::max<int64_t>(bytes, 1), 1, units) * together;
    grid_size(tiles * units);
    return {static_cast<int>(tiles), static_cast<int>(units), static_cast<int>(std::min(side, units))};
  }

  __host__ __device__ unsigned blocks() const { return static_cast<unsigned>(tiles) * static_cast<unsigned>(units); }

  struct Block {
    int tile, unit;
  };

  __device__ Block find(unsigned number) const {
    const int in_side = tiles * side, first = static_cast<int>(number) / in_side;
    const int rest = static_cast<int>(number) - first * in_side, here = std::min(side, units - first * side);
    return {rest / here, first * side + rest % here};
  }

  // Number of what a block does in its round number `round`, if blocks stay and take one after another: there and back
  // again, so that none always has more than its neighbour.
  __device__ static unsigned in_round(int round) {
    return static_cast<unsigned>(round) * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  }
};

}  // namespace lect11ext::cuda
