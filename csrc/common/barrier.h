// A barrier for the threads of one parallel region, reached every few microseconds.
#pragma once

#include <atomic>
#include <cstdint>

namespace lect11ext {

class Barrier {
 public:
  explicit Barrier(int64_t parties);

  // Arrives for `count` parties; the result is for them to wait for, then or later.
  int64_t arrive(int64_t count);
  // Waits until all have arrived as often. No party arrives again before it has waited.
  void wait(int64_t arrivals);
  void arrive_and_wait(int64_t count) { wait(arrive(count)); }

 private:
  const int64_t parties_;
  alignas(64) std::atomic<int64_t> arrived_{0};
};

}  // namespace lect11ext
