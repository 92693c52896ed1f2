#include "common/tensors.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <vector>

namespace lect11ext {
namespace {

// From here on memory usually comes fresh from the system, page by page as it is written: 2 µs for every 4 KiB on a
// virtual machine, or 60 µs for 2 MiB at once.
constexpr size_t kWorthHugePages = size_t{4} << 20;

void request_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < kWorthHugePages) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: a refusal changes nothing
#endif
}

// Whether dimension d of every operand continues dimension d + 1, so that the two are one.
bool merges(int64_t inner_size, const std::vector<at::IntArrayRef>& strides, int64_t d) {
  for (const auto& stride : strides) {
    if (stride[d] != stride[d + 1] * inner_size) return false;
  }
  return true;
}

}  // namespace

void check_dtype(const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(is_kernel_dtype(type), name, " must be float32, float64, bfloat16 or float16, but got ", type);
}

DType dtype_of(const at::Tensor& tensor, const char* name) {
  check_dtype(name, tensor);
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::Float;
    case at::kDouble: return DType::Double;
    case at::kBFloat16: return DType::BFloat16;
    default: return DType::Half;
  }
}

at::Tensor empty_output(at::IntArrayRef size, const at::TensorOptions& options) {
  at::Tensor out = at::empty(size, options);
  if (out.is_cpu()) request_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

void set_views(at::IntArrayRef size, Shape& shape, std::initializer_list<Operand*> operands) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::vector<Operand*> given;
    std::vector<at::IntArrayRef> strides;
    for (Operand* operand : operands) {
      if (!operand->tensor.defined()) continue;
      given.push_back(operand);
      strides.push_back(operand->tensor.strides());
    }
    std::vector<int64_t> kept;  // the innermost dimension of each merged group
    std::vector<int64_t> sizes;
    shape.numel = 1;
    for (int64_t d = 0; d < static_cast<int64_t>(size.size()); ++d) {
      shape.numel *= size[d];
      if (size[d] == 1) continue;
      const bool merged = !kept.empty() && kept.back() == d - 1 && merges(size[d], strides, d - 1);
      if (merged) {
        kept.back() = d;
        sizes.back() *= size[d];
      } else {
        kept.push_back(d);
        sizes.push_back(size[d]);
      }
    }
    if (kept.size() > kMaxDims) {
      for (Operand* operand : given) operand->tensor = operand->tensor.contiguous();
      continue;
    }
    shape.ndim = kept.empty() ? 1 : static_cast<int>(kept.size());
    shape.sizes[0] = 1;
    std::copy(sizes.begin(), sizes.end(), shape.sizes);
    for (size_t i = 0; i < given.size(); ++i) {
      View& view = *given[i]->view;
      view.data = const_cast<void*>(given[i]->tensor.const_data_ptr());
      view.dtype = dtype_of(given[i]->tensor, "operand");
      view.dense = given[i]->tensor.is_contiguous();
      view.strides[0] = 1;
      for (size_t k = 0; k < kept.size(); ++k) view.strides[k] = strides[i][kept[k]];
    }
    return;
  }
}

at::Tensor with_unit_columns(const at::Tensor& matrix) {
  const bool unit = matrix.size(1) <= 1 || matrix.stride(1) == 1;
  const bool apart = matrix.size(0) <= 1 || matrix.stride(0) >= matrix.size(1);
  return unit && apart ? matrix : matrix.contiguous();
}

at::Tensor finite_exp(const at::Tensor& x) {
  const double largest = x.scalar_type() == at::kDouble ? 709.7827 : 88.72283;
  // The bound stops no derivative: where the value is cut off, the exponential is still its own slope.
  const at::Tensor finite = at::clamp_max(x, 1e30);
  return at::exp(at::where(finite > largest, (finite - finite.detach()) + largest, finite));
}

void check_same_device(std::initializer_list<std::pair<const char*, const at::Tensor*>> tensors) {
  const auto& [first_name, first] = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(!tensor->defined() || tensor->device() == first->device(),
                "Expected all tensors to be on the same device, but ", name, " is on ", tensor->device(), " and ",
                first_name, " is on ", first->device());
  }
}

void check_broadcast(const char* name, const at::Tensor& tensor, const char* like_name, const at::Tensor& like) {
  bool fits = tensor.dim() <= like.dim();
  for (int64_t d = 1; fits && d <= tensor.dim(); ++d) {
    fits = tensor.sym_size(-d) == like.sym_size(-d) || tensor.sym_size(-d) == 1;
  }
  TORCH_CHECK_VALUE(fits, name, " must broadcast to the shape of ", like_name, ", ", like.sym_sizes(), ", but got ",
                    tensor.sym_sizes());
}

void check_shape(const char* name, c10::SymIntArrayRef got, c10::SymIntArrayRef expected, const char* meaning) {
  bool same = got.size() == expected.size();
  for (size_t d = 0; same && d < got.size(); ++d) same = got[d] == expected[d];
  TORCH_CHECK_VALUE(same, name, " must have shape ", expected, " (", meaning, "), but got ", got);
}

}  // namespace lect11ext
