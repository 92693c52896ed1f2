// What the LSTM and the GRU cell share on PyTorch's side: checks of their arguments, and how kernels take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

namespace lect11ext::recurrent {

// The arguments that both cells have. `gates` is 4 for the LSTM, 3 for the GRU.
struct CellInputs {
  const at::Tensor &input, &h;
  const at::Tensor &weight_ih, &weight_hh;  // a layer may have no weight_ih: undefined
  const std::optional<at::Tensor>&bias_ih, &bias_hh;
  int64_t gates;
  int64_t rank = 2;                        // of input: 3 where its first dimension is time
  const at::Tensor* cell_state = nullptr;  // of an LSTM

  c10::SymInt batch() const { return input.sym_size(-2); }
  c10::SymInt hidden() const;

  // Throws unless shapes, types and devices fit together.
  void check() const;
};

// Throws unless a tensor has so many dimensions.
void check_matrix(const char* name, const at::Tensor& tensor, int64_t rank = 2);

// The cells' types are equal, except that autograd may hand over gradients of another: throws unless they are.
void check_state(const char* name, const at::Tensor& state, const CellInputs& in);

// Throws unless `tensor` has the rows of the batch, `columns` columns, and input's device; and its type, but for a
// gradient (`any_type`), which is converted.
void check_rows_of(const char* name, const at::Tensor& tensor, const CellInputs& in, const c10::SymInt& columns,
                   bool any_type = false);

// The same for weights in packed blocks, which are dense [blocks, gates, I or H, 16].
void check_packed(const at::Tensor& input, const at::Tensor& h, const at::Tensor& packed_ih,
                  const at::Tensor& packed_hh, const std::optional<at::Tensor>& bias_ih,
                  const std::optional<at::Tensor>& bias_hh, int64_t gates);

// What is asked for; undefined else.
template <class Make>
at::Tensor when(bool wanted, Make make) {
  return wanted ? make() : at::Tensor();
}

// A gradient's shape and type, for what has neither yet.
inline at::Tensor empty_gradient(bool wanted, const std::optional<at::Tensor>& of) {
  return when(wanted && of.has_value() && of->defined(),
              [&] { return at::empty_symint(of->sym_sizes(), of->options()); });
}

// Weights as the CPU kernels take them: rows at their stride, or packed blocks.
struct Weights {
  const void *ih, *hh;
  int64_t ih_stride, hh_stride;
  bool packed;
};

// A matrix as the CPU kernels take it: pointer and row stride, rows dense.
struct Rows {
  at::Tensor held;
  const void* data;
  int64_t stride;

  explicit Rows(const at::Tensor& matrix);
};

// A bias as the kernels take it: dense, or null.
struct Bias {
  at::Tensor held;

  explicit Bias(const std::optional<at::Tensor>& bias);
  const void* data() const;
};

// A gradient as the kernels take it: dense and of type `type`, or undefined.
at::Tensor dense_gradient(const std::optional<at::Tensor>& grad, at::ScalarType type);

// The type in which the CPU's kernels keep the gradient of the pre-activations: float, or double. CUDA keeps its
// storage type, which cuBLAS takes.
at::ScalarType grad_pre_type(const at::Tensor& like);

// The type of the arithmetic: float, or double.
at::ScalarType compute_type(const at::Tensor& like);

}  // namespace lect11ext::recurrent
