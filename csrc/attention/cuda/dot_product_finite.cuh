// Whether some operand is infinite or NaN, or so near the largest float that a part of it would be (kMostSplit): "not
// finite", here. The host need not know: kernels read a flag. Finding out costs one read of the operands. Two ask.
//
// Of 16-bit types, what a mask may bar: a key that no query sees, or a query that sees nothing, is never used, whatever
// is in it; but tiles of wgmma come from shared memory as they are, and zero times NaN is NaN. So the kernels of sm_90a
// compute masked attention as if all were finite, and where it is not, the kernels for all devices compute it once
// more.
//
// Of floats, all operands, where it pays (FloatScan): there are kernels that take them for finite, and split them by
// three instructions for tensor cores instead of five.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "attention/cuda/dot_product_scan_worth.h"
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
    for (int e = 0; e < kVector<S>; ++e) found = found || !(std::abs(piece[e]) <= kMostSplit);
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

class FloatScan {
 public:
  explicit FloatScan(const Attention& args, const AttentionOperand& grad_out = {}) : args_(args), grad_out_(grad_out) {}

  bool pays() const {
    const bool whole = args_.head_dim % kVector<float> == 0 && args_.value_dim % kVector<float> == 0;
    const bool narrow = std::max(args_.head_dim, args_.value_dim) <= 128;  // others have one kernel for all
    if (args_.dtype != DType::Float || !whole || !narrow) return false;
    for (const AttentionOperand* operand : {&args_.query, &args_.key, &args_.value, &grad_out_}) {
      if (!is_aligned<float>(*operand)) return false;
    }
    const int64_t sequences = args_.query_starts == nullptr ? 1 : std::max<int64_t>(args_.sequences, 1);
    const double window = static_cast<double>(args_.window_left) + static_cast<double>(args_.window_right) + 1;
    const double keys = std::clamp(window, 0.0, static_cast<double>(args_.keys / sequences));
    const int64_t columns = args_.head_dim + args_.value_dim;
    const auto queries = static_cast<double>(args_.batch * args_.heads) * static_cast<double>(args_.queries);
    const double multiply_adds = queries * keys * static_cast<double>(columns);
    const double read = queries * static_cast<double>(grad_out_.data == nullptr ? args_.head_dim : columns) +
                        static_cast<double>(args_.batch * args_.kv_heads) * static_cast<double>(args_.keys * columns);
    return multiply_adds >= std::max(kScanMultiplyAdds, kScanReuse * read);
  }

  int64_t scratch() const { return pays() ? kFlagBytes : 0; }

  // Null where it does not pay.
  const int* find(void* scratch, void* stream) const {
    if (!pays()) return nullptr;
    const auto rows = [&](const AttentionOperand& operand, int64_t heads, int64_t positions, int64_t columns) {
      return ScannedRows{operand, args_.batch, heads, operand.data == nullptr ? 0 : positions,
                         columns / kVector<float>};
    };
    return find_non_finite<float>({rows(args_.query, args_.heads, args_.queries, args_.head_dim),
                                   rows(args_.key, args_.kv_heads, args_.keys, args_.head_dim),
                                   rows(args_.value, args_.kv_heads, args_.keys, args_.value_dim),
                                   rows(grad_out_, args_.heads, args_.queries, args_.value_dim)},
                                  scratch, stream);
  }

 private:
  const Attention& args_;
  const AttentionOperand grad_out_;
};

}  // namespace
}  // namespace lect11ext::cuda
