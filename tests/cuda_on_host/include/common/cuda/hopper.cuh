// Stands in for csrc/common/cuda/hopper.cuh; hopper.cpp has what these functions do.
//
// Nothing comes earlier than the hardware promises it: copies of TMA take place at once in every other block and when
// their barrier is waited for in the rest, products when they are waited for, from shared memory as it is then.
#pragma once

#include <cuda.h>

#include "common/cuda/memory.cuh"

#define LECT11EXT_HOPPER_CODE 1

namespace cuda_on_host {

uint32_t shared_address(const void* shared);

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, int bytes);
void barrier_wait(uint32_t barrier, int parity);
void named_barrier(int id, int threads, bool waits);
void load_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, const int (&corner)[4]);

void load_bytes(uint32_t to, const void* from, uint32_t barrier, int bytes);
void put_floats(float* to, uint32_t from, int count, bool adds);
void floats_written(bool only_read);
void count_wait(const int* counter, int least);

struct Product {
  bool brain;      // bfloat16
  bool adds;       // to what the sums are
  bool registers;  // a comes from there
  bool down;       // a and b, of shared memory, are summed down their rows
  int columns;     // of the sums
  uint64_t a, b;   // descriptors
};
void wgmma_fence();
void wgmma(const Product& product, float* sums, const uint32_t* words);
void wgmma_commit();
void wgmma_wait(int groups);
void set_registers(int count, bool more);

}  // namespace cuda_on_host

namespace lect11ext::cuda {

inline constexpr int kWarpgroup = 128;

inline uint32_t shared_address(const void* shared) { return cuda_on_host::shared_address(shared); }

inline void barrier_init(uint32_t barrier, int arrivals) { cuda_on_host::barrier_init(barrier, arrivals); }
inline void barrier_init_done() {}
inline void barrier_arrive(uint32_t barrier) { cuda_on_host::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expecting(uint32_t barrier, int bytes) { cuda_on_host::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, int parity) { cuda_on_host::barrier_wait(barrier, parity); }

inline void named_barrier_wait(int id, int threads) { cuda_on_host::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { cuda_on_host::named_barrier(id, threads, false); }

inline void load_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int column, int position, int head,
                     int batch) {
  cuda_on_host::load_box(to, map, barrier, {column, position, head, batch});
}
inline void load_bytes(uint32_t to, const void* from, uint32_t barrier, int bytes) {
  cuda_on_host::load_bytes(to, from, barrier, bytes);
}
inline void store_floats(float* to, uint32_t from, int count) { cuda_on_host::put_floats(to, from, count, false); }
inline void add_floats(float* to, uint32_t from, int count) { cuda_on_host::put_floats(to, from, count, true); }
inline void floats_read() { cuda_on_host::floats_written(true); }
inline void floats_written() { cuda_on_host::floats_written(false); }
inline void shared_is_written() {}
inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_on_host::fail("a row of a matrix is not aligned");
  const auto rows = cuda_on_host::exchange_all(static_cast<uint32_t*>(row));
  const int g = cuda_on_host::lane() / 4, q = cuda_on_host::lane() % 4;
  for (int i = 0; i < 4; ++i) rows[8 * i + g][q] = words[i];
}
inline void prefetch_map(const CUtensorMap&) {}

inline void count_wait(const int* counter, int least) { cuda_on_host::count_wait(counter, least); }
inline void count_up(int* counter) { ++*counter; }

template <int kCount>
inline void give_registers() {
  cuda_on_host::set_registers(kCount, false);
}
template <int kCount>
inline void take_registers() {
  cuda_on_host::set_registers(kCount, true);
}

inline uint64_t matrix_descriptor(uint32_t address, int leading, int stride) {
  return uint64_t{1} << 62 | static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
         (address & 0x3FFFF) >> 4;
}
inline uint64_t moved(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

inline void wgmma_fence() { cuda_on_host::wgmma_fence(); }
inline void wgmma_commit() { cuda_on_host::wgmma_commit(); }
template <int kGroups>
inline void wgmma_wait() {
  cuda_on_host::wgmma_wait(kGroups);
}

template <int kPinned = 0, class T, int kParts>
inline void pin(T (&)[kParts][4]) {}
inline int unknown(int x) { return x; }

template <class S, int kColumns, bool kAdd, bool kDown = false>
inline void wgmma_of_shared(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b) {
  cuda_on_host::wgmma({std::is_same_v<S, __nv_bfloat16>, kAdd, false, kDown, kColumns, a, b}, &sums[0][0], nullptr);
}
template <class S, int kColumns>
inline void wgmma_of_registers(float (&sums)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  cuda_on_host::wgmma({std::is_same_v<S, __nv_bfloat16>, true, true, false, kColumns, 0, b}, &sums[0][0], a);
}

template <class S>
inline uint32_t round_pair(float low, float high) {
  const S pair[2] = {to_storage<S>(low), to_storage<S>(high)};
  uint32_t word;
  std::memcpy(&word, pair, sizeof(word));
  return word;
}

}  // namespace lect11ext::cuda
