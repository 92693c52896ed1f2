// Entry points for ctypes: each takes the struct that the kernel takes, which host_kernels.py mirrors; its size is
// exported so that a mirror that has fallen behind is noticed.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime.h>
#include <sanitizer/asan_interface.h>

#include "attention/additive.h"
#include "attention/dot_product.h"
#include "autoencoder/corruption.h"
#include "autoencoder/hashing.h"
#include "autoencoder/penalties.h"
#include "autoencoder/reconstruction.h"
#include "autoencoder/sparse_code.h"
#include "autoencoder/variational.h"
#include "common/random.h"
#include "recurrent/gru_cell.h"
#include "recurrent/layer_cuda.h"
#include "recurrent/lstm_cell.h"

namespace {

std::string message;

// Null, or why the call failed.
template <class Args>
const char* call(void (*kernel)(const Args&, void*), const Args* args) {
  try {
    kernel(*args, nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

std::size_t scratch_asked_for;

// With scratch of the size that the call asks for: NaN at first, and before a band that must stay as it is.
template <class Args, auto kKernel>
void with_scratch(const Args& args, void* stream) {
  constexpr double kSentinel = 1234;
  constexpr std::size_t kBand = 32;
  const auto bytes = static_cast<std::size_t>(lect11ext::cuda::attention_scratch(args));
  scratch_asked_for = bytes;
  std::vector<double> scratch((bytes + sizeof(double) - 1) / sizeof(double), std::nan(""));
  scratch.insert(scratch.end(), kBand, kSentinel);
  const double* const band = scratch.data() + scratch.size() - kBand;
  ASAN_POISON_MEMORY_REGION(band, kBand * sizeof(double));
  kKernel(args, scratch.data(), stream);
  ASAN_UNPOISON_MEMORY_REGION(band, kBand * sizeof(double));
  if (std::count(scratch.end() - kBand, scratch.end(), kSentinel) != kBand) {
    throw std::runtime_error("written beyond the scratch's end");
  }
}

}  // namespace

#define SCRATCH_ENTRY(name, Args)                                                                         \
  extern "C" const char* name(const lect11ext::Args* args) {                                              \
    return call(with_scratch<lect11ext::Args, lect11ext::cuda::name>, args);                              \
  }                                                                                                       \
  extern "C" std::size_t sizeof_##Args() { return sizeof(lect11ext::Args); }

#define ENTRY(name, Args)                                                                              \
  extern "C" const char* name(const lect11ext::Args* args) { return call(lect11ext::cuda::name, args); } \
  extern "C" std::size_t sizeof_##Args() { return sizeof(lect11ext::Args); }

ENTRY(philox_key, PhiloxReservation)
ENTRY(philox_normal, PhiloxNormal)
ENTRY(corruption_drift, CorruptionDrift)
ENTRY(corruption_replace, CorruptionReplace)
ENTRY(gaussian_forward, GaussianForward)
ENTRY(gaussian_backward, GaussianBackward)
ENTRY(penalty_forward, PenaltyForward)
ENTRY(penalty_backward, PenaltyBackward)
ENTRY(reconstruction_forward, ReconstructionForward)
ENTRY(reconstruction_backward, ReconstructionBackward)
ENTRY(binarize, Binarize)
ENTRY(pack_bits, PackBits)
ENTRY(unpack_bits, UnpackBits)
ENTRY(hamming_distance, HammingDistance)
ENTRY(hamming_histogram, HammingHistogram)
ENTRY(hamming_plan, HammingPlan)
ENTRY(hamming_count, HammingCount)
ENTRY(hamming_fill, HammingFill)
ENTRY(topk_code, TopkCode)
ENTRY(scatter_code, ScatterCode)
ENTRY(weighted_rows, WeightedRows)
ENTRY(row_dots, RowDots)
ENTRY(additive_forward, AdditiveForward)
ENTRY(additive_backward, AdditiveBackward)
ENTRY(lstm_gates_forward, LstmGates)
ENTRY(lstm_gates_backward, LstmGatesBackward)
ENTRY(gru_gates_forward, GruGates)
ENTRY(gru_gates_backward, GruGatesBackward)
ENTRY(layer_forward, LayerCuda)
ENTRY(layer_backward, LayerCudaBackward)
SCRATCH_ENTRY(attention_forward, AttentionForward)
SCRATCH_ENTRY(attention_backward, AttentionBackward)
SCRATCH_ENTRY(attention_tangent, AttentionTangent)
SCRATCH_ENTRY(attention_backward_tangent, AttentionBackwardTangent)
ENTRY(attention_dropout_mask, DropoutMask)

// What the device seems to have from now on.
extern "C" void set_device(int multiprocessors, int most_shared, int compute_major) {
  cuda_on_host::multiprocessors = multiprocessors;
  cuda_on_host::most_shared = most_shared;
  cuda_on_host::compute_major = compute_major;
}

// Of the latest launch.
extern "C" std::size_t shared_bytes() { return cuda_on_host::shared_bytes; }
extern "C" std::size_t scratch_bytes() { return scratch_asked_for; }  // of attention
extern "C" std::size_t blocks_together() { return cuda_on_host::blocks_together; }

extern "C" int64_t additive_weight_rows(const lect11ext::AdditiveBackward* args) {
  return lect11ext::cuda::additive_weight_rows(*args);
}

extern "C" void column_blocks(int64_t rows, int64_t cols, int64_t most_runs, lect11ext::ColumnBlocks* out) {
  *out = lect11ext::ColumnBlocks(rows, cols, most_runs);
}

extern "C" void row_tiles(int64_t rows, int64_t cols, lect11ext::RowTiles* out) {
  *out = lect11ext::RowTiles(rows, cols);
}
