// topk_code reads a row once from memory. The k-th largest of the maxima of m ≥ k disjoint parts of a row is no larger
// than the row's own k-th, and with m = 4k little smaller: a second look, into the cache, collects the few elements
// that reach it, and only those are sorted.
#include <cstring>
#include <limits>

#include "autoencoder/sparse_code.h"
#include "common/cpu/memory.h"
#include "common/cpu/scratch.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

constexpr int64_t kFewestParts = 256;  // whole vectors of any type
constexpr int64_t kPartsPerValue = 4;  // then about a tenth more than k elements reach the bound

template <class T>
using KeyOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// An integer in the order of the numbers: both zeros are 0, NaN is the largest.
template <class T>
inline KeyOf<T> key_of(T x) {
  using Key = KeyOf<T>;
  constexpr Key kLargest = std::numeric_limits<Key>::max();
  const T no_minus_zero = x + T(0);
  Key bits;
  std::memcpy(&bits, &no_minus_zero, sizeof(bits));
  const Key key = bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kLargest);
  return x != x ? kLargest : key;
}

template <class T>
inline T number_of(KeyOf<T> key) {
  using Key = KeyOf<T>;
  const Key bits = key ^ ((key >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
  T x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class Key>
inline int64_t count_from(const Key* keys, int64_t n, Key bound) {
  Key count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= bound ? 1 : 0;
  return count;
}

// A bound that at least k of the keys reach: the largest one, or one that exactly k reach. Bit by bit, which takes no
// branch that is hard to predict.
template <class Key>
inline Key bound_of(const Key* keys, int64_t n, int64_t k) {
  using Bits = std::make_unsigned_t<Key>;
  constexpr int kTop = 8 * sizeof(Key) - 1;
  constexpr Bits kSign = Bits(1) << kTop;
  Bits bound = 0;
  for (int bit = kTop; bit >= 0; --bit) {
    const Bits higher = bound | (Bits(1) << bit);
    const int64_t count = count_from(keys, n, static_cast<Key>(higher ^ kSign));
    if (count >= k) bound = higher;
    if (count == k) break;
  }
  return static_cast<Key>(bound ^ kSign);
}

// A type of this file, so that the instances of std's functions are too.
template <class T>
struct Entry {
  KeyOf<T> key;
  int32_t index;
};

struct Before {
  template <class E>
  bool operator()(const E& a, const E& b) const {
    return a.key != b.key ? a.key > b.key : a.index < b.index;
  }
};

template <class T>
struct Buffers {
  Scratch<T> row, parts;
  Scratch<KeyOf<T>> keys;
  Scratch<Entry<T>> above, equal;
  int64_t count;  // of parts

  explicit Buffers(const TopkCode& args)
      : row(args.length),
        parts(args.length),
        keys(args.length),
        above(args.length),
        equal(args.k),
        count(kFewestParts) {
    while (count < kPartsPerValue * args.k) count *= 2;
  }
};

// The maxima of elements i, i + count, i + 2·count, …
template <class T>
void part_maxima(const T* row, int64_t n, int64_t count, T* parts) {
  for (int64_t i = 0; i < count; i += kLanes<T>) Vec<T>::loadu(row + i).store(parts + i);
  int64_t base = count;
  for (; base + count <= n; base += count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      at::vec::maximum(Vec<T>::loadu(row + base + i), Vec<T>::loadu(parts + i)).store(parts + i);
    }
  }
  for (int64_t i = 0; i < n - base; ++i) {
    const T x = row[base + i];
    if (x > parts[i] || x != x) parts[i] = x;
  }
}

// Leaves the k largest in order in buffers.above. Meanwhile asks for `next`, the row that comes next.
template <class T, class S>
void select(const T* row, const S* next, int64_t n, int64_t k, Buffers<T>& buffers) {
  const bool by_parts = 2 * buffers.count <= n;
  if (by_parts) part_maxima<T>(row, n, buffers.count, buffers.parts);
  const T* from = by_parts ? buffers.parts : row;
  const int64_t candidates = by_parts ? buffers.count : n;
  KeyOf<T>* const keys = buffers.keys;
  for (int64_t i = 0; i < candidates; ++i) keys[i] = key_of(from[i]);
  const KeyOf<T> key = bound_of(keys, candidates, k);
  // Keys beyond those of the infinities are no number's. NaN, above, has one: inf, the next below, bounds it too.
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const T bound = key > key_of(kInfinity) ? kInfinity : key < key_of(-kInfinity) ? -kInfinity : number_of<T>(key);
  const KeyOf<T> bound_key = key_of(bound);

  int64_t above = 0, equal = 0;
  Entry<T>*const entries = buffers.above, *const ties = buffers.equal;
  const auto take = [&](int64_t i) {
    const KeyOf<T> own = key_of(row[i]);
    if (own > bound_key) entries[above++] = {own, static_cast<int32_t>(i)};
    else if (own == bound_key && equal < k) ties[equal++] = {own, static_cast<int32_t>(i)};
  };
  const Vec<T> limit(bound);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    __builtin_prefetch(next + i);
    const Vec<T> x = Vec<T>::loadu(row + i);
    // Those that are not below; once there are ties enough, those that are not below and no tie.
    unsigned reached = static_cast<unsigned>((equal < k ? x < limit : x <= limit).zero_mask());
    for (; reached != 0; reached &= reached - 1) take(i + __builtin_ctz(reached));
  }
  for (; i < n; ++i) take(i);

  if (above > k) std::nth_element(entries, entries + k, entries + above, Before());
  std::sort(entries, entries + std::min(above, k), Before());
  for (int64_t j = above; j < k; ++j) entries[j] = ties[j - above];
}

template <class S>
void topk(const TopkCode& args, int64_t begin, int64_t end) {
  using T = std::conditional_t<kIsHalf<S>, float, S>;  // both 16-bit types keep their order in float
  Buffers<T> buffers(args);
  for (int64_t r = begin; r < end; ++r) {
    const S* const input = static_cast<const S*>(args.input) + r * args.stride;
    const T* row = buffers.row;
    if constexpr (kIsHalf<S>) convert(input, static_cast<T*>(buffers.row), args.length);
    else row = input;
    select<T>(row, r + 1 < end ? input + args.stride : input, args.length, args.k, buffers);
    S* const values = static_cast<S*>(args.values) + r * args.k;
    int64_t* const indices = args.indices + r * args.k;
    for (int64_t j = 0; j < args.k; ++j) {
      const Entry<T> entry = buffers.above[j];
      const bool zero = args.rectify && entry.key <= 0;
      values[j] = zero ? S(0) : input[entry.index];
      indices[j] = entry.index;
    }
  }
}

template <class Element>
void scatter(const ScatterCode& args, int64_t begin, int64_t end) {
  const size_t row_bytes = static_cast<size_t>(args.length) * sizeof(Element);
  for (int64_t r = begin; r < end; ++r) {
    Element* const out = static_cast<Element*>(args.out) + r * args.length;
    std::memset(out, 0, row_bytes);
    const Element* const values = static_cast<const Element*>(args.values) + r * args.k;
    const int64_t* const indices = args.indices + r * args.k;
    for (int64_t j = 0; j < args.k; ++j) out[indices[j]] = values[j];
  }
}

}  // namespace

void topk_code_kernel(const TopkCode& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { topk<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void scatter_code_kernel(const ScatterCode& args, int64_t begin, int64_t end) {
  switch (args.element_bytes) {
    case 2: return scatter<uint16_t>(args, begin, end);
    case 4: return scatter<uint32_t>(args, begin, end);
    default: return scatter<uint64_t>(args, begin, end);
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
