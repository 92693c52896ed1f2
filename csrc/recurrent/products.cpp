#include "recurrent/products.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "common/dispatch.h"
#include "common/tensors.h"
#include "recurrent/cell_common.h"

namespace lect11ext::recurrent {
namespace {

// Rows of C that the BLAS computes in one call. They are cut the same way for any number of threads, and each call has
// one: left to itself the BLAS cuts sums too, by the number of threads, and bits would depend on it.
constexpr int64_t kBlasRows = 256;

// bfloat16: rounding, and a call's 15 µs, are repaid from this many multiply-adds on. Float: MKL is the faster one on
// Intel's processors alone, and of long sums (docs/performance-notes.md).
constexpr int64_t kWorthTheBlas = 1 << 22, kFloatWorthTheBlas = 1 << 27;

// The type in which the BLAS is given a product; none where our own kernel is faster.
std::optional<at::ScalarType> blas_type(at::ScalarType type, int64_t multiply_adds) {
  if (!at::globalContext().userEnabledMkldnn()) return std::nullopt;
  if (type == at::kFloat || (type == at::kBFloat16 && prefers_float_products())) {
    const bool faster = is_intel() && capability() >= Capability::AVX512 && at::hasMKL();
    if (faster && multiply_adds >= kFloatWorthTheBlas) return at::kFloat;
  } else if (type == at::kBFloat16 && multiply_adds >= kWorthTheBlas && capability() >= Capability::AVX512_BF16) {
    return at::kBFloat16;
  }
  return std::nullopt;
}

// The BLAS asks OpenMP how many threads there are, which inside a parallel region is still the number outside.
class OneThread {  // for this thread's calls
 public:
#if AT_PARALLEL_OPENMP
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  const int before_;
#endif
};

}  // namespace

bool rounds_gradients(at::ScalarType type, int64_t multiply_adds) {
  return type == at::kBFloat16 && blas_type(type, multiply_adds) == type;
}

int64_t Products::BlasProduct::blocks() const { return (c.size(0) + kBlasRows - 1) / kBlasRows; }

void Products::BlasProduct::run(int64_t begin, int64_t end) const {
  // A thread of a parallel region knows nothing of the caller's autograd and autocast; nor must the caller here.
  const at::AutoDispatchBelowAutograd no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const OneThread one;
  for (int64_t first = begin * kBlasRows; first < std::min(end * kBlasRows, c.size(0)); first += kBlasRows) {
    const int64_t rows = std::min(kBlasRows, c.size(0) - first);
    at::Tensor out = c.narrow(0, first, rows);
    if (b.scalar_type() == c.scalar_type()) at::mm_out(out, a.narrow(0, first, rows), b);
    else out.copy_(at::mm(a.narrow(0, first, rows), b));
  }
}

const at::Tensor& Products::rounded(const at::Tensor& grad_pre, at::ScalarType type) {
  for (const auto& [from, to] : rounded_) {
    if (from.is_same(grad_pre)) return to;
  }
  return rounded_.emplace_back(grad_pre, grad_pre.to(type)).second;
}

void Products::add(const at::Tensor& grad_pre, bool transposed, const at::Tensor& b, const at::Tensor& c,
                   bool accumulate) {
  const int64_t multiply_adds = grad_pre.numel() * b.size(1);
  multiply_adds_ += multiply_adds;
  const auto type = accumulate ? std::nullopt : blas_type(b.scalar_type(), multiply_adds);
  if (type.has_value()) {
    const at::Tensor& a = rounded(grad_pre, *type);
    blas_.push_back({transposed ? a.t() : a, b.to(*type), c});
    return;
  }
  const at::Tensor a = transposed ? grad_pre.t() : grad_pre;
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
}

at::Tensor Products::input_gradient(const at::Tensor& grad_pre, const at::Tensor& weight, const at::Tensor& onto) {
  if (!weight.is_cpu()) return onto.defined() ? at::addmm(onto, grad_pre, weight) : at::mm(grad_pre, weight);
  at::Tensor out = onto.defined() ? onto : at::empty({grad_pre.size(0), weight.size(1)}, weight.options());
  add(grad_pre, /*transposed=*/false, weight, out, onto.defined());
  return out;
}

at::Tensor Products::weight_gradient(const at::Tensor& grad_pre, const at::Tensor& x, at::Tensor out) {
  if (!out.defined()) out = empty_output({grad_pre.size(1), x.size(1)}, x.options());
  if (x.is_cpu()) {
    add(grad_pre, /*transposed=*/true, x, out, /*accumulate=*/false);
  } else {
    at::mm_out(out, grad_pre.t(), x);
  }
  return out;
}

at::Tensor Products::bias_gradient(const at::Tensor& grad_pre, at::ScalarType type) {
  if (!grad_pre.is_cpu()) return grad_pre.sum(0);
  at::Tensor out = at::empty({grad_pre.size(1)}, grad_pre.options().dtype(type));
  sums_.push_back({grad_pre.size(0), grad_pre.size(1), grad_pre.const_data_ptr(), out.mutable_data_ptr(),
                   dtype_of(out, "bias"), grad_pre.scalar_type() == at::kBFloat16});
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
      const auto take = [&](int64_t blocks, const auto& run) {
        run(blocks * part / shares, blocks * (part + 1) / shares);
        part = (part + 1) % shares;
      };
      for (const BlasProduct& product : blas_) {
        take(product.blocks(), [&](int64_t first, int64_t last) { product.run(first, last); });
      }
      for (const Product& product : products_) {
        take(product_blocks(product), [&](int64_t first, int64_t last) { product_kernel(product, first, last); });
      }
      for (const ColumnSums& sums : sums_) {
        take((sums.n + kSumColumns - 1) / kSumColumns,
             [&](int64_t first, int64_t last) { column_sums_kernel(sums, first, last); });
      }
    }
  };
  if (shares == 1) return run_shares(0, 1);
  at::parallel_for(0, shares, 1, run_shares);
}

}  // namespace lect11ext::recurrent
