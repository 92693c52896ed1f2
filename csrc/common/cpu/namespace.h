// Included first by every CPU kernel: the build's namespace and its vector type.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#define LECT11EXT_KERNEL_NAMESPACE CPU_CAPABILITY

namespace lect11ext::CPU_CAPABILITY {

template <class T>
using Vec = at::vec::Vectorized<T>;

template <class T>
inline constexpr int kLanes = Vec<T>::size();

}  // namespace lect11ext::CPU_CAPABILITY
