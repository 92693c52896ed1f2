// topk_code: a block takes a row and reads it once. Every thread finds the largest of its share; a bound that k of
// these reach is reached by k elements, and in most rows by few more, which the threads that have one collect. The k
// largest of what was collected are found by counting, for each, those before it.
//
// Where k is large, or too many elements reach the bound (a row of which most are equal), the k-th largest key is found
// digit by digit, the highest first, by counting how many keys have each digit; then what is larger is collected, and
// of what is equal the first by index, and sorted. A row is read once more for each digit then, and once to collect.
#include <cstdint>

#include "common/cuda/memory.cuh"

#include "autoencoder/sparse_code.h"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kThreads = 512, kWarp = 32, kWarps = kThreads / kWarp;
// Digits of eleven bits: three of a float, of which the first holds its exponent, so that few keys share one.
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kDigitsEach = kDigits / kThreads;

// An unsigned integer in the order of the numbers: zeros are equal, NaN is the largest.
template <class Key>
__device__ inline Key ordered(Key bits, Key infinity) {
  constexpr Key kSign = static_cast<Key>(Key(1) << (8 * sizeof(Key) - 1));
  const bool negative = (bits & kSign) != 0, is_nan = static_cast<Key>(bits & static_cast<Key>(~kSign)) > infinity;
  // Selected, not branched on: neighbours go different ways.
  Key key = static_cast<Key>(bits ^ (negative ? static_cast<Key>(~Key(0)) : kSign));
  key = bits == kSign ? kSign : key;  // −0
  return is_nan ? static_cast<Key>(~Key(0)) : key;
}

template <class S>
struct Keys {
  using Key = std::conditional_t<sizeof(S) == 8, uint64_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint16_t>>;
  static constexpr int kBits = 8 * sizeof(S);
  static constexpr Key kInfinity = std::is_same_v<S, double>          ? Key(0x7FF0000000000000)
                                   : std::is_same_v<S, float>         ? Key(0x7F800000)
                                   : std::is_same_v<S, __nv_bfloat16> ? Key(0x7F80)
                                                                      : Key(0x7C00);

  static __device__ Key of(const S* from) {
    Key bits;
    memcpy(&bits, from, sizeof(bits));
    return ordered<Key>(bits, kInfinity);
  }
};

template <class Key>
struct Entry {
  Key key;
  uint32_t index;
  __device__ bool before(const Entry& other) const { return key != other.key ? key > other.key : index < other.index; }
};

// What a block's threads share besides the entries, which lie in dynamic shared memory.
struct Shared {
  int counts[kDigits];
  int warp_sums[kWarps];
  int digit, above;  // the digit of the k-th key, and how many keys have a larger one
  int taken;
};

// Finds the digit with which the count of keys, from the largest digit on, comes to `wanted`, and leaves it in
// `shared`.
__device__ inline void find_digit(Shared& shared, int wanted) {
  // A thread takes neighbouring digits, thread 0 the largest.
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int top = kDigits - 1 - kDigitsEach * static_cast<int>(threadIdx.x);
  int own = 0;
#pragma unroll
  for (int i = 0; i < kDigitsEach; ++i) own += shared.counts[top - i];
  int up_to = own;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(~0u, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  if (lane == kWarp - 1) shared.warp_sums[warp] = up_to;
  __syncthreads();
  for (int w = 0; w < warp; ++w) up_to += shared.warp_sums[w];
  int before = up_to - own;
  if (before < wanted && wanted <= up_to) {
    int digit = top;
    while (before + shared.counts[digit] < wanted) before += shared.counts[digit--];
    shared.digit = digit;
    shared.above = before;
  }
  __syncthreads();
}

// The first `wanted` elements with the key, by index: the block walks over the row together.
template <class S, class Key>
__device__ inline void take_first(Shared& shared, const S* row, int length, Key key, int wanted, int first,
                                  Entry<Key>* entries) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int taken = 0;
  for (int base = 0; base < length && taken < wanted; base += kThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const bool equal = i < length && Keys<S>::of(row + i) == key;
    const unsigned ballot = __ballot_sync(~0u, equal);
    if (lane == 0) shared.warp_sums[warp] = __popc(ballot);
    __syncthreads();
    int place = taken + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += shared.warp_sums[w];
      taken += shared.warp_sums[w];
    }
    if (equal && place < wanted) entries[first + place] = {key, static_cast<uint32_t>(i)};
    __syncthreads();
  }
}

// Bitonic sort of `count`, a power of two.
template <class E>
__device__ inline void sort_entries(E* entries, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      for (int pair = threadIdx.x; pair < count / 2; pair += kThreads) {
        const int a = 2 * pair - pair % distance, b = a + distance;
        const bool descending = (a & size) == 0;
        const E first = entries[a], second = entries[b];
        if (second.before(first) == descending) {
          entries[a] = second;
          entries[b] = first;
        }
      }
      __syncthreads();
    }
  }
}

// Calls f(key, index) for this thread's share of a row, N elements at a time, of which some loads are under way
// together.
template <int N, class S, class F>
__device__ inline void walk(const S* row, int length, F f) {
  constexpr int kTogether = 4;
  const int pieces = length / N;
  for (int piece = threadIdx.x; piece < pieces; piece += kTogether * kThreads) {
    Pack<S, N> packs[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (piece + j * kThreads < pieces) packs[j] = Pack<S, N>::load(row + int64_t{N} * (piece + j * kThreads));
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (piece + j * kThreads >= pieces) break;
#pragma unroll
      for (int i = 0; i < N; ++i) f(Keys<S>::of(&packs[j].data[i]), N * (piece + j * kThreads) + i);
    }
  }
  for (int i = N * pieces + static_cast<int>(threadIdx.x); i < length; i += kThreads) f(Keys<S>::of(row + i), i);
}

template <class S, class F>
__device__ inline void walk(const S* row, int length, F f) {
  if (reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0) walk<kVector<S>>(row, length, f);
  else walk<1>(row, length, f);
}

// Writes entry number j of a row's code.
template <class S, class Key>
__device__ inline void write_entry(const TopkCode& args, int64_t r, const S* row, const Entry<Key>& entry, int j) {
  constexpr Key kZero = static_cast<Key>(Key(1) << (Keys<S>::kBits - 1));
  const int64_t to = r * args.k + j;
  static_cast<S*>(args.values)[to] = args.rectify && entry.key <= kZero ? to_storage<S>(0.0f) : row[entry.index];
  args.indices[to] = entry.index;
}

// Up to this many a row, a bound is sought: the shares' largest are then so many that few shares have two of the k.
constexpr int64_t kMostByBound = kThreads / 2;

// Whether the row is done: not if more than `room` elements reach the bound.
template <class S, class Key>
__device__ inline bool take_by_bound(Shared& shared, const TopkCode& args, int64_t r, const S* row, Entry<Key>* entries,
                                     int room) {
  // Of the bound, which may be any number that k shares reach: sign, exponent and some digits.
  constexpr int kBits = sizeof(S) == 8 ? 20 : 16;
  const int length = static_cast<int>(args.length), k = static_cast<int>(args.k);
  if (threadIdx.x == 0) shared.taken = 0;
  Key largest = 0;
  walk(row, length, [&](Key key, int) { largest = key > largest ? key : largest; });
  Key bound = 0;
  for (int bit = Keys<S>::kBits - 1; bit >= Keys<S>::kBits - kBits; --bit) {
    const Key higher = static_cast<Key>(bound | static_cast<Key>(Key(1) << bit));
    if (__syncthreads_count(largest >= higher) >= k) bound = higher;
  }
  if (largest >= bound) {
    walk(row, length, [&](Key key, int index) {
      if (key < bound) return;
      const int place = atomicAdd(&shared.taken, 1);
      if (place < room) entries[place] = {key, static_cast<uint32_t>(index)};
    });
  }
  __syncthreads();
  const int taken = shared.taken;
  __syncthreads();  // before `taken` is used again
  if (taken > room) return false;
  for (int e = threadIdx.x; e < taken; e += kThreads) {
    const Entry<Key> entry = entries[e];
    int before = 0;
    for (int other = 0; other < taken; ++other) before += entries[other].before(entry);
    if (before < k) write_entry<S>(args, r, row, entry, before);
  }
  return true;
}

template <class S>
__device__ inline void take_by_digits(Shared& shared, const TopkCode& args, int64_t r, const S* row,
                                      Entry<typename Keys<S>::Key>* entries, int padded) {
  using Key = typename Keys<S>::Key;
  const int k = static_cast<int>(args.k), length = static_cast<int>(args.length);
  Key prefix = 0;  // the digits of the k-th key that are known, others zero
  int wanted = k, equal = 0;
  for (int high = Keys<S>::kBits; high > 0;) {
    const int bits = high < kDigitBits ? high : kDigitBits, low = high - bits;
    for (int d = threadIdx.x; d < kDigits; d += kThreads) shared.counts[d] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < length; i += kThreads) {
      const Key key = Keys<S>::of(row + i);
      const bool known = high == Keys<S>::kBits || (key >> high) == (prefix >> high);
      if (known) atomicAdd(&shared.counts[static_cast<int>(key >> low) & ((1 << bits) - 1)], 1);
    }
    __syncthreads();
    find_digit(shared, wanted);
    prefix |= static_cast<Key>(static_cast<Key>(shared.digit) << low);
    wanted -= shared.above;
    equal = shared.counts[shared.digit];
    high = low;
    __syncthreads();
  }

  // k − wanted keys are larger, `equal` are equal, of which the first `wanted` are taken.
  for (int i = threadIdx.x; i < padded; i += kThreads) entries[i] = {Key(0), ~0u};
  if (threadIdx.x == 0) shared.taken = 0;
  __syncthreads();
  const bool all_equal = equal == wanted;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const Key key = Keys<S>::of(row + i);
    if (key > prefix || (all_equal && key == prefix)) {
      entries[atomicAdd(&shared.taken, 1)] = {key, static_cast<uint32_t>(i)};  // in any order: they are sorted below
    }
  }
  if (!all_equal) take_first<S, Key>(shared, row, length, prefix, wanted, k - wanted, entries);
  __syncthreads();
  sort_entries(entries, padded);
  for (int j = threadIdx.x; j < k; j += kThreads) write_entry<S>(args, r, row, entries[j], j);
}

// Three blocks on a multiprocessor: while one collects, the others have 64 KiB of loads under way. Two of 16 bits,
// whose eight elements a load take more registers.
template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 2 ? 2 : 3)
    topk_kernel(const __grid_constant__ TopkCode args, int room) {
  __shared__ Shared shared;
  auto* const entries = reinterpret_cast<Entry<typename Keys<S>::Key>*>(dynamic_shared);
  const int64_t r = blockIdx.x;
  const S* const row = static_cast<const S*>(args.input) + r * args.stride;
  if (args.k <= kMostByBound && take_by_bound<S>(shared, args, r, row, entries, room)) return;
  int padded = 2;
  while (padded < args.k) padded *= 2;
  take_by_digits<S>(shared, args, r, row, entries, padded);
}

// A thread takes an entry.
template <class Element>
__global__ void __launch_bounds__(kThreads) scatter_kernel(const __grid_constant__ ScatterCode args) {
  const int64_t count = args.rows * args.k, step = int64_t{kThreads} * gridDim.x;
  for (int64_t e = int64_t{kThreads} * blockIdx.x + threadIdx.x; e < count; e += step) {
    const int64_t index = args.indices[e];
    if (index < 0 || index >= args.length) continue;
    static_cast<Element*>(args.out)[divide(e, args.k) * args.length + index] =
        static_cast<const Element*>(args.values)[e];
  }
}

}  // namespace

void topk_code(const TopkCode& args, void* stream) {
  if (args.rows == 0 || args.k == 0) return;
  // A power of two, twice as many as are wanted where there is a bound.
  int room = 2;
  while (room < (args.k <= kMostByBound ? std::max<int64_t>(2 * args.k, 64) : args.k)) room *= 2;
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const size_t bytes = static_cast<size_t>(room) * sizeof(Entry<typename Keys<S>::Key>);
    launch(topk_kernel<S>, dim3(grid_size(args.rows)), kThreads, bytes, stream, args, room);
  });
}

void scatter_code(const ScatterCode& args, void* stream) {
  if (args.rows * args.k == 0) return;
  auto kernel = scatter_kernel<uint64_t>;
  if (args.element_bytes == 2) kernel = scatter_kernel<uint16_t>;
  if (args.element_bytes == 4) kernel = scatter_kernel<uint32_t>;
  launch(kernel, grid_stride_blocks(args.rows * args.k, kThreads), kThreads, 0, stream, args);
}

}  // namespace lect11ext::cuda
