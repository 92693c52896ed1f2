// What include/common/cuda/hopper.cuh declares: tensor maps, TMA, barriers of shared memory, named ones, wgmma. What is
// left unfinished when a block ends, or was called as the hardware forbids, stops the test.
#include "common/cuda/hopper.cuh"

#include <algorithm>
#include <deque>
#include <vector>

#include "hopper.h"

namespace lect11ext::cuda {
extern thread_local unsigned char dynamic_shared[];
}

namespace cuda_on_host {
namespace {

// Not a multiple of 1024: where the hardware puts a block's shared memory is not said.
constexpr uint32_t kFirstAddress = 1024 + 48;
constexpr int kWarpgroupThreads = 128, kMostNamed = 16;

void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

unsigned char* shared_at(uint32_t address, std::size_t bytes) {
  require(address >= kFirstAddress && address - kFirstAddress + bytes <= shared_bytes,
          "shared memory is used that was not asked for");
  return lect11ext::cuda::dynamic_shared + (address - kFirstAddress);
}

// --- state of a block ---------------------------------------------------------------------------------------------

// As it lies in shared memory, so that a write that goes astray is noticed.
struct SharedBarrier {
  int32_t bytes;  // announced and not yet come
  uint16_t arrivals : 15, phase : 1;
  uint16_t missing : 15, made : 1;
};
static_assert(sizeof(SharedBarrier) == 8);

struct Copy {
  uint32_t to, barrier;
  CUtensorMap map;
  int corner[4];
  const void* from;  // of bytes one behind the other, so many, and not of the map
  int bytes;
};

// From shared memory to floats, done as late as its thread's wait allows.
struct Put {
  unsigned thread;
  float* to;
  uint32_t from;
  int count;
  bool adds;
};

struct Named {
  int threads = 0, come = 0;
  unsigned opened = 0;
};

struct PendingProduct {
  Product product;
  int started = 0;  // by so many threads
  float* sums[kWarpgroupThreads];
  uint32_t words[kWarpgroupThreads][4];
};

struct Warpgroup {
  std::deque<PendingProduct> pending;
  std::size_t done = 0;  // products before the first pending one
  int waiting = 0;
  unsigned waits = 0;
  std::size_t target = 0;
  struct Thread {
    std::size_t started = 0;
    std::vector<std::size_t> groups;  // products started when each was committed
    bool fenced = false;
    int registers = 0;
  } threads[kWarpgroupThreads];
};

struct Block {
  std::vector<Copy> copies;
  std::vector<Put> puts;
  std::vector<uint32_t> barriers;
  Named named[kMostNamed];
  std::deque<Warpgroup> warpgroups;  // which stay where they are when others come
};
thread_local Block state;

Warpgroup& warpgroup() {
  const std::size_t n = threadIdx.x / kWarpgroupThreads;
  if (state.warpgroups.size() <= n) state.warpgroups.resize(n + 1);
  return state.warpgroups[n];
}

Warpgroup::Thread& own_thread() { return warpgroup().threads[threadIdx.x % kWarpgroupThreads]; }

// --- barriers -----------------------------------------------------------------------------------------------------

SharedBarrier& barrier_at(uint32_t address, bool made = true) {
  require(address % 8 == 0, "a barrier is not aligned");
  auto& barrier = *reinterpret_cast<SharedBarrier*>(shared_at(address, 8));
  require(!made || barrier.made, "a barrier was not initialised, or was overwritten");
  return barrier;
}

void end_phase(SharedBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.missing = barrier.arrivals;
}

// The 128-byte permutation, of addresses.
uint32_t permuted(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void count_bytes(uint32_t address, int bytes) {
  SharedBarrier& barrier = barrier_at(address);
  barrier.bytes -= bytes;
  require(barrier.bytes >= 0, "more bytes came than a barrier was told of");
  end_phase(barrier);
}

void copy(const Copy& c) {
  if (c.from != nullptr) {
    std::memcpy(shared_at(c.to, static_cast<std::size_t>(c.bytes)), c.from, static_cast<std::size_t>(c.bytes));
    return count_bytes(c.barrier, c.bytes);
  }
  const CUtensorMap& map = c.map;
  const int rows = static_cast<int>(map.box[1]), bytes = static_cast<int>(map.box[0]) * 2;
  constexpr int kPiece = 16, kElements = 8;
  for (int row = 0; row < rows; ++row) {
    for (int piece = 0; piece < bytes; piece += kPiece) {
      const int64_t at[4] = {c.corner[0] + piece / 2, c.corner[1] + row, c.corner[2], c.corner[3]};
      bool inside = at[0] >= 0 && at[0] + kElements <= static_cast<int64_t>(map.sizes[0]);
      int64_t offset = at[0] * 2;
      for (int d = 1; d < 4; ++d) {
        inside &= at[d] >= 0 && at[d] < static_cast<int64_t>(map.sizes[d]);
        offset += at[d] * static_cast<int64_t>(map.strides[d - 1]);
      }
      unsigned char* const to = shared_at(permuted(c.to + row * 128 + piece), kPiece);
      if (inside) std::memcpy(to, map.data + offset, kPiece);
      else std::memset(to, 0, kPiece);
    }
  }
  count_bytes(c.barrier, rows * bytes);
}

void copy_those_of(uint32_t barrier) {
  std::vector<Copy> mine;
  const auto is_mine = [&](const Copy& c) { return c.barrier == barrier; };
  std::copy_if(state.copies.begin(), state.copies.end(), std::back_inserter(mine), is_mine);
  std::erase_if(state.copies, is_mine);
  for (const Copy& c : mine) copy(c);
}

// --- products -----------------------------------------------------------------------------------------------------

float number(bool brain, uint16_t bits) {
  if (brain) return __bfloat162float(std::bit_cast<__nv_bfloat16>(bits));
  return __half2float(std::bit_cast<__half>(bits));
}

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    require(bits >> 62 == 1, "a descriptor is not of 128-byte rows that are permuted");
    require((bits & ~(uint64_t{3} << 62 | uint64_t{0x3FFF} << 32 | uint64_t{0x3FFF} << 16 | 0x3FFF)) == 0,
            "a descriptor has bits that mean nothing, or a base offset");
  }
  // Row (of eights) and element of a row of 128 bytes.
  uint16_t at(uint32_t eights, uint32_t row, uint32_t further, uint32_t element) const {
    uint16_t bits;
    std::memcpy(&bits, shared_at(permuted(start + eights * stride + row * 128 + further + element * 2), 2), 2);
    return bits;
  }
};

constexpr int kDepth = 16, kRows = 64, kMostColumns = 128;

[[gnu::optimize("O3"), gnu::no_sanitize("undefined")]] void multiply(const float (&a)[kRows][kDepth],
                                                                     const float (&b)[kDepth][kMostColumns],
                                                                     float (&out)[kRows][kMostColumns], int columns) {
  for (int row = 0; row < kRows; ++row) {
    float* const sums = out[row];
    for (int k = 0; k < kDepth; ++k) {
      const float x = a[row][k];
      for (int column = 0; column < columns; ++column) sums[column] += x * b[k][column];
    }
  }
}

void take(const PendingProduct& pending) {
  const Product& product = pending.product;
  static thread_local float a[kRows][kDepth], b[kDepth][kMostColumns], out[kRows][kMostColumns];
  const auto row_of = [](int thread, int half) { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; };
  if (product.registers) {
    for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
      for (int i = 0; i < 8; ++i) {
        const uint32_t word = pending.words[thread][i / 2];
        a[row_of(thread, i / 2 % 2)][i / 4 * 8 + 2 * (thread % 4) + i % 2] =
            number(product.brain, static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16));
      }
    }
  } else {
    const Descriptor d(product.a);
    for (uint32_t row = 0; row < kRows; ++row) {
      for (uint32_t k = 0; k < kDepth; ++k) {
        a[row][k] = number(product.brain, product.down ? d.at(k / 8, k % 8, 0, row) : d.at(row / 8, row % 8, 0, k));
      }
    }
  }
  const Descriptor d(product.b);
  for (uint32_t column = 0; column < static_cast<uint32_t>(product.columns); ++column) {
    for (uint32_t k = 0; k < kDepth; ++k) {
      b[k][column] = number(product.brain, product.registers || product.down
                                               ? d.at(k / 8, k % 8, column / 64 * d.leading, column % 64)  // MN-major
                                               : d.at(column / 8, column % 8, 0, k));
    }
  }
  for (auto& row : out) std::fill(std::begin(row), std::end(row), 0.0f);
  multiply(a, b, out, product.columns);
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    float* const sums = pending.sums[thread];
    for (int i = 0; i < product.columns / 2; ++i) {
      const float sum = out[row_of(thread, i % 4 / 2)][i / 4 * 8 + 2 * (thread % 4) + i % 2];
      sums[i] = product.adds ? sums[i] + sum : sum;
    }
  }
}

}  // namespace

// --- what a block's begin and end are told ------------------------------------------------------------------------

void hopper_begins() { state = Block{}; }

void hopper_ends() {
  require(state.copies.empty() && state.puts.empty(), "a block ends before its copies");
  for (const uint32_t address : state.barriers) {
    const SharedBarrier& barrier = barrier_at(address);
    require(barrier.missing == barrier.arrivals && barrier.bytes == 0, "a block ends with a barrier half full");
  }
  for (const Named& named : state.named) require(named.come == 0, "a block ends with a named barrier half full");
  for (const Warpgroup& group : state.warpgroups) require(group.pending.empty(), "a block ends before its products");
}

// --- instructions -------------------------------------------------------------------------------------------------

uint32_t shared_address(const void* shared) {
  return kFirstAddress +
         static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - lect11ext::cuda::dynamic_shared);
}

void barrier_init(uint32_t address, int arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  SharedBarrier& barrier = barrier_at(address, false);
  barrier = {};
  barrier.arrivals = barrier.missing = count;
  barrier.made = 1;
  state.barriers.push_back(address);
}

void barrier_arrive(uint32_t address, int bytes) {
  SharedBarrier& barrier = barrier_at(address);
  require(barrier.missing > 0, "more threads came than a barrier was told of");
  --barrier.missing;
  barrier.bytes += bytes;
  end_phase(barrier);
}

void barrier_wait(uint32_t address, int parity) {
  wait_until([=] {
    copy_those_of(address);
    return barrier_at(address).phase != parity;
  });
}

void named_barrier(int id, int threads, bool waits) {
  require(id > 0 && id < kMostNamed && threads % warpSize == 0, "a named barrier that there is not");
  Named& named = state.named[id];
  require(named.come == 0 || named.threads == threads, "threads do not agree how many a named barrier waits for");
  named.threads = threads;
  const unsigned opened = named.opened;
  if (++named.come == threads) {
    named.come = 0;
    ++named.opened;
  } else if (waits) {
    wait_until([&named, opened] { return named.opened != opened; });
  }
}

void load_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, const int (&corner)[4]) {
  require(map.mark == kTensorMapMark, "a tensor map was not made");
  require(to % 1024 == 0, "a box does not begin at a multiple of 1024 bytes");
  state.copies.push_back({to, barrier, map, {corner[0], corner[1], corner[2], corner[3]}, nullptr, 0});
  if (blockIdx.x % 2 == 0) copy_those_of(barrier);
}

void load_bytes(uint32_t to, const void* from, uint32_t barrier, int bytes) {
  require((to | reinterpret_cast<uintptr_t>(from) | static_cast<unsigned>(bytes)) % 16 == 0, "a copy is not aligned");
  state.copies.push_back({to, barrier, {}, {}, from, bytes});
  if (blockIdx.x % 2 == 0) copy_those_of(barrier);
}

void put_floats(float* to, uint32_t from, int count, bool adds) {
  require((from | reinterpret_cast<uintptr_t>(to) | static_cast<unsigned>(4 * count)) % 16 == 0,
          "a copy is not aligned");
  state.puts.push_back({threadIdx.x, to, from, count, adds});
}

// What is only known to be read is done too: nothing can show that it is not there.
void floats_written(bool) {
  wait_until_idle();  // what may overwrite them does it now
  std::erase_if(state.puts, [](const Put& put) {
    if (put.thread != threadIdx.x) return false;
    const auto* const from = reinterpret_cast<const float*>(shared_at(put.from, sizeof(float) * put.count));
    for (int i = 0; i < put.count; ++i) put.to[i] = put.adds ? put.to[i] + from[i] : from[i];
    return true;
  });
}

// Blocks run one after another: what neither an earlier one nor a thread of this one does never happens.
void count_wait(const int* counter, int least) {
  wait_until([=] { return *counter == least; });
}

void set_registers(int count, bool more) {
  require(count % 8 == 0 && count >= 24 && count <= 256, "a count of registers that there is not");
  own_thread().registers = count;
  (void)more;
}

void wgmma_fence() { own_thread().fenced = true; }

void wgmma(const Product& product, float* sums, const uint32_t* words) {
  Warpgroup& group = warpgroup();
  Warpgroup::Thread& thread = own_thread();
  require(thread.fenced, "a product is started without a fence");
  const std::size_t n = thread.started++ - group.done;
  if (group.pending.size() == n) group.pending.push_back({product, 0, {}, {}});
  PendingProduct& pending = group.pending[n];
  require(pending.product.a == product.a && pending.product.b == product.b &&
              pending.product.registers == product.registers && pending.product.columns == product.columns &&
              pending.product.down == product.down,
          "threads of a warpgroup start different products");
  const unsigned own = threadIdx.x % kWarpgroupThreads;
  ++pending.started;
  pending.sums[own] = sums;
  if (words != nullptr) std::copy_n(words, 4, pending.words[own]);
}

void wgmma_commit() { own_thread().groups.push_back(own_thread().started); }

void wgmma_wait(int groups) {
  Warpgroup& group = warpgroup();
  Warpgroup::Thread& thread = own_thread();
  const std::size_t count = thread.groups.size(), kept = static_cast<std::size_t>(groups);
  const std::size_t target = count > kept ? thread.groups[count - 1 - kept] : 0;
  thread.fenced = false;
  require(group.waiting == 0 || group.target == target, "threads of a warpgroup wait for different products");
  group.target = target;
  if (++group.waiting < kWarpgroupThreads) {
    const unsigned waits = group.waits;
    wait_until([&group, waits] { return group.waits != waits; });
    return;
  }
  wait_until_idle();  // what may overwrite their operands does it now
  for (; group.done < target; ++group.done) {
    require(group.pending.front().started == kWarpgroupThreads, "a thread of a warpgroup has not started a product");
    take(group.pending.front());
    group.pending.pop_front();
  }
  group.waiting = 0;
  ++group.waits;
}

}  // namespace cuda_on_host

// --- the driver ---------------------------------------------------------------------------------------------------

namespace {
int tensor_maps = 0;
}
// How many were made, by which tests know that kernels with TMA were taken.
extern "C" int tensor_maps_made() { return tensor_maps; }

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && reinterpret_cast<uintptr_t>(map) % 64 == 0;
  if (!aligned || rank != 4 || sizes[0] % 8 != 0 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 > 128)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(data), {}, {}, {}, kTensorMapMark};
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] < 1 || sizes[d] > uint64_t{1} << 32 || box[d] < 1 || box[d] > 256 || steps[d] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map->sizes[d] = sizes[d];
    map->box[d] = box[d];
  }
  for (int d = 0; d < 3; ++d) {
    if (strides[d] % 16 != 0 || strides[d] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    map->strides[d] = strides[d];
  }
  ++tensor_maps;
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
