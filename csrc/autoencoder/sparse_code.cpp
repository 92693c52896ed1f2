// PyTorch side of sparse_decode, sparse_dots and sparse_outer: schema, kernels' arguments. Derivatives:
// sparse_code_autograd.cpp. What they compute, and the kernels: sparse_code.h.
#include "autoencoder/sparse_code.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "autoencoder/sparse_code_inputs.h"
#include "autoencoder/sparse_code_ops.h"
#include "common/dispatch.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace sparse_code;

// --- meta ---------------------------------------------------------------------------------------------------------

Tensor meta_decode(const Tensor& values, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  check_decode(values, indices, weight, bias);
  return at::empty_symint(size_with(indices, weight.sym_size(1)),
                          values.options().dtype(promoted_type(values, weight, bias)));
}

Tensor meta_dots(const Tensor& dense, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  check_dots(dense, indices, weight, bias);
  return at::empty_symint(indices.sym_sizes(), dense.options().dtype(promoted_type(dense, weight, bias)));
}

Tensor meta_outer(const Tensor& values, const Tensor& indices, const Tensor& dense, c10::SymInt atoms) {
  check_outer(values, indices, dense, atoms);
  return at::empty_symint({atoms, dense.sym_size(-1)}, values.options().dtype(promoted_type(values, dense)));
}

// --- kernels ------------------------------------------------------------------------------------------------------

// int64 and dense; on the CPU, in range.
Tensor places_of(const Tensor& indices, int64_t atoms) {
  const Tensor places = indices.to(at::kLong).contiguous();
  if (!places.is_cpu()) return places;
  const int64_t* const data = places.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < places.numel(); ++i) {
    TORCH_CHECK_INDEX(data[i] >= 0 && data[i] < atoms, "indices must be in [0, ", atoms,
                      "), the rows of weight, but got ", data[i]);
  }
  return places;
}

// A matrix as the kernels read it. They take double with double only.
Tensor table_of(const Tensor& matrix, at::ScalarType arithmetic) {
  return with_unit_columns(arithmetic == at::kDouble ? matrix.to(at::kDouble) : matrix);
}

at::ScalarType arithmetic_of(at::ScalarType result) { return result == at::kDouble ? at::kDouble : at::kFloat; }

// In a cache's reach an element takes about a quarter of a nanosecond.
int64_t row_cost(int64_t terms, int64_t rows, int64_t width) { return (terms / rows + 1) * width / 4 + 1; }

void run_weighted_rows(const WeightedRows& args, int64_t terms, c10::Device device) {
  launch<weighted_rows_kernel, LECT11EXT_CUDA_KERNEL(weighted_rows)>(args, args.rows,
                                                                     row_cost(terms, args.rows, args.width), device);
}

Tensor kernel_decode(const Tensor& values, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  check_decode(values, indices, weight, bias);
  const auto type = promoted_type(values, weight, bias), arithmetic = arithmetic_of(type);
  const Tensor places = places_of(indices, weight.size(0));
  const auto size = size_with(indices, weight.size(1));
  Tensor out = empty_output(C10_AS_INTARRAYREF_SLOW(size), values.options().dtype(type));
  if (out.numel() == 0) return out;
  const Tensor table = table_of(weight, arithmetic), terms = values.to(arithmetic).contiguous();
  const Tensor added = autograd::defined(bias) ? bias->to(arithmetic).contiguous() : Tensor();
  WeightedRows args{};
  args.rows = rows_of(indices);
  args.width = table.size(1);
  args.k = indices.size(-1);
  args.table_rows = table.size(0);
  args.values = terms.const_data_ptr();
  args.indices = places.const_data_ptr<int64_t>();
  args.table = table.const_data_ptr();
  args.dtype = dtype_of(table, "weight");
  args.stride = table.stride(0);
  args.bias = added.defined() ? added.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.out_dtype = dtype_of(out, "out");
  run_weighted_rows(args, terms.numel(), out.device());
  return out;
}

Tensor kernel_dots(const Tensor& dense, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  check_dots(dense, indices, weight, bias);
  const auto type = promoted_type(dense, weight, bias), arithmetic = arithmetic_of(type);
  const Tensor places = places_of(indices, weight.size(0));
  Tensor out = at::empty(indices.sizes(), dense.options().dtype(type));
  if (out.numel() == 0) return out;
  RowDots args{};
  args.rows = rows_of(indices);
  args.width = weight.size(1);
  const Tensor table = table_of(weight, arithmetic),
               rows = table_of(dense.reshape({args.rows, args.width}), arithmetic);
  args.k = indices.size(-1);
  args.table_rows = table.size(0);
  args.indices = places.const_data_ptr<int64_t>();
  args.table = table.const_data_ptr();
  args.dtype = dtype_of(table, "weight");
  args.stride = table.stride(0);
  args.dense = rows.const_data_ptr();
  args.dense_dtype = dtype_of(rows, "dense");
  args.dense_stride = rows.stride(0);
  const Tensor added = autograd::defined(bias) ? bias->to(arithmetic).contiguous() : Tensor();
  args.bias = added.defined() ? added.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.out_dtype = dtype_of(out, "out");
  launch<row_dots_kernel, LECT11EXT_CUDA_KERNEL(row_dots)>(args, args.rows,
                                                           row_cost(out.numel(), args.rows, args.width), out.device());
  return out;
}

// Entries by atom, those of one atom in their order, and where each atom's begin.
struct Order {
  Tensor entries, starts;
};

Order counting_sort(const Tensor& places, int64_t atoms) {
  const int64_t count = places.numel();
  Order order{at::empty({count}, places.options()), at::zeros({atoms + 1}, places.options())};
  const int64_t* const place = places.const_data_ptr<int64_t>();
  int64_t *const entries = order.entries.mutable_data_ptr<int64_t>(), *const starts =
                                                                          order.starts.mutable_data_ptr<int64_t>();
  // starts[a] is at first where atom a − 1 begins, and has come to where it ends once its entries have their places.
  for (int64_t i = 0; i < count; ++i) {
    if (place[i] + 2 <= atoms) ++starts[place[i] + 2];
  }
  for (int64_t a = 2; a <= atoms; ++a) starts[a] += starts[a - 1];
  for (int64_t i = 0; i < count; ++i) entries[starts[place[i] + 1]++] = i;
  return order;
}

Order order_of(const Tensor& places, int64_t atoms) {
  if (places.is_cpu()) return counting_sort(places, atoms);
  // What is out of range is sorted to the ends, where no atom has it.
  const auto [sorted, entries] = at::sort(places.view({-1}), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  return {entries, at::searchsorted(sorted, at::arange(atoms + 1, places.options()))};
}

Tensor kernel_outer(const Tensor& values, const Tensor& indices, const Tensor& dense, c10::SymInt symbolic_atoms) {
  check_outer(values, indices, dense, symbolic_atoms);
  const int64_t atoms = symbolic_atoms.guard_int(__FILE__, __LINE__), width = dense.size(-1);
  const auto type = promoted_type(values, dense), arithmetic = arithmetic_of(type);
  const Tensor places = places_of(indices, atoms);
  const auto options = values.options().dtype(type);
  if (atoms * width == 0 || places.numel() == 0) return at::zeros({atoms, width}, options);
  const int64_t rows = rows_of(indices);
  const Tensor table = table_of(dense.reshape({rows, width}), arithmetic), terms = values.to(arithmetic).contiguous();
  const Order order = order_of(places, atoms);
  Tensor out = empty_output({atoms, width}, options);
  WeightedRows args{};
  args.rows = atoms;
  args.width = width;
  args.k = indices.size(-1);
  args.table_rows = rows;
  args.values = terms.const_data_ptr();
  args.order = order.entries.const_data_ptr<int64_t>();
  args.starts = order.starts.const_data_ptr<int64_t>();
  args.table = table.const_data_ptr();
  args.dtype = dtype_of(table, "dense");
  args.stride = table.stride(0);
  args.out = out.mutable_data_ptr();
  args.out_dtype = dtype_of(out, "out");
  run_weighted_rows(args, terms.numel(), out.device());
  return out;
}

}  // namespace

// --- registration -------------------------------------------------------------------------------------------------

Tensor sparse_decode(const Tensor& values, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = find_op<decltype(sparse_decode)>("lect11ext::sparse_decode");
  return op.call(values, indices, weight, bias);
}

Tensor sparse_dots(const Tensor& dense, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = find_op<decltype(sparse_dots)>("lect11ext::sparse_dots");
  return op.call(dense, indices, weight, bias);
}

Tensor sparse_outer(const Tensor& values, const Tensor& indices, const Tensor& dense, c10::SymInt atoms) {
  static const auto op = find_op<decltype(sparse_outer)>("lect11ext::sparse_outer");
  return op.call(values, indices, dense, std::move(atoms));
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("sparse_dots(Tensor dense, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("sparse_outer(Tensor values, Tensor indices, Tensor dense, SymInt atoms) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

static void add_kernels(torch::Library& m) {
  m.impl("sparse_decode", kernel_decode);
  m.impl("sparse_dots", kernel_dots);
  m.impl("sparse_outer", kernel_outer);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("sparse_decode", meta_decode);
  m.impl("sparse_dots", meta_dots);
  m.impl("sparse_outer", meta_outer);
}

}  // namespace lect11ext
