// PyTorch side of binarize, pack_bits and unpack_bits. Kernels: hashing.h; derivatives: hashing_autograd.cpp.
#include "autoencoder/hashing.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gt.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "autoencoder/hashing_inputs.h"
#include "autoencoder/hashing_ops.h"
#include "common/dispatch.h"
#include "common/ops.h"
#include "common/tensors.h"

namespace lect11ext {
namespace {

using namespace hashing;

// The number of the input's type that the threshold is compared as, as torch compares a tensor with a float.
double rounded(double threshold, at::ScalarType type) {
  switch (type) {
    case at::kFloat: return static_cast<float>(threshold);
    case at::kBFloat16: return static_cast<float>(at::BFloat16(static_cast<float>(threshold)));
    case at::kHalf: return static_cast<float>(at::Half(static_cast<float>(threshold)));
    default: return threshold;
  }
}

// The integers that a type holds, from `least` to below `end`.
struct Range {
  double least, end;
};

// x > t of an integer x is x > ⌊t⌋, in integers: exact beyond what a float tells apart. torch's common types are
// compared as they are, others as int64.
Tensor integers_above(const Tensor& input, double threshold) {
  const auto type = input.scalar_type();
  const bool is_signed = type == at::kChar || type == at::kShort || type == at::kInt;
  const double half = std::ldexp(1.0, 8 * static_cast<int>(input.element_size()) - 1);
  const Range range = is_signed ? Range{-half, half} : type == at::kByte ? Range{0, 2 * half} : Range{-0x1p63, 0x1p63};
  const double floor = std::floor(threshold);
  if (floor < range.least) return at::full_like(input, true, input.options().dtype(at::kBool));
  if (floor >= range.end) return at::full_like(input, false, input.options().dtype(at::kBool));
  const Tensor integers = is_signed || type == at::kByte ? input : input.to(at::kLong);
  return at::gt(integers, static_cast<int64_t>(floor));
}

// --- kernels ------------------------------------------------------------------------------------------------------

Tensor kernel_binarize(const Tensor& input, double threshold) {
  check_binarize(input, threshold);
  Tensor out = empty_output(input.sizes(), input.options());
  Binarize args{};
  Operand operand{input, &args.input};
  set_views(input.sizes(), args.shape, {&operand});
  args.threshold = rounded(threshold, input.scalar_type());
  args.out = out.mutable_data_ptr();
  launch<binarize_kernel, LECT11EXT_CUDA_KERNEL(binarize)>(args, args.tiles(), Binarize::kTile / 4, input.device());
  return out;
}

at::DimVector with_last(at::IntArrayRef size, int64_t last) {
  at::DimVector out(size.begin(), size.end());
  out.back() = last;
  return out;
}

Tensor kernel_pack(const Tensor& input, double threshold) {
  check_pack(input, threshold);
  PackBits args{};
  args.columns = input.size(-1);
  Tensor codes = empty_output(with_last(input.sizes(), args.bytes()), input.options().dtype(at::kByte));
  args.rows = args.columns > 0 ? input.numel() / args.columns : 0;
  args.codes = codes.mutable_data_ptr<uint8_t>();
  Operand operand;
  if (is_kernel_dtype(input.scalar_type())) {
    operand = {input, &args.input};
    set_views(input.sizes(), args.shape, {&operand});
    args.threshold = rounded(threshold, input.scalar_type());
  } else {
    const bool is_bool = input.scalar_type() == at::kBool;
    operand.tensor = (is_bool ? input : integers_above(input, threshold)).contiguous();
    args.bits = static_cast<const uint8_t*>(operand.tensor.const_data_ptr());
  }
  launch<pack_bits_kernel, LECT11EXT_CUDA_KERNEL(pack_bits)>(args, args.rows, 2 + args.columns / 8, input.device());
  return codes;
}

// What 1 looks like in a type.
uint64_t pattern_of_one(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return 0x3F800000;
    case at::kDouble: return 0x3FF0000000000000;
    case at::kBFloat16: return 0x3F80;
    case at::kHalf: return 0x3C00;
    default: return 1;
  }
}

Tensor kernel_unpack(const Tensor& codes, std::optional<c10::SymInt> num_bits, at::ScalarType dtype) {
  UnpackBits args{};
  args.columns = check_unpack(codes, num_bits, dtype).guard_int(__FILE__, __LINE__);
  Tensor out = empty_output(with_last(codes.sizes(), args.columns), codes.options().dtype(dtype));
  const Tensor dense = codes.contiguous();
  args.rows = args.columns > 0 ? out.numel() / args.columns : 0;
  args.bytes = codes.size(-1);
  args.codes = dense.const_data_ptr<uint8_t>();
  args.one = pattern_of_one(dtype);
  args.item_size = static_cast<int64_t>(out.element_size());
  args.out = out.mutable_data_ptr();
  launch<unpack_bits_kernel, LECT11EXT_CUDA_KERNEL(unpack_bits)>(args, args.rows, 2 + args.columns / 4, codes.device());
  return out;
}

// --- meta ---------------------------------------------------------------------------------------------------------

Tensor meta_binarize(const Tensor& input, double threshold) {
  check_binarize(input, threshold);
  return at::empty_symint(input.sym_sizes(), input.options());
}

c10::SymDimVector with_last(c10::SymIntArrayRef size, c10::SymInt last) {
  c10::SymDimVector out(size.begin(), size.end());
  out.back() = std::move(last);
  return out;
}

Tensor meta_pack(const Tensor& input, double threshold) {
  check_pack(input, threshold);
  const auto size = with_last(input.sym_sizes(), (input.sym_size(-1) + 7) / 8);
  return at::empty_symint(size, input.options().dtype(at::kByte));
}

Tensor meta_unpack(const Tensor& codes, std::optional<c10::SymInt> num_bits, at::ScalarType dtype) {
  const auto size = with_last(codes.sym_sizes(), check_unpack(codes, num_bits, dtype));
  return at::empty_symint(size, codes.options().dtype(dtype));
}

}  // namespace

// --- registration -------------------------------------------------------------------------------------------------

Tensor binarize(const Tensor& input, double threshold) {
  static const auto op = find_op<decltype(binarize)>("lect11ext::binarize");
  return op.call(input, threshold);
}

Tensor pack_bits(const Tensor& input, double threshold) {
  static const auto op = find_op<decltype(pack_bits)>("lect11ext::pack_bits");
  return op.call(input, threshold);
}

Tensor unpack_bits(const Tensor& codes, std::optional<c10::SymInt> num_bits, at::ScalarType dtype) {
  static const auto op = find_op<decltype(unpack_bits)>("lect11ext::unpack_bits");
  return op.call(codes, std::move(num_bits), dtype);
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("binarize(Tensor input, float threshold) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("pack_bits(Tensor input, float threshold) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("unpack_bits(Tensor codes, SymInt? num_bits, ScalarType dtype) -> Tensor", {at::Tag::pt2_compliant_tag});
}

static void add_kernels(torch::Library& m) {
  m.impl("binarize", kernel_binarize);
  m.impl("pack_bits", kernel_pack);
  m.impl("unpack_bits", kernel_unpack);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("binarize", meta_binarize);
  m.impl("pack_bits", meta_pack);
  m.impl("unpack_bits", meta_unpack);
}

}  // namespace lect11ext
