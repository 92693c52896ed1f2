// From products of queries and keys to scores: windows, masks, softcap, ALiBi, and the noise of dropout.
#pragma once

#include <cmath>

#include "attention/cuda/dot_product_tile.cuh"
#include "common/philox.h"

namespace lect11ext::cuda {

inline constexpr double kLog2E = 1.4426950408889634074;
// Of fewer positions than these distances, and differences of two, are exact in floats.
inline constexpr int kExactDistances = 1 << 23;

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

// That a score exceeds its row's lse by, at most: by what it was rounded otherwise where the lse was found, which of a
// huge score would be a factor of any size.
inline constexpr float kMostExcess = 0.5f;

// NaN stays.
__device__ inline double at_most(double x, double bound) { return x > bound ? bound : x; }
__device__ inline float at_most(float x, float bound) {
#if defined(__CUDA_ARCH__)
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(bound));
  return least;
#else
  return x > bound ? bound : x;
#endif
}

// Of a score less its row's lse.
template <class C>
__device__ inline C weight_of(C excess) {
  return power_of_two(at_most(excess, C(kMostExcess)) * C(kLog2E));
}

// tanh, of the difference from 1: its error is 1e-7, however small the result. Times a softcap of no more than
// kQuickSoftcap that is far below what a score of 16 bits is rounded to.
inline constexpr double kQuickSoftcap = 256;
__device__ inline float quick_tanh(float x) {
  return 1.0f - 2.0f * reciprocal(1.0f + power_of_two(x * static_cast<float>(2 * kLog2E)));
}

inline int64_t mask_bytes(const Attention& args) {
  if (args.mask.type == MaskType::Bool) return 1;
  return args.mask.type == MaskType::Float ? 4 : args.dtype == DType::Float ? 4 : args.dtype == DType::Double ? 8 : 2;
}

// Whether neighbouring elements of the mask along dimension `along` may be read as one, if the first is an even one.
inline bool mask_pairs(const Attention& args, int along) {
  const AttentionMask& mask = args.mask;
  const int64_t size = along == 2 ? args.queries : args.keys;
  bool pairs = mask.type != MaskType::None && mask.strides[along] == 1 && size % 2 == 0 &&
               reinterpret_cast<uintptr_t>(mask.data) % static_cast<uintptr_t>(2 * mask_bytes(args)) == 0;
  for (int d = 0; d < 4; ++d) pairs = pairs && (d == along || mask.strides[d] % 2 == 0);
  return pairs;
}

// What a lane has of a row of a tile: elements n, e of column 8n + e, counted from the lane's first one. The row is a
// query and the columns keys, or the other way round.
struct LaneRow {
  int low, high;  // the window: columns that count, both included
  int64_t mask;   // offset of the mask's element of column 0
  int room;       // columns that there are from the lane's first on
  int distance;   // of column c from the diagonal: |distance − c|
  float slope;    // of ALiBi
};

// The kernels' arguments and a sequence; queries and keys are counted within it. kKeysAreRows: of a tile.
template <class S, bool kKeysAreRows = false>
struct Scores {
  using C = Compute<S>;

  const Attention& args;
  const Sequence& sequence;
  bool pairs;  // of the mask, along columns

  // Of a query and a key, one of which is the row, and the other the lane's first column.
  __device__ LaneRow row(int head, int query, int key) const {
    LaneRow row{};
    const int first = query + sequence.diagonal - sequence.left, last = query + sequence.diagonal + sequence.right;
    if constexpr (kKeysAreRows) {
      row.low = key - sequence.diagonal - sequence.right - query;
      row.high = std::min(key - sequence.diagonal + sequence.left, sequence.queries - 1) - query;
      if (key >= sequence.keys) row.high = row.low - 1;
      row.room = key < sequence.keys ? sequence.queries - query : 0;
      row.distance = key - sequence.diagonal - query;
    } else {
      row.low = first - key;
      row.high = std::min(last, sequence.keys - 1) - key;
      if (query >= sequence.queries) row.high = row.low - 1;
      row.room = query < sequence.queries ? sequence.keys - key : 0;
      row.distance = query + sequence.diagonal - key;
    }
    row.mask = mask_offset(args.mask, head, query, key);
    row.slope = 0;
    if (args.alibi_slopes != nullptr) {
      row.slope = args.alibi_slopes[sequence.batch * args.alibi_strides[0] + head * args.alibi_strides[1]];
    }
    return row;
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

  // --- who sees whom: bit 2n + e for an element of a row

  template <int kTiles>
  __device__ static uint32_t in_window(const LaneRow& row) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int column = i / 2 * 8 + i % 2;
      if (column >= row.low && column <= row.high) bits |= 1u << i;
    }
    return bits;
  }

  // kOfBool: the mask, if there is one, is known to be a bool.
  template <int kTiles, bool kOfBool = false>
  __device__ uint32_t seen(const LaneRow& row) const {
    const uint32_t window = in_window<kTiles>(row);
    if (args.mask.type == MaskType::None) return window;
    uint32_t bits = window;
    if (kOfBool || args.mask.type == MaskType::Bool) {
      each_of_mask<kTiles, uint8_t>(row, window, [&](int i, uint8_t x) { bits &= x != 0 ? ~0u : ~(1u << i); });
    } else {
      each_added<kTiles>(row, window, [&](int i, C x) { bits &= x != -infinity<C>() ? ~0u : ~(1u << i); });
    }
    return bits;
  }

  // --- scores

  // Of a row, at first its products, at last its scores where `bits` says so. element(i) gives number i; keep(i, x)
  // takes u / softcap where there is a softcap.
  template <int kTiles, class Element, class Keep>
  __device__ void finish(const LaneRow& row, uint32_t bits, Element element, Keep keep) const {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) element(i) = rounded_product(element(i), C(args.scale));
    if (args.softcap != 0) {
      const C limit = C(args.softcap), inverse = C(1) / limit;
      const auto cap = [&](auto capped_of) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          const C capped = capped_of(element(i));
          keep(i, capped);
          element(i) = rounded_product(limit, capped);
        }
      };
      if (kIsHalf<S> && args.softcap <= kQuickSoftcap) cap([&](C x) { return C(quick_tanh(x * inverse)); });
      else cap([&](C x) { return std::tanh(x / limit); });
    }
    if (args.alibi_slopes != nullptr) {
      const auto add = [&](auto distance) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          element(i) = std::fma(-C(row.slope), std::abs(distance(i / 2 * 8 + i % 2)), element(i));
        }
      };
      const C first = C(row.distance);
      if (sequence.queries < kExactDistances && sequence.keys < kExactDistances)
        add([&](int column) { return first - C(column); });
      else add([&](int column) { return C(row.distance - column); });
    }
    if (args.mask.type > MaskType::Bool) each_added<kTiles>(row, bits, [&](int i, C x) { element(i) += x; });
  }

 private:
  // f(i, x) for the mask's elements of a row that `bits` names, if any, and perhaps for others. Where all of the row is
  // there, all is read before any is used.
  template <int kTiles, class T, class F>
  __device__ void each_of_mask(const LaneRow& row, uint32_t bits, F f) const {
    if (bits == 0) return;
    const T* const at = static_cast<const T*>(args.mask.data) + row.mask;
    const bool all = row.room > 8 * (kTiles - 1) + 1;
    if (pairs && all) {
      Pack<T, 2> words[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) words[n] = Pack<T, 2>::load(at + 8 * n);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) f(i, words[i / 2].data[i % 2]);
      return;
    }
    const int64_t step = args.mask.strides[kKeysAreRows ? 2 : 3];
    const auto number = [&](int i) { return at[(i / 2 * 8 + i % 2) * step]; };
    if (all) {
      T words[2 * kTiles];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) words[i] = number(i);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) f(i, words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if ((bits >> i & 1) != 0) f(i, number(i));
      }
    }
  }

  template <int kTiles, class F>
  __device__ void each_added(const LaneRow& row, uint32_t bits, F f) const {
    if (args.mask.type == MaskType::Float) each_of_mask<kTiles, float>(row, bits, f);
    else each_of_mask<kTiles, S>(row, bits, [&](int i, S x) { f(i, from_storage<C>(x)); });
  }
};

// --- dropout ------------------------------------------------------------------------------------------------------

// What dropout leaves of two tiles of 16 × 8 side by side, found by whole warps: each block, eight keys of a query, is
// drawn once.
class Dropout {
 public:
  __device__ Dropout(const Attention& args, const Sequence& sequence) {
    if (args.dropout_p <= 0) return;
    seed_ = static_cast<uint64_t>(args.dropout_key[0]);
    blocks_of_row_ = (static_cast<uint64_t>(args.keys) + kDropoutBlock - 1) / kDropoutBlock;
    queries_ = args.queries;
    first_ = static_cast<uint64_t>(args.dropout_key[1]) +
             static_cast<uint64_t>(sequence.batch * args.heads * queries_ + sequence.first_query) * blocks_of_row_;
    threshold_ = dropout_threshold(args.dropout_p);
  }

  // Where a lane draws, as far as the keys go: of four lanes that share two rows, `low` and `high`, and two tiles each
  // draws the block of one row and one tile.
  template <class Lane>
  __device__ uint64_t place(int low_head, int low, int high_head, int high, const Lane& lane) const {
    return lane.q % 2 == 0 ? place(low_head, low, lane.q / 2 * 8) : place(high_head, high, lane.q / 2 * 8);
  }

  // Of the lane's eight elements, tile by tile, a word a row, with a half for each of its two keys.
  template <class Lane>
  __device__ void draw(uint32_t (&words)[4], uint64_t place, int first_key, const Lane& lane) const {
    const PhiloxBlock mine = philox(seed_, place + static_cast<uint64_t>(first_key / kDropoutBlock));
    // Lane q has a block, and needs word q of each: two steps, in which half of what a lane has changes hands.
    const bool odd = lane.q % 2 != 0, upper = lane.q / 2 != 0;
    uint32_t pairs[4];
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      const uint32_t other = __shfl_xor_sync(~0u, odd ? mine.x[w] : mine.x[w + 1], 1);
      pairs[w] = odd ? other : mine.x[w];
      pairs[w + 1] = odd ? mine.x[w + 1] : other;
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t other = __shfl_xor_sync(~0u, upper ? pairs[b] : pairs[2 + b], 2);
      words[b] = upper ? other : pairs[b];
      words[2 + b] = upper ? pairs[2 + b] : other;
    }
  }
  __device__ bool keeps(uint32_t word, int half) const { return (word >> (16 * half) & 0xFFFF) >= threshold_; }

  // Eight bits, one for each element of the lane: rows are queries `low` and `high`, columns keys from `first_key` on.
  template <class Lane>
  __device__ uint32_t keep_of_queries(int head, int low, int high, int first_key, const Lane& lane) const {
    uint32_t of[4], keep = 0;
    draw(of, place(head, low, head, high, lane), first_key, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) keep |= keeps(of[i / 2], i % 2) ? 1u << i : 0;
    return keep;
  }

  // The same where rows are keys from `first_key` on, a multiple of sixteen, and columns queries from `first_query` on.
  template <class Lane>
  __device__ uint32_t keep_of_keys(int head, int first_query, int first_key, const Lane& lane) const {
    // Of the eight lanes that have the same queries, four, and all sixteen keys, each draws one of the eight blocks, in
    // the order of the elements, and all learn of all: a byte a block, of which a lane needs the bit of its key.
    const int query = first_query + lane.g / 4 * 8 + 2 * lane.q + lane.g % 2;
    const PhiloxBlock mine = philox(seed_, place(head, query, first_key + lane.g / 2 % 2 * 8));
    uint32_t drawn = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) drawn |= keeps(mine.x[i / 2], i % 2) ? 1u << i : 0;
    drawn <<= 8 * (lane.g % 4);
    drawn |= __shfl_xor_sync(~0u, drawn, 4);
    drawn |= __shfl_xor_sync(~0u, drawn, 8);
    const uint32_t other = __shfl_xor_sync(~0u, drawn, 16);
    const bool first = lane.g < 4;
    return own_bits(first ? drawn : other, lane.g) | own_bits(first ? other : drawn, lane.g) << 4;
  }

 private:
  // Bit g of each of four bytes, side by side.
  __device__ static uint32_t own_bits(uint32_t bytes, int g) { return ((bytes >> g & 0x01010101) * 0x10204080) >> 28; }

  __device__ uint64_t place(int head, int query, int key) const {
    return first_ + static_cast<uint64_t>(head * queries_ + query) * blocks_of_row_ +
           static_cast<uint64_t>(key / kDropoutBlock);
  }

  int64_t queries_ = 0;
  uint64_t seed_ = 0, first_ = 0, blocks_of_row_ = 0;
  uint32_t threshold_ = 0;
};

// Whether scores are products times a positive scale, some of them barred, but for what ALiBi takes.
inline bool scores_are_sloped_products(const Attention& args) {
  constexpr double kLeastScale = 1e-30;  // one that a float holds
  return args.mask.type <= MaskType::Bool && args.softcap == 0 && args.scale > kLeastScale;
}

// The same without ALiBi and a mask, and nothing is dropped.
inline bool is_plain(const Attention& args) {
  return scores_are_sloped_products(args) && args.alibi_slopes == nullptr && args.mask.type == MaskType::None &&
         args.dropout_p <= 0;
}

// What is dropped of weights becomes zero: rows are queries, the lane's are `low` and `high`.
template <int kTiles, class C, class Lane>
__device__ inline void drop_weights(C (&weights)[kTiles][4], const Dropout& dropout, int low_head, int low,
                                    int high_head, int high, int first_key, const Lane& lane) {
  const uint64_t place = dropout.place(low_head, low, high_head, high, lane);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    uint32_t words[4];
    dropout.draw(words, place, first_key + 8 * n, lane);
#pragma unroll
    for (int i = 0; i < 8 && n + i / 4 < kTiles; ++i) {
      C& weight = weights[n + i / 4][i % 4];
      weight = dropout.keeps(words[i / 2], i % 2) ? weight : C(0);
    }
  }
}

// --- whole tiles --------------------------------------------------------------------------------------------------

// Of the bits of rows, two for every eight columns: which columns some row of the warp has, as right_of_columns wants
// it.
__device__ inline uint32_t columns_seen(uint32_t bits) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) bits |= __shfl_xor_sync(~0u, bits, lanes);
  return bits;
}

}  // namespace lect11ext::cuda
