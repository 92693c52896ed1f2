// Ops that draw: philox_key takes a key from a torch generator, philox_normal turns a key into normals.
#include "common/random.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <mutex>

#include "common/dispatch.h"
#include "common/ops.h"
#include "common/random_ops.h"
#include "common/tensors.h"

#ifdef LECT11EXT_WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace lect11ext {
namespace {

void check_numel(const c10::SymInt& numel) {
  TORCH_CHECK_VALUE(numel >= 0, "numel must be nonnegative, but got ", numel);
}

at::Tensor philox_key_meta(const at::Tensor& like, c10::SymInt numel, const std::optional<at::Generator>& generator) {
  check_numel(numel);
  return at::empty({2}, like.options().dtype(at::kLong));
}

at::Tensor philox_key_cpu(const at::Tensor& like, c10::SymInt numel, const std::optional<at::Generator>& generator) {
  check_numel(numel);
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  uint64_t seed;
  {
    std::lock_guard<std::mutex> lock(source->mutex_);
    seed = source->random64();
  }
  at::Tensor key = at::empty({2}, like.options().dtype(at::kLong));
  auto* data = key.mutable_data_ptr<int64_t>();
  data[0] = static_cast<int64_t>(seed);
  data[1] = 0;
  return key;
}

void check_normal(const at::Tensor& key, c10::SymIntArrayRef size, at::ScalarType dtype) {
  check_key(key, key.device());
  check_dtype("dtype", dtype);
  for (const auto& n : size) TORCH_CHECK_VALUE(n >= 0, "size must be nonnegative, but got ", size);
}

at::Tensor philox_normal_meta(const at::Tensor& key, c10::SymIntArrayRef size, at::ScalarType dtype) {
  check_normal(key, size, dtype);
  return at::empty_symint(size, key.options().dtype(dtype));
}

PhiloxNormal describe(const at::Tensor& key, const at::Tensor& out) {
  return {key.const_data_ptr<int64_t>(), out.mutable_data_ptr(), dtype_of(out, "dtype"), out.numel()};
}

at::Tensor philox_normal_cpu(const at::Tensor& key, c10::SymIntArrayRef size, at::ScalarType dtype) {
  check_normal(key, size, dtype);
  at::Tensor out = empty_output(C10_AS_INTARRAYREF_SLOW(size), key.options().dtype(dtype));
  const at::Tensor dense = key.contiguous();
  const PhiloxNormal args = describe(dense, out);
  run_parallel(philox_normal_kernel, args, (args.numel + kNormalChunk - 1) / kNormalChunk, kNormalChunk);
  return out;
}

#ifdef LECT11EXT_WITH_CUDA

at::Tensor philox_key_cuda(const at::Tensor& like, c10::SymInt numel, const std::optional<at::Generator>& generator) {
  check_numel(numel);
  const c10::cuda::CUDAGuard guard(like.device());
  auto* source = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(like.get_device()));
  at::PhiloxCudaState state;
  {
    std::lock_guard<std::mutex> lock(source->mutex_);
    // In 32-bit values: one block of four for every four normals.
    state = source->philox_cuda_state(static_cast<uint64_t>((numel.guard_int(__FILE__, __LINE__) + 3) / 4 * 4));
  }
  at::Tensor key = at::empty({2}, like.options().dtype(at::kLong));
  PhiloxReservation reservation{};
  reservation.captured = state.captured_;
  if (state.captured_) {
    reservation.seed_ptr = state.seed_.ptr;
    reservation.offset_ptr = state.offset_.ptr;
    reservation.offset_intragraph = state.offset_intragraph_;
  } else {
    reservation.seed = state.seed_.val;
    reservation.offset = state.offset_.val;
  }
  reservation.key = key.mutable_data_ptr<int64_t>();
  cuda::philox_key(reservation, current_stream());
  return key;
}

at::Tensor philox_normal_cuda(const at::Tensor& key, c10::SymIntArrayRef size, at::ScalarType dtype) {
  check_normal(key, size, dtype);
  const c10::cuda::CUDAGuard guard(key.device());
  at::Tensor out = at::empty_symint(size, key.options().dtype(dtype));
  const at::Tensor dense = key.contiguous();
  const PhiloxNormal args = describe(dense, out);
  if (args.numel > 0) cuda::philox_normal(args, current_stream());
  return out;
}

#endif

}  // namespace

void check_key(const at::Tensor& key, c10::Device device, const char* name) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, name, " must be an int64 tensor [seed, offset], but got ",
                   key.scalar_type());
  TORCH_CHECK_VALUE(key.dim() == 1 && key.sym_size(0) == 2, name, " must have shape [2] ([seed, offset]), but got ",
                    key.sym_sizes());
  TORCH_CHECK(key.device() == device, "Expected ", name, " to be on ", device, ", but got ", key.device());
}

at::Tensor philox_key(const at::Tensor& like, c10::SymInt numel, const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(philox_key_meta)>("lect11ext::philox_key");
  return op.call(like, std::move(numel), generator);
}

at::Tensor philox_normal(const at::Tensor& key, c10::SymIntArrayRef size, at::ScalarType dtype) {
  static const auto op = find_op<decltype(philox_normal_meta)>("lect11ext::philox_normal");
  return op.call(key, size, dtype);
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("philox_key(Tensor like, SymInt numel, Generator? generator=None) -> Tensor",
        {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
  m.def("philox_normal(Tensor key, SymInt[] size, ScalarType dtype) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) {
  m.impl("philox_key", philox_key_cpu);
  m.impl("philox_normal", philox_normal_cpu);
}

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) {
  m.impl("philox_key", philox_key_cuda);
  m.impl("philox_normal", philox_normal_cuda);
}
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("philox_key", philox_key_meta);
  m.impl("philox_normal", philox_normal_meta);
}

// A key is integral and noise is a constant: neither has a derivative.
TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) { fall_through(m, {"philox_key", "philox_normal"}); }

}  // namespace lect11ext
