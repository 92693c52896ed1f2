// What is added to a query's scores: masks and ALiBi's distances, as biases of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/dot_product_cpu.h"
#include "common/cpu/memory.h"

namespace lect11ext::CPU_CAPABILITY {

template <class C>
inline constexpr C kMinusInfinity = -std::numeric_limits<C>::infinity();

template <class T>
inline void load_bias(const T* mask, int64_t stride, int64_t n, float* bias) {
  for (int64_t j = 0; j < n; ++j) bias[j] = static_cast<float>(mask[j * stride]);
}
inline void load_bias(const double* mask, int64_t stride, int64_t n, double* bias) {
  for (int64_t j = 0; j < n; ++j) bias[j] = mask[j * stride];
}

// 0 where a key is allowed, else −∞. Masks often bar whole panels, which a look at their bytes tells.
template <class C>
inline void load_allowed(const uint8_t* allowed, int64_t n, C* bias) {
  uint8_t any = 0;
  for (int64_t k = 0; k < n; ++k) any |= allowed[k];
  if (any == 0) return std::fill(bias, bias + n, kMinusInfinity<C>);
  for (int64_t k = 0; k < n; ++k) bias[k] = allowed[k] != 0 ? C(0) : kMinusInfinity<C>;
}

// mask_ij − slope · |i + diagonal − j| for keys j … j + n − 1 of query i: −∞ where the mask bars one.
template <class S, class C>
inline void bias_row(const Attention& args, const AttentionMask& mask, bool with_slopes, int64_t batch, int64_t head,
                     int64_t i, int64_t diagonal, int64_t j, int64_t n, C* bias) {
  const int64_t at = batch * mask.strides[0] + head * mask.strides[1] + i * mask.strides[2] + j * mask.strides[3];
  const int64_t stride = mask.strides[3];
  switch (mask.type) {
    case MaskType::None: std::fill(bias, bias + n, C(0)); break;
    case MaskType::Bool: {
      const uint8_t* from = static_cast<const uint8_t*>(mask.data) + at;
      if (stride == 1) {
        for (int64_t k = 0; k < n; k += kPanelKeys) load_allowed(from + k, std::min(kPanelKeys, n - k), bias + k);
      } else {
        for (int64_t k = 0; k < n; ++k) bias[k] = from[k * stride] != 0 ? C(0) : kMinusInfinity<C>;
      }
      break;
    }
    case MaskType::Float:
      if constexpr (std::is_same_v<C, float>) load_bias(static_cast<const float*>(mask.data) + at, stride, n, bias);
      break;
    case MaskType::Storage: {
      const S* from = static_cast<const S*>(mask.data) + at;
      if (stride == 1) convert(from, bias, n);
      else load_bias(from, stride, n, bias);
      break;
    }
  }
  if (!with_slopes || args.alibi_slopes == nullptr) return;
  const C slope = args.alibi_slopes[batch * args.alibi_strides[0] + head * args.alibi_strides[1]];
  for (int64_t k = 0; k < n; ++k) bias[k] -= slope * static_cast<C>(std::abs(i + diagonal - j - k));
}

// What a boolean mask alone makes of a block of keys for some queries, as its bytes tell; Some where anything else
// changes scores too. Most blocks of most masks, and all but one of padding, are of one kind.
enum class BlockMask { AllAllowed, AllBarred, Some };

inline BlockMask block_mask(const Attention& args, int64_t batch, int64_t head, int64_t i, int64_t rows, int64_t j,
                            int64_t n) {
  const int64_t* strides = args.mask.strides;
  if (args.mask.type != MaskType::Bool || args.alibi_slopes != nullptr || args.softcap != 0 || strides[3] > 1) {
    return BlockMask::Some;
  }
  const uint8_t* row = static_cast<const uint8_t*>(args.mask.data) + batch * strides[0] + head * strides[1] +
                       i * strides[2] + j * strides[3];
  const int64_t columns = strides[3] == 0 ? 1 : n;
  uint8_t any = 0, all = 1;
  for (int64_t r = 0; r < (strides[2] == 0 ? 1 : rows); ++r, row += strides[2]) {
    for (int64_t k = 0; k < columns; ++k) {
      any |= row[k];
      all &= row[k] != 0;
    }
    if (any != 0 && all == 0) return BlockMask::Some;
  }
  return all != 0 ? BlockMask::AllAllowed : BlockMask::AllBarred;
}

}  // namespace lect11ext::CPU_CAPABILITY
