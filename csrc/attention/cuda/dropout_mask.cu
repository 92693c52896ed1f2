#include <algorithm>

#include "attention/dot_product.h"
#include "common/cuda/launch.h"
#include "common/cuda/memory.cuh"
#include "common/philox.h"

namespace lect11ext::cuda {
namespace {

constexpr int kThreads = 256;

// A thread draws one Philox block at a time, eight bytes of the mask, which in whole rows of eights are one word.
__global__ void __launch_bounds__(kThreads) dropout_mask_kernel(const __grid_constant__ DropoutMask args) {
  const auto seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  const uint32_t threshold = dropout_threshold(args.p);
  const int64_t blocks_of_row = divide_up(args.columns, kDropoutBlock), step = int64_t{kThreads} * gridDim.x;
  const bool words = args.columns % kDropoutBlock == 0 && reinterpret_cast<uintptr_t>(args.kept) % kDropoutBlock == 0;
  for (int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x; i < args.rows * blocks_of_row; i += step) {
    const int64_t row = divide(i, blocks_of_row), first = (i - row * blocks_of_row) * kDropoutBlock;
    const PhiloxBlock block = philox(seed, offset + static_cast<uint64_t>(i));
    uint64_t bytes = 0;
#pragma unroll
    for (int k = 0; k < kDropoutBlock; ++k) {
      const bool kept = (block.x[k / 2] >> (16 * (k % 2)) & 0xFFFF) >= threshold;
      bytes |= uint64_t{kept} << (8 * k);
    }
    bool* const to = args.kept + row * args.columns + first;
    if (words) {
      *reinterpret_cast<uint64_t*>(to) = bytes;
    } else {
      const int64_t count = std::min<int64_t>(kDropoutBlock, args.columns - first);
      for (int64_t k = 0; k < count; ++k) to[k] = (bytes >> (8 * k) & 1) != 0;
    }
  }
}

}  // namespace

void attention_dropout_mask(const DropoutMask& args, void* stream) {
  const int64_t blocks = args.rows * divide_up(args.columns, kDropoutBlock);
  if (blocks > 0) launch(dropout_mask_kernel, grid_stride_blocks(blocks, kThreads), kThreads, 0, stream, args);
}

}  // namespace lect11ext::cuda
