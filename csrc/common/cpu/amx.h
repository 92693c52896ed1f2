// Products of bfloat16 rows with panels by AMX, whose tiles of B are what a panel consists of already: [k/2][16][2].
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include "common/cpu/dot.h"

namespace lect11ext::CPU_CAPABILITY {

// Fewer rows leave most of a tile empty, and dot products are as fast.
inline constexpr int64_t kAmxLeastRows = 4;
inline constexpr int64_t kAmxRows = 16;     // of a tile
inline constexpr int64_t kAmxDepth = 32;    // elements of k in a row of A, pairs of them in a column of B
inline constexpr int64_t kAmxColumns = 16;  // floats in a row of C

// Tiles 0 to 3: two by two blocks of C, 4 and 5: rows of A, 6 and 7: columns of B.
struct alignas(64) AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  AmxConfig(int64_t upper, int64_t lower) {
    for (int tile = 0; tile < 8; ++tile) row_bytes[tile] = 64;
    rows[0] = rows[1] = rows[4] = static_cast<uint8_t>(upper);
    rows[2] = rows[3] = rows[5] = static_cast<uint8_t>(std::max<int64_t>(lower, 1));
    rows[6] = rows[7] = kAmxDepth / 2;
  }
};

// How far apart neighbouring rows lie, in elements; 0 where that differs.
template <class T>
inline int64_t common_stride(T* const* rows, int64_t n) {
  const int64_t stride = n > 1 ? rows[1] - rows[0] : kAmxDepth;
  for (int64_t i = 2; i < n; ++i) {
    if (rows[i] - rows[i - 1] != stride) return 0;
  }
  return stride;
}

// Up to 32 rows times 32 columns (kWide) or 16. Rows of a and c lie a stride apart; strides count elements.
template <bool kLower, bool kWide>
inline void amx_block(const at::BFloat16* a, int64_t a_stride, const at::BFloat16* b, int64_t b_stride, int64_t depth,
                      float* c, int64_t c_stride, bool add) {
  const int64_t a_bytes = a_stride * 2, b_bytes = b_stride * 2, c_bytes = c_stride * 4;
  float* lower = c + kAmxRows * c_stride;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kWide) _tile_loadd(1, c + kAmxColumns, c_bytes);
    if constexpr (kLower) _tile_loadd(2, lower, c_bytes);
    if constexpr (kLower && kWide) _tile_loadd(3, lower + kAmxColumns, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kAmxDepth, b += kAmxDepth / 2 * b_stride) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide) {
      _tile_loadd(7, b + kAmxDepth, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kLower) {
      _tile_loadd(5, a + kAmxRows * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kWide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kWide) _tile_stored(1, c + kAmxColumns, c_bytes);
  if constexpr (kLower) _tile_stored(2, lower, c_bytes);
  if constexpr (kLower && kWide) _tile_stored(3, lower + kAmxColumns, c_bytes);
}

// As panel_product, of the whole tiles of k: how many elements of it that were. Rows that do not lie a stride apart are
// moved together first, a part of k at a time.
template <int kColumns>
inline int64_t amx_product(const at::BFloat16* const* a, int64_t rows, int64_t size, const at::BFloat16* panel,
                           int64_t panel_row, float* const* out, bool add) {
  constexpr int64_t kGroup = 2 * kAmxRows, kStagedDepth = 512;
  const int64_t whole = size / kAmxDepth * kAmxDepth;
  if (whole == 0) return 0;
  alignas(64) at::BFloat16 staged_a[kGroup * kStagedDepth];
  alignas(64) float staged_c[kGroup * kColumns];
  int64_t configured = 0;
  for (int64_t r = 0; r < rows; r += kGroup) {
    const int64_t n = std::min(kGroup, rows - r), lower = std::max<int64_t>(n - kAmxRows, 0);
    if (n != configured) {
      const AmxConfig config(std::min(n, kAmxRows), lower);
      _tile_loadconfig(&config);
      configured = n;
    }
    const int64_t a_stride = common_stride(a + r, n), c_stride = common_stride(out + r, n);
    const int64_t part = a_stride != 0 ? whole : kStagedDepth;
    float* const c = c_stride != 0 ? out[r] : staged_c;
    const int64_t c_row = c_stride != 0 ? c_stride : kColumns;
    if (c_stride == 0 && add) {
      for (int64_t i = 0; i < n; ++i) std::copy_n(out[r + i], kColumns, staged_c + i * kColumns);
    }
    for (int64_t k = 0; k < whole; k += part) {
      const int64_t depth = std::min(part, whole - k), a_row = a_stride != 0 ? a_stride : kStagedDepth;
      for (int64_t i = 0; a_stride == 0 && i < n; ++i) std::copy_n(a[r + i] + k, depth, staged_a + i * kStagedDepth);
      const at::BFloat16* const from = a_stride != 0 ? a[r] + k : staged_a;
      for (int64_t column = 0; column < kColumns; column += 2 * kAmxColumns) {
        const bool wide = column + kAmxColumns < kColumns;
        const at::BFloat16* b = panel + k / 2 * panel_row + column * 2;
        const auto run = [&]<bool kLower, bool kWide>() {
          amx_block<kLower, kWide>(from, a_row, b, panel_row, depth, c + column, c_row, add || k > 0);
        };
        if (lower > 0) wide ? run.template operator()<true, true>() : run.template operator()<true, false>();
        else wide ? run.template operator()<false, true>() : run.template operator()<false, false>();
      }
    }
    for (int64_t i = 0; c_stride == 0 && i < n; ++i) std::copy_n(staged_c + i * kColumns, kColumns, out[r + i]);
  }
  _tile_release();
  return whole;
}

}  // namespace lect11ext::CPU_CAPABILITY

#endif
