// When the kernels of sm_90a are taken, and what they are told.
#pragma once

#include <cstdlib>
#include <cstring>

#include "attention/cuda/dot_product_finite.cuh"
#include "attention/cuda/dot_product_hopper.h"
#include "attention/cuda/dot_product_mask_tiles.cuh"
#include "common/cuda/tensor_map.h"

namespace lect11ext::cuda {

// Where they run, unless LECT11EXT_ATTENTION_HOPPER=0 switches them off.
inline bool hopper_is_chosen() {
#ifdef LECT11EXT_SM90A  // built in
  const char* const wish = std::getenv("LECT11EXT_ATTENTION_HOPPER");
  return (wish == nullptr || std::strcmp(wish, "0") != 0) && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#else
  return false;
#endif
}

// What the kernels compute. A few queries are better cut along the keys.
inline bool hopper_computes(const Attention& args) {
  constexpr int64_t kFew = 16;
  const int64_t sequences = args.query_starts == nullptr ? 1 : args.sequences;
  constexpr int64_t kMost = 128, kPiece = 8;  // columns, and those of sixteen bytes
  const auto fits = [&](int64_t columns) { return columns > 0 && columns <= kMost && columns % kPiece == 0; };
  const bool sizes = fits(args.head_dim) && fits(args.value_dim) && args.queries > kFew * sequences && args.keys > 0 &&
                     args.sequences > 0 && args.heads > 0;
  const bool some = args.window_left + args.window_right >= 0;  // else no query sees a key
  return sizes && some && (args.dtype == DType::BFloat16 || args.dtype == DType::Half);
}

// Whether a tile may have what no query sees beside what is seen: masked keys, and the next sequence's.
inline bool needs_finite(const Attention& args) {
  return args.mask.type != MaskType::None || args.query_starts != nullptr;
}

// Columns of tiles, of which operands fill the first ones: TMA makes zeros of the rest.
inline int hopper_columns(const Attention& args) { return std::max(args.head_dim, args.value_dim) <= 64 ? 64 : 128; }

// What a kernel has code for. Plain: products, and a window. Masked: a bool mask, and sequences one behind the other
// besides; scores are counted in products still. Dropped: dropout besides. Sloped: what Masked has, and ALiBi. Scored:
// all there is.
enum class HopperKind { Plain, Masked, Dropped, Sloped, Scored };
template <HopperKind kKind>
using HopperKindOf = std::integral_constant<HopperKind, kKind>;

// Whether slopes may be counted in products, where they are divided by the scale, and distances are floats. Slope
// bounds the quotient, which a slope of 10⁸ does not reach with these scales.
inline bool slopes_fit(const Attention& args) {
  constexpr double kLeastScale = 1e-20;
  return args.scale >= kLeastScale && args.queries < kExactDistances && args.keys < kExactDistances;
}

// Returns f of a null pointer of the storage type, the columns, and the kernel's kind: of the two that can drop, the
// one that is asked for, or Scored.
template <HopperKind kOfDropout, class F>
HopperRun with_hopper_kernel(const Attention& args, F f) {
  const auto with_columns = [&](auto* type) {
    const auto with_kind = [&](auto columns) {
      const bool drops = args.dropout_p > 0, slopes = args.alibi_slopes != nullptr;
      if (!scores_are_sloped_products(args) || (slopes && (drops || !slopes_fit(args)))) {
        return f(type, columns, HopperKindOf<HopperKind::Scored>{});
      }
      if (slopes) return f(type, columns, HopperKindOf<HopperKind::Sloped>{});
      if (drops) return f(type, columns, HopperKindOf<kOfDropout>{});
      return is_plain(args) && args.query_starts == nullptr ? f(type, columns, HopperKindOf<HopperKind::Plain>{})
                                                            : f(type, columns, HopperKindOf<HopperKind::Masked>{});
    };
    if (hopper_columns(args) == 64) return with_kind(std::integral_constant<int, 64>{});
    return with_kind(std::integral_constant<int, 128>{});
  };
  if (args.dtype == DType::BFloat16) return with_columns(static_cast<__nv_bfloat16*>(nullptr));
  return with_columns(static_cast<__half*>(nullptr));
}

// Tiles of the rows of a head: of one sequence, whose batch is found otherwise, or of those one behind the other.
inline SequenceTiles tiles_of_head(const Attention& args, const int64_t* starts, int64_t rows, int64_t size) {
  return {starts, starts == nullptr ? 1 : args.sequences, rows, size, 1};
}

// Positions from `first` to `last` − 1.
struct Span {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// The keys that some query sees, and the queries that see some key. What is outside may be NaN and is never read:
// tensor maps end there, beyond which there are zeros.
inline Span keys_of_use(const Attention& args) {
  if (args.query_starts != nullptr) return {0, args.keys};
  const int64_t diagonal = args.bottom_right ? args.keys - args.queries : 0;
  const int64_t first = std::clamp<int64_t>(diagonal - args.window_left, 0, args.keys);
  return {first, std::clamp<int64_t>(args.queries + diagonal + args.window_right, first, args.keys)};
}

inline Span queries_of_use(const Attention& args) {
  if (args.query_starts != nullptr) return {0, args.queries};
  const int64_t diagonal = args.bottom_right ? args.keys - args.queries : 0;
  const int64_t first = std::clamp<int64_t>(-diagonal - args.window_right, 0, args.queries);
  return {first, std::clamp<int64_t>(args.keys - diagonal + args.window_left, first, args.queries)};
}

// What TMA takes of an operand.
inline ScannedRows scanned(const Attention& args, const AttentionOperand& operand, int64_t heads, int64_t columns,
                           const Span& span) {
  const auto* const first = static_cast<const __half*>(operand.data) + span.first * operand.strides.position;
  return {{first, operand.strides}, args.batch, heads, span.size(), columns / kVector<__half>};
}

inline bool map_operand(CUtensorMap& map, const Attention& args, const AttentionOperand& operand, int64_t heads,
                        int64_t columns, const Span& span, int rows) {
  const AttentionStrides& strides = operand.strides;
  const char* const data = static_cast<const char*>(operand.data) + 2 * span.first * strides.position;
  // Of an empty span nothing is read.
  const MappedTensor tensor{args.dtype,
                            data,
                            {args.batch, heads, std::max<int64_t>(span.size(), 1), columns},
                            {strides.batch, strides.head, strides.position}};
  return make_tensor_map(map, tensor, rows);
}

// Whether rows may be written in pieces of 16 bytes.
inline bool rows_are_aligned(const void* data, const AttentionStrides& strides) {
  return is_aligned<__half>(AttentionOperand{data, strides});
}

// --- the order of blocks ------------------------------------------------------------------------------------------

// In which order tiles of `units`, which are heads of all batches, are taken. Groups of `side` units, of which the last
// takes the rest too, go side by side, tile by tile from the one with the most work on: few units at a time, so that
// what their tiles share, K and V or Q and dO, is still in the L2 cache.
struct BlockOrder {
  int tiles, units, side;
  bool uneven;  // tiles differ in work

  // bytes: what a unit's tiles share; `together`: units that share it
  static BlockOrder of(const Attention& args, int64_t tiles, int64_t units, int64_t bytes, int64_t together) {
    constexpr int64_t kCache = 24 << 20;  // about half of the L2 cache of an H100
    const int64_t side = std::clamp<int64_t>(kCache / std::max<int64_t>(bytes, 1), 1, units) * together;
    grid_size(tiles * units);
    const bool left = args.window_left < args.queries + args.keys, right = args.window_right < args.queries + args.keys;
    return {static_cast<int>(tiles), static_cast<int>(units), static_cast<int>(std::min(side, units)),
            left != right || args.query_starts != nullptr};
  }

  __host__ __device__ unsigned blocks() const { return static_cast<unsigned>(tiles) * static_cast<unsigned>(units); }

  struct Block {
    int tile, unit;
  };

  __device__ int groups() const { return units / side; }
  __device__ int group_units(int group) const { return group == groups() - 1 ? units - group * side : side; }
  __device__ Block find(int group, int index) const {
    const int here = group_units(group);
    return {index / here, group * side + index % here};
  }
  __device__ Block find(int number) const {
    const int group = std::min(number / (tiles * side), groups() - 1);
    return find(group, number - group * tiles * side);
  }

  // What a block does in its round number `round`, if blocks stay and take one after another: there and back again, so
  // that none always has more than its neighbour. False: nothing; then `over` is whether that was all.
  //
  // Where tiles differ in work every group begins with a round. The least work that there would be is what is missing
  // at the end of the one before, and all blocks have done alike, or will have after the next group.
  __device__ bool in_round(int round, Block& block, bool& over) const {
    const int blocks = static_cast<int>(gridDim.x), own = static_cast<int>(blockIdx.x);
    int number = round * blocks + (round % 2 == 0 ? own : blocks - 1 - own), group = 0;
    if (uneven) {
      const int rounds = (tiles * side + blocks - 1) / blocks;
      group = std::min(round / rounds, groups() - 1);
      number -= group * rounds * blocks;
    } else {
      group = std::min(number / (tiles * side), groups() - 1);
      number -= group * tiles * side;
    }
    const bool any = number < tiles * group_units(group);
    over = !any && group == groups() - 1;
    if (any) block = find(group, number);
    return any;
  }
};

}  // namespace lect11ext::cuda
