// PyTorch side of hamming_distance, hamming_topk and hamming_radius: schema, kernels' arguments. Kernels: hashing.h.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

#include "autoencoder/hashing.h"
#include "autoencoder/hashing_inputs.h"
#include "autoencoder/hashing_ops.h"
#include "common/dispatch.h"
#include "common/ops.h"
#include "common/tensors.h"

namespace lect11ext {
namespace {

using namespace hashing;
using Pair = std::tuple<Tensor, Tensor>;
using Ranges = std::tuple<Tensor, Tensor, Tensor>;

CodeRows rows_of(const Tensor& matrix) { return {matrix.const_data_ptr<uint8_t>(), matrix.size(0), matrix.stride(0)}; }

// LECT11EXT_HASHING_VPOPCNT=0 tries the other way of counting on a processor that has the instruction.
bool has_instruction() {
#if defined(__x86_64__)
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vpopcntdq"));
  const char* const wish = std::getenv("LECT11EXT_HASHING_VPOPCNT");
  return has && (wish == nullptr || std::strcmp(wish, "0") != 0);
#else
  return false;
#endif
}

// --- all distances ------------------------------------------------------------------------------------------------

// Codes with their batch expanded, and unit stride in their bytes.
Tensor expand_batch(const Tensor& codes, at::IntArrayRef size) {
  at::DimVector whole(size.begin(), size.end());
  whole[whole.size() - 2] = codes.size(-2);
  whole.back() = codes.size(-1);
  const Tensor dense = codes.size(-1) <= 1 || codes.stride(-1) == 1 ? codes : codes.contiguous();
  return dense.expand(whole);
}

Tensor kernel_distance(const Tensor& a, const Tensor& b) {
  const auto sym_size = check_distance(a, b);
  const auto size = C10_AS_INTARRAYREF_SLOW(sym_size);
  Tensor out = empty_output(size, a.options().dtype(at::kInt));
  if (out.numel() == 0) return out;
  Tensor query = expand_batch(a, size), codes = expand_batch(b, size);
  HammingDistance args{};
  int64_t dims = static_cast<int64_t>(size.size()) - 2;
  if (dims > kMaxDims) {
    query = query.flatten(0, dims - 1);
    codes = codes.flatten(0, dims - 1);
    dims = 1;
  }
  args.instruction = has_instruction();
  args.bytes = a.size(-1);
  args.batches.ndim = static_cast<int>(dims);
  args.batches.numel = out.numel() / (size[size.size() - 2] * size.back());
  for (int64_t d = 0; d < dims; ++d) {
    args.batches.sizes[d] = query.size(d);
    args.query_steps[d] = query.stride(d);
    args.codes_steps[d] = codes.stride(d);
  }
  args.query = {query.const_data_ptr<uint8_t>(), query.size(-2), query.stride(-2)};
  args.codes = {codes.const_data_ptr<uint8_t>(), codes.size(-2), codes.stride(-2)};
  args.out = out.mutable_data_ptr<int32_t>();
  const int64_t blocks = divide_up(args.codes.count, code_block(args.bytes));
  launch<hamming_distance_kernel, LECT11EXT_CUDA_KERNEL(hamming_distance)>(
      args, args.batches.numel * args.query_blocks() * blocks,
      code_block(args.bytes) * std::min(args.query.count, HammingDistance::kQueries) / 2, a.device());
  return out;
}

// --- searches on the CPU ------------------------------------------------------------------------------------------

// Blocks of queries, so that the codes are read rarely, and segments of the codes, so that few queries are enough for
// all threads. The results do not depend on either.
void divide_work(HammingSearch& args) {
  constexpr int64_t kFewQueries = 8;     // that share what a block of codes costs, whatever the threads
  constexpr int64_t kLeastCodes = 8192;  // of a segment
  const int64_t threads = at::get_num_threads();
  args.block = std::clamp(divide_up(args.query.count, threads), kFewQueries, HammingSearch::kMostQueries);
  const int64_t wanted = divide_up(threads, args.blocks());
  args.segment = std::max(divide_up(args.codes.count, wanted), kLeastCodes);
  args.segments = std::max<int64_t>(1, divide_up(args.codes.count, args.segment));
}

// About a third of a nanosecond for a word of a code.
int64_t item_cost(const HammingSearch& args) {
  return std::min(args.block, args.query.count) * args.segment * divide_up(args.bytes + 1, 8) / 3;
}

void prepare(const Tensor& query, const Tensor& codes, HammingSearch& args) {
  args.instruction = has_instruction();
  args.bytes = query.size(1);
  args.query = rows_of(query);
  args.codes = rows_of(codes);
  divide_work(args);
}

Tensor scratch(int64_t n, const Tensor& like, at::ScalarType type = at::kLong) {
  return at::empty({n}, like.options().dtype(type));
}

Found* found_in(const Tensor& memory) {
  static_assert(sizeof(Found) == sizeof(int64_t));
  return reinterpret_cast<Found*>(memory.mutable_data_ptr<int64_t>());
}

void cpu_topk(const Tensor& query, const Tensor& codes, int64_t k, const Tensor& distances, const Tensor& indices) {
  HammingTopk args{};
  prepare(query, codes, args);
  args.k = k;
  const Tensor found = scratch(args.query.count * args.segments * k, query);
  const Tensor counts = scratch(args.query.count * args.segments, query);
  args.found = found_in(found);
  args.counts = counts.mutable_data_ptr<int64_t>();
  args.distances = distances.mutable_data_ptr<int32_t>();
  args.indices = indices.mutable_data_ptr<int64_t>();
  run_parallel(hamming_topk_kernel, args, args.items(), item_cost(args));
  run_parallel(hamming_topk_sort_kernel, args, args.query.count, args.bytes * 8 + args.segments * k * 2);
}

Ranges cpu_radius(const Tensor& query, const Tensor& codes, int64_t radius) {
  constexpr int64_t kMostCapacity = 512, kLeastCapacity = 16;  // of a segment
  constexpr int64_t kFound = int64_t{1} << 23;                 // of all: 64 MiB, where queries are many
  HammingRadius args{};
  prepare(query, codes, args);
  args.limit = std::min(radius, 8 * args.bytes) + 1;
  const int64_t n = args.query.count, places = n * args.segments;
  args.capacity = std::min(std::clamp(kFound / places, kLeastCapacity, kMostCapacity), args.segment);
  const Tensor found = scratch(places * args.capacity, query);
  const Tensor counts = scratch(places, query), starts = scratch(places, query), offsets = scratch(n + 1, query);
  args.found = found_in(found);
  args.counts = counts.mutable_data_ptr<int64_t>();
  run_parallel(hamming_count_kernel, args, args.items(), item_cost(args));

  int64_t* start = starts.mutable_data_ptr<int64_t>();
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  int64_t sum = 0;
  for (int64_t place = 0; place < places; ++place) {
    if (place % args.segments == 0) offset[place / args.segments] = sum;
    start[place] = sum;
    sum += args.counts[place];
  }
  offset[n] = sum;
  Tensor distances = empty_output({sum}, query.options().dtype(at::kInt));
  Tensor indices = empty_output({sum}, query.options().dtype(at::kLong));
  args.starts = start;
  args.distances = distances.mutable_data_ptr<int32_t>();
  args.indices = indices.mutable_data_ptr<int64_t>();
  run_parallel(hamming_fill_kernel, args, args.items(), 1 + 2 * sum / args.items());
  return {offsets, distances, indices};
}

// --- searches on CUDA ---------------------------------------------------------------------------------------------

#ifdef LECT11EXT_WITH_CUDA
void prepare(const Tensor& query, const Tensor& codes, HammingCudaSearch& args) {
  args.bytes = query.size(1);
  args.query = rows_of(query);
  args.codes = rows_of(codes);
  args.divide();
}

Pair cuda_topk(const Tensor& query, const Tensor& codes, int64_t k) {
  const c10::cuda::CUDAGuard guard(query.device());
  void* stream = current_stream();
  HammingHistogram histogram{};
  prepare(query, codes, histogram);
  const int64_t n = histogram.query.count, segments = histogram.segments;
  const Tensor counts = at::zeros({n * segments * histogram.bins()}, query.options().dtype(at::kInt));
  const Tensor totals = at::zeros({n * histogram.bins()}, query.options().dtype(at::kLong));
  histogram.k = k;
  histogram.counts = counts.mutable_data_ptr<int32_t>();
  histogram.totals = totals.mutable_data_ptr<int64_t>();
  cuda::hamming_histogram(histogram, stream);

  const Tensor limits = scratch(n, query, at::kInt), starts = scratch(n * segments + 1, query);
  const Tensor ties = scratch(n * segments, query);
  HammingPlan plan{n,
                   segments,
                   histogram.bins(),
                   k,
                   histogram.counts,
                   histogram.totals,
                   limits.mutable_data_ptr<int32_t>(),
                   starts.mutable_data_ptr<int64_t>(),
                   ties.mutable_data_ptr<int64_t>()};
  cuda::hamming_plan(plan, stream);

  HammingFill fill{};
  static_cast<HammingCudaSearch&>(fill) = histogram;
  Tensor distances = at::empty({n, k}, query.options().dtype(at::kInt));
  Tensor indices = at::empty({n, k}, query.options().dtype(at::kLong));
  fill.limits = plan.limits;
  fill.starts = plan.starts;
  fill.ties = plan.ties;
  fill.distances = distances.mutable_data_ptr<int32_t>();
  fill.indices = indices.mutable_data_ptr<int64_t>();
  cuda::hamming_fill(fill, stream);
  // Stable: in ascending order of the index where the distance is the same.
  auto [sorted, order] = at::sort(distances, /*stable=*/true, /*dim=*/-1, /*descending=*/false);
  return {sorted, indices.gather(-1, order)};
}

Ranges cuda_radius(const Tensor& query, const Tensor& codes, int64_t radius) {
  const c10::cuda::CUDAGuard guard(query.device());
  void* stream = current_stream();
  HammingCount count{};
  prepare(query, codes, count);
  const int64_t n = count.query.count, places = n * count.segments;
  const Tensor counts = scratch(places, query);
  count.limit = static_cast<int32_t>(std::min(radius, 8 * count.bytes) + 1);
  count.counts = counts.mutable_data_ptr<int64_t>();
  cuda::hamming_count(count, stream);

  const Tensor ends = at::zeros({places + 1}, counts.options());
  ends.narrow(0, 1, places).copy_(at::cumsum(counts, 0));
  const int64_t sum = ends[places].item<int64_t>();
  Tensor distances = at::empty({sum}, query.options().dtype(at::kInt));
  Tensor indices = at::empty({sum}, query.options().dtype(at::kLong));
  HammingFill fill{};
  static_cast<HammingCudaSearch&>(fill) = count;
  fill.limit = count.limit;
  fill.starts = ends.const_data_ptr<int64_t>();
  fill.distances = distances.mutable_data_ptr<int32_t>();
  fill.indices = indices.mutable_data_ptr<int64_t>();
  cuda::hamming_fill(fill, stream);
  return {ends.slice(0, 0, places + 1, count.segments).contiguous(), distances, indices};
}
#endif

// --- both ---------------------------------------------------------------------------------------------------------

Pair kernel_topk(const Tensor& query, const Tensor& codes, c10::SymInt sym_k) {
  check_topk(query, codes, sym_k);
  const int64_t k = sym_k.guard_int(__FILE__, __LINE__), n = query.size(0);
  const Tensor rows = with_unit_columns(query), all = with_unit_columns(codes);
#ifdef LECT11EXT_WITH_CUDA
  if (query.is_cuda() && n > 0 && k > 0) return cuda_topk(rows, all, k);
#endif
  Tensor distances = empty_output({n, k}, query.options().dtype(at::kInt));
  Tensor indices = empty_output({n, k}, query.options().dtype(at::kLong));
  if (n > 0 && k > 0) cpu_topk(rows, all, k, distances, indices);
  return {distances, indices};
}

Ranges kernel_radius(const Tensor& query, const Tensor& codes, int64_t radius) {
  check_radius(query, codes, radius);
  const Tensor rows = with_unit_columns(query), all = with_unit_columns(codes);
  if (query.size(0) == 0 || codes.size(0) == 0) {
    return {at::zeros({query.size(0) + 1}, query.options().dtype(at::kLong)),
            at::empty({0}, query.options().dtype(at::kInt)), at::empty({0}, query.options().dtype(at::kLong))};
  }
#ifdef LECT11EXT_WITH_CUDA
  if (query.is_cuda()) return cuda_radius(rows, all, radius);
#endif
  return cpu_radius(rows, all, radius);
}

// --- meta: of hamming_radius in Python, for C++ cannot say that a size depends on data ----------------------------

Tensor meta_distance(const Tensor& a, const Tensor& b) {
  return at::empty_symint(check_distance(a, b), a.options().dtype(at::kInt));
}

Pair meta_topk(const Tensor& query, const Tensor& codes, c10::SymInt k) {
  check_topk(query, codes, k);
  const c10::SymDimVector size{query.sym_size(0), k};
  return {at::empty_symint(size, query.options().dtype(at::kInt)),
          at::empty_symint(size, query.options().dtype(at::kLong))};
}

}  // namespace

// --- registration -------------------------------------------------------------------------------------------------

Tensor hamming_distance(const Tensor& a, const Tensor& b) {
  static const auto op = find_op<decltype(hamming_distance)>("lect11ext::hamming_distance");
  return op.call(a, b);
}

Pair hamming_topk(const Tensor& query, const Tensor& codes, c10::SymInt k) {
  static const auto op = find_op<decltype(hamming_topk)>("lect11ext::hamming_topk");
  return op.call(query, codes, std::move(k));
}

Ranges hamming_radius(const Tensor& query, const Tensor& codes, int64_t radius) {
  static const auto op = find_op<decltype(hamming_radius)>("lect11ext::hamming_radius");
  return op.call(query, codes, radius);
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("hamming_distance(Tensor a, Tensor b) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("hamming_topk(Tensor query, Tensor codes, SymInt k) -> (Tensor distances, Tensor indices)",
        {at::Tag::pt2_compliant_tag});
  m.def("hamming_radius(Tensor query, Tensor codes, int radius) -> (Tensor offsets, Tensor distances, Tensor indices)",
        {at::Tag::pt2_compliant_tag, at::Tag::dynamic_output_shape});
}

static void add_kernels(torch::Library& m) {
  m.impl("hamming_distance", kernel_distance);
  m.impl("hamming_topk", kernel_topk);
  m.impl("hamming_radius", kernel_radius);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("hamming_distance", meta_distance);
  m.impl("hamming_topk", meta_topk);
}

}  // namespace lect11ext
