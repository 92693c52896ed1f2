// Distances between one query and a block of codes, word by word. Included by hashing_search.cpp alone.
//
// Every way of counting bits is a struct of the same static functions:
//   kGroup                                      codes that find() judges at a time
//   prepare(rows, bytes, first, n, room)        the block of codes first … first + n − 1, arranged in `room`
//   find(block, query, from, limit)             the first group from code `from` on, a multiple of kGroup, in which one
//                                               is nearer than `limit`; what is not below block.count if none is
//   distances(block, query, from, n, out)       of n codes; `from` is a multiple of kGroup, or n is 1
#pragma once

#include <cstring>

#include "autoencoder/hashing.h"
#include "common/cpu/namespace.h"

namespace lect11ext::CPU_CAPABILITY {

constexpr int64_t kMostWords = 8;  // of 64 bits, of a query that is kept in words
constexpr int64_t kRoom = 16384;   // bytes of a prepared block, code_block(bytes) codes of up to kMostWords words

// A block of codes as they lie, and, where `columns` is given, as columns: word w of code c at [w·padded + c].
// Words have 32 bits where a code has up to 4 bytes.
struct Block {
  const uint8_t* rows;
  int64_t stride, count, bytes;
  const void* columns;
  int64_t padded;
};

// A query as it lies, and in words, where it has up to kMostWords.
struct Query {
  const uint8_t* row;
  uint64_t words[kMostWords];
};

template <class T>
inline T load_as(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// The last n < 8 bytes of a code of `bytes` bytes, in a word filled up with zeros. Nothing outside the code is read.
inline uint64_t load_tail(const uint8_t* code, int64_t bytes, int64_t n) {
  if (n == 0) return 0;
  if (bytes >= 8) return load_as<uint64_t>(code + bytes - 8) >> 8 * (8 - n);
  if (bytes >= 4) {
    const uint64_t high = load_as<uint32_t>(code + bytes - 4);
    return load_as<uint32_t>(code) | (bytes > 4 ? high << 8 * (bytes - 4) : 0);
  }
  uint64_t word = code[0];
  if (bytes > 1) word |= static_cast<uint64_t>(code[1]) << 8;
  if (bytes > 2) word |= static_cast<uint64_t>(code[2]) << 16;
  return word;
}

inline int64_t words_of(int64_t bytes) { return (bytes + 7) / 8; }

inline uint64_t load_word(const uint8_t* code, int64_t bytes, int64_t w) {
  return 8 * w + 8 <= bytes ? load_as<uint64_t>(code + 8 * w) : load_tail(code, bytes, bytes - 8 * w);
}

inline void prepare_query(const uint8_t* row, int64_t bytes, Query& query) {
  query.row = row;
  for (int64_t w = 0; w < kMostWords; ++w) query.words[w] = 8 * w < bytes ? load_word(row, bytes, w) : 0;
}

inline uint32_t count_bits(uint64_t x) {
#if defined(__POPCNT__) || !defined(__x86_64__)
  return static_cast<uint32_t>(__builtin_popcountll(x));
#else
  // Without the instruction the compiler would call a function.
  x = x - (x >> 1 & 0x5555555555555555);
  x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
  return static_cast<uint32_t>(((x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56);
#endif
}

// --- one word after the other -------------------------------------------------------------------------------------

// Bytes is the length of a code, 0 where it is known at run time only.
template <int Bytes>
inline uint32_t distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  if constexpr (Bytes == 4) return count_bits(load_as<uint32_t>(a) ^ load_as<uint32_t>(b));
  const int64_t n = Bytes > 0 ? Bytes : bytes, whole = n / 8;
  uint32_t sum = 0;
  for (int64_t w = 0; w < whole; ++w) sum += count_bits(load_as<uint64_t>(a + 8 * w) ^ load_as<uint64_t>(b + 8 * w));
  if (n % 8 != 0) sum += count_bits(load_tail(a, n, n % 8) ^ load_tail(b, n, n % 8));
  return sum;
}

struct Scalar {
  static constexpr int64_t kGroup = 1;

  static Block prepare(const CodeRows& codes, int64_t bytes, int64_t first, int64_t n, void*) {
    return {codes.data + first * codes.stride, codes.stride, n, bytes, nullptr, 0};
  }

  static int64_t find(const Block& block, const Query& query, int64_t from, uint32_t limit) {
    switch (block.bytes) {
      case 4: return find<4>(block, query, from, limit);
      case 8: return find<8>(block, query, from, limit);
      case 16: return find<16>(block, query, from, limit);
      case 32: return find<32>(block, query, from, limit);
      default: return find<0>(block, query, from, limit);
    }
  }

  static void distances(const Block& block, const Query& query, int64_t from, int64_t n, uint32_t* out) {
    switch (block.bytes) {
      case 4: return distances<4>(block, query, from, n, out);
      case 8: return distances<8>(block, query, from, n, out);
      case 16: return distances<16>(block, query, from, n, out);
      case 32: return distances<32>(block, query, from, n, out);
      default: return distances<0>(block, query, from, n, out);
    }
  }

 private:
  template <int Bytes>
  static int64_t find(const Block& block, const Query& query, int64_t from, uint32_t limit) {
    for (int64_t c = from; c < block.count; ++c) {
      if (distance<Bytes>(query.row, block.rows + c * block.stride, block.bytes) < limit) return c;
    }
    return block.count;
  }

  template <int Bytes>
  static void distances(const Block& block, const Query& query, int64_t from, int64_t n, uint32_t* out) {
    for (int64_t c = 0; c < n; ++c) {
      out[c] = distance<Bytes>(query.row, block.rows + (from + c) * block.stride, block.bytes);
    }
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
