// float32 attention on a GPU without torch: against float64 in some rows, the kernels for finite numbers against those
// for any, and time.
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DLECT11EXT_SM90A
//     -I csrc -I tools -o float_attention_on_gpu tools/float_attention_on_gpu.cu
//     csrc/attention/cuda/dot_product_{forward,backward}.cu
//     csrc/attention/cuda/dot_product_hopper_{forward,backward}.cu csrc/common/cuda/tensor_map.cu
//
// A line for each shape: the output's largest error in some rows, in units of the largest value there; whether outputs
// and gradients have the same bits where rows lie askew, of which is not asked whether they are finite; TFLOP/s,
// forward and backward, as others count. Its status is 1 where something is wrong.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <optional>

#include "attention/dot_product.h"
#include "on_gpu.h"

namespace {

using namespace lect11ext;
using namespace lect11ext::on_gpu;

constexpr int kRows = 16, kThreads = 128;  // rows that are found in float64, and threads for each
constexpr double kRounding = 1e-5;
constexpr int64_t kBatch = 8, kHeads = 16, kLength = 2048;

// Row number `i` of those that are looked at.
__host__ __device__ int64_t row_of(int i) { return i * int64_t{131} % kLength; }

// Rows of the first head, in float64: a block a row.
__global__ void exact_rows_kernel(const float* query, const float* key, const float* value, double* out, int columns,
                                  double scale, bool causal) {
  __shared__ double weights[kLength];
  const int64_t row = row_of(static_cast<int>(blockIdx.x)), keys = causal ? row + 1 : kLength;
  for (int64_t j = threadIdx.x; j < keys; j += kThreads) {
    double score = 0;
    for (int d = 0; d < columns; ++d) score += double{query[row * columns + d]} * double{key[j * columns + d]};
    weights[j] = scale * score;
  }
  __syncthreads();
  double largest = weights[0], sum = 0;
  for (int64_t j = 1; j < keys; ++j) largest = fmax(largest, weights[j]);
  for (int64_t j = 0; j < keys; ++j) sum += exp(weights[j] - largest);
  for (int d = static_cast<int>(threadIdx.x); d < columns; d += kThreads) {
    double total = 0;
    for (int64_t j = 0; j < keys; ++j) total += exp(weights[j] - largest) * double{value[j * columns + d]};
    out[int64_t{blockIdx.x} * columns + d] = total / sum;
  }
}

// Rows of all tensors are `columns + gap` apart; with a gap of one they are not aligned to sixteen bytes.
struct Run {
  AttentionBackward backward{};
  AttentionForward forward{};
  Device<float> query, key, value, grad_out, out, lse, grad_query, grad_key, grad_value;
  std::optional<Device<char>> scratch;

  Run(int64_t columns, bool causal, int64_t gap)
      : query(kBatch * kHeads * kLength * (columns + gap)),
        key(query.count),
        value(query.count),
        grad_out(query.count),
        out(query.count),
        lse(kBatch * kHeads * kLength),
        grad_query(query.count),
        grad_key(query.count),
        grad_value(query.count) {
    const int64_t step = columns + gap;
    const AttentionStrides strides{kHeads * kLength * step, kLength * step, step};
    Attention& common = backward;
    common.batch = common.sequences = kBatch, common.heads = common.kv_heads = kHeads;
    common.queries = common.keys = kLength, common.head_dim = common.value_dim = columns;
    common.dtype = DType::Float, common.scale = 1 / std::sqrt(static_cast<double>(columns));
    common.window_left = kOpen, common.window_right = causal ? 0 : kOpen;
    common.query = {query.data, strides}, common.key = {key.data, strides}, common.value = {value.data, strides};
    forward = AttentionForward{common, out.data, strides, lse.data};
    backward.out = {out.data, strides}, backward.lse = lse.data, backward.grad_out = {grad_out.data, strides};
    backward.grad_query = grad_query.data, backward.grad_key = grad_key.data, backward.grad_value = grad_value.data;
    backward.grad_query_strides = backward.grad_key_strides = backward.grad_value_strides = strides;
    scratch.emplace(std::max(cuda::attention_scratch(forward), cuda::attention_scratch(backward)));
  }

  void run_forward() { cuda::attention_forward(forward, scratch->data, nullptr); }
  void run_backward() { cuda::attention_backward(backward, scratch->data, nullptr); }
  std::vector<Device<float>*> inputs() { return {&query, &key, &value, &grad_out}; }
  std::vector<Device<float>*> outputs() { return {&out, &grad_query, &grad_key, &grad_value}; }
};

// The same rows, with other gaps between them.
void lay(const Device<float>& from, int64_t gap, Device<float>& to, int64_t other_gap, int64_t columns) {
  const auto pitch = [&](int64_t g) { return static_cast<size_t>(columns + g) * sizeof(float); };
  cuda::check(cudaMemcpy2D(to.data, pitch(other_gap), from.data, pitch(gap), pitch(0), kBatch * kHeads * kLength,
                           cudaMemcpyDeviceToDevice),
              "copy");
}

bool compare(int64_t columns, bool causal) {
  std::mt19937 random(1);
  Run run(columns, causal, 0);
  for (Device<float>* input : run.inputs()) input->draw(random);
  for (Device<float>* output : run.outputs()) output->poison();
  run.run_forward();
  run.run_backward();
  Device<double> exact(kRows * columns);
  exact_rows_kernel<<<kRows, kThreads>>>(run.query.data, run.key.data, run.value.data, exact.data,
                                         static_cast<int>(columns), run.forward.scale, causal);
  cuda::check(cudaDeviceSynchronize(), "run attention");
  const std::vector<double> expected = exact.read();
  const std::vector<float> out = run.out.read();
  double most = 0, largest = 0;
  for (int i = 0; i < kRows; ++i) {
    for (int64_t d = 0; d < columns; ++d) {
      const double error = std::abs(double{out[row_of(i) * columns + d]} - expected[i * columns + d]);
      most = error <= most ? most : error;  // NaN stays
      largest = std::max(largest, std::abs(expected[i * columns + d]));
    }
  }
  bool same = true;
  {
    Run askew(columns, causal, 1);
    for (int i = 0; i < 4; ++i) lay(*run.inputs()[i], 0, *askew.inputs()[i], 1, columns);
    for (Device<float>* output : askew.outputs()) output->poison();
    askew.run_forward();
    askew.run_backward();
    Device<float> rows(run.out.count), zeros(run.out.count);
    zeros.clear();
    for (int i = 0; i < 4; ++i) {
      lay(*askew.outputs()[i], 1, rows, 0, columns);
      // Of NaN there is a difference to zero.
      same = same && difference(rows, *run.outputs()[i]) == 0 && !std::isnan(difference(rows, zeros));
    }
  }
  const double flop = 4.0 * kBatch * kHeads * kLength * kLength * columns * (causal ? 0.5 : 1.0);
  const double forward = milliseconds([&] { run.run_forward(); }), backward = milliseconds([&] { run.run_backward(); });
  std::printf("D %lld%s: error %.1e; finite as any: %s; %.1f and %.1f TFLOP/s, both %.1f\n",
              static_cast<long long>(columns), causal ? ", causal" : "", most / largest, same ? "same bits" : "OTHERS",
              flop / forward * 1e-9, 2.5 * flop / backward * 1e-9, 3.5 * flop / (forward + backward) * 1e-9);
  std::fflush(stdout);
  return same && most / largest < kRounding;
}

}  // namespace

int main() {
  alarm(60);
  bool good = true;
  for (const int64_t columns : {64, 96, 128}) {
    for (const bool causal : {false, true}) good = compare(columns, causal) && good;
  }
  return good ? 0 : 1;
}
