// Ops by their names: called, and passed through.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <initializer_list>

namespace lect11ext {

// An op of this library, to be kept in a static variable: the look-up takes a lock.
template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What a key has no part in: autocast where no type changes, autograd where there is no derivative.
inline void fall_through(torch::Library& m, std::initializer_list<const char*> ops) {
  for (const char* op : ops) m.impl(op, torch::CppFunction::makeFallthrough());
}

}  // namespace lect11ext
