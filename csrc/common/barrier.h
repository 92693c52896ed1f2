// A barrier for the threads of one parallel region, reached every few microseconds.
#pragma once

#include <atomic>
#include <cstdint>

namespace lect11ext {

class Barrier {
 public:
  explicit Barrier(int64_t parties);

  // Arrives for `count` parties, and waits until all have arrived as often.
  void arrive_and_wait(int64_t count);

 private:
  const int64_t parties_;
  alignas(64) std::atomic<int64_t> arrived_{0};
};

}  // namespace lect11ext
