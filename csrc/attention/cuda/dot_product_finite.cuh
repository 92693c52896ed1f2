// Whether there is infinity or NaN in what a mask may bar. A key that no query sees, or a query that sees nothing, is
// never used, whatever is in it; but tiles of wgmma come from shared memory as they are, and zero times NaN is NaN. So
// the kernels of sm_90a compute masked attention as if all were finite, and where it is not, the kernels for all
// devices compute it once more: the host need not know. Finding out costs one read of the operands.
#pragma once

#include <initializer_list>

#include "attention/cuda/dot_product_score.cuh"

namespace lect11ext::cuda {

inline constexpr int64_t kFlagBytes = 256;  // of the scratch: an int, and room to where the allocator would begin

namespace {

constexpr int kScanThreads = 256;

__global__ void clear_flag_kernel(int* flag) { *flag = 0; }

// [batch, heads, positions] rows of `pieces` times sixteen bytes.
struct ScannedRows {
  AttentionOperand operand;
  int64_t batch, heads, positions, pieces;
};

template <class S>
__global__ void __launch_bounds__(kScanThreads) non_finite_kernel(const __grid_constant__ ScannedRows rows, int* flag) {
  const int64_t step = int64_t{gridDim.x} * kScanThreads;
  const int64_t count = rows.batch * rows.heads * rows.positions * rows.pieces;
  bool found = false;
  for (int64_t i = int64_t{blockIdx.x} * kScanThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = divide(i, rows.pieces), unit = divide(row, rows.positions), batch = divide(unit, rows.heads);
    const S* const from = row_of<S>(rows.operand, batch, unit - batch * rows.heads, row - unit * rows.positions);
    const Pack<S, kVector<S>> piece = Pack<S, kVector<S>>::load(from + (i - row * rows.pieces) * kVector<S>);
#pragma unroll
    for (int e = 0; e < kVector<S>; ++e) found = found || !(std::abs(piece[e]) < infinity<float>());
  }
  if (found) *flag = 1;  // all who write write the same
}

// Has the flag at the beginning of `scratch`, which it returns, say whether one of the rows, whose columns are a
// multiple of sixteen bytes, is not finite.
template <class S>
const int* find_non_finite(std::initializer_list<ScannedRows> all, void* scratch, void* stream) {
  int* const flag = static_cast<int*>(scratch);
  launch(clear_flag_kernel, 1, 1, 0, stream, flag);
  for (const ScannedRows& rows : all) {
    const int64_t count = rows.batch * rows.heads * rows.positions * rows.pieces;
    if (count == 0) continue;
    launch(non_finite_kernel<S>, grid_stride_blocks(count, kScanThreads), kScanThreads, 0, stream, rows, flag);
  }
  return flag;
}

}  // namespace
}  // namespace lect11ext::cuda
