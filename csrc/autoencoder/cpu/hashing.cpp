#include "autoencoder/hashing.h"

#include "common/cpu/memory.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

constexpr int64_t kWord = 64;    // bits that are packed at a time
constexpr int64_t kPiece = 512;  // elements fetched at a time: whole words

// --- binarize -----------------------------------------------------------------------------------------------------

template <class T>
void binarize(const Binarize& args, int64_t begin, int64_t end) {
  alignas(64) T fetched[Binarize::kTile], staged[Binarize::kTile];
  const Vec<T> threshold(T(args.threshold)), zero(T(0)), one(T(1));
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t start = tile * Binarize::kTile, n = std::min(Binarize::kTile, args.shape.numel - start);
    const T* x = fetch<T>(args.shape, args.input, start, n, fetched);
    T* out = target<T>(args.out, args.input.dtype, start, n, staged);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> v = Vec<T>::loadu(x + i);
      const Vec<T> bit = Vec<T>::blendv(zero, one, v > threshold);
      Vec<T>::blendv(v, bit, v == v).store(out + i);
    }
    flush<T>(args.out, args.input.dtype, start, n, out, staged);
  }
}

// --- pack ---------------------------------------------------------------------------------------------------------

// One bit of each lane, the first lane's lowest.
inline uint64_t above(const float* x, float threshold) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(threshold), _CMP_GT_OQ);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 greater = _mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_set1_ps(threshold), _CMP_GT_OQ);
  return static_cast<unsigned>(_mm256_movemask_ps(greater));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint64_t>(x[i] > threshold) << i;
  return bits;
#endif
}

inline uint64_t above(const double* x, double threshold) {
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= static_cast<uint64_t>(x[i] > threshold) << i;
  return bits;
}

// The order of the bits in each byte, reversed.
inline uint64_t reverse_in_bytes(uint64_t x) {
  x = (x >> 4 & 0x0F0F0F0F0F0F0F0F) | (x & 0x0F0F0F0F0F0F0F0F) << 4;
  x = (x >> 2 & 0x3333333333333333) | (x & 0x3333333333333333) << 2;
  return (x >> 1 & 0x5555555555555555) | (x & 0x5555555555555555) << 1;
}

// n bits, the first one lowest, what is beyond them anything.
inline void store_bits(uint64_t bits, int64_t n, uint8_t* to) {
  if (n < kWord) bits &= (uint64_t{1} << n) - 1;
  bits = reverse_in_bytes(bits);
  if (n == kWord) {
    for (int b = 0; b < 8; ++b) to[b] = static_cast<uint8_t>(bits >> 8 * b);
  } else {
    for (int64_t b = 0; 8 * b < n; ++b) to[b] = static_cast<uint8_t>(bits >> 8 * b);
  }
}

template <class T>
void pack_row(const PackBits& args, int64_t row, T threshold) {
  alignas(64) T buffer[kPiece];
  uint8_t* codes = args.codes + row * args.bytes();
  for (int64_t first = 0; first < args.columns; first += kPiece) {
    const int64_t n = std::min(kPiece, args.columns - first);
    const T* x = fetch<T>(args.shape, args.input, row * args.columns + first, n, buffer);
    for (int64_t word = 0; word < n; word += kWord) {
      const int64_t count = std::min(kWord, n - word);
      uint64_t bits = 0;
      for (int64_t i = 0; i < count; i += kLanes<T>) bits |= above(x + word + i, threshold) << i;
      store_bits(bits, count, codes + (first + word) / 8);
    }
  }
}

void pack_bytes(const PackBits& args, int64_t row) {
  const uint8_t* x = args.bits + row * args.columns;
  uint8_t* codes = args.codes + row * args.bytes();
  for (int64_t first = 0; first < args.columns; first += kWord) {
    const int64_t count = std::min(kWord, args.columns - first);
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>(x[first + i] != 0) << i;
    store_bits(bits, count, codes + first / 8);
  }
}

// --- unpack -------------------------------------------------------------------------------------------------------

#if defined(CPU_CAPABILITY_AVX512)
// The lowest bits, one a lane, as numbers.
template <class Bits>
inline __m512i numbers(uint64_t bits, Bits one) {
  if constexpr (sizeof(Bits) == 1) return _mm512_maskz_set1_epi8(bits, static_cast<char>(one));
  else if constexpr (sizeof(Bits) == 2)
    return _mm512_maskz_set1_epi16(static_cast<__mmask32>(bits), static_cast<short>(one));
  else if constexpr (sizeof(Bits) == 4)
    return _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), static_cast<int>(one));
  else return _mm512_maskz_set1_epi64(static_cast<__mmask8>(bits), static_cast<long long>(one));
}
#endif

template <class Bits>
void unpack_row(const UnpackBits& args, int64_t row) {
  const uint8_t* codes = args.codes + row * args.bytes;
  Bits* out = static_cast<Bits*>(args.out) + row * args.columns;
  const Bits one = static_cast<Bits>(args.one);
  const int64_t whole = args.columns / 8;
  int64_t b = 0;
#if defined(CPU_CAPABILITY_AVX512)
  // Masks: in 0.6 of the time of what the compiler makes of the loop below, in a quarter where a number is a byte.
  constexpr int kPart = 64 / sizeof(Bits);
  for (; b + 8 <= whole; b += 8) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint64_t>(codes[b + i]) << 8 * i;
    bits = reverse_in_bytes(bits);
    for (int i = 0; i < kWord; i += kPart) _mm512_storeu_si512(out + 8 * b + i, numbers<Bits>(bits >> i, one));
  }
#endif
  for (; b < whole; ++b) {
    const uint32_t byte = codes[b];
    for (int i = 0; i < 8; ++i) out[8 * b + i] = (byte >> (7 - i) & 1) != 0 ? one : Bits(0);
  }
  for (int64_t i = 8 * whole; i < args.columns; ++i) out[i] = (codes[whole] >> (7 - i % 8) & 1) != 0 ? one : Bits(0);
}

}  // namespace

void binarize_kernel(const Binarize& args, int64_t begin, int64_t end) {
  args.input.dtype == DType::Double ? binarize<double>(args, begin, end) : binarize<float>(args, begin, end);
}

void pack_bits_kernel(const PackBits& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (args.input.data == nullptr) pack_bytes(args, row);
    else if (args.input.dtype == DType::Double) pack_row<double>(args, row, args.threshold);
    else pack_row<float>(args, row, static_cast<float>(args.threshold));
  }
}

void unpack_bits_kernel(const UnpackBits& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    switch (args.item_size) {
      case 1: unpack_row<uint8_t>(args, row); break;
      case 2: unpack_row<uint16_t>(args, row); break;
      case 4: unpack_row<uint32_t>(args, row); break;
      default: unpack_row<uint64_t>(args, row);
    }
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
