// Memory that a call needs while it runs. It is kept from call to call, four pieces for each calling thread (an op's
// three at most, and its kernel's), since fresh memory costs more than most kernels: the system hands it out page by
// page, 2 µs for every 4 KiB on a virtual machine. Nothing is ever read from it that the same call has not written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lect11ext {

// Parts are reserved first, then handed out:
//
//   Workspace space;
//   const auto a = space.reserve(bytes), b = space.reserve(others);
//   void* pointer = space.at(a);
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // Where a part of `bytes` will lie, aligned to a cache line.
  size_t reserve(int64_t bytes);
  // The part's memory. After the first call nothing can be reserved any more.
  void* at(size_t part);

 private:
  struct Kept;
  static Kept* find_kept();

  size_t size_ = 0;
  char* memory_ = nullptr;
  Kept* kept_ = nullptr;  // where the memory is from; else it is freed at the end
};

}  // namespace lect11ext
