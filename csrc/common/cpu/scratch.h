// Memory of a work item, which no other item sees.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/cpu/namespace.h"

namespace lect11ext::CPU_CAPABILITY {

// Zeros at first, with room for a vector of any type beyond the end. std::vector's functions would be shared with other
// builds.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(std::calloc(static_cast<size_t>(count) + kRoom, sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr size_t kRoom = 64;
  T* data_;
};

}  // namespace lect11ext::CPU_CAPABILITY
