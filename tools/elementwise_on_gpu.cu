// Kernels that the memory binds, on a GPU without torch: microseconds, and per cent of what a copy of the runtime's
// moves, by the bytes that each must read and write. In float32, at sizes of docs/gpu.md.
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -I csrc -I tools
//     -o elementwise_on_gpu tools/elementwise_on_gpu.cu csrc/autoencoder/cuda/{variational,corruption,penalties}.cu
//     csrc/autoencoder/cuda/{reconstruction,sparse_code_topk,hashing_search}.cu csrc/recurrent/cuda/{lstm,gru}_cell.cu
//
// Links CUDA's runtime statically: what is built where there is no GPU runs where there is one. Results are not looked
// at: tests/cuda_on_host and the tests on a GPU do that.
#include <unistd.h>

#include <cstdio>

#include "autoencoder/corruption.h"
#include "autoencoder/hashing.h"
#include "autoencoder/penalties.h"
#include "autoencoder/reconstruction.h"
#include "autoencoder/sparse_code.h"
#include "autoencoder/variational.h"
#include "on_gpu.h"
#include "recurrent/gru_cell.h"
#include "recurrent/lstm_cell.h"

namespace {

using namespace lect11ext;
using namespace lect11ext::on_gpu;

double copied = 0;  // bytes a microsecond

template <class Run>
void report(const char* name, double bytes, Run run) {
  try {
    const double us = milliseconds(run) * 1e3;
    if (copied == 0) copied = bytes / us;
    std::printf("%-44s %8.1f us %6.1f %%\n", name, us, 100 * bytes / us / copied);
  } catch (const std::exception& error) {
    std::printf("%-44s %s\n", name, error.what());
  }
  std::fflush(stdout);
}

void copy() {
  constexpr size_t kBytes = size_t{1} << 28;
  Device<char> from(kBytes), to(kBytes);
  report("copy", 2.0 * kBytes, [&] { cudaMemcpyAsync(to.data, from.data, kBytes, cudaMemcpyDeviceToDevice); });
}

// A matrix of floats, and how kernels see it and what is repeated over its rows or columns.
struct Matrix : Device<float> {
  int64_t rows, cols;
  Matrix(int64_t rows, int64_t cols, bool drawn = true) : Device(size_t(rows * cols)), rows(rows), cols(cols) {
    std::mt19937 random(1);
    if (drawn) draw(random);
  }
  double bytes() const { return 4.0 * static_cast<double>(count); }
  Shape flat() const { return {rows * cols, 1, {rows * cols}}; }
  Shape shape() const { return {rows * cols, 2, {rows, cols}}; }
  View view() const { return {data, DType::Float, true, {1}}; }
  View of_shape() const { return {data, DType::Float, true, {cols, 1}}; }
  View by_row() const { return {data, DType::Float, false, {1, 0}}; }
  View by_column() const { return {data, DType::Float, false, {0, 1}}; }
};

struct Key : Device<int64_t> {
  Key() : Device(2) { clear(); }
};

void gaussian() {
  constexpr int64_t kRows = 1 << 18, kCols = 64;
  const Matrix mean(kRows, kCols), logvar(kRows, kCols), z(kRows, kCols, false), grad(kRows, kCols, false),
      other(kRows, kCols, false);
  const Matrix kl(kRows, 1);
  const Key key;
  Gaussian common{};
  common.shape = mean.flat(), common.mean = mean.view(), common.logvar = logvar.view();
  common.key = key.data, common.samples = 1;
  GaussianForward forward{common};
  forward.tiles = RowTiles(kRows, kCols), forward.z = z.data, forward.kl = kl.data;
  report("gaussian_rsample_kl forward", 3 * z.bytes(), [&] { cuda::gaussian_forward(forward, nullptr); });
  GaussianBackward backward{common};
  backward.shape = mean.shape(), backward.mean = mean.of_shape(), backward.logvar = logvar.of_shape();
  backward.tiles = forward.tiles, backward.grad_z_shape = z.flat(), backward.grad_z = z.view();
  backward.grad_kl = kl.by_row(), backward.grad_kl_scale = 1;
  backward.grad_mean = grad.data, backward.grad_logvar = other.data;
  report("gaussian_rsample_kl backward", 5 * z.bytes(), [&] { cuda::gaussian_backward(backward, nullptr); });
}

constexpr int64_t kRows = 1 << 14, kCols = 1024;

void corruption() {
  const Matrix input(kRows, kCols), out(kRows, kCols, false);
  const Key key;
  const Corruption common{input.flat(), input.view(), key.data, out.data, false};
  const CorruptionReplace masking{common, 0, 0, nullptr, 1u << 30, 0};
  const CorruptionDrift drift{common, 0.3};
  report("corrupt masking", 2 * out.bytes(), [&] { cuda::corruption_replace(masking, nullptr); });
  report("corrupt gaussian", 2 * out.bytes(), [&] { cuda::corruption_drift(drift, nullptr); });
}

void penalties(const char* name, Activation activation, Penalty penalty) {
  const bool by_column = penalty == Penalty::Mean;
  const Matrix input(kRows, kCols), grad(kRows, kCols), out(kRows, kCols, false), sums(kRows, kCols / 2);
  PenalizedActivation common{};
  common.shape = input.flat(), common.input = input.view();
  common.activation = activation, common.penalty = penalty;
  PenaltyForward forward{common};
  forward.tiles = RowTiles(kRows, kCols), forward.blocks = ColumnBlocks(kRows, kCols, ColumnBlocks::kRunsOnGpu);
  forward.output = out.data, forward.sums = sums.data;
  char line[64];
  std::snprintf(line, sizeof(line), "sparse_activation %s forward", name);
  report(line, 2 * out.bytes(), [&] { cuda::penalty_forward(forward, nullptr); });
  PenaltyBackward backward{common};
  backward.shape = input.shape(), backward.input = input.of_shape(), backward.blocks = forward.blocks;
  backward.grad_output = grad.of_shape(), backward.grad_penalty = by_column ? sums.by_column() : sums.by_row();
  backward.grad_penalty_scale = 1, backward.grad_input = out.data;
  std::snprintf(line, sizeof(line), "sparse_activation %s backward", name);
  report(line, 3 * out.bytes(), [&] { cuda::penalty_backward(backward, nullptr); });
}

void reconstruction(const char* name, Likelihood likelihood) {
  const Matrix input(kRows, kCols), target(kRows, kCols), grad_input(kRows, kCols, false), loss(kRows, 1);
  Reconstruction common{};
  common.shape = input.flat(), common.input = input.view(), common.target = target.view();
  common.likelihood = likelihood;
  ReconstructionForward forward{common};
  forward.tiles = RowTiles(kRows, kCols), forward.loss = loss.data;
  char line[64];
  std::snprintf(line, sizeof(line), "reconstruction_loss %s forward", name);
  report(line, 2 * input.bytes(), [&] { cuda::reconstruction_forward(forward, nullptr); });
  ReconstructionBackward backward{common};
  backward.shape = input.shape(), backward.input = input.of_shape(), backward.target = target.of_shape();
  backward.tiles = forward.tiles, backward.grad = loss.by_row(), backward.grad_scale = 1;
  backward.grad_input = grad_input.data;
  std::snprintf(line, sizeof(line), "reconstruction_loss %s backward", name);
  report(line, 3 * input.bytes(), [&] { cuda::reconstruction_backward(backward, nullptr); });
}

void gates() {
  const Matrix pre(kRows, 4 * kCols), state(kRows, kCols), h(kRows, kCols), c(kRows, kCols), bias(1, 4 * kCols);
  const Matrix hidden(kRows, 3 * kCols), kept(kRows, 4 * kCols, false), c_out(kRows, kCols);
  const double of_state = state.bytes();
  LstmGates lstm{kRows,     kCols,      DType::Float, false,  pre.data,   bias.data,
                 bias.data, state.data, kCols,        h.data, c_out.data, kept.data};
  report("LSTM gates forward", 11 * of_state, [&] { cuda::lstm_gates_forward(lstm, nullptr); });
  LstmGatesBackward lstm_backward{kRows,     kCols,      DType::Float, false,      h.data,   c.data, INFINITY,
                                  kept.data, state.data, kCols,        c_out.data, pre.data, h.data};
  report("LSTM gates backward", 13 * of_state, [&] { cuda::lstm_gates_backward(lstm_backward, nullptr); });
  GruGates gru{kRows,     kCols,      DType::Float, GruStage::After, pre.data, hidden.data, bias.data,
               bias.data, state.data, kCols,        nullptr,         h.data,   kept.data};
  report("GRU gates forward", 12 * of_state, [&] { cuda::gru_gates_forward(gru, nullptr); });
  GruGatesBackward gru_backward{kRows,      kCols, DType::Float, GruStage::After, h.data,      INFINITY, kept.data,
                                state.data, kCols, nullptr,      pre.data,        hidden.data, c.data};
  report("GRU gates backward", 13 * of_state, [&] { cuda::gru_gates_backward(gru_backward, nullptr); });
}

void topk(int64_t k) {
  constexpr int64_t kLength = 32768;
  const Matrix input(4096, kLength), values(4096, k);
  const Device<int64_t> indices(values.count);
  const TopkCode args{input.rows, kLength, k, input.data, DType::Float, kLength, false, values.data, indices.data};
  char line[64];
  std::snprintf(line, sizeof(line), "topk_code k %lld", static_cast<long long>(k));
  report(line, input.bytes(), [&] { cuda::topk_code(args, nullptr); });
}

void hamming(int64_t queries) {
  constexpr int64_t kCodes = 1 << 22, kBytes = 16, kNearest = 10;
  Device<uint32_t> codes(kCodes * kBytes / sizeof(uint32_t));
  std::mt19937 random(1);
  std::vector<uint32_t> words(codes.count);
  for (uint32_t& word : words) word = static_cast<uint32_t>(random());
  cuda::check(cudaMemcpy(codes.data, words.data(), words.size() * sizeof(uint32_t), cudaMemcpyHostToDevice), "copy");
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes.data);
  HammingHistogram histogram{};
  histogram.bytes = kBytes;
  histogram.query = {bytes, queries, kBytes}, histogram.codes = {bytes, kCodes, kBytes};
  histogram.divide();
  const int64_t pairs = queries * histogram.segments;
  const Device<int32_t> counts(pairs * histogram.bins()), limits(queries), distances(queries * kNearest);
  const Device<int64_t> totals(queries * histogram.bins()), starts(pairs + 1), ties(pairs), indices(queries * kNearest);
  histogram.k = kNearest, histogram.counts = counts.data, histogram.totals = totals.data;
  const HammingPlan plan{queries,     histogram.segments, histogram.bins(), kNearest, counts.data,
                         totals.data, limits.data,        starts.data,      ties.data};
  HammingFill fill{};
  static_cast<HammingCudaSearch&>(fill) = histogram;
  fill.limits = limits.data, fill.starts = starts.data, fill.ties = ties.data;
  fill.distances = distances.data, fill.indices = indices.data;
  const double of_codes = static_cast<double>(kCodes * kBytes);
  std::printf("hamming_topk, %lld queries\n", static_cast<long long>(queries));
  report("  histogram", of_codes, [&] {
    cudaMemsetAsync(counts.data, 0, counts.count * sizeof(int32_t));
    cudaMemsetAsync(totals.data, 0, totals.count * sizeof(int64_t));
    cuda::hamming_histogram(histogram, nullptr);
  });
  report("  plan", 4.0 * counts.count, [&] { cuda::hamming_plan(plan, nullptr); });
  report("  fill", of_codes, [&] { cuda::hamming_fill(fill, nullptr); });
}

}  // namespace

int main() {
  alarm(120);
  copy();
  gaussian();
  corruption();
  penalties("relu, l1", Activation::Relu, Penalty::L1);
  penalties("sigmoid, kl", Activation::Sigmoid, Penalty::Mean);
  reconstruction("bernoulli", Likelihood::Bernoulli);
  reconstruction("squared_error", Likelihood::SquaredError);
  gates();
  for (const int64_t k : {32, 256, 512}) topk(k);
  for (const int64_t queries : {1, 64}) hamming(queries);
}
