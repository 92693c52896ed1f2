// The activations of a code: φ(a) in the table, with the derivatives that penalties are made of.
//
//   identity a        relu max(a, 0), φ'(0) = 0        sigmoid 1/(1 + e^−a)        softplus log(1 + e^a)        tanh
#pragma once

#include <cstdint>
#include <type_traits>

namespace lect11ext {

enum class Activation : int8_t { Identity, Relu, Sigmoid, Softplus, Tanh };

// Calls f with the activation as a constant.
template <class F>
constexpr void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::Identity: return f(std::integral_constant<Activation, Activation::Identity>());
    case Activation::Relu: return f(std::integral_constant<Activation, Activation::Relu>());
    case Activation::Sigmoid: return f(std::integral_constant<Activation, Activation::Sigmoid>());
    case Activation::Softplus: return f(std::integral_constant<Activation, Activation::Softplus>());
    case Activation::Tanh: return f(std::integral_constant<Activation, Activation::Tanh>());
  }
}

}  // namespace lect11ext
