// From which on it pays to ask whether floats are finite (dot_product_finite.cuh), as estimated. The tests' host build
// has a stand-in for this header, with less of both.
#pragma once

namespace lect11ext::cuda {

// Multiply-adds: an eighth of their time, some 12 µs, is what the launches cost.
inline constexpr double kScanMultiplyAdds = 2147483648.0;
// For each element that is read: an eighth of their time at 45 TFLOP/s is as long as one takes to read at 3.3 TB/s, and
// half as long again.
inline constexpr double kScanReuse = 350.0;

}  // namespace lect11ext::cuda
