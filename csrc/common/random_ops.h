// The drawing ops as functions that any op may call; what they do stands in random.h and random.cpp.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace lect11ext {

// A key [seed, offset] for `numel` normals on the device of `like`, from the generator, which advances.
at::Tensor philox_key(const at::Tensor& like, c10::SymInt numel, const std::optional<at::Generator>& generator);

// Standard normals of the key's stream, on the key's device.
at::Tensor philox_normal(const at::Tensor& key, c10::SymIntArrayRef size, at::ScalarType dtype);

// Throws unless it is an int64 tensor [seed, offset] on `device`; `name` is the argument's.
void check_key(const at::Tensor& key, c10::Device device, const char* name = "key");

}  // namespace lect11ext
