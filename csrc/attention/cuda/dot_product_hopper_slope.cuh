// ALiBi in the kernels of sm_90a that count scores in products.
#pragma once

#include "attention/cuda/dot_product_hopper_tile.cuh"

namespace lect11ext::cuda {

// A head's slope, for scores in products.
struct Slope {
  float of;

  // Bounded, so that nothing it is multiplied with overflows: on the diagonal infinity would make NaN. What exceeds the
  // bound, infinity too, bars all but the diagonal; NaN stays.
  __device__ static Slope of_head(const Attention& args, int64_t batch, int head) {
    constexpr float kMost = 1e28f;
    const float slope = args.alibi_slopes[batch * args.alibi_strides[0] + head * args.alibi_strides[1]] /
                        static_cast<float>(args.scale);
    return {slope > kMost ? kMost : slope < -kMost ? -kMost : slope};
  }

  // Takes slope · |distance| of products, those of a lane's two rows; first: of these, the distance of its first column
  // from the diagonal, whose size is the same for rows of queries and of keys.
  //
  // One rounding for an element, forward and backward, so that a huge score has the same digits in both. What all of a
  // row has in common could go where its exponents are counted from, for half the instructions, and then they differ.
  template <int kTiles>
  __device__ void take(float (&products)[kTiles][4], int first) const {
    const float from[2] = {static_cast<float>(first), static_cast<float>(first + 8)};
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const float column = static_cast<float>(i / 4 * 8 + i % 2);
      float& product = products[i / 4][i % 4];
      product = std::fma(-of, std::abs(from[i % 4 / 2] - column), product);
    }
  }
};

}  // namespace lect11ext::cuda
