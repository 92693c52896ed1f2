// Codes as columns of words, for AVX-512. Included by hashing_search.cpp alone.
#pragma once

#include <immintrin.h>

#include "autoencoder/cpu/hashing_words.h"

namespace lect11ext::CPU_CAPABILITY {

constexpr int64_t kColumnGroup = 64;  // codes that are compared with the limit at a time

// Columns of codes of two or four words, where a transposition of vectors takes a third of the time of one of words.
inline void transpose_two(const uint8_t* rows, int64_t padded, int64_t from, uint64_t* columns) {
  const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + 64);
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
  _mm512_storeu_si512(columns + from, _mm512_permutex2var_epi64(a, even, b));
  _mm512_storeu_si512(columns + padded + from, _mm512_permutex2var_epi64(a, odd, b));
}

inline void transpose_four(const uint8_t* rows, int64_t padded, int64_t from, uint64_t* columns) {
  const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + 64);
  const __m512i c = _mm512_loadu_si512(rows + 128), d = _mm512_loadu_si512(rows + 192);
  const __m512i low = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13), high = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i ab = _mm512_permutex2var_epi64(a, low, b), cd = _mm512_permutex2var_epi64(c, low, d);
  const __m512i ef = _mm512_permutex2var_epi64(a, high, b), gh = _mm512_permutex2var_epi64(c, high, d);
  _mm512_storeu_si512(columns + from, _mm512_shuffle_i64x2(ab, cd, 0x44));
  _mm512_storeu_si512(columns + padded + from, _mm512_shuffle_i64x2(ab, cd, 0xEE));
  _mm512_storeu_si512(columns + 2 * padded + from, _mm512_shuffle_i64x2(ef, gh, 0x44));
  _mm512_storeu_si512(columns + 3 * padded + from, _mm512_shuffle_i64x2(ef, gh, 0xEE));
}

// Words of codes from `from` on. Words is a template argument so that a row's loads have no branch between them, and
// the block a copy so that what is stored cannot change it.
template <int Words>
inline void transpose_rows(const Block block, int64_t from, uint64_t* columns) {
  const int64_t rest = block.bytes - 8 * (Words - 1), shift = 8 * (8 - rest);  // of the last word: 1 to 8 bytes
  const uint8_t* row = block.rows + from * block.stride;
  for (int64_t c = from; c < block.count; ++c, row += block.stride) {
    for (int w = 0; w + 1 < Words; ++w) columns[w * block.padded + c] = load_as<uint64_t>(row + 8 * w);
    if constexpr (Words > 1) {
      columns[(Words - 1) * block.padded + c] = load_as<uint64_t>(row + block.bytes - 8) >> shift;
    } else {
      columns[c] = load_word(row, block.bytes, 0);
    }
  }
}

// Codes from padded − kColumnGroup on that are not there become zeros.
inline void to_columns(const Block& block, void* room) {
  constexpr int64_t kVector = 8;  // codes of a transposition
  const int64_t words = words_of(block.bytes), tail = block.padded - kColumnGroup;
  if (block.bytes <= 4) {
    uint32_t* column = static_cast<uint32_t*>(room);
    std::memset(column + tail, 0, kColumnGroup * sizeof(uint32_t));
    for (int64_t c = 0; c < block.count; ++c) {
      column[c] = static_cast<uint32_t>(load_tail(block.rows + c * block.stride, block.bytes, block.bytes));
    }
    return;
  }
  uint64_t* columns = static_cast<uint64_t*>(room);
  for (int64_t w = 0; w < words; ++w) {
    std::memset(columns + w * block.padded + tail, 0, kColumnGroup * sizeof(uint64_t));
  }
  int64_t c = 0;
  if (block.bytes == 16 && block.stride == 16) {
    for (; c + kVector <= block.count; c += kVector) transpose_two(block.rows + 16 * c, block.padded, c, columns);
  } else if (block.bytes == 32 && block.stride == 32) {
    for (; c + kVector <= block.count; c += kVector) transpose_four(block.rows + 32 * c, block.padded, c, columns);
  }
  switch (words) {
    case 1: return transpose_rows<1>(block, c, columns);
    case 2: return transpose_rows<2>(block, c, columns);
    case 3: return transpose_rows<3>(block, c, columns);
    case 4: return transpose_rows<4>(block, c, columns);
    case 5: return transpose_rows<5>(block, c, columns);
    case 6: return transpose_rows<6>(block, c, columns);
    case 7: return transpose_rows<7>(block, c, columns);
    default: return transpose_rows<8>(block, c, columns);
  }
}

inline Block prepare_columns(const CodeRows& codes, int64_t bytes, int64_t first, int64_t n, void* room) {
  Block block{codes.data + first * codes.stride, codes.stride, n, bytes, nullptr, n};
  if (words_of(bytes) > kMostWords) return block;  // rows: their sums are long enough to be taken along them
  block.padded = (n + kColumnGroup - 1) / kColumnGroup * kColumnGroup;
  const bool are_columns = (bytes == 4 || bytes == 8) && codes.stride == bytes && block.padded == n;
  if (!are_columns) to_columns(block, room);
  block.columns = are_columns ? block.rows : room;
  return block;
}

}  // namespace lect11ext::CPU_CAPABILITY

// Bits are counted by VPOPCNTDQ where the processor has it, which the build's capability does not say, else by a table
// of the sixteen half bytes. Of 1M codes of 32 to 256 bits, 64 queries: 0.41 of the table's time.
#define LECT11EXT_BITS Table
#define LECT11EXT_BITS_TARGET
#include "autoencoder/cpu/hashing_bits.h"
#undef LECT11EXT_BITS
#undef LECT11EXT_BITS_TARGET

#define LECT11EXT_BITS Instruction
#define LECT11EXT_BITS_TARGET __attribute__((target("avx512vpopcntdq")))
#define LECT11EXT_BITS_VPOPCNT
#include "autoencoder/cpu/hashing_bits.h"
#undef LECT11EXT_BITS
#undef LECT11EXT_BITS_TARGET
#undef LECT11EXT_BITS_VPOPCNT
