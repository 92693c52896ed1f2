#include "common/barrier.h"

#include <thread>

namespace lect11ext {
namespace {

// Polls before a waiting thread lets others run, some 20 to 50 µs: the one that it waits for may be queued behind it on
// this very processor.
constexpr int kPolls = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Barrier::Barrier(int64_t parties) : parties_(parties) {}

void Barrier::arrive_and_wait(int64_t count) {
  if (count == parties_) return;
  const int64_t target = (arrived_.fetch_add(count, std::memory_order_acq_rel) / parties_ + 1) * parties_;
  for (int polls = 0; arrived_.load(std::memory_order_acquire) < target; ++polls) {
    if (polls < kPolls) pause();
    else std::this_thread::yield();
  }
}

}  // namespace lect11ext
