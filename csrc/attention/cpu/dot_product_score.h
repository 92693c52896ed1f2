// What makes t of a raw score q · k, in every pass to the same bits: what the backward makes again must be what the
// forward had.
//
//   t = softcap · tanh(scale · q · k / softcap) + bias, and −∞ where the bias is, whatever the score
#pragma once

#include <limits>

#include "attention/cpu/dot_product_tile.h"

namespace lect11ext::CPU_CAPABILITY {

// Whether scores are changed by more than a factor before they are weighed.
inline bool has_biases(const Attention& args) {
  return args.mask.type != MaskType::None || args.alibi_slopes != nullptr || args.softcap != 0;
}

// Or by a factor that no exponent takes: −∞ times a smaller one could be NaN, or +∞.
inline constexpr double kLeastScale = 1e-30;
inline bool changes_scores(const Attention& args) { return has_biases(args) || !(args.scale > kLeastScale); }

template <class C>
struct ScoreTransform {
  // Before the bias; its slope by scale · q · k, and the slope's own.
  struct Capped {
    Vec<C> t, slope, bend;
  };

  const bool caps;
  const Vec<C> scale, cap, steep;

  explicit ScoreTransform(const Attention& args)
      : caps(args.softcap != 0),
        scale(static_cast<C>(args.scale)),
        cap(static_cast<C>(args.softcap)),
        steep(static_cast<C>(caps ? 1 / args.softcap : 0)) {}

  __attribute__((always_inline)) Capped capped(Vec<C> raw) const {
    const Vec<C> one(C(1));
    Capped result{raw * scale, one, Vec<C>(C(0))};
    if (caps) {
      const Vec<C> ratio = tanh(result.t * steep);
      result.t = ratio * cap;
      result.slope = one - ratio * ratio;
      result.bend = ratio * result.slope * steep * Vec<C>(C(-2));
    }
    return result;
  }

  // Sums with masks of the lowest number stay finite in base 2.
  __attribute__((always_inline)) static Vec<C> bounded_below(Vec<C> t) {
    return greater(Vec<C>(std::numeric_limits<C>::lowest() / 2), t);
  }

  __attribute__((always_inline)) static Vec<C> biased(Vec<C> t, Vec<C> bias) {
    const Vec<C> low(kMinusInfinity<C>);
    return select_equal(bias, low, low, bounded_below(t + bias));
  }

  // Of a row's scores from … to − 1, in place.
  void apply(C* scores, const C* bias, int64_t from, int64_t to) const {
    for (int64_t k = from; k < to; k += kLanes<C>) {
      biased(capped(Vec<C>::loadu(scores + k)).t, Vec<C>::loadu(bias + k)).store(scores + k);
    }
  }

  // Where biases are zero and nothing caps: as apply() has it.
  void apply_scale(C* scores, int64_t from, int64_t to) const {
    for (int64_t k = from; k < to; k += kLanes<C>) bounded_below(Vec<C>::loadu(scores + k) * scale).store(scores + k);
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
