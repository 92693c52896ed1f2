#include "autoencoder/partial_sums.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <vector>

namespace lect11ext {
namespace {

template <class T>
void sum_neighbours(const T* partials, T* out, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(partials[row * count + i]);
    out[row] = static_cast<T>(sum);
  }
}

template <class T>
void sum_down(const T* partials, T* out, int64_t runs, int64_t cols, double scale) {
  std::vector<double> sums(cols);
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t i = 0; i < cols; ++i) sums[i] += static_cast<double>(partials[run * cols + i]);
  }
  for (int64_t i = 0; i < cols; ++i) out[i] = static_cast<T>(scale * sums[i]);
}

}  // namespace

at::Tensor sum_tiles(const at::Tensor& partials, at::IntArrayRef size, const RowTiles& tiles) {
  if (!partials.is_cpu()) return partials.view({tiles.rows, tiles.tiles_per_row}).sum(-1).view(size);
  at::Tensor out = at::empty(size, partials.options());
  if (partials.scalar_type() == at::kDouble) {
    sum_neighbours(partials.const_data_ptr<double>(), out.mutable_data_ptr<double>(), tiles.rows, tiles.tiles_per_row);
  } else {
    sum_neighbours(partials.const_data_ptr<float>(), out.mutable_data_ptr<float>(), tiles.rows, tiles.tiles_per_row);
  }
  return out;
}

at::Tensor sum_runs(const at::Tensor& partials, double scale) {
  if (!partials.is_cpu()) return partials.sum(0).mul_(scale);
  at::Tensor out = at::empty({partials.size(1)}, partials.options());
  if (partials.scalar_type() == at::kDouble) {
    sum_down(partials.const_data_ptr<double>(), out.mutable_data_ptr<double>(), partials.size(0), partials.size(1),
             scale);
  } else {
    sum_down(partials.const_data_ptr<float>(), out.mutable_data_ptr<float>(), partials.size(0), partials.size(1),
             scale);
  }
  return out;
}

at::Tensor sum_broadcast(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  // at::sum splits what has this many elements (at::internal::GRAIN_SIZE) among threads.
  constexpr int64_t kSplit = 32768, kColumns = 1024;
  const bool is_known = tensor.is_cpu() && !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  const auto is_one = [](const c10::SymInt& n) { return n == 1; };
  if (!is_known || tensor.numel() < kSplit || !std::all_of(size.begin(), size.end(), is_one)) {
    return at::sum_to(tensor, size);
  }
  const at::Tensor flat = tensor.reshape({-1});
  const int64_t whole = flat.numel() / kColumns * kColumns;
  const at::Tensor columns = flat.narrow(0, 0, whole).view({-1, kColumns}).sum(0);
  return at::cat({columns, flat.narrow(0, whole, flat.numel() - whole)}).sum().view_symint(size);
}

}  // namespace lect11ext
