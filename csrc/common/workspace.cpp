#include "common/workspace.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lect11ext {
namespace {

constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
// From here on a piece is whole huge pages: small ones lie anywhere in memory, and those that share sets of a
// second-level cache put one another out of it (docs/performance-notes.md).
constexpr size_t kWorthHugePages = kHugePage / 8;
constexpr size_t kMostKept = size_t{64} << 20;  // of a piece

char* allocate(size_t bytes) {
  const size_t alignment = bytes >= kWorthHugePages ? kHugePage : kLine;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, bytes);
  TORCH_CHECK(memory != nullptr, "could not allocate a workspace of ", bytes, " bytes");
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);  // only a hint: a refusal changes nothing
#endif
  return static_cast<char*>(memory);
}

}  // namespace

struct Workspace::Kept {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  size_t size = 0;
  bool in_use = false;
};

// One that is free, or null.
Workspace::Kept* Workspace::find_kept() {
  static thread_local std::array<Kept, 4> pieces;
  for (Kept& piece : pieces) {
    if (!piece.in_use) return &piece;
  }
  return nullptr;
}

size_t Workspace::reserve(int64_t bytes) {
  TORCH_INTERNAL_ASSERT(memory_ == nullptr);
  const size_t part = size_;
  size_ += (static_cast<size_t>(bytes) + kLine - 1) / kLine * kLine;
  return part;
}

void* Workspace::at(size_t part) {
  if (memory_ == nullptr && size_ > 0) {
    kept_ = size_ <= kMostKept ? find_kept() : nullptr;
    if (kept_ == nullptr) {
      memory_ = allocate(size_);
    } else {
      if (kept_->size < size_) {
        kept_->size = 0;
        kept_->memory.reset();
        kept_->memory.reset(allocate(size_));
        kept_->size = size_;
      }
      kept_->in_use = true;
      memory_ = kept_->memory.get();
    }
    // As at::empty does, for tests: every float type's NaN.
    const auto& context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
      std::memset(memory_, 0xFF, size_);
    }
  }
  return memory_ + part;
}

Workspace::~Workspace() {
  if (kept_ == nullptr) std::free(memory_);
  else kept_->in_use = false;
}

}  // namespace lect11ext
