// Dot-product attention on a GPU without torch: the kernels of sm_90a against those for all devices, results and time.
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DLECT11EXT_SM90A
//     -I csrc -I tools -o attention_on_gpu tools/attention_on_gpu.cu
//     csrc/attention/cuda/dot_product_{forward,backward}.cu
//     csrc/attention/cuda/dot_product_hopper_{forward,backward}.cu csrc/common/cuda/tensor_map.cu
//
// Links CUDA's runtime statically: what is built where there is no GPU runs where there is one. A line for each shape:
// largest differences, in units of the largest value; TFLOP/s of both, forward and backward (five products), as others
// count. An argument names a part of the names of the shapes that are wanted. Stops after three minutes, since a
// barrier that is wrong waits for ever.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "attention/cuda/dot_product_hopper.h"
#include "on_gpu.h"

namespace {

using namespace lect11ext;
using namespace lect11ext::on_gpu;

// Padding: a bool of keys, the last quarter of which is barred; Left: the first. Documents: a bool of queries and keys,
// four blocks on the diagonal, of which the second sees nothing; Heads: a quarter of the keys for every head in turn.
// Nan: as padding, and NaN in its values and keys, so that the kernels for all devices take over. Bool: of queries and
// keys, a tenth barred. Bias: what is added, of queries and keys, a tenth of it −∞. Sequences: those of the batch one
// behind the other.
enum class Option { None, Padding, Left, Documents, Heads, Nan, Bool, Bias, Alibi, Softcap, Dropout, Sequences };
inline bool pads(Option option) { return option == Option::Padding || option == Option::Left || option == Option::Nan; }
inline bool of_pairs(Option option) { return option == Option::Bool || option == Option::Documents; }

struct Case {
  const char* name;
  int64_t batch, heads, kv_heads, queries, keys, columns;
  bool causal;
  int64_t window = kOpen;
  Option option = Option::None;
};

// What an option needs in memory, and its part of the arguments.
struct Given {
  Device<uint8_t> barred;
  Device<S> bias;
  Device<float> slopes;
  Device<int64_t> key, query_starts, key_starts;

  Given(const Case& c, std::mt19937& random, Attention& args)
      : barred(pads(c.option)              ? c.keys
               : c.option == Option::Heads ? c.heads * c.keys
               : of_pairs(c.option)        ? c.queries * c.keys
                                           : 0),
        bias(c.option == Option::Bias ? c.queries * c.keys : 0),
        slopes(c.heads),
        key(2),
        query_starts(c.batch + 1),
        key_starts(c.batch + 1) {
    std::vector<uint8_t> seen(barred.count);
    for (size_t i = 0; i < seen.size(); ++i) {
      const auto key = static_cast<int64_t>(i) % c.keys, row = static_cast<int64_t>(i) / c.keys;
      const int64_t part = 4 * key / c.keys, document = 4 * row / c.queries;
      switch (c.option) {
        case Option::Bool: seen[i] = random() % 10 != 0; break;
        case Option::Left: seen[i] = part > 0; break;
        case Option::Documents: seen[i] = part == document && document != 1; break;
        case Option::Heads: seen[i] = part == row % 4; break;
        default: seen[i] = part < 3;
      }
    }
    bias.draw(random);
    std::vector<S> added = bias.read();
    for (size_t i = 0; i < added.size(); i += 10) added[i] = __float2bfloat16(-INFINITY);
    std::vector<float> slope(c.heads);
    for (int64_t h = 0; h < c.heads; ++h) slope[h] = std::exp2(-8.0f * static_cast<float>(h + 1) / c.heads);
    const int64_t words[2] = {1234567, 0};
    const auto copy = [](void* to, const void* from, size_t bytes) {
      cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy");
    };
    copy(barred.data, seen.data(), seen.size());
    copy(bias.data, added.data(), added.size() * sizeof(S));
    copy(slopes.data, slope.data(), slope.size() * sizeof(float));
    copy(key.data, words, sizeof(words));
    std::vector<int64_t> starts[2];
    for (int64_t n = 0; n <= c.batch; ++n) starts[0].push_back(n * c.queries), starts[1].push_back(n * c.keys);
    copy(query_starts.data, starts[0].data(), starts[0].size() * sizeof(int64_t));
    copy(key_starts.data, starts[1].data(), starts[1].size() * sizeof(int64_t));
    switch (c.option) {
      case Option::Padding:
      case Option::Left:
      case Option::Nan: args.mask = {barred.data, MaskType::Bool, {0, 0, 0, 1}}; break;
      case Option::Heads: args.mask = {barred.data, MaskType::Bool, {0, c.keys, 0, 1}}; break;
      case Option::Documents:
      case Option::Bool: args.mask = {barred.data, MaskType::Bool, {0, 0, c.keys, 1}}; break;
      case Option::Bias: args.mask = {bias.data, MaskType::Storage, {0, 0, c.keys, 1}}; break;
      case Option::Alibi: args.alibi_slopes = slopes.data, args.alibi_strides[1] = 1; break;
      case Option::Softcap: args.softcap = 30; break;
      case Option::Dropout: args.dropout_p = 0.1, args.dropout_key = key.data; break;
      case Option::Sequences:
        args.batch = 1, args.queries *= c.batch, args.keys *= c.batch;
        args.query_starts = query_starts.data, args.key_starts = key_starts.data;
        break;
      case Option::None: break;
    }
  }
};

void choose(bool hopper) { setenv("LECT11EXT_ATTENTION_HOPPER", hopper ? "1" : "0", 1); }

void compare(const Case& c) {
  std::mt19937 random(1);
  const size_t of_queries = c.batch * c.heads * c.queries, of_keys = c.batch * c.kv_heads * c.keys;
  Device<S> query(of_queries * c.columns), key(of_keys * c.columns), value(of_keys * c.columns);
  Device<S> out(query.count), grad_out(query.count), grad_query(query.count);
  Device<S> grad_key(key.count), grad_value(key.count);
  Device<float> lse(of_queries);
  for (Device<S>* t : {&query, &key, &value, &grad_out}) t->draw(random);

  // [batch, positions, heads, columns], as models have them.
  const AttentionStrides a{c.queries * c.heads * c.columns, c.columns, c.heads * c.columns};
  const AttentionStrides b{c.keys * c.kv_heads * c.columns, c.columns, c.kv_heads * c.columns};
  AttentionBackward backward{};
  Attention& common = backward;
  common.batch = common.sequences = c.batch;
  common.heads = c.heads, common.kv_heads = c.kv_heads;
  common.queries = c.queries, common.keys = c.keys;
  common.head_dim = common.value_dim = c.columns;
  common.dtype = DType::BFloat16;
  common.query = {query.data, a}, common.key = {key.data, b}, common.value = {value.data, b};
  common.scale = 1 / std::sqrt(static_cast<double>(c.columns));
  common.window_left = c.window, common.window_right = c.causal ? 0 : kOpen;
  const Given given(c, random, common);
  if (c.option == Option::Nan) {  // of the last sequence's last key
    for (Device<S>* t : {&key, &value}) {
      const size_t last = t->count - static_cast<size_t>(c.kv_heads * c.columns);
      cuda::check(cudaMemset(t->data + last, 0xFF, (t->count - last) * sizeof(S)), "fill");
    }
  }
  AttentionForward forward{common, out.data, a, lse.data};
  backward.out = {out.data, a}, backward.lse = lse.data, backward.grad_out = {grad_out.data, a};
  backward.grad_query = grad_query.data, backward.grad_query_strides = a;
  backward.grad_key = grad_key.data, backward.grad_value = grad_value.data;
  backward.grad_key_strides = backward.grad_value_strides = b;
  Device<char> scratch(std::max(cuda::attention_scratch(forward), cuda::attention_scratch(backward)));

  const auto run_forward = [&] { cuda::attention_forward(forward, scratch.data, nullptr); };
  const auto run_backward = [&] { cuda::attention_backward(backward, scratch.data, nullptr); };
  const auto results = [&](bool hopper) {
    choose(hopper);
    for (Device<S>* t : {&out, &grad_query, &grad_key, &grad_value}) t->poison();
    run_forward();
    run_backward();
    cuda::check(cudaDeviceSynchronize(), "run attention");
    std::vector<Device<S>> all;
    for (const Device<S>* t : {&out, &grad_query, &grad_key, &grad_value}) all.push_back(t->copy());
    return all;
  };
  const auto expected = results(false);
  const auto expected_lse = lse.copy();
  lse.poison();
  choose(true);
  const bool taken = cuda::hopper_forward(forward, scratch.data, nullptr).started;
  const auto actual = results(true), again = results(true);
  std::printf("%-22s%s differences: out %.1e lse %.1e dq %.1e dk %.1e dv %.1e; repeats %s", c.name,
              taken ? "" : " NOT TAKEN", difference(actual[0], expected[0]), difference(lse, expected_lse),
              difference(actual[1], expected[1]), difference(actual[2], expected[2]),
              difference(actual[3], expected[3]), [&] {
                for (size_t i = 0; i < actual.size(); ++i) {
                  if (difference(actual[i], again[i]) != 0) return "NO";
                }
                return "yes";
              }());
  const double pairs = static_cast<double>(of_queries) * c.keys * (c.causal ? 0.5 : 1.0), flop = 4 * pairs * c.columns;
  for (const bool hopper : {false, true}) {
    choose(hopper);
    std::printf("; %s %.0f and %.0f TFLOP/s", hopper ? "sm_90a" : "general", flop / milliseconds(run_forward) * 1e-9,
                2.5 * flop / milliseconds(run_backward) * 1e-9);
  }
  std::printf("\n");
  std::fflush(stdout);
}

// One query of many sequences, which is bound by reading keys and values.
void decode(int64_t batch, int64_t heads, int64_t kv_heads, int64_t keys, int64_t columns) {
  std::mt19937 random(1);
  const size_t of_queries = batch * heads, of_keys = batch * kv_heads * keys;
  Device<S> query(of_queries * columns), key(of_keys * columns), value(of_keys * columns), out(query.count);
  Device<float> lse(of_queries);
  for (Device<S>* t : {&query, &key, &value}) t->draw(random);
  AttentionForward forward{};
  forward.batch = forward.sequences = batch, forward.heads = heads, forward.kv_heads = kv_heads;
  forward.queries = 1, forward.keys = keys, forward.head_dim = forward.value_dim = columns;
  forward.dtype = DType::BFloat16, forward.scale = 1 / std::sqrt(static_cast<double>(columns));
  forward.window_left = forward.window_right = kOpen;
  const AttentionStrides a{heads * columns, columns, columns};
  const AttentionStrides b{keys * kv_heads * columns, keys * columns, columns};
  forward.query = {query.data, a}, forward.key = {key.data, b}, forward.value = {value.data, b};
  forward.out = out.data, forward.out_strides = a, forward.lse = lse.data;
  Device<char> scratch(cuda::attention_scratch(forward));
  const double took = milliseconds([&] { cuda::attention_forward(forward, scratch.data, nullptr); });
  std::printf("one query, B %lld, heads %lld/%lld, S %lld, D %lld: %.3f ms, %.2f TB/s\n", static_cast<long long>(batch),
              static_cast<long long>(heads), static_cast<long long>(kv_heads), static_cast<long long>(keys),
              static_cast<long long>(columns), took, 2e-9 * sizeof(S) * key.count / took);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  alarm(180);
  const auto wanted = [&](const char* name) { return argc < 2 || std::strstr(name, argv[1]) != nullptr; };
  const Case cases[] = {
      {"D 64, small", 1, 2, 2, 200, 300, 64, false},
      {"D 128, small", 1, 2, 2, 200, 300, 128, false},
      {"D 128, causal, odd", 2, 4, 2, 777, 777, 128, true},
      {"D 64, causal, groups", 2, 8, 2, 1500, 1500, 64, true},
      {"D 64, window", 2, 4, 4, 1000, 1100, 64, true, 200},
      {"D 128, 2048", 8, 16, 16, 2048, 2048, 128, false},
      {"D 64, 2048", 8, 16, 16, 2048, 2048, 64, false},
      {"D 128, 4096", 4, 16, 16, 4096, 4096, 128, false},
      {"D 128, 4096, causal", 4, 16, 16, 4096, 4096, 128, true},
      {"D 64, 4096", 4, 32, 32, 4096, 4096, 64, false},
      {"D 64, 4096, causal", 4, 32, 32, 4096, 4096, 64, true},
      {"D 128, 64/8, 16384", 1, 64, 8, 16384, 16384, 128, false},
      {"D 128, 64/8, causal", 1, 64, 8, 16384, 16384, 128, true},
      {"D 64, bool, odd", 1, 2, 2, 200, 301, 64, false, kOpen, Option::Bool},
      {"D 128, bias, small", 1, 4, 2, 200, 300, 128, true, kOpen, Option::Bias},
      {"D 128, small, dropout", 2, 4, 2, 200, 300, 128, true, 101, Option::Dropout},
      {"D 64, bool, window", 2, 4, 2, 300, 300, 64, true, 101, Option::Bool},
      {"D 128, NaN, small", 1, 4, 2, 200, 300, 128, false, kOpen, Option::Nan},
      {"D 128, left, small", 2, 4, 2, 300, 700, 128, false, kOpen, Option::Left},
      {"D 64, left, small", 2, 4, 2, 300, 512, 64, true, kOpen, Option::Left},
      {"D 128, documents, small", 1, 4, 2, 700, 900, 128, false, kOpen, Option::Documents},
      {"D 64, documents, small", 1, 4, 2, 700, 900, 64, false, 300, Option::Documents},
      {"D 128, heads, small", 2, 8, 2, 300, 1024, 128, false, kOpen, Option::Heads},
      {"D 64, heads, small", 2, 8, 2, 300, 1024, 64, false, kOpen, Option::Heads},
      {"D 128, padding", 4, 16, 16, 4096, 4096, 128, false, kOpen, Option::Padding},
      {"D 128, documents", 4, 16, 16, 4096, 4096, 128, false, kOpen, Option::Documents},
      {"D 128, bool", 4, 16, 16, 4096, 4096, 128, false, kOpen, Option::Bool},
      {"D 128, bias", 4, 16, 16, 4096, 4096, 128, false, kOpen, Option::Bias},
      {"D 128, alibi, causal", 4, 16, 16, 4096, 4096, 128, true, kOpen, Option::Alibi},
      {"D 128, softcap", 4, 16, 16, 4096, 4096, 128, false, kOpen, Option::Softcap},
      {"D 128, dropout", 4, 16, 16, 4096, 4096, 128, false, kOpen, Option::Dropout},
      {"D 128, sequences, small", 3, 4, 2, 150, 200, 128, true, kOpen, Option::Sequences},
      {"D 128, sequences", 4, 16, 16, 4096, 4096, 128, false, kOpen, Option::Sequences},
      {"D 128, sequences, causal", 16, 16, 16, 1024, 1024, 128, true, kOpen, Option::Sequences},
      {"D 64, padding", 4, 32, 32, 4096, 4096, 64, false, kOpen, Option::Padding},
      {"D 96", 4, 16, 16, 4096, 4096, 96, false},
      {"D 256", 4, 8, 8, 4096, 4096, 256, false},
  };
  for (const Case& c : cases) {
    if (wanted(c.name)) compare(c);
  }
  if (!wanted("decoding")) return 0;
  for (const int64_t batch : {1, 32}) decode(batch, 32, 8, 8192, 128);
  decode(32, 32, 32, 4096, 64);
}
