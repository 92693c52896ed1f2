#include "autoencoder/hashing.h"

#include "common/cuda/launch.h"
#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWord = 4;  // bytes

// --- distances ----------------------------------------------------------------------------------------------------

// Word number w of a code of `bytes` bytes, filled up with zeros. Aligned: every row begins at a multiple of a word and
// consists of whole ones.
template <bool Aligned>
__device__ inline uint32_t load_word(const uint8_t* code, int64_t bytes, int64_t w) {
  if constexpr (Aligned) return reinterpret_cast<const uint32_t*>(code)[w];
  uint32_t word = 0;
  const int64_t left = bytes - kWord * w;
#pragma unroll
  for (int i = 0; i < kWord; ++i) {
    if (i < left) word |= static_cast<uint32_t>(code[kWord * w + i]) << 8 * i;
  }
  return word;
}

__host__ __device__ inline int64_t words_of(int64_t bytes) { return (bytes + kWord - 1) / kWord; }

template <bool Aligned>
__device__ inline int distance(const uint32_t* query, const uint8_t* code, int64_t bytes) {
  int sum = 0;
  for (int64_t w = 0; w < words_of(bytes); ++w) sum += __popc(query[w] ^ load_word<Aligned>(code, bytes, w));
  return sum;
}

bool is_aligned(const CodeRows& codes, int64_t bytes) {
  return bytes % kWord == 0 && codes.stride % kWord == 0 && reinterpret_cast<uintptr_t>(codes.data) % kWord == 0;
}

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

// --- searches: a block of threads takes one query and one segment of the codes ------------------------------------

// The query's words come first in shared memory.
struct Place {
  int64_t query, segment, first, last;
  uint32_t* words;
  int64_t number;  // of the pair
};

__device__ inline Place enter(const HammingCudaSearch& args, uint32_t* shared) {
  Place place;
  place.number = blockIdx.x;
  place.query = divide(blockIdx.x, args.segments);
  place.segment = blockIdx.x - place.query * args.segments;
  place.first = place.segment * args.segment;
  const int64_t end = place.first + args.segment;
  place.last = end < args.codes.count ? end : args.codes.count;
  place.words = shared;
  const uint8_t* query = args.query.data + place.query * args.query.stride;
  for (int64_t w = threadIdx.x; w < words_of(args.bytes); w += kThreads) {
    shared[w] = load_word<false>(query, args.bytes, w);
  }
  __syncthreads();
  return place;
}

// Integer sums: the same whatever the order of the additions.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads) histogram_kernel(HammingHistogram args, bool in_shared) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(dynamic_shared);
  const int64_t bins = args.bins();
  int32_t* const counts = args.counts + static_cast<int64_t>(blockIdx.x) * bins;
  int32_t* const sums = in_shared ? reinterpret_cast<int32_t*>(shared + words_of(args.bytes)) : counts;
  for (int64_t i = threadIdx.x; in_shared && i < bins; i += kThreads) sums[i] = 0;
  const Place place = enter(args, shared);
  for (int64_t c = place.first + threadIdx.x; c < place.last; c += kThreads) {
    atomicAdd(sums + distance<Aligned>(place.words, args.codes.data + c * args.codes.stride, args.bytes), 1);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; in_shared && i < bins; i += kThreads) counts[i] = sums[i];
}

// One block a query: the limit, and the sums that precede each segment's results.
__global__ void __launch_bounds__(kThreads) plan_kernel(HammingPlan args) {
  __shared__ int64_t partial[kThreads];
  __shared__ int limit;
  __shared__ int64_t below_limit;
  const int64_t query = blockIdx.x;
  const int32_t* counts = args.counts + query * args.segments * args.bins;
  // A thread sums some neighbouring bins over all segments; then one finds the bin in which the k-th code is.
  const int64_t share = (args.bins + kThreads - 1) / kThreads;
  const int64_t low = threadIdx.x * share, high = low + share < args.bins ? low + share : args.bins;
  int64_t sum = 0;
  for (int64_t bin = low; bin < high; ++bin) {
    for (int64_t s = 0; s < args.segments; ++s) sum += counts[s * args.bins + bin];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t below = 0;
    int owner = 0;
    while (below + partial[owner] < args.k) below += partial[owner++];
    int64_t bin = owner * share;
    for (;; ++bin) {
      int64_t here = 0;
      for (int64_t s = 0; s < args.segments; ++s) here += counts[s * args.bins + bin];
      if (below + here >= args.k) break;
      below += here;
    }
    limit = static_cast<int>(bin);
    below_limit = below;
    args.limits[query] = limit;
  }
  __syncthreads();
  for (int64_t s = threadIdx.x; s < args.segments; s += kThreads) {
    int64_t below = 0;
    for (int bin = 0; bin < limit; ++bin) below += counts[s * args.bins + bin];
    args.starts[query * args.segments + s] = below;  // how many, until the sums are taken
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t start = 0, left = args.k - below_limit;
    for (int64_t s = 0; s < args.segments; ++s) {
      const int64_t place = query * args.segments + s, at_limit = counts[s * args.bins + limit];
      const int64_t below = args.starts[place], taken = at_limit < left ? at_limit : left;
      args.starts[place] = query * args.k + start;
      args.ties[place] = taken;
      start += below + taken;
      left -= taken;
    }
  }
}

template <bool Aligned>
__global__ void __launch_bounds__(kThreads) count_kernel(HammingCount args) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(dynamic_shared);
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  const Place place = enter(args, shared);
  unsigned long long count = 0;
  for (int64_t c = place.first + threadIdx.x; c < place.last; c += kThreads) {
    count += distance<Aligned>(place.words, args.codes.data + c * args.codes.stride, args.bytes) < args.limit;
  }
  atomicAdd(&total, count);
  __syncthreads();
  if (threadIdx.x == 0) args.counts[place.number] = static_cast<int64_t>(total);
}

// In ascending order of the index: a warp's lanes by a ballot, the block's warps by their sums. Codes at the limit are
// numbered apart, for only the first of them are taken; where they go follows from how many of both kinds came before.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads) fill_kernel(HammingFill args) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(dynamic_shared);
  __shared__ int below_of[kWarps], ties_of[kWarps];
  const Place place = enter(args, shared);
  const int limit = args.limits != nullptr ? args.limits[place.query] : args.limit;
  const int64_t most_ties = args.ties != nullptr ? args.ties[place.number] : 0;
  const int64_t start = args.starts[place.number];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned before = (1u << lane) - 1;
  int64_t below = 0, ties = 0;  // so far
  for (int64_t first = place.first; first < place.last; first += kThreads) {
    const int64_t c = first + threadIdx.x;
    const bool here = c < place.last;
    const int d = here ? distance<Aligned>(place.words, args.codes.data + c * args.codes.stride, args.bytes) : 0;
    const bool is_below = here && d < limit, is_tie = here && d == limit;
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
      args.indices[to] = c;
    }
    __syncthreads();  // the sums have been read
  }
}

unsigned pairs(const HammingCudaSearch& args) { return static_cast<unsigned>(args.query.count * args.segments); }
size_t query_bytes(const HammingCudaSearch& args) { return static_cast<size_t>(words_of(args.bytes)) * kWord; }

}  // namespace

void hamming_distance(const HammingDistance& args, void* stream) {
  constexpr int64_t kMostBlocks = 65535;
  const int64_t tiles = (args.query.count + kTileQueries - 1) / kTileQueries;
  const int64_t columns = std::min((args.codes.count + kThreads - 1) / kThreads, kMostBlocks);
  bool aligned = is_aligned(args.codes, args.bytes);
  for (int d = 0; d < args.batches.ndim; ++d) aligned = aligned && args.codes_steps[d] % kWord == 0;
  if (args.batches.numel * tiles * columns == 0) return;
  launch(aligned ? distance_kernel<true> : distance_kernel<false>,
         dim3(static_cast<unsigned>(args.batches.numel * tiles), static_cast<unsigned>(columns)), kThreads, 0, stream,
         args, tiles);
}

void hamming_histogram(const HammingHistogram& args, void* stream) {
  constexpr size_t kMostShared = 48 * 1024;  // that need not be asked for
  const size_t all = query_bytes(args) + static_cast<size_t>(args.bins()) * sizeof(int32_t);
  const bool in_shared = all <= kMostShared;
  launch(is_aligned(args.codes, args.bytes) ? histogram_kernel<true> : histogram_kernel<false>, pairs(args), kThreads,
         in_shared ? all : query_bytes(args), stream, args, in_shared);
}

void hamming_plan(const HammingPlan& args, void* stream) {
  launch(plan_kernel, static_cast<unsigned>(args.queries), kThreads, 0, stream, args);
}

void hamming_count(const HammingCount& args, void* stream) {
  launch(is_aligned(args.codes, args.bytes) ? count_kernel<true> : count_kernel<false>, pairs(args), kThreads,
         query_bytes(args), stream, args);
}

void hamming_fill(const HammingFill& args, void* stream) {
  launch(is_aligned(args.codes, args.bytes) ? fill_kernel<true> : fill_kernel<false>, pairs(args), kThreads,
         query_bytes(args), stream, args);
}

}  // namespace lect11ext::cuda
