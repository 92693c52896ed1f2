// The products of a cell's backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include "common/product.h"

namespace lect11ext::recurrent {

// Whether a product of so many multiply-adds takes grad_pre rounded to `type`, that of its other matrix, on the CPU.
bool rounds_gradients(at::ScalarType type, int64_t multiply_adds);

// The CPU's kernels multiply in float32 and take a grad_pre of float32. Large products are left to the BLAS where it is
// faster: of bfloat16 where the machine multiplies it, with grad_pre rounded, and of float on Intel's processors, of
// bfloat16 as float too where that is faster there.
//
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
  struct BlasProduct {
    at::Tensor a, b, c;  // c = a · b, c of their type or of a narrower one

    int64_t blocks() const;
    void run(int64_t begin, int64_t end) const;
  };

  // c = grad_pre · b, or grad_preᵀ · b; added to c where `accumulate`.
  void add(const at::Tensor& grad_pre, bool transposed, const at::Tensor& b, const at::Tensor& c, bool accumulate);
  const at::Tensor& rounded(const at::Tensor& grad_pre, at::ScalarType type);

  c10::SmallVector<Product, 6> products_;
  c10::SmallVector<BlasProduct, 4> blas_;
  c10::SmallVector<ColumnSums, 2> sums_;
  c10::SmallVector<at::Tensor, 16> held_;  // what their pointers borrow from
  c10::SmallVector<std::pair<at::Tensor, at::Tensor>, 2> rounded_;
  int64_t multiply_adds_ = 0;
};

}  // namespace lect11ext::recurrent
