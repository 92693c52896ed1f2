// The module _C: a short way from Python into the ops, and what `python -m lect11ext` reports.
//
// A call through here costs 2 µs less than one through torch.ops; under torch.compile the wrappers take torch.ops.
#include <torch/extension.h>

#include "attention/additive_ops.h"
#include "attention/dot_product_weights_inputs.h"
#include "autoencoder/corruption_inputs.h"
#include "autoencoder/corruption_ops.h"
#include "autoencoder/hashing_ops.h"
#include "autoencoder/penalties_inputs.h"
#include "autoencoder/reconstruction_inputs.h"
#include "autoencoder/sparse_code_ops.h"
#include "autoencoder/variational_inputs.h"
#include "autoencoder/variational_ops.h"
#include "common/capability.h"
#include "common/random_ops.h"
#include "recurrent/cells_ops.h"
#include "recurrent/layer_schema.h"

namespace py = pybind11;

namespace lect11ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> draw_gaussian_rsample_kl(
    const at::Tensor& mean, const at::Tensor& logvar, const OptionalTensor& prior_mean,
    const OptionalTensor& prior_logvar, std::optional<int64_t> num_samples, double free_bits,
    std::optional<double> logvar_min, std::optional<double> logvar_max, const std::string& reduction,
    const std::optional<at::Generator>& generator, const OptionalTensor& key) {
  std::optional<c10::SymInt> samples;
  if (num_samples.has_value()) samples = *num_samples;
  at::Tensor used = key.value_or(at::Tensor());
  if (!key.has_value()) {
    const gaussian::Inputs in{mean,    logvar,    prior_mean, prior_logvar, used,
                              samples, free_bits, logvar_min, logvar_max,   gaussian::parse_reduction(reduction)};
    in.check_operands();
    const int64_t words = in.compute_dtype() == at::kDouble ? 2 : 1;  // of a uniform
    used = philox_key(mean, words * mean.sym_numel() * num_samples.value_or(1), generator);
  }
  return gaussian_rsample_kl(mean, logvar, prior_mean, prior_logvar, used, samples, free_bits, logvar_min, logvar_max,
                             reduction);
}

std::tuple<at::Tensor, OptionalTensor> draw_corrupt(
    const at::Tensor& input, const std::string& kind, double amount, double low, double high, bool return_mask,
    const std::optional<at::Generator>& generator, const OptionalTensor& key) {
  at::Tensor used = key.value_or(at::Tensor());
  if (!key.has_value()) {
    const corruption::Inputs in{input, "input", corruption::parse_kind(kind), amount};
    in.check_operands();
    used = philox_key(input, (in.is_double_stream() ? 2 : 1) * input.sym_numel(), generator);
  }
  return corrupt(input, used, kind, amount, low, high, return_mask);
}

namespace layers {

using namespace layer_op;

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm(LSTM_LAYER_PARAMETERS, bool save) {
  Outputs out = call_forward(LSTM_LAYER_INPUTS, save);
  return {out.out, out.h, out.c, out.cells};
}

std::tuple<Tensor, Tensor> gru(GRU_LAYER_PARAMETERS) {
  Outputs out = call_forward(GRU_LAYER_INPUTS, /*save=*/false);
  return {out.out, out.h};
}

}  // namespace layers

namespace attention {

using namespace attention_op;

const OptionalTensor kNone;

Outputs attend(ATTENTION_PARAMETERS) { return call_forward(ATTENTION_INPUTS); }
Tensor weights(ATTENTION_WEIGHTS_PARAMETERS) { return call_weights(ATTENTION_WEIGHTS_INPUTS(kNone)); }
OutputsAndWeights attend_with_weights(WITH_WEIGHTS_PARAMETERS) {
  return call_with_weights(WITH_WEIGHTS_INPUTS(kNone), average_heads);
}

}  // namespace attention

py::dict build_info() {
  py::dict info;
  info["torch"] = LECT11EXT_TORCH_VERSION;
  info["compiler"] = LECT11EXT_CXX_COMPILER;
#if LECT11EXT_X86_BUILDS
  info["cpu_builds"] = "default avx2 avx512 avx512_bf16";
#else
  info["cpu_builds"] = "default";
#endif
  info["cuda_architectures"] = LECT11EXT_CUDA_ARCHITECTURES;
#ifdef LECT11EXT_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace lect11ext

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace lect11ext;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("gaussian_rsample_kl", &draw_gaussian_rsample_kl, NoGil(), py::arg("mean"), py::arg("logvar"),
        py::arg("prior_mean"), py::arg("prior_logvar"),
        py::arg("num_samples").noconvert(),  // a fraction is no number of samples
        py::arg("free_bits"), py::arg("logvar_min"), py::arg("logvar_max"), py::arg("reduction"), py::arg("generator"),
        py::arg("key"));
  m.def("corrupt", &draw_corrupt, NoGil(), py::arg("input"), py::arg("kind"), py::arg("amount"), py::arg("low"),
        py::arg("high"), py::arg("return_mask").noconvert(), py::arg("generator"), py::arg("key"));
  m.def(
      "penalized_activation",
      [](const at::Tensor& input, const OptionalTensor& scale, const std::string& activation,
         const std::string& penalty) { return penalties::call_forward(input, scale, activation, penalty); },
      NoGil());
  m.def(
      "topk_code",
      [](const at::Tensor& input, int64_t k, const std::string& activation) { return topk_code(input, k, activation); },
      NoGil(), py::arg("input"), py::arg("k").noconvert(), py::arg("activation"));
  m.def("sparse_decode", &sparse_decode, NoGil());
  m.def("sparse_dots", &sparse_dots, NoGil());
  m.def(
      "reconstruction_loss",
      [](const at::Tensor& input, const at::Tensor& target, const OptionalTensor& logvar, const OptionalTensor& weight,
         const std::string& likelihood, const std::string& reduction) {
        return reconstruction::call_forward(input, target, logvar, weight, likelihood, reduction);
      },
      NoGil());
  m.def(
      "philox_key",
      [](const at::Tensor& like, int64_t numel, const std::optional<at::Generator>& generator) {
        return philox_key(like, numel, generator);
      },
      NoGil(), py::arg("like"), py::arg("numel").noconvert(), py::arg("generator"));
  m.def(
      "lstm_cell",
      [](const at::Tensor& input, const at::Tensor& h, const at::Tensor& c, const at::Tensor& weight_ih,
         const at::Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
         const std::string& candidate, std::optional<double> grad_clip) {
        auto [h_out, c_out, gates] =
            lstm_cell(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, candidate, grad_clip, false);
        return std::make_pair(std::move(h_out), std::move(c_out));
      },
      NoGil());
  m.def(
      "gru_cell",
      [](const at::Tensor& input, const at::Tensor& h, const at::Tensor& weight_ih, const at::Tensor& weight_hh,
         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool reset_after,
         std::optional<double> grad_clip) {
        return std::get<0>(gru_cell(input, h, weight_ih, weight_hh, bias_ih, bias_hh, reset_after, grad_clip, false));
      },
      NoGil(), py::arg("input"), py::arg("h"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"),
      py::arg("bias_hh"), py::arg("reset_after").noconvert(), py::arg("grad_clip"));
  m.def(
      "lstm_cell_packed",
      [](const at::Tensor& input, const at::Tensor& h, const at::Tensor& c, const at::Tensor& packed_ih,
         const at::Tensor& packed_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
         const std::string& candidate) {
        return lstm_cell_packed(input, h, c, packed_ih, packed_hh, bias_ih, bias_hh, candidate);
      },
      NoGil());
  m.def("gru_cell_packed", &gru_cell_packed, NoGil());
  m.def("lstm_layer", &layers::lstm, NoGil());
  m.def("gru_layer", &layers::gru, NoGil());
  m.def(
      "additive_attention",
      [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& score_weight,
         const OptionalTensor& attn_mask) {
        return std::get<0>(additive_attention(query, key, value, score_weight, attn_mask, /*save_weights=*/false));
      },
      NoGil());
  m.def("attention", &attention::attend, NoGil());
  m.def("attention_weights", &attention::weights, NoGil());
  m.def("attention_with_weights", &attention::attend_with_weights, NoGil());
  m.def("binarize", &binarize, NoGil());
  m.def("pack_bits", &pack_bits, NoGil());
  m.def("hamming_distance", &hamming_distance, NoGil());
  m.def(
      "hamming_topk",
      [](const at::Tensor& query, const at::Tensor& codes, int64_t k) { return hamming_topk(query, codes, k); },
      NoGil(), py::arg("query"), py::arg("codes"), py::arg("k").noconvert());
  m.def("hamming_radius", &hamming_radius, NoGil(), py::arg("query"), py::arg("codes"), py::arg("radius").noconvert());
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return capability_name(capability()); });
  m.def("best_cpu_capability", [] { return capability_name(best_capability()); });
  m.def("set_cpu_capability", &set_capability);
}
