#include "autoencoder/cpu/hashing_words.h"
#if defined(CPU_CAPABILITY_AVX512)
#include "autoencoder/cpu/hashing_columns.h"
#endif

#include <algorithm>

#include "common/cpu/scratch.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

struct alignas(64) Room {
  uint8_t bytes[kRoom];
};

// The queries and codes of one work item.
struct Item {
  int64_t query, queries;  // first, and how many
  int64_t code, codes;
  int64_t segment;

  Item(const HammingSearch& args, int64_t number) : segment(number % args.segments) {
    query = number / args.segments * args.block;
    queries = std::min(args.block, args.query.count - query);
    code = segment * args.segment;
    codes = std::max<int64_t>(0, std::min(args.segment, args.codes.count - code));
  }
};

// Gives every code that is nearer than its query's sink's limit to that sink, in ascending order of the index: each
// block of codes to all queries, while it is in the first-level cache.
template <class Bits, class Sink>
void scan_by(const HammingSearch& args, const Item& item, Sink* sinks) {
  Room room;
  Query queries[HammingSearch::kMostQueries];
  uint32_t distances[Bits::kGroup];
  for (int64_t q = 0; q < item.queries; ++q) prepare_query(args.query.row(item.query + q), args.bytes, queries[q]);
  const int64_t size = code_block(args.bytes);
  for (int64_t first = 0; first < item.codes; first += size) {
    const int64_t number = item.code + first;  // of the block's first code
    const Block block = Bits::prepare(args.codes, args.bytes, number, std::min(size, item.codes - first), room.bytes);
    for (int64_t q = 0; q < item.queries; ++q) {
      Sink& sink = sinks[q];
      for (int64_t c = 0; (c = Bits::find(block, queries[q], c, sink.limit)) < block.count; c += Bits::kGroup) {
        const int64_t n = std::min(Bits::kGroup, block.count - c);
        Bits::distances(block, queries[q], c, n, distances);
        for (int64_t i = 0; i < n; ++i) {
          if (distances[i] < sink.limit) sink.take(distances[i], number + c + i);
        }
      }
    }
  }
}

template <class Sink>
void scan(const HammingSearch& args, const Item& item, Sink* sinks) {
#if defined(CPU_CAPABILITY_AVX512)
  args.instruction ? scan_by<Instruction>(args, item, sinks) : scan_by<Table>(args, item, sinks);
#else
  scan_by<Scalar>(args, item, sinks);
#endif
}

template <class Bits>
void all_distances(const HammingDistance& args, int64_t begin, int64_t end) {
  Room room;
  Query query;
  const int64_t size = code_block(args.bytes), blocks = (args.codes.count + size - 1) / size;
  for (int64_t item = begin; item < end; ++item) {
    int64_t first = item % blocks * size, rest = item / blocks;
    const int64_t n = std::min(size, args.codes.count - first);
    const int64_t low = rest % args.query_blocks() * HammingDistance::kQueries;
    const int64_t high = std::min(args.query.count, low + HammingDistance::kQueries);
    const int64_t batch = rest / args.query_blocks();
    CodeRows queries = args.query, codes = args.codes;
    int64_t index = batch;
    for (int d = args.batches.ndim - 1; d >= 0; --d) {
      queries.data += index % args.batches.sizes[d] * args.query_steps[d];
      codes.data += index % args.batches.sizes[d] * args.codes_steps[d];
      index /= args.batches.sizes[d];
    }
    const Block block = Bits::prepare(codes, args.bytes, first, n, room.bytes);
    for (int64_t q = low; q < high; ++q) {
      prepare_query(queries.row(q), args.bytes, query);
      int32_t* out = args.out + (batch * queries.count + q) * codes.count + first;
      Bits::distances(block, query, 0, n, reinterpret_cast<uint32_t*>(out));
    }
  }
}

// The k nearest so far. Distances are small integers, so a count of each tells the k-th smallest, which is the limit:
// a code at the same distance with a higher index is not among the nearest.
struct Nearest {
  uint32_t limit;
  int64_t k;
  int64_t below = 0;  // how many found are nearer than the limit: fewer than k
  uint32_t* counts;   // of the codes found at each distance
  Found* found;       // in ascending order of the index; some of them no longer nearest
  int64_t size = 0, capacity;

  void take(uint32_t distance, int64_t index) {
    found[size++] = Found(distance, index);
    ++counts[distance];
    for (++below; below >= k;) below -= counts[--limit];
    if (size == capacity) compact();
  }

  // Leaves the k nearest, or all where there are fewer.
  void compact() {
    int64_t kept = 0, ties = k - below;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t distance = found[i].distance();
      if (distance > limit || (distance == limit && ties-- <= 0)) continue;
      found[kept++] = found[i];
    }
    size = kept;
  }
};

struct Within {
  uint32_t limit;
  int64_t capacity;
  Found* found;
  int64_t count = 0;

  void take(uint32_t distance, int64_t index) {
    if (count < capacity) found[count] = Found(distance, index);
    ++count;
  }
};

struct Filling {
  uint32_t limit;
  int32_t* distances;
  int64_t* indices;

  void take(uint32_t distance, int64_t index) {
    *distances++ = static_cast<int32_t>(distance);
    *indices++ = index;
  }
};

}  // namespace

void hamming_distance_kernel(const HammingDistance& args, int64_t begin, int64_t end) {
#if defined(CPU_CAPABILITY_AVX512)
  args.instruction ? all_distances<Instruction>(args, begin, end) : all_distances<Table>(args, begin, end);
#else
  all_distances<Scalar>(args, begin, end);
#endif
}

void hamming_topk_kernel(const HammingTopk& args, int64_t begin, int64_t end) {
  const int64_t bins = 8 * args.bytes + 2;
  // One more than a segment has is never full; else compacting, which takes as long as the room is large, is rare.
  const int64_t capacity = std::min(args.segment + 1, 2 * args.k + 64);
  Scratch<uint32_t> counts(args.block * bins);
  Scratch<Found> found(args.block * capacity);
  Nearest sinks[HammingSearch::kMostQueries];
  for (int64_t number = begin; number < end; ++number) {
    const Item item(args, number);
    std::fill(counts + 0, counts + args.block * bins, 0u);
    for (int64_t q = 0; q < item.queries; ++q) {
      sinks[q] = {static_cast<uint32_t>(bins - 1), args.k, 0, counts + q * bins, found + q * capacity, 0, capacity};
    }
    scan(args, item, sinks);
    for (int64_t q = 0; q < item.queries; ++q) {
      sinks[q].compact();
      const int64_t place = (item.query + q) * args.segments + item.segment;
      args.counts[place] = sinks[q].size;
      std::copy(sinks[q].found, sinks[q].found + sinks[q].size, args.found + place * args.k);
    }
  }
}

// Counting sort: what the segments found is in ascending order of the index, and what is counted stays in order.
void hamming_topk_sort_kernel(const HammingTopk& args, int64_t begin, int64_t end) {
  const int64_t bins = 8 * args.bytes + 1;
  Scratch<int64_t> places(bins);
  for (int64_t q = begin; q < end; ++q) {
    std::fill(places + 0, places + bins, int64_t{0});
    const int64_t* counts = args.counts + q * args.segments;
    for (int64_t s = 0; s < args.segments; ++s) {
      const Found* found = args.found + (q * args.segments + s) * args.k;
      for (int64_t i = 0; i < counts[s]; ++i) ++places[found[i].distance()];
    }
    int64_t sum = 0;
    for (int64_t d = 0; d < bins; ++d) {
      const int64_t count = places[d];
      places[d] = sum;
      sum += count;
    }
    for (int64_t s = 0; s < args.segments; ++s) {
      const Found* found = args.found + (q * args.segments + s) * args.k;
      for (int64_t i = 0; i < counts[s]; ++i) {
        const int64_t place = places[found[i].distance()]++;
        if (place >= args.k) continue;
        args.distances[q * args.k + place] = static_cast<int32_t>(found[i].distance());
        args.indices[q * args.k + place] = found[i].index();
      }
    }
  }
}

void hamming_count_kernel(const HammingRadius& args, int64_t begin, int64_t end) {
  Within sinks[HammingSearch::kMostQueries];
  for (int64_t number = begin; number < end; ++number) {
    const Item item(args, number);
    for (int64_t q = 0; q < item.queries; ++q) {
      const int64_t place = (item.query + q) * args.segments + item.segment;
      sinks[q] = {static_cast<uint32_t>(args.limit), args.capacity, args.found + place * args.capacity, 0};
    }
    scan(args, item, sinks);
    for (int64_t q = 0; q < item.queries; ++q) {
      args.counts[(item.query + q) * args.segments + item.segment] = sinks[q].count;
    }
  }
}

void hamming_fill_kernel(const HammingRadius& args, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const Item item(args, number);
    for (int64_t q = 0; q < item.queries; ++q) {
      const int64_t place = (item.query + q) * args.segments + item.segment;
      Filling sink{static_cast<uint32_t>(args.limit), args.distances + args.starts[place],
                   args.indices + args.starts[place]};
      if (args.counts[place] > args.capacity) {
        Item alone = item;
        alone.query += q;
        alone.queries = 1;
        scan(args, alone, &sink);
        continue;
      }
      const Found* found = args.found + place * args.capacity;
      for (int64_t i = 0; i < args.counts[place]; ++i) sink.take(found[i].distance(), found[i].index());
    }
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
