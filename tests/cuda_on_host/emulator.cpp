// The fibers behind include/cuda_runtime.h.
#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_runtime.h"
#include "hopper.h"

// What a .cu file with dynamic shared memory declares in this namespace, outside the unnamed one, and under this name:
// extern __shared__ __align__(16) unsigned char dynamic_shared[];
namespace lect11ext::cuda {
alignas(16) thread_local unsigned char dynamic_shared[227 * 1024];
}

namespace cuda_on_host {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it waits: a change of contexts would ask the system for its signals every time
  std::unique_ptr<char[]> stack;
  uint3 index;
  Barrier barrier;
  unsigned mask, turn;
  const std::function<bool()>* condition;  // that it waits for
  bool started, finished;
};

// What a launch asked for of dynamic shared memory is all ones at first, NaN in every floating type: it holds nothing
// yet. Behind it lies what a kernel must not write.
constexpr unsigned char kUnwritten = 0xFF, kBeyond = 0xA5;
constexpr std::size_t kBand = 256;
std::atomic<bool> wrote_beyond = false;

unsigned char* band() { return lect11ext::cuda::dynamic_shared + shared_bytes; }
std::size_t beyond() { return sizeof(lect11ext::cuda::dynamic_shared) - shared_bytes; }
bool has_band() { return beyond() >= kBand; }

// A block in execution. One for each system thread, which keeps the stacks from block to block.
class Block {
 public:
  void run(const std::function<void()>& thread, uint3 index, dim3 grid, dim3 size, std::barrier<>* all_blocks);
  void wait(Barrier barrier, unsigned mask);
  void wait_until(const std::function<bool()>& condition);
  Slot* slots() { return slots_.data() + number() / warpSize * warpSize; }
  WideSlot* wide_slots() {
    const std::size_t first = number() / warpSize * warpSize;
    return wide_slots_.data() + 2 * first + (++current_->turn % 2) * warpSize;
  }
  int number() const { return static_cast<int>(current_ - fibers_.data()); }

 private:
  [[noreturn]] static void enter();
  void prepare(std::size_t threads, dim3 size);
  void resume(Fiber& fiber);
  bool release_warps();
  bool release_conditions();
  bool release_idle();
  bool release_sleeping();
  bool release_all(Barrier barrier);

  std::vector<Fiber> fibers_;
  std::size_t threads_ = 0, unfinished_ = 0;
  std::vector<Slot> slots_;
  std::vector<WideSlot> wide_slots_;
  Fiber* current_ = nullptr;
  const std::function<void()>* thread_ = nullptr;
  jmp_buf scheduler_;
};

thread_local Block block;
void Block::enter() {
  (*block.thread_)();
  block.current_->finished = true;
  _longjmp(block.scheduler_, 1);
}

[[gnu::noinline]] void Block::wait(Barrier barrier, unsigned mask) {
  current_->barrier = barrier;
  current_->mask = mask;
  if (_setjmp(current_->place) == 0) _longjmp(scheduler_, 1);
}

void Block::prepare(std::size_t threads, dim3 size) {
  if (fibers_.size() < threads) fibers_.resize(threads);
  threads_ = unfinished_ = threads;
  slots_.assign((threads + warpSize - 1) / warpSize * warpSize, Slot{});
  wide_slots_.resize(2 * slots_.size());
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers_[i];
    if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    const unsigned n = static_cast<unsigned>(i);
    fiber.index = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    fiber.barrier = Barrier::None;
    fiber.turn = 0;
    fiber.started = fiber.finished = false;
  }
}

[[gnu::noinline]] void Block::resume(Fiber& fiber) {
  current_ = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler_) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  if (current_->finished) --unfinished_;
}

// Lets go every group of lanes that wait with one mask and of which none is missing; lanes that have ended count as
// come, as they do on the hardware.
bool Block::release_warps() {
  bool any = false;
  for (std::size_t first = 0; first < threads_; first += warpSize) {
    const std::size_t lanes = std::min<std::size_t>(warpSize, threads_ - first);
    Fiber* const warp = &fibers_[first];
    if (std::all_of(warp, warp + lanes, [](const Fiber& f) { return f.barrier == Barrier::Warp && f.mask == ~0u; })) {
      std::for_each(warp, warp + lanes, [](Fiber& f) { f.barrier = Barrier::None; });
      any = true;
      continue;
    }
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const Fiber& asking = fibers_[first + lane];
      if (asking.finished || asking.barrier != Barrier::Warp) continue;
      const unsigned mask = asking.mask;
      const auto takes_part = [&](std::size_t i) { return (mask >> i & 1) != 0 && !fibers_[first + i].finished; };
      bool complete = true;
      for (std::size_t i = 0; i < lanes; ++i) {
        const Fiber& other = fibers_[first + i];
        if (takes_part(i) && (other.barrier != Barrier::Warp || other.mask != mask)) complete = false;
      }
      for (std::size_t i = 0; complete && i < lanes; ++i) {
        if (takes_part(i)) fibers_[first + i].barrier = Barrier::None;
      }
      any |= complete;
    }
  }
  return any;
}

void Block::wait_until(const std::function<bool()>& condition) {
  if (condition()) return;
  current_->condition = &condition;
  wait(Barrier::Condition, 0);
}

bool Block::release_conditions() {
  bool any = false;
  for (std::size_t i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[i];
    if (fiber.finished || fiber.barrier != Barrier::Condition || !(*fiber.condition)()) continue;
    fiber.barrier = Barrier::None;
    any = true;
  }
  return any;
}

bool Block::release_idle() {
  for (std::size_t i = 0; i < threads_; ++i) {
    if (fibers_[i].finished || fibers_[i].barrier != Barrier::Idle) continue;
    fibers_[i].barrier = Barrier::None;
    return true;
  }
  return false;
}

// Blocks that wait for one another are threads of the system, of which others may want the core.
bool Block::release_sleeping() {
  bool any = false;
  for (std::size_t i = 0; i < threads_; ++i) {
    if (fibers_[i].finished || fibers_[i].barrier != Barrier::Sleep) continue;
    fibers_[i].barrier = Barrier::None;
    any = true;
  }
  if (any) std::this_thread::yield();
  return any;
}

bool Block::release_all(Barrier barrier) {
  if (unfinished_ == 0) return false;
  for (std::size_t i = 0; i < threads_; ++i) {
    if (!fibers_[i].finished && fibers_[i].barrier != barrier) return false;
  }
  for (std::size_t i = 0; i < threads_; ++i) fibers_[i].barrier = Barrier::None;
  return true;
}

void Block::run(const std::function<void()>& thread, uint3 index, dim3 grid, dim3 size, std::barrier<>* all_blocks) {
  thread_ = &thread;
  blockIdx = index;
  gridDim = grid;
  blockDim = size;
  prepare(std::size_t{size.x} * size.y * size.z, size);
  std::fill_n(lect11ext::cuda::dynamic_shared, shared_bytes, kUnwritten);
  if (has_band()) std::fill_n(band(), kBand, kBeyond);
  ASAN_POISON_MEMORY_REGION(band(), beyond());
  hopper_begins();
  // Every other block, and every other pass, runs its threads from the last to the first: a missing barrier that one
  // order hides, the other shows.
  for (unsigned pass = index.x; unfinished_ > 0; ++pass) {
    bool progress = false;
    for (std::size_t n = 0; n < threads_; ++n) {
      Fiber& fiber = fibers_[pass % 2 == 0 ? n : threads_ - 1 - n];
      if (fiber.finished || fiber.barrier != Barrier::None) continue;
      resume(fiber);
      progress = true;
    }
    progress |= release_warps();
    progress |= release_conditions();
    progress |= release_all(Barrier::Block);
    if (all_blocks != nullptr && release_all(Barrier::Grid)) {
      all_blocks->arrive_and_wait();
      progress = true;
    }
    if (!progress) progress = release_idle() || release_sleeping();
    if (!progress) fail("the threads of a block wait at different barriers, or for the grid in an ordinary launch");
  }
  hopper_ends();
  ASAN_UNPOISON_MEMORY_REGION(band(), beyond());
  if (has_band() && std::count(band(), band() + kBand, kBeyond) != kBand) wrote_beyond = true;
}

}  // namespace

void wait(Barrier barrier, unsigned mask) { block.wait(barrier, mask); }
void wait_until(const std::function<bool()>& condition) { block.wait_until(condition); }
void wait_until_idle() { block.wait(Barrier::Idle, 0); }
Slot* warp_slots() { return block.slots(); }
WideSlot* wide_slots() { return block.wide_slots(); }
int lane() { return block.number() % warpSize; }

bool is_shared(const void* address) {
  const auto* const first = lect11ext::cuda::dynamic_shared;
  return address >= first && address < first + sizeof(lect11ext::cuda::dynamic_shared);
}

void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the host: %s.\n", what);
  std::abort();
}

bool take_wrote_beyond() { return wrote_beyond.exchange(false); }

void run(const std::function<void()>& thread, dim3 grid, dim3 size, std::size_t together) {
  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
  const auto index = [&](std::size_t n) {
    return uint3{static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                 static_cast<unsigned>(n / grid.x / grid.y)};
  };
  if (together == 0) {
    for (std::size_t n = 0; n < blocks; ++n) block.run(thread, index(n), grid, size, nullptr);
    return;
  }
  for (std::size_t first = 0; first < blocks; first += together) {
    std::barrier<> all_blocks(static_cast<std::ptrdiff_t>(together));
    std::vector<std::jthread> threads;
    for (std::size_t n = first; n < first + together; ++n) {
      threads.emplace_back([&, n] {
        block.run(thread, index(n), grid, size, &all_blocks);
        all_blocks.arrive_and_drop();
      });
    }
  }
}

}  // namespace cuda_on_host

// Until all other threads of the block have gone on as far as they can.
void __nanosleep(unsigned) { cuda_on_host::wait(cuda_on_host::Barrier::Sleep); }
