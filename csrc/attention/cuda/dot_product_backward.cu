#include "attention/dot_product.h"

#include <stdexcept>

namespace lect11ext::cuda {

int64_t attention_scratch(const AttentionBackward&) { return 0; }
int64_t attention_scratch(const AttentionTangent&) { return 0; }
int64_t attention_scratch(const AttentionBackwardTangent&) { return 0; }

void attention_backward(const AttentionBackward&, void*, void*) { throw std::runtime_error("not yet there"); }
void attention_tangent(const AttentionTangent&, void*, void*) { throw std::runtime_error("not yet there"); }
void attention_backward_tangent(const AttentionBackwardTangent&, void*, void*) {
  throw std::runtime_error("not yet there");
}

}  // namespace lect11ext::cuda
