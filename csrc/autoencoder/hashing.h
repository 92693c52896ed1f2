// Semantic hashing (Salakhutdinov & Hinton 2009): binary codes of the values of saturated units, packed into bytes, and
// look-up by the number of bits in which codes differ, their Hamming distance.
//
// A packed code has the layout of numpy.packbits and of faiss's binary indexes: bit i of a code is the bit of value
// 128 >> i % 8 of byte i / 8, and the bits behind the last one are zero.
#pragma once

#include "common/capability.h"
#include "common/view.h"

namespace lect11ext {

// --- from values to codes and back --------------------------------------------------------------------------------

// 1 where an element is above the threshold, NaN where it is NaN, else 0.
struct Binarize {
  static constexpr int64_t kTile = 1024;  // elements of a work item

  Shape shape;
  View input;        // read
  double threshold;  // a number of the input's type
  void* out;         // written: dense, of the input's type

  int64_t tiles() const { return (shape.numel + kTile - 1) / kTile; }
};

struct PackBits {
  int64_t rows, columns;  // work items, and bits of a code
  Shape shape;            // of the input, row-major: element number row·columns + column; only with `input`
  View input;             // read: the bit is set where an element is above the threshold. Or, where data is null,
  const uint8_t* bits;    // read: rows × columns bytes, dense; the bit is set where the byte is not zero
  double threshold;       // a number of the input's type
  uint8_t* codes;         // written: rows × bytes(), dense

  constexpr int64_t bytes() const { return (columns + 7) / 8; }
};

// The values 0 and 1 as numbers of any type, given by how one looks.
struct UnpackBits {
  int64_t rows, columns;  // work items, and bits wanted of a code
  int64_t bytes;          // of a code; columns ≤ 8·bytes
  const uint8_t* codes;   // read: rows × bytes, dense
  uint64_t one;           // the pattern of 1
  int64_t item_size;      // 1, 2, 4 or 8 bytes
  void* out;              // written: rows × columns, dense
};

LECT11EXT_CPU_KERNEL(binarize_kernel, Binarize)
LECT11EXT_CPU_KERNEL(pack_bits_kernel, PackBits)
LECT11EXT_CPU_KERNEL(unpack_bits_kernel, UnpackBits)

// --- look-up ------------------------------------------------------------------------------------------------------

// Distances of longer codes do not fit the 16 bits that they are kept in.
inline constexpr int64_t kMostCodeBytes = 8191;

// Rows of packed codes, each of dense bytes.
struct CodeRows {
  const uint8_t* data;
  int64_t count;
  int64_t stride;  // from row to row, in bytes

  const uint8_t* row(int64_t i) const { return data + i * stride; }
};

// All distances of a batch of queries and codes.
struct HammingDistance {
  // A work item is one element of the batch, some queries and as many codes as stay in the first-level cache.
  static constexpr int64_t kQueries = 64;

  bool instruction;  // as in HammingSearch
  int64_t bytes;
  Shape batches;                  // dimensions not merged; numel of 1 where there are none
  CodeRows query, codes;          // of the batch's first element
  int64_t query_steps[kMaxDims];  // from element to element of the batch, in bytes; 0 where broadcast
  int64_t codes_steps[kMaxDims];
  int32_t* out;  // written: batches × queries × codes, dense

  int64_t query_blocks() const { return (query.count + kQueries - 1) / kQueries; }
};

// What both searches share. A work item is a block of queries against a segment of the codes.
struct HammingSearch {
  // The searches' results are the same for any blocks and segments.
  static constexpr int64_t kMostQueries = 64;

  bool instruction;  // whether AVX-512 builds may count bits by VPOPCNTDQ, which not all of their processors have
  int64_t bytes;
  CodeRows query, codes;
  int64_t block;     // queries of an item, at most kMostQueries
  int64_t segment;   // codes of an item
  int64_t segments;  // at least 1

  int64_t blocks() const { return (query.count + block - 1) / block; }
  int64_t items() const { return blocks() * segments; }
};

// A code that was found, in 64 bits: its number in the upper 48, its distance in the lower 16.
struct Found {
  uint64_t word;

  static constexpr int kDistanceBits = 16;

  Found() = default;
  Found(uint32_t distance, int64_t index) : word(static_cast<uint64_t>(index) << kDistanceBits | distance) {}
  uint32_t distance() const { return static_cast<uint32_t>(word & 0xFFFF); }
  int64_t index() const { return static_cast<int64_t>(word >> kDistanceBits); }
};

// The k nearest, ascending by distance and, where that is the same, by index. k ≥ 1.
struct HammingTopk : HammingSearch {
  int64_t k;
  Found* found;        // scratch: queries × segments × k, of each segment its k nearest in ascending order of the index
  int64_t* counts;     // scratch: queries × segments, how many these are
  int32_t* distances;  // written: queries × k
  int64_t* indices;    // written: queries × k
};

// All within a radius, in ascending order of the index.
struct HammingRadius : HammingSearch {
  int64_t limit;          // radius + 1, at most 8·bytes + 1
  int64_t capacity;       // the first so many of each segment are kept by the count, so that it need not be read again
  Found* found;           // scratch: queries × segments × capacity
  int64_t* counts;        // queries × segments: written by the count, read by the fill
  const int64_t* starts;  // queries × segments, read by the fill: where a segment's results begin
  int32_t* distances;     // written by the fill
  int64_t* indices;       // written by the fill
};

LECT11EXT_CPU_KERNEL(hamming_distance_kernel, HammingDistance)  // items: batches × blocks of queries × blocks of codes
LECT11EXT_CPU_KERNEL(hamming_topk_kernel, HammingTopk)          // items()
LECT11EXT_CPU_KERNEL(hamming_topk_sort_kernel, HammingTopk)     // queries
LECT11EXT_CPU_KERNEL(hamming_count_kernel, HammingRadius)       // items()
LECT11EXT_CPU_KERNEL(hamming_fill_kernel, HammingRadius)        // items()

// Codes of an item of hamming_distance: 16 KiB of them, in whole groups of 64.
inline int64_t code_block(int64_t bytes) {
  constexpr int64_t kBytes = 16384, kGroup = 64;
  const int64_t rows = kBytes / (bytes > 4 ? (bytes + 7) / 8 * 8 : 4) / kGroup * kGroup;
  return rows > kGroup ? rows : kGroup;
}

// --- CUDA ---------------------------------------------------------------------------------------------------------

// Both searches go over the codes twice: a count in each segment, from which follows what is taken of it and where that
// goes, and a fill in ascending order of the index of those segments that have something.
struct HammingCudaSearch {
  int64_t bytes;
  CodeRows query, codes;
  int64_t segment, segments;

  // Enough segments to fill the device, of enough codes that what goes with a segment is little.
  void divide() {
    constexpr int64_t kBlocks = 1024, kSharing = 8, kLeastCodes = 4096,
                      kMostCodes = int64_t{1} << 30;  // int32_t counts
    const int64_t wanted =
        (kBlocks + query.count - 1) / query.count * (query.count < kSharing ? query.count : kSharing);
    const int64_t even = (codes.count + wanted - 1) / wanted;
    segment = even < kLeastCodes ? kLeastCodes : even > kMostCodes ? kMostCodes : even;
    segments = codes.count > segment ? (codes.count + segment - 1) / segment : 1;
  }
};

// How many codes there are at each distance: at those that are not beyond the k-th nearest of the query, while the
// counts at others are anything.
struct HammingHistogram : HammingCudaSearch {
  int64_t k;
  int32_t* counts;  // written: queries × segments × bins(), zero at first
  int64_t* totals;  // written: queries × bins(), sums over the segments; zero at first

  constexpr int64_t bins() const { return 8 * bytes + 1; }
};

// From the histograms to what a query takes of each segment for its k nearest: all below a limit, and of those at it as
// many as are left, in ascending order of the index.
struct HammingPlan {
  int64_t queries, segments, bins, k;
  const int32_t* counts;  // read: queries × segments × bins
  const int64_t* totals;  // read: queries × bins
  int32_t* limits;        // written: queries
  int64_t* starts;        // written: queries × segments, where a segment's results begin, and where the last ones end
  int64_t* ties;          // written: queries × segments, how many are taken at the limit
};

struct HammingCount : HammingCudaSearch {
  int32_t limit;
  int64_t* counts;  // written: queries × segments, how many are below the limit
};

struct HammingFill : HammingCudaSearch {
  int32_t limit;          // of all queries, where `limits` is null
  const int32_t* limits;  // read: queries
  const int64_t* starts;  // read: queries × segments + 1
  const int64_t* ties;    // read: queries × segments; null where nothing is taken at the limit
  int32_t* distances;     // written
  int64_t* indices;       // written
};

}  // namespace lect11ext

// The CUDA kernels: they run on the current device, in order on `stream`, a cudaStream_t.
namespace lect11ext::cuda {

void binarize(const Binarize& args, void* stream);
void pack_bits(const PackBits& args, void* stream);
void unpack_bits(const UnpackBits& args, void* stream);
void hamming_distance(const HammingDistance& args, void* stream);
void hamming_histogram(const HammingHistogram& args, void* stream);
void hamming_plan(const HammingPlan& args, void* stream);
void hamming_count(const HammingCount& args, void* stream);
void hamming_fill(const HammingFill& args, void* stream);

}  // namespace lect11ext::cuda
