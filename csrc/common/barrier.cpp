#include "common/barrier.h"

namespace lect11ext {
namespace {

// Polls before a waiting thread sleeps, some 20 to 50 µs: the one that it waits for may be queued behind it on this
// very processor, or behind another program. A thread that sleeps is let in again at once when it is woken; one that
// yields would wait for that program's whole slice, after every step.
constexpr int kPolls = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Barrier::Barrier(int64_t parties) : parties_(parties) {}

int64_t Barrier::arrive(int64_t count) {
  if (count == parties_) return 0;
  const int64_t before = arrived_.fetch_add(count, std::memory_order_acq_rel);
  const int64_t target = (before / parties_ + 1) * parties_;
  if (before + count == target) arrived_.notify_all();
  return target;
}

void Barrier::wait(int64_t arrivals) {
  for (int polls = 0;; ++polls) {
    const int64_t arrived = arrived_.load(std::memory_order_acquire);
    if (arrived >= arrivals) return;
    if (polls < kPolls) pause();
    else arrived_.wait(arrived, std::memory_order_acquire);
  }
}

}  // namespace lect11ext
