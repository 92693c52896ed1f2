#include "autoencoder/hashing.h"

#include "autoencoder/cuda/hashing_codes.cuh"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// --- all pairs ----------------------------------------------------------------------------------------------------

constexpr int kTileQueries = 16;
constexpr int kTileWords = 32;  // of 16 queries: 2 KiB of shared memory

// A block of threads takes one code a thread against a tile of queries: what is read of a code serves all of them.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads) distance_kernel(HammingDistance args, int64_t query_tiles) {
  __shared__ uint32_t tile[kTileQueries][kTileWords];
  const int64_t batch = blockIdx.x / query_tiles, low = blockIdx.x % query_tiles * kTileQueries;
  int64_t query_offset = 0, codes_offset = 0, rest = batch;
  for (int d = args.batches.ndim - 1; d >= 0; --d) {
    const int64_t outer = divide(rest, args.batches.sizes[d]), index = rest - outer * args.batches.sizes[d];
    query_offset += index * args.query_steps[d];
    codes_offset += index * args.codes_steps[d];
    rest = outer;
  }
  const int queries = static_cast<int>(args.query.count - low < kTileQueries ? args.query.count - low : kTileQueries);
  const int64_t words = words_of(args.bytes);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads; first < args.codes.count;
       first += static_cast<int64_t>(gridDim.y) * kThreads) {
    const int64_t code = first + threadIdx.x;
    const bool here = code < args.codes.count;
    const uint8_t* row = args.codes.data + codes_offset + (here ? code : 0) * args.codes.stride;
    int sums[kTileQueries] = {};
    for (int64_t word = 0; word < words; word += kTileWords) {
      const int count = static_cast<int>(words - word < kTileWords ? words - word : kTileWords);
      __syncthreads();  // the tile before this one has been used
      for (int i = threadIdx.x; i < kTileQueries * kTileWords; i += kThreads) {
        const int q = i / kTileWords, w = i % kTileWords;
        const uint8_t* from = args.query.data + query_offset + (low + q) * args.query.stride;
        tile[q][w] = q < queries && w < count ? load_word<false>(from, args.bytes, word + w) : 0;
      }
      __syncthreads();
      for (int w = 0; w < count; ++w) {
        const uint32_t bits = load_word<Aligned>(row, args.bytes, word + w);
#pragma unroll
        for (int q = 0; q < kTileQueries; ++q) sums[q] += __popc(tile[q][w] ^ bits);
      }
    }
    int32_t* out = args.out + (batch * args.query.count + low) * args.codes.count + code;
#pragma unroll
    for (int q = 0; q < kTileQueries; ++q) {
      if (here && q < queries) out[q * args.codes.count] = sums[q];
    }
  }
}

// --- searches -----------------------------------------------------------------------------------------------------

constexpr int kTogether = 4;  // codes whose loads a thread has under way

// Calls f(codes, first) for kTogether codes of each thread, which lie kThreads apart; those beyond the segment are not
// loaded.
template <int kWords, class F>
__device__ inline void for_codes(const HammingCudaSearch& args, int64_t begin, int64_t end, F f) {
  for (int64_t first = begin; first < end; first += kTogether * kThreads) {
    Code<kWords> codes[kTogether] = {};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int64_t number = first + j * kThreads + threadIdx.x;
      if (number < end) codes[j] = Code<kWords>::load(args.codes, args.bytes, number);
    }
    f(codes, first);
  }
}

__device__ inline int64_t segment_end(const HammingCudaSearch& args, int64_t segment) {
  const int64_t end = (segment + 1) * args.segment;
  return end < args.codes.count ? end : args.codes.count;
}

__device__ inline void load_query(const HammingCudaSearch& args, int64_t query, uint32_t* words) {
  const uint8_t* from = args.query.data + query * args.query.stride;
  for (int64_t w = threadIdx.x; w < words_of(args.bytes); w += kThreads)
    words[w] = load_word<false>(from, args.bytes, w);
}

// A block of threads takes one query and one segment of the codes. The query's words come first in shared memory.
struct Place {
  int64_t query, first, last;
  uint32_t* words;
  int64_t number;  // of the pair
};

__device__ inline Place enter(const HammingCudaSearch& args, uint32_t* shared) {
  Place place;
  place.number = blockIdx.x;
  place.query = divide(blockIdx.x, args.segments);
  const int64_t segment = blockIdx.x - place.query * args.segments;
  place.first = segment * args.segment;
  place.last = segment_end(args, segment);
  place.words = shared;
  load_query(args, place.query, shared);
  __syncthreads();
  return place;
}

// The distance within which `k` of a histogram's codes lie; all distances where there are not as many. By a warp.
__device__ inline int bound_of(const int32_t* counts, int bins, int64_t k) {
  const int lane = threadIdx.x % kWarp;
  int64_t below = 0;
  for (int base = 0; base < bins; base += kWarp) {
    int64_t up_to = base + lane < bins ? counts[base + lane] : 0;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0u, up_to, distance);
      if (lane >= distance) up_to += other;
    }
    const unsigned reached = __ballot_sync(~0u, below + up_to >= k);
    if (reached != 0) return base + kWarp - __popc(reached);
    below += __shfl_sync(~0u, up_to, kWarp - 1);
  }
  return bins;
}

constexpr int kGroup = kWarps;  // queries that share the reading of codes, at most

// Integer sums: the same whatever the order of the additions. A block takes some queries and a segment. From its first
// codes it knows a distance within which there are k, and counts only what is as near afterwards: a few of the codes,
// where all of them would wait for one another, since most random codes have one of few distances.
template <int kWords>
__global__ void __launch_bounds__(kThreads) histogram_kernel(HammingHistogram args, int group, bool fits) {
  __shared__ int bounds[kGroup];
  uint32_t* const words = reinterpret_cast<uint32_t*>(dynamic_shared);
  const bool in_shared = kWords > 0 || fits;  // known to the compiler where it matters
  const int bins = static_cast<int>(args.bins()), per_code = static_cast<int>(words_of(args.bytes));
  const int64_t which = divide(blockIdx.x, args.segments), segment = blockIdx.x - which * args.segments;
  const int64_t query = which * group, of_query = args.segments * bins;
  const int queries = static_cast<int>(args.query.count - query < group ? args.query.count - query : group);
  int32_t* const counts = args.counts + (query * args.segments + segment) * bins;
  int32_t* const shared = reinterpret_cast<int32_t*>(words + group * per_code);
  for (int q = 0; q < queries; ++q) load_query(args, query + q, words + q * per_code);
  for (int i = threadIdx.x; in_shared && i < queries * bins; i += kThreads) shared[i] = 0;
  if (threadIdx.x < kGroup) bounds[threadIdx.x] = bins;
  __syncthreads();
  const int64_t begin = segment * args.segment, end = segment_end(args, segment);
  for_codes<kWords>(args, begin, end, [&](const Code<kWords>* codes, int64_t first) {
    for (int q = 0; q < queries; ++q) {
      const auto own = Code<kWords>::in_registers(words + q * per_code);
      const int bound = bounds[q];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (first + j * kThreads + threadIdx.x >= end) break;
        const int d = codes[j].distance(own.data);
        if (d > bound) continue;
        if (in_shared) atomicAdd(shared + q * bins + d, 1);
        else atomicAdd(counts + q * of_query + d, 1);
      }
    }
    if (!in_shared || first != begin) return;
    __syncthreads();
    const int warp = threadIdx.x / kWarp;
    if (warp < queries) {
      const int bound = bound_of(shared + warp * bins, bins, args.k);
      if (threadIdx.x % kWarp == 0) bounds[warp] = bound;
    }
    __syncthreads();
  });
  __syncthreads();
  for (int q = 0; q < queries; ++q) {
    for (int i = threadIdx.x; i < bins; i += kThreads) {
      const int32_t count = in_shared ? shared[q * bins + i] : __ldcg(counts + q * of_query + i);
      if (in_shared) counts[q * of_query + i] = count;
      // Above the bound the count is that of the first codes only; what is sought lies at it, or below.
      if (count == 0 || i > bounds[q]) continue;
      atomicAdd(reinterpret_cast<unsigned long long*>(args.totals + (query + q) * bins + i),
                static_cast<unsigned long long>(count));
    }
  }
}

// The sum of the values of the threads up to this one, and of all.
struct Sums {
  int64_t up_to, all;
};

__device__ inline Sums sums_of(int64_t value, int64_t* warp_sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Sums sums{value, 0};
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(~0u, sums.up_to, distance);
    if (lane >= distance) sums.up_to += other;
  }
  __syncthreads();  // the sums before have been read
  if (lane == kWarp - 1) warp_sums[warp] = sums.up_to;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) sums.up_to += warp_sums[w];
    sums.all += warp_sums[w];
  }
  return sums;
}

// One block a query: the limit, and the sums that precede each segment's results.
__global__ void __launch_bounds__(kThreads) plan_kernel(HammingPlan args) {
  __shared__ int64_t warp_sums[kWarps];
  __shared__ int nearest, limit;
  __shared__ int64_t below_limit;
  const int64_t query = blockIdx.x;
  const int32_t* counts = args.counts + query * args.segments * args.bins;
  const int64_t* totals = args.totals + query * args.bins;
  if (threadIdx.x == 0) nearest = 0;
  // The first bin that is not empty, and that in which the k-th code is.
  int64_t below = 0;
  for (int64_t base = 0; base < args.bins && below < args.k; base += kThreads) {
    const int64_t bin = base + threadIdx.x, here = bin < args.bins ? totals[bin] : 0;
    const Sums sums = sums_of(here, warp_sums);
    const int64_t up_to = below + sums.up_to, before = up_to - here;
    if (here > 0 && before == 0) nearest = static_cast<int>(bin);
    if (before < args.k && args.k <= up_to) {
      limit = static_cast<int>(bin);
      below_limit = before;
      args.limits[query] = limit;
    }
    below += sums.all;
  }
  __syncthreads();
  int64_t start = query * args.k, left = args.k - below_limit;  // of the segments that come next
  for (int64_t base = 0; base < args.segments; base += kThreads) {
    const int64_t segment = base + threadIdx.x, place = query * args.segments + segment;
    int64_t nearer = 0, at_limit = 0;
    if (segment < args.segments) {
      for (int bin = nearest; bin < limit; ++bin) nearer += counts[segment * args.bins + bin];
      at_limit = counts[segment * args.bins + limit];
    }
    const Sums of_nearer = sums_of(nearer, warp_sums), of_limit = sums_of(at_limit, warp_sums);
    const int64_t ties_before = of_limit.up_to - at_limit < left ? of_limit.up_to - at_limit : left;
    if (segment < args.segments) {
      args.starts[place] = start + of_nearer.up_to - nearer + ties_before;
      args.ties[place] = at_limit < left - ties_before ? at_limit : left - ties_before;
    }
    const int64_t ties = of_limit.all < left ? of_limit.all : left;
    start += of_nearer.all + ties;
    left -= ties;
  }
  if (threadIdx.x == 0 && query == args.queries - 1) args.starts[args.queries * args.segments] = start;
}

template <int kWords>
__global__ void __launch_bounds__(kThreads) count_kernel(HammingCount args) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  const Place place = enter(args, reinterpret_cast<uint32_t*>(dynamic_shared));
  unsigned long long count = 0;
  for_codes<kWords>(args, place.first, place.last, [&](const Code<kWords>* codes, int64_t first) {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const bool here = first + j * kThreads + threadIdx.x < place.last;
      count += here && codes[j].distance(place.words) < args.limit;
    }
  });
  atomicAdd(&total, count);
  __syncthreads();
  if (threadIdx.x == 0) args.counts[place.number] = static_cast<int64_t>(total);
}

// In ascending order of the index: a warp's lanes by a ballot, the block's warps by their sums. Codes at the limit are
// numbered apart, for only the first of them are taken; where they go follows from how many of both kinds came before.
template <int kWords>
__global__ void __launch_bounds__(kThreads) fill_kernel(HammingFill args) {
  __shared__ int below_of[kWarps], ties_of[kWarps];
  const int64_t start = args.starts[blockIdx.x], found = args.starts[blockIdx.x + 1] - start;
  if (found == 0) return;  // most segments, where few codes are wanted
  const Place place = enter(args, reinterpret_cast<uint32_t*>(dynamic_shared));
  const int limit = args.limits != nullptr ? args.limits[place.query] : args.limit;
  const int64_t most_ties = args.ties != nullptr ? args.ties[place.number] : 0;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned before = (1u << lane) - 1;
  int64_t below = 0, ties = 0;  // so far
  for_codes<kWords>(args, place.first, place.last, [&](const Code<kWords>* codes, int64_t first) {
    if (below + (ties < most_ties ? ties : most_ties) == found) return;
    int distances[kTogether];
    int near = 0;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const bool here = first + j * kThreads + threadIdx.x < place.last;
      distances[j] = here ? codes[j].distance(place.words) : limit + 1;
      near += distances[j] <= limit;
    }
    if (__syncthreads_count(near) == 0) return;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int d = distances[j];
      const bool is_below = d < limit, is_tie = d == limit;
      const unsigned below_lanes = __ballot_sync(~0u, is_below), tie_lanes = __ballot_sync(~0u, is_tie);
      if (lane == 0) {
        below_of[warp] = __popc(below_lanes);
        ties_of[warp] = __popc(tie_lanes);
      }
      __syncthreads();
      int64_t my_below = below + __popc(below_lanes & before), my_ties = ties + __popc(tie_lanes & before);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) {
          my_below += below_of[w];
          my_ties += ties_of[w];
        }
        below += below_of[w];
        ties += ties_of[w];
      }
      if (is_below || (is_tie && my_ties < most_ties)) {
        const int64_t to = start + my_below + (my_ties < most_ties ? my_ties : most_ties);
        args.distances[to] = d;
        args.indices[to] = first + j * kThreads + threadIdx.x;
      }
      __syncthreads();  // the sums have been read
    }
  });
}

unsigned pairs(const HammingCudaSearch& args) { return grid_size(args.query.count * args.segments); }
// Up to a multiple of sixteen: the compiler reads up to three words that a code does not have, to use none of them.
size_t query_bytes(const HammingCudaSearch& args) {
  constexpr int64_t kRead = 16;
  return static_cast<size_t>((words_of(args.bytes) * kWord + kRead - 1) / kRead * kRead);
}

}  // namespace

void hamming_distance(const HammingDistance& args, void* stream) {
  constexpr int64_t kMostBlocks = 65535;
  const int64_t tiles = (args.query.count + kTileQueries - 1) / kTileQueries;
  const int64_t columns = std::min((args.codes.count + kThreads - 1) / kThreads, kMostBlocks);
  bool aligned = are_aligned(args.codes, args.bytes, kWord);
  for (int d = 0; d < args.batches.ndim; ++d) aligned = aligned && args.codes_steps[d] % kWord == 0;
  if (args.batches.numel * tiles * columns == 0) return;
  launch(aligned ? distance_kernel<true> : distance_kernel<false>,
         dim3(grid_size(args.batches.numel * tiles), static_cast<unsigned>(columns)), kThreads, 0, stream, args, tiles);
}

void hamming_histogram(const HammingHistogram& args, void* stream) {
  constexpr size_t kMostShared = 47 * 1024;  // that need not be asked for, less what the kernel has itself
  const size_t of_query = query_bytes(args), all = of_query + static_cast<size_t>(args.bins()) * sizeof(int32_t);
  const bool in_shared = all <= kMostShared;
  const int64_t most = std::min<int64_t>(kGroup, in_shared ? kMostShared / all : 1);
  const int64_t group = std::min(most, args.query.count), groups = (args.query.count + group - 1) / group;
  with_words(args, [&](auto words) {
    launch(histogram_kernel<decltype(words)::value>, grid_size(groups * args.segments), kThreads,
           static_cast<size_t>(group) * (in_shared ? all : of_query), stream, args, static_cast<int>(group), in_shared);
  });
}

void hamming_plan(const HammingPlan& args, void* stream) {
  launch(plan_kernel, grid_size(args.queries), kThreads, 0, stream, args);
}

void hamming_count(const HammingCount& args, void* stream) {
  with_words(args, [&](auto words) {
    launch(count_kernel<decltype(words)::value>, pairs(args), kThreads, query_bytes(args), stream, args);
  });
}

void hamming_fill(const HammingFill& args, void* stream) {
  with_words(args, [&](auto words) {
    launch(fill_kernel<decltype(words)::value>, pairs(args), kThreads, query_bytes(args), stream, args);
  });
}

}  // namespace lect11ext::cuda
