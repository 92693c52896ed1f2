// The products of a cell's backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include "common/product.h"

namespace lect11ext::recurrent {

// On the CPU products are collected, and run() computes all of them in one parallel region: a cell has up to six, and
// to wake the threads for each costs as much as a small one takes. On CUDA each is launched at once.
class Products {
 public:
  // grad_pre [B, G·H] · weight [G·H, N], in weight's type; added to `onto` where that is given.
  at::Tensor input_gradient(const at::Tensor& grad_pre, const at::Tensor& weight, const at::Tensor& onto = {});

  // grad_preᵀ [G·H, B] · x [B, N], in x's type, written to `out` where that is given.
  at::Tensor weight_gradient(const at::Tensor& grad_pre, const at::Tensor& x, at::Tensor out = {});

  // The column sums of grad_pre, in type `type`.
  at::Tensor bias_gradient(const at::Tensor& grad_pre, at::ScalarType type);

  // Fills what the others have returned.
  void run();

 private:
  void add(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, bool accumulate);

  c10::SmallVector<Product, 6> products_;
  c10::SmallVector<ColumnSums, 2> sums_;
  c10::SmallVector<at::Tensor, 16> held_;  // what their pointers borrow from
  int64_t multiply_adds_ = 0;
};

}  // namespace lect11ext::recurrent
