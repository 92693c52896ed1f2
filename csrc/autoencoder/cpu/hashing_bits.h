// One way of counting bits with AVX-512: hashing_columns.h includes this once for each. No include guard.

namespace lect11ext::CPU_CAPABILITY {

struct LECT11EXT_BITS {
  static constexpr int64_t kGroup = kColumnGroup;

  static Block prepare(const CodeRows& codes, int64_t bytes, int64_t first, int64_t n, void* room) {
    return prepare_columns(codes, bytes, first, n, room);
  }

  LECT11EXT_BITS_TARGET static int64_t find(const Block& block, const Query& query, int64_t from, uint32_t limit) {
    if (block.columns == nullptr) return find_in_rows(block, query, from, limit);
    if (block.bytes <= 4) return find_short(block, query, from, limit);
    switch (words_of(block.bytes)) {
      case 1: return find_in_columns<1>(block, query, from, limit);
      case 2: return find_in_columns<2>(block, query, from, limit);
      case 3: return find_in_columns<3>(block, query, from, limit);
      case 4: return find_in_columns<4>(block, query, from, limit);
      case 5: return find_in_columns<5>(block, query, from, limit);
      case 6: return find_in_columns<6>(block, query, from, limit);
      case 7: return find_in_columns<7>(block, query, from, limit);
      default: return find_in_columns<8>(block, query, from, limit);
    }
  }

  LECT11EXT_BITS_TARGET static void distances(const Block& block, const Query& query, int64_t from, int64_t n,
                                              uint32_t* out) {
    if (block.columns == nullptr) {
      for (int64_t c = 0; c < n; ++c) out[c] = row_distance(block, query, from + c);
      return;
    }
    if (block.bytes <= 4) {
      const uint32_t* column = static_cast<const uint32_t*>(block.columns) + from;
      const __m512i word = _mm512_set1_epi32(static_cast<int>(query.words[0]));
      for (int64_t c = 0; c < n; c += kShort) {
        const __mmask16 here = n - c < kShort ? (1u << (n - c)) - 1 : 0xFFFF;
        const __m512i codes = _mm512_maskz_loadu_epi32(here, column + c);
        _mm512_mask_storeu_epi32(out + c, here, short_sums(_mm512_xor_si512(codes, word)));
      }
      return;
    }
    const uint64_t* columns = static_cast<const uint64_t*>(block.columns) + from;
    const int64_t words = words_of(block.bytes);
    for (int64_t c = 0; c < n; c += kLong) {
      const __mmask8 here = n - c < kLong ? (1u << (n - c)) - 1 : 0xFF;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t w = 0; w < words; ++w) {
        const __m512i codes = _mm512_maskz_loadu_epi64(here, columns + w * block.padded + c);
        sum = add(sum, counts(_mm512_xor_si512(codes, _mm512_set1_epi64(static_cast<int64_t>(query.words[w])))));
      }
      _mm512_mask_cvtepi64_storeu_epi32(out + c, here, sums(sum));
    }
  }

 private:
  static constexpr int64_t kShort = 16, kLong = 8;  // words of 32 and of 64 bits in a vector
  static constexpr int64_t kRowVectors = 31;        // whose counts of 8 bits at most fit a byte

#if defined(LECT11EXT_BITS_VPOPCNT)
  // counts() of some vectors, added, become counts of 64 bits by sums().
  LECT11EXT_BITS_TARGET static __m512i counts(__m512i v) { return _mm512_popcnt_epi64(v); }
  LECT11EXT_BITS_TARGET static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi64(a, b); }
  LECT11EXT_BITS_TARGET static __m512i sums(__m512i counts) { return counts; }
  LECT11EXT_BITS_TARGET static __m512i short_sums(__m512i v) { return _mm512_popcnt_epi32(v); }
#else
  static __m512i counts(__m512i v) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i half = _mm512_set1_epi8(0x0F);
    const __m512i low = _mm512_and_si512(v, half), high = _mm512_and_si512(_mm512_srli_epi16(v, 4), half);
    return _mm512_add_epi8(_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high));
  }
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi8(a, b); }
  static __m512i sums(__m512i counts) { return _mm512_sad_epu8(counts, _mm512_setzero_si512()); }
  static __m512i short_sums(__m512i v) {
    return _mm512_madd_epi16(_mm512_maddubs_epi16(counts(v), _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
  }
#endif

  // The smallest of a group is compared, not each: minima of 32 bits, for there is none of 64 in one instruction, and
  // the upper halves are zero.
  template <int Words>
  LECT11EXT_BITS_TARGET static int64_t find_in_columns(const Block& block, const Query& query, int64_t from,
                                                       uint32_t limit) {
    const uint64_t* columns = static_cast<const uint64_t*>(block.columns);
    __m512i word[Words];
    for (int w = 0; w < Words; ++w) word[w] = _mm512_set1_epi64(static_cast<int64_t>(query.words[w]));
    const __m512i bound = _mm512_set1_epi64(limit);
    for (int64_t c = from; c < block.padded; c += kGroup) {
      __m512i least = _mm512_set1_epi64(0xFFFF);
      for (int64_t i = c; i < c + kGroup; i += kLong) {
        __m512i sum = counts(_mm512_xor_si512(_mm512_loadu_si512(columns + i), word[0]));
        for (int w = 1; w < Words; ++w) {
          const __m512i codes = _mm512_loadu_si512(columns + w * block.padded + i);
          sum = add(sum, counts(_mm512_xor_si512(codes, word[w])));
        }
        least = _mm512_min_epu32(least, sums(sum));
      }
      if (_mm512_cmplt_epu64_mask(least, bound) != 0) return c;
    }
    return block.padded;
  }

  LECT11EXT_BITS_TARGET static int64_t find_short(const Block& block, const Query& query, int64_t from,
                                                  uint32_t limit) {
    const uint32_t* column = static_cast<const uint32_t*>(block.columns);
    const __m512i word = _mm512_set1_epi32(static_cast<int>(query.words[0]));
    const __m512i bound = _mm512_set1_epi32(static_cast<int>(limit));
    for (int64_t c = from; c < block.padded; c += kGroup) {
      __m512i least = _mm512_set1_epi32(0xFFFF);
      for (int64_t i = c; i < c + kGroup; i += kShort) {
        least = _mm512_min_epu32(least, short_sums(_mm512_xor_si512(_mm512_loadu_si512(column + i), word)));
      }
      if (_mm512_cmplt_epu32_mask(least, bound) != 0) return c;
    }
    return block.padded;
  }

  // Along a row of more than kMostWords words.
  LECT11EXT_BITS_TARGET static uint32_t row_distance(const Block& block, const Query& query, int64_t code) {
    constexpr int64_t kBytes = 64;
    const uint8_t *a = query.row, *b = block.rows + code * block.stride;
    __m512i total = _mm512_setzero_si512();
    int64_t i = 0;
    while (i + kBytes <= block.bytes) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t n = 0; n < kRowVectors && i + kBytes <= block.bytes; ++n, i += kBytes) {
        sum = add(sum, counts(_mm512_xor_si512(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i))));
      }
      total = _mm512_add_epi64(total, sums(sum));
    }
    if (i < block.bytes) {
      const __mmask64 here = (uint64_t{1} << (block.bytes - i)) - 1;
      const __m512i rest = _mm512_xor_si512(_mm512_maskz_loadu_epi8(here, a + i), _mm512_maskz_loadu_epi8(here, b + i));
      total = _mm512_add_epi64(total, sums(counts(rest)));
    }
    return static_cast<uint32_t>(_mm512_reduce_add_epi64(total));
  }

  LECT11EXT_BITS_TARGET static int64_t find_in_rows(const Block& block, const Query& query, int64_t from,
                                                    uint32_t limit) {
    for (int64_t c = from; c < block.count; ++c) {
      if (row_distance(block, query, c) < limit) return c / kGroup * kGroup;
    }
    return block.count;
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
