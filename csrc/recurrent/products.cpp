#include "recurrent/products.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "common/dispatch.h"
#include "common/tensors.h"
#include "recurrent/cell_common.h"

namespace lect11ext::recurrent {

void Products::add(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, bool accumulate) {
  const Rows rows(b);
  Product args{};
  args.m = a.size(0);
  args.n = b.size(1);
  args.k = a.size(1);
  args.a = a.const_data_ptr();
  args.a_row = a.stride(0);
  args.a_column = a.stride(1);
  args.b = rows.data;
  args.b_stride = rows.stride;
  args.c = c.mutable_data_ptr();
  args.dtype = dtype_of(b, "matrix");
  args.accumulate = accumulate;
  // Wide blocks where two a thread remain.
  args.columns = kWide;
  if (product_blocks(args) < 2 * at::get_num_threads()) args.columns = kNarrow;
  held_.append({a, rows.held, c});
  products_.push_back(args);
  multiply_adds_ += args.m * args.n * args.k;
}

at::Tensor Products::input_gradient(const at::Tensor& grad_pre, const at::Tensor& weight, const at::Tensor& onto) {
  if (!weight.is_cpu()) return onto.defined() ? at::addmm(onto, grad_pre, weight) : at::mm(grad_pre, weight);
  at::Tensor out = onto.defined() ? onto : at::empty({grad_pre.size(0), weight.size(1)}, weight.options());
  add(grad_pre, weight, out, onto.defined());
  return out;
}

at::Tensor Products::weight_gradient(const at::Tensor& grad_pre, const at::Tensor& x, at::Tensor out) {
  if (!out.defined()) out = empty_output({grad_pre.size(1), x.size(1)}, x.options());
  if (x.is_cpu()) {
    add(grad_pre.t(), x, out, /*accumulate=*/false);
  } else {
    at::mm_out(out, grad_pre.t(), x);
  }
  return out;
}

at::Tensor Products::bias_gradient(const at::Tensor& grad_pre, at::ScalarType type) {
  if (!grad_pre.is_cpu()) return grad_pre.sum(0);
  at::Tensor out = at::empty({grad_pre.size(1)}, grad_pre.options().dtype(type));
  sums_.push_back(
      {grad_pre.size(0), grad_pre.size(1), grad_pre.const_data_ptr(), out.mutable_data_ptr(), dtype_of(out, "bias")});
  held_.append({grad_pre, out});
  return out;
}

void Products::run() {
  constexpr int64_t kMultiplyAddsPerUnit = 32;  // of a nanosecond, roughly, on one core
  const int64_t worth = multiply_adds_ / kMultiplyAddsPerUnit / kWorthAThread;
  const int64_t shares = std::clamp<int64_t>(worth, 1, at::get_num_threads());
  // A share is its part of the blocks of every product, so that unlike products need no weighing; which part differs
  // from product to product, so that those of a single block go to different shares.
  const auto run_shares = [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      int64_t part = share;
      const auto take = [&](auto* kernel, const auto& args, int64_t blocks) {
        kernel(args, blocks * part / shares, blocks * (part + 1) / shares);
        part = (part + 1) % shares;
      };
      for (const Product& product : products_) take(product_kernel, product, product_blocks(product));
      for (const ColumnSums& sums : sums_) take(column_sums_kernel, sums, (sums.n + kSumColumns - 1) / kSumColumns);
    }
  };
  if (shares == 1) return run_shares(0, 1);
  at::parallel_for(0, shares, 1, run_shares);
}

}  // namespace lect11ext::recurrent
