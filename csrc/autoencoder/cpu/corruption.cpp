#include "autoencoder/corruption.h"

#include "autoencoder/cpu/row_sums.h"
#include "common/cpu/memory.h"
#include "common/cpu/normal.h"
#include "common/cpu/words.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

static_assert(kTile == kCorruptionTile);

template <class T>
void drift(const CorruptionDrift& args, int64_t begin, int64_t end) {
  Buffer<T> fetched, noise, staged;
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  const DType dtype = args.input.dtype;
  const Vec<T> deviation(static_cast<T>(args.deviation));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t start = t * kTile, n = std::min(kTile, args.shape.numel - start);
    const T* input = fetch<T>(args.shape, args.input, start, n, fetched.data);
    const T* eps = normals(seed, offset, start, n, noise.data);
    T* out = target<T>(args.out, dtype, start, n, staged.data);
    const bool stream = args.streams && out != staged.data && can_stream(out);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      store(at::vec::fmadd(deviation, Vec<T>::loadu(eps + i), Vec<T>::loadu(input + i)), out + i, stream);
    }
    flush<T>(args.out, dtype, start, n, out, staged.data);
  }
  if (args.streams) finish_streams();
}

// Nothing is computed with the elements, so they are moved as they are, whatever the type. The 16-bit types are
// classes, which the compiler's vectors do not hold; what is inside them they do.
template <class S>
auto* inside(S* p) {
  if constexpr (kIsHalf<S>) return &p->x;
  else return p;
}

// The compiler makes vectors of this loop, on AVX2 only if nothing narrower is chosen from than a word.
template <class S>
void choose(const uint32_t* __restrict words, const S* __restrict input, S* __restrict out, int64_t n,
            const CorruptionReplace& args, S low, S high) {
  using Wide = std::conditional_t<sizeof(S) == 2, uint32_t, S>;
  const Wide wide_low = low, wide_high = high;
  const uint32_t pepper = args.pepper, last = args.last;
  for (int64_t i = 0; i < n; ++i) {
    const Wide replaced = words[i] < pepper ? wide_low : wide_high, kept = input[i];
    out[i] = static_cast<S>(words[i] <= last ? replaced : kept);
  }
}

// Past the caches, from a buffer.
template <class S>
void stream_tile(const S* from, S* to) {
  const float* source = reinterpret_cast<const float*>(from);  // moved by vectors alone
  float* target = reinterpret_cast<float*>(to);
  constexpr int64_t kFloats = kTile * sizeof(S) / sizeof(float);
  for (int64_t i = 0; i < kFloats; i += kLanes<float>) store(Vec<float>::loadu(source + i), target + i, true);
}

template <class S>
void replace(const CorruptionReplace& args, int64_t begin, int64_t end) {
  alignas(64) uint32_t drawn[kTile + kWordSlack];
  Buffer<S> fetched, staged;
  const PhiloxKeys keys(static_cast<uint64_t>(args.key[0]));
  const uint64_t offset = static_cast<uint64_t>(args.key[1]);
  S low, high;
  convert(&args.low, &low, 1);
  convert(&args.high, &high, 1);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t start = t * kTile, n = std::min(kTile, args.shape.numel - start);
    const S* input = static_cast<const S*>(args.input.data) + start;
    if (!args.input.dense) {
      gather<S>(args.shape, args.input, start, n, fetched.data);
      input = fetched;
    }
    S* out = static_cast<S*>(args.out) + start;
    const bool stream = args.streams && n == kTile && can_stream(reinterpret_cast<const float*>(out));
    words(keys, offset, start, n, drawn);
    choose(drawn, inside(input), inside(stream ? staged.data : out), n, args, *inside(&low), *inside(&high));
    if (stream) stream_tile(staged.data, out);
    if (args.mask != nullptr) {
      bool* mask = args.mask + start;
      for (int64_t i = 0; i < n; ++i) mask[i] = drawn[i] <= args.last;
    }
  }
  if (args.streams) finish_streams();
}

}  // namespace

void corruption_drift_kernel(const CorruptionDrift& args, int64_t begin, int64_t end) {
  args.input.dtype == DType::Double ? drift<double>(args, begin, end) : drift<float>(args, begin, end);
}

void corruption_replace_kernel(const CorruptionReplace& args, int64_t begin, int64_t end) {
  with_type(args.input.dtype, [&](auto* type) { replace<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

}  // namespace lect11ext::CPU_CAPABILITY
