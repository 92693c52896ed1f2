// How a kernel sees a tensor: a pointer, a type and strides. Shared by CPU and CUDA, free of torch.
#pragma once

#include <cstdint>

namespace lect11ext {

// After neighbouring dimensions are merged few tensors have more than two; an op copies one that has more than this.
inline constexpr int kMaxDims = 8;

enum class DType : int8_t { Float, Double, BFloat16, Half };

// Bytes of an element as it is stored, and as kernels compute with it.
constexpr int64_t storage_size(DType type) { return type == DType::Double ? 8 : type == DType::Float ? 4 : 2; }
constexpr int64_t compute_size(DType type) { return type == DType::Double ? 8 : 4; }

constexpr int64_t divide_up(int64_t n, int64_t step) { return (n + step - 1) / step; }
constexpr int64_t round_up(int64_t n, int64_t step) { return divide_up(n, step) * step; }

// Sizes shared by all operands of an elementwise kernel. Dimensions that every operand can merge are merged, those of
// size one dropped; ndim is at least 1. Elements are numbered in row-major order.
struct Shape {
  int64_t numel = 0;
  int ndim = 0;
  int64_t sizes[kMaxDims] = {};
};

// One operand over a Shape. Strides count elements; stride 0 repeats. `data` is borrowed and null where there is none.
struct View {
  void* data = nullptr;
  DType dtype = DType::Float;
  bool dense = false;  // whether element number i lies at data[i]
  int64_t strides[kMaxDims] = {};
};

}  // namespace lect11ext
