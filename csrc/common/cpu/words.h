// Words of the Philox stream (common/philox.h) in their order, many at a time.
#pragma once

#include "common/cpu/normal.h"

namespace lect11ext::CPU_CAPABILITY {

// Room that words() needs in `out` beyond `count`.
inline constexpr int kWordSlack = kStepsTogether * kNormalsPerStep;

// The words of kSteps steps from block `counter` on.
template <int kSteps>
inline void ordered_words(const PhiloxKeys& keys, uint64_t counter, uint32_t* out) {
  float* bits = reinterpret_cast<float*>(out);  // moved by vectors alone
  philox_words<kSteps>(keys, counter, bits);
  // A step's even words are in its first half, odd ones in the second.
  for (int i = 0; i < kSteps * kNormalsPerStep; i += kNormalsPerStep) {
    const auto [first_half, second_half] =
        at::vec::interleave2(Vec<float>::loadu(bits + i), Vec<float>::loadu(bits + i + kLanes<float>));
    first_half.store(bits + i);
    second_half.store(bits + i + kLanes<float>);
  }
}

// Words number first … first + count − 1 of the stream of offset `offset`; `first` is a multiple of four.
inline void words(const PhiloxKeys& keys, uint64_t offset, int64_t first, int64_t count, uint32_t* out) {
  const uint64_t counter = offset + static_cast<uint64_t>(first / 4);
  constexpr int kMany = kStepsTogether * kNormalsPerStep;
  for (int64_t drawn = 0; drawn < count; drawn += kMany) {
    ordered_words<kStepsTogether>(keys, counter + static_cast<uint64_t>(drawn / 4), out + drawn);
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
