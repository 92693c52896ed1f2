#include "attention/cuda/dot_product_launch.cuh"

namespace lect11ext::cuda {

int64_t attention_scratch(const AttentionBackwardTangent& args) { return BackwardRun<true>::scratch(args); }

void attention_backward_tangent(const AttentionBackwardTangent& args, void* scratch, void* stream) {
  BackwardRun<true>::run(args, scratch, stream);
}

}  // namespace lect11ext::cuda
