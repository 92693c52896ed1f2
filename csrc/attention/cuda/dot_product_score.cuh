// From products of queries and keys to scores: windows, masks, softcap, ALiBi, and the noise of dropout.
#pragma once

#include <cmath>

#include "attention/cuda/dot_product_tile.cuh"
#include "common/philox.h"

namespace lect11ext::cuda {

inline constexpr double kLog2E = 1.4426950408889634074;

template <class C>
__device__ inline C infinity() {
  return C(INFINITY);
}

// A product that the compiler does not fuse with what follows: rounded otherwise in two kernels, a huge score would
// differ by more than a weight can bear.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// Beyond this exponents are differences of scores, not of products of scores with a factor: the product's rounding
// would be an error of all weights of a row, and of its lse. Only 16-bit types, whose weights are rounded anyway,
// are spared the subtraction below.
inline constexpr float kLargeExponent = 64;

// That a score exceeds its row's lse by, at most, in binary logarithms: by what the lse was rounded.
inline constexpr float kMostBinaryExcess = 0.5f * static_cast<float>(kLog2E);

// NaN stays.
__device__ inline float at_most(float x, float bound) {
#if defined(__CUDA_ARCH__)
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(bound));
  return least;
#else
  return x > bound ? bound : x;
#endif
}

// The kernels' arguments and a sequence; queries and keys are counted within it.
template <class S>
struct Scores {
  using C = Compute<S>;

  const Attention& args;
  const Sequence& sequence;

  // --- who sees whom

  __device__ bool in_window(int query, int key) const {
    const int ahead = key - query - sequence.diagonal;
    return query < sequence.queries && key < sequence.keys && ahead <= sequence.right && -ahead <= sequence.left;
  }

  __device__ int64_t mask_offset(const AttentionMask& mask, int head, int query, int key) const {
    return sequence.batch * mask.strides[0] + head * mask.strides[1] + query * mask.strides[2] + key * mask.strides[3];
  }

  // What a mask that is no bool adds, or its tangent.
  __device__ C added(const AttentionMask& mask, int head, int query, int key) const {
    const int64_t offset = mask_offset(mask, head, query, key);
    if (mask.type == MaskType::Float) return static_cast<const float*>(mask.data)[offset];
    return from_storage<C>(static_cast<const S*>(mask.data)[offset]);
  }

  __device__ bool sees(int head, int query, int key) const {
    if (!in_window(query, key)) return false;
    if (args.mask.type == MaskType::None) return true;
    if (args.mask.type == MaskType::Bool) {
      return static_cast<const uint8_t*>(args.mask.data)[mask_offset(args.mask, head, query, key)] != 0;
    }
    return added(args.mask, head, query, key) != -infinity<C>();
  }

  // --- scores

  struct Score {
    C t;       // the score
    C capped;  // u / softcap; zero without a softcap
  };

  // Plain: it is a multiple of the product.
  template <bool kPlain>
  __device__ Score score(C product, int head, int query, int key) const {
    Score score{rounded_product(product, C(args.scale)), 0};
    if constexpr (kPlain) return score;
    if (args.softcap != 0) {
      score.capped = std::tanh(score.t / C(args.softcap));
      score.t = rounded_product(C(args.softcap), score.capped);
    }
    if (args.alibi_slopes != nullptr) {
      const int distance = query + sequence.diagonal - key;
      const float slope = args.alibi_slopes[sequence.batch * args.alibi_strides[0] + head * args.alibi_strides[1]];
      score.t = std::fma(-C(slope), C(distance < 0 ? -distance : distance), score.t);
    }
    if (args.mask.type > MaskType::Bool) score.t += added(args.mask, head, query, key);
    return score;
  }
};

// --- dropout ------------------------------------------------------------------------------------------------------

// The uniform words of tiles of 16 × 8, made by whole warps: each block of four words once.
class Dropout {
 public:
  __device__ Dropout(const Attention& args, const Sequence& sequence) : heads_(args.heads) {
    if (args.dropout_p <= 0) return;
    seed_ = static_cast<uint64_t>(args.dropout_key[0]);
    blocks_of_row_ = (static_cast<uint64_t>(args.keys) + 3) / 4;
    queries_ = args.queries;
    first_ = static_cast<uint64_t>(args.dropout_key[1]) +
             static_cast<uint64_t>(sequence.batch * heads_ * queries_ + sequence.first_query) * blocks_of_row_;
    threshold_ = static_cast<uint64_t>(ceil(args.dropout_p * 0x1p32));
  }

  // Four bits, one for each element of the lane: rows are queries `low` and `high` of heads low_head and high_head,
  // columns keys from `first_key` on, a multiple of eight.
  __device__ uint32_t keep_of_queries(int low_head, int low, int high_head, int high, int first_key,
                                      const Lane& lane) const {
    const bool odd = lane.q % 2 != 0;  // an odd lane draws for row g + 8, its neighbour for row g
    const PhiloxBlock mine = draw(odd ? high_head : low_head, odd ? high : low, first_key + 2 * lane.q);
    const uint32_t other_0 = __shfl_xor_sync(~0u, odd ? mine.x[0] : mine.x[2], 1);
    const uint32_t other_1 = __shfl_xor_sync(~0u, odd ? mine.x[1] : mine.x[3], 1);
    const uint32_t own = keeps(odd ? mine.x[2] : mine.x[0]) | keeps(odd ? mine.x[3] : mine.x[1]) << 1;
    const uint32_t other = keeps(other_0) | keeps(other_1) << 1;
    return odd ? other | own << 2 : own | other << 2;
  }

  // The same where rows are keys from `first_key` on, a multiple of sixteen, and columns queries from `first_query` on.
  __device__ uint32_t keep_of_keys(int head, int first_query, int first_key, const Lane& lane) const {
    // Of the lanes whose keys share a block, each draws for one of the four elements.
    const int word = lane.g % 4, quad = lane.lane - 4 * word;
    const PhiloxBlock mine = draw(head, first_query + 2 * lane.q + word % 2, first_key + 8 * (word / 2) + lane.g);
    uint32_t keep = 0;
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
      const int to = (word + turn) % 4, from = (word - turn) & 3;
      const uint32_t given = to == 0 ? mine.x[0] : to == 1 ? mine.x[1] : to == 2 ? mine.x[2] : mine.x[3];
      keep |= keeps(__shfl_sync(~0u, given, quad + 4 * from)) << from;
    }
    return keep;
  }

 private:
  __device__ uint32_t keeps(uint32_t word) const { return word >= threshold_ ? 1 : 0; }

  __device__ PhiloxBlock draw(int head, int query, int key) const {
    return philox(seed_, first_ + static_cast<uint64_t>(head * queries_ + query) * blocks_of_row_ +
                             static_cast<uint64_t>(key) / 4);
  }

  int64_t heads_, queries_ = 0;
  uint64_t seed_ = 0, first_ = 0, blocks_of_row_ = 0, threshold_ = 0;
};

// What a kept weight is multiplied by.
__host__ __device__ inline double kept_weight(const Attention& args) {
  return args.dropout_p < 1 ? 1 / (1 - args.dropout_p) : 0;
}

// --- whole tiles --------------------------------------------------------------------------------------------------

// Elements of a tile of 16 × 8 · kTiles that count, four bits for each eight columns: which columns of these some row
// of the warp has, as right_of_columns wants it.
template <int kTiles>
__device__ inline uint32_t columns_seen(uint32_t bits) {
  uint32_t columns = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t four = bits >> (4 * n) & 15;
    columns |= ((four | four >> 2) & 3) << (2 * n);
  }
  for (int lanes = 4; lanes < 32; lanes *= 2) columns |= __shfl_xor_sync(~0u, columns, lanes);
  return columns;
}

template <int kTiles>
inline constexpr uint32_t kAllBits = static_cast<uint32_t>((uint64_t{1} << (4 * kTiles)) - 1);

}  // namespace lect11ext::cuda
