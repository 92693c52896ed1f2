// Packs keys and values into panels, a panel of one head at a time.
#include "attention/cpu/dot_product_tile.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class P>
bool all_finite(const P* x, int64_t n) {
  int bad = 0;  // counted as an integer, so that the loop becomes vectors
  if constexpr (sizeof(P) == 2) {
    constexpr uint16_t kExponent = 0x7F80;  // of bfloat16; float16 is no operand
    const auto* words = reinterpret_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < n; ++i) bad |= (words[i] & kExponent) == kExponent;
  } else {
    for (int64_t i = 0; i < n; ++i) bad |= !(std::abs(x[i]) <= std::numeric_limits<P>::max());
  }
  return bad == 0;
}

constexpr int64_t kWords = 16;  // 32-bit words that are transposed at a time, in rows and in columns

// [keys][columns] → [columns / kDeep][64][kDeep], where a pair of 16-bit columns moves as one word.
template <class P>
void transpose(const Matrix<const P>& from, int64_t keys, int64_t columns, P* to) {
  if constexpr (sizeof(P) == 8) {
    for (int64_t k = 0; k < keys; ++k) {
      for (int64_t c = 0; c < columns; ++c) to[c * kPanelKeys + k] = from.row(k)[c];
    }
  } else {
    constexpr int64_t kElements = sizeof(float) / sizeof(P);
    const auto* source = reinterpret_cast<const float*>(from.data);
    auto* target = reinterpret_cast<float*>(to);
    const int64_t stride = from.stride / kElements;
    for (int64_t k = 0; k < keys; k += kWords) {
      for (int64_t c = 0; c < columns / kElements; c += kWords) {
        at::vec::transpose_mxn<float>(source + k * stride + c, stride, target + c * kPanelKeys + k, kPanelKeys, kWords,
                                      kWords);
      }
    }
  }
}

// [keys][columns] → [keys / kDeep][columns][kDeep].
template <class P>
void interleave(const Matrix<const P>& from, int64_t keys, int64_t columns, P* to) {
  if constexpr (PanelStep<P>::kDeep == 1) {
    for (int64_t k = 0; k < keys; ++k) std::copy_n(from.row(k), columns, to + k * columns);
  } else {
    for (int64_t k = 0; k < keys; k += 2, to += 2 * columns) {
      const P *even = from.row(k), *odd = from.row(k + 1);
      for (int64_t c = 0; c < columns; ++c) {
        to[2 * c] = even[c];
        to[2 * c + 1] = odd[c];
      }
    }
  }
}

// Whether every query sees every key, so that what is not finite shows wherever it stands.
bool sees_all(const Attention& args) {
  return args.mask.type == MaskType::None && args.window_left == kOpen && args.window_right == kOpen &&
         args.dropout_p <= 0;
}

template <class S, class P>
void pack(const Attention& args, const AttentionPlan& plan, const PackedOperand& to, int64_t begin, int64_t end) {
  if (to.from.data == nullptr) return;
  const bool has_rows = to.rows != nullptr || to.rows_are_own, checks = has_rows && !sees_all(args);
  if (!checks) std::fill(to.finite + begin - to.first, to.finite + end - to.first, true);
  if (!checks && to.rows == nullptr && to.transposed == nullptr) return;
  const int64_t wide = round_up(to.columns, kDeepStep), narrow = round_up(to.columns, kColumnStep);
  Workspace space;
  const auto part = space.reserve(kPanelKeys * wide * sizeof(P));
  P* staged = static_cast<P*>(space.at(part));
  // `count` rows from row `first` of the panel, and zeros up to `padded`.
  const auto stage = [&](const S* from, int64_t count, int64_t padded) {
    for (int64_t r = 0; r < count; ++r) {
      P* row = staged + r * wide;
      convert(from + r * to.from.strides.position, row, to.columns);
      std::fill(row + to.columns, row + wide, P(0));
    }
    std::fill(staged + count * wide, staged + padded * wide, P(0));
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n =
        std::upper_bound(plan.panels, plan.panels + args.sequences + 1, item / args.kv_heads) - plan.panels - 1;
    const int64_t panels = plan.panels[n + 1] - plan.panels[n], local = item - plan.panels[n] * args.kv_heads;
    const int64_t head = local / panels, first = local % panels * kPanelKeys;
    const AttentionSequence s(args, n);
    const int64_t rows = std::min(kPanelKeys, s.keys - first),
                  keys = round_up(rows, std::max(kWords, kKeyStep<P>));  // others are not read
    const S* source = row_of<S>(to.from, s.batch, head, s.key_start + first);
    Matrix<const P> from{staged, wide};
    bool in_place = false;
    if constexpr (std::is_same_v<S, P>) {
      constexpr int64_t kStep = kWords * std::max<int64_t>(1, sizeof(float) / sizeof(P));
      const int64_t stride = to.from.strides.position;
      in_place =
          (rows == kPanelKeys || PanelStep<P>::kDeep == 1) && to.columns % kStep == 0 && stride % (kStep / kWords) == 0;
      if (in_place) from = {source, stride};
    }
    if (!in_place) stage(source, rows, keys);
    if (checks) {
      bool finite = true;
      for (int64_t r = 0; r < rows; ++r) finite = all_finite(from.row(r), to.columns) && finite;
      to.finite[item - to.first] = finite;
    }
    if (to.rows != nullptr) {
      P* const panel = static_cast<P*>(to.rows) + (item - to.first) * kPanelKeys * narrow;
      interleave(from, in_place ? rows : keys, narrow, panel);
      if (in_place) std::fill(panel + rows * narrow, panel + keys * narrow, P(0));
    }
    if (to.transposed != nullptr) {
      P* const panel = static_cast<P*>(to.transposed) + (item - to.first) * kPanelKeys * wide;
      const int64_t whole = in_place ? rows / kWords * kWords : keys;
      transpose(from, whole, in_place ? to.columns : wide, panel);
      if (in_place && whole < rows) {  // what scores beyond the keys are made of is of no account
        stage(source + whole * to.from.strides.position, rows - whole, kWords);
        transpose({staged, wide}, kWords, to.columns, panel + whole);
      }
    }
  }
}

}  // namespace

void attention_pack_kernel(const AttentionPack& pack_args, int64_t begin, int64_t end) {
  with_operands(pack_args.args->dtype, pack_args.plan.widens, [&](auto* type, auto* operand) {
    using S = std::remove_pointer_t<decltype(type)>;
    using P = std::remove_pointer_t<decltype(operand)>;
    for (const PackedOperand* to : {&pack_args.key, &pack_args.value, &pack_args.key_t, &pack_args.value_t}) {
      pack<S, P>(*pack_args.args, pack_args.plan, *to, begin, end);
    }
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
