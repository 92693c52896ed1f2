// The ops of semantic hashing as functions; what they compute stands in hashing.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lect11ext {

at::Tensor binarize(const at::Tensor& input, double threshold);
at::Tensor pack_bits(const at::Tensor& input, double threshold);
at::Tensor unpack_bits(const at::Tensor& codes, std::optional<c10::SymInt> num_bits, at::ScalarType dtype);
at::Tensor hamming_distance(const at::Tensor& a, const at::Tensor& b);
std::tuple<at::Tensor, at::Tensor> hamming_topk(const at::Tensor& query, const at::Tensor& codes, c10::SymInt k);
std::tuple<at::Tensor, at::Tensor, at::Tensor> hamming_radius(const at::Tensor& query, const at::Tensor& codes,
                                                              int64_t radius);

}  // namespace lect11ext
