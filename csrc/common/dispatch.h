// The parallel loop with which an op runs a CPU kernel.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace lect11ext {

// Below this much work, in units of about a nanosecond, starting a second thread costs more than it saves: waking an
// idle OpenMP team takes 2 to 5 µs.
inline constexpr int64_t kWorthAThread = 8000;

// Runs kernel(args, begin, end) over `items` work items of `cost` units each on as many threads as that is worth.
template <class Args>
void run_parallel(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items, int64_t cost) {
  if (items == 0) return;
  const int64_t grain = cost >= kWorthAThread ? 1 : (kWorthAThread + cost - 1) / (cost > 0 ? cost : 1);
  if (items <= grain || at::get_num_threads() == 1) return kernel(args, 0, items);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace lect11ext
