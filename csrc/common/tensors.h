// From tensors to the structs that kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "common/view.h"

namespace lect11ext {

// Throws TypeError unless the kernels have the type; `name` is the argument's.
DType dtype_of(const at::Tensor& tensor, const char* name);

inline bool is_kernel_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// Throws TypeError unless the kernels have the type.
void check_dtype(const char* name, at::ScalarType type);
inline void check_dtype(const char* name, const at::Tensor& tensor) { check_dtype(name, tensor.scalar_type()); }

// An uninitialised output. Where it is large, on the CPU, the system is asked to back it with huge pages, as NumPy
// does.
at::Tensor empty_output(at::IntArrayRef size, const at::TensorOptions& options);

// An op that reads and writes more bytes than this, a usual last-level cache, streams what it writes past the caches.
inline constexpr size_t kBeyondCaches = size_t{32} << 20;

// One operand to be seen as a View: a tensor expanded to the common size, or an undefined one.
struct Operand {
  at::Tensor tensor;
  View* view;
};

// Fills `shape` with `size`, its dimensions merged as far as all operands allow, and every operand's view. An operand
// that would need more than kMaxDims dimensions is replaced by a dense copy, kept alive in `operands`.
void set_views(at::IntArrayRef size, Shape& shape, std::initializer_list<Operand*> operands);

// The same tensor with unit stride in its last dimension and no overlap, copied if it has not.
at::Tensor with_unit_columns(const at::Tensor& matrix);

// The sum over the first two dimensions: time and batch. Torch 2.11 finds sum({0, 1}) ambiguous, hence a name for it.
inline at::Tensor sum_rows(const at::Tensor& tensor) {
  return tensor.sum(at::OptionalIntArrayRef{at::IntArrayRef{0, 1}});
}

// e^x, in place of infinity a number next to the largest: zero times it is zero, as its slope there is.
at::Tensor finite_exp(const at::Tensor& x);

// Throws unless all defined tensors are on the device of the first.
void check_same_device(std::initializer_list<std::pair<const char*, const at::Tensor*>> tensors);

// Throws unless `tensor` broadcasts to the shape of `like`.
void check_broadcast(const char* name, const at::Tensor& tensor, const char* like_name, const at::Tensor& like);

// Throws unless both are equal where both are known.
void check_shape(const char* name, c10::SymIntArrayRef got, c10::SymIntArrayRef expected, const char* meaning);

}  // namespace lect11ext
