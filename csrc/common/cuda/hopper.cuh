// What kernels of sm_90a ask of the hardware by inline PTX: copies of whole tiles by the tensor memory accelerator
// (TMA), barriers in shared memory that count its bytes, products of a warpgroup (wgmma), and registers that warps hand
// to one another. Source: the PTX ISA. The tests' host build has a stand-in for this header.
//
// Shared memory is named by 32-bit addresses here, as these instructions want it.
#pragma once

#include <cuda.h>

#include "common/cuda/memory.cuh"

// Whether the code of a kernel is wanted: other architectures get empty kernels, which are never launched.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LECT11EXT_HOPPER_CODE 1
#else
#define LECT11EXT_HOPPER_CODE 0
#endif

namespace lect11ext::cuda {

inline constexpr int kWarpgroup = 128;  // threads

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- barriers in shared memory ------------------------------------------------------------------------------------

// Eight bytes each. A phase ends when `arrivals` have come, and all bytes that were announced; then the next begins.
__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to TMA; threads need __syncthreads besides.
__device__ inline void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes.
__device__ inline void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the latest phase of that parity: of the first (0), the second (1), the third (0) and so on.
// Before the first has ended, one of parity 1 counts as ended.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// --- named barriers -----------------------------------------------------------------------------------------------

// Barrier `id` (1 to 15; 0 is that of __syncthreads) opens when `threads` have come, by the one function or the other.
__device__ inline void named_barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- TMA ----------------------------------------------------------------------------------------------------------

// Copies the box of a [batch, head, position, column] tensor that begins there, zero where it leaves the tensor, and
// tells the barrier its bytes. One thread starts it.
__device__ inline void load_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int column, int position,
                                int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(position), "r"(head), "r"(batch)
      : "memory");
}

// Copies bytes that lie one behind the other, sixteen or a multiple, and tells the barrier.
__device__ inline void load_bytes(uint32_t to, const void* from, uint32_t barrier, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

// The other way: floats of shared memory are put into memory, or added to what is there, each by itself.
__device__ inline void store_floats(float* to, uint32_t from, int count) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
               "r"(from), "r"(4 * count)
               : "memory");
}
__device__ inline void add_floats(float* to, uint32_t from, int count) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
      "r"(from), "r"(4 * count)
      : "memory");
}

// Waits until what this thread has stored and added is read from shared memory, or is in memory.
__device__ inline void floats_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void floats_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four matrices of 8 × 8 elements of 16 bits to shared memory, as load_matrices reads them: lane l gives the address of
// row l % 8 of matrix l / 8, and has of matrix i in word i the elements [l / 4][2 · (l % 4)] and the next.
__device__ inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// What this thread has written to shared memory comes before what TMA and products read there after a barrier.
__device__ inline void shared_is_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// --- turns of blocks ----------------------------------------------------------------------------------------------

// Waits until a counter has come that far. What others had TMA write before they counted is there for TMA to add to.
__device__ inline void count_wait(const int* counter, int least) {
  int count = 0;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  } while (count < least);
  asm volatile("fence.proxy.async;" ::: "memory");
}

// After floats_written.
__device__ inline void count_up(int* counter) {
  asm volatile("fence.proxy.async;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// --- registers ----------------------------------------------------------------------------------------------------

// All warps of a warpgroup call one of them: from now on its threads have kCount registers, a multiple of eight from 24
// to 256. Who takes waits until others have given; a kernel needs __launch_bounds__ with both numbers.
template <int kCount>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- products -----------------------------------------------------------------------------------------------------

// A matrix of 16-bit elements in shared memory, in rows of 128 bytes whose pieces of 16 bytes are permuted: piece c of
// row r lies at place c ^ (r % 8), as TMA writes it; a tile begins at a multiple of 1024 bytes. What the two offsets
// mean depends on which way the sum goes. Along the rows (K-major): `stride` bytes from eight rows to the next eight,
// `leading` unused. Down the rows (MN-major): `stride` bytes from eight rows to the next eight, and `leading` from 64
// columns to the next 64.
__device__ inline uint64_t matrix_descriptor(uint32_t address, int leading, int stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
         (address & 0x3FFFF) >> 4;
}

// The same matrix so many bytes further on: an addition, where making it anew would take five instructions.
__device__ inline uint64_t moved(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Registers that products read or write must not be touched from wgmma_fence on; the sums are there after wgmma_wait.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the latest kGroups.
template <int kGroups>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The compiler takes sums for known as soon as a product is started. This says that they change here: after a wait, so
// that nothing that reads them is moved before it; and before a fence, so that what writes them is not moved behind it.
// kPinned: only so many of them, the first; 0 for all.
template <int kPinned = 0, int kTiles>
__device__ inline void pin(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < (kPinned == 0 ? kTiles : kPinned); ++i) {
    asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])::"memory");
  }
}

template <int kParts>
__device__ inline void pin(uint32_t (&words)[kParts][4]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    asm volatile("" : "+r"(words[i][0]), "+r"(words[i][1]), "+r"(words[i][2]), "+r"(words[i][3])::"memory");
  }
}

// A number that the compiler does not know to be `x`: what follows from it is computed where it is used, and not once
// and kept, in registers or spilled.
__device__ inline int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// clang-format off
#define LECT11EXT_SUMS_4(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define LECT11EXT_SUMS_16(i) LECT11EXT_SUMS_4(i), LECT11EXT_SUMS_4(i + 1), LECT11EXT_SUMS_4(i + 2), LECT11EXT_SUMS_4(i + 3)
#define LECT11EXT_SUMS_64 LECT11EXT_SUMS_16(0), LECT11EXT_SUMS_16(4)
#define LECT11EXT_SUMS_128 LECT11EXT_SUMS_64, LECT11EXT_SUMS_16(8), LECT11EXT_SUMS_16(12)
#define LECT11EXT_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LECT11EXT_NAMES_128 LECT11EXT_NAMES_64 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// `n` columns of sums, elements of `type`; `last`: names of what follows the sums.
#define LECT11EXT_WGMMA(n, type, last) \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" LECT11EXT_NAMES_##n "}, " last ";\n}"
// clang-format on

// sums (+)= a · bᵀ for 64 rows of a, kColumns of b and sixteen columns of both, of which matrices lie in shared memory
// (K-major). Lane l of warp w of the warpgroup has of the sums what mma has of its 16 × 8, tile by tile: rows
// 16w + l / 4 and 8 more, columns 8t + 2 · (l % 4) and 1 more. kAdd: else the sums begin here.
// kDown: sums (+)= aᵀ · b, summed down sixteen rows of both, which are MN-major; a has 64 columns.
template <class S, int kColumns, bool kAdd, bool kDown = false>
__device__ inline void wgmma_of_shared(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b) {
#define LECT11EXT_PRODUCT(n, type, matrix_a, matrix_b, added, down)                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " added ", 0;\n" LECT11EXT_WGMMA(                  \
                   n, type, matrix_a ", " matrix_b ", add, 1, 1, " down ", " down)                      \
               : LECT11EXT_SUMS_##n                                                                     \
               : "l"(a), "l"(b), "n"(static_cast<int>(kAdd)), "n"(static_cast<int>(kDown)))
  static_assert(kColumns == 64 || kColumns == 128);
  constexpr bool kBrain = std::is_same_v<S, __nv_bfloat16>;
  if constexpr (kColumns == 64 && kBrain) LECT11EXT_PRODUCT(64, "bf16", "%32", "%33", "%34", "%35");
  else if constexpr (kColumns == 64) LECT11EXT_PRODUCT(64, "f16", "%32", "%33", "%34", "%35");
  else if constexpr (kBrain) LECT11EXT_PRODUCT(128, "bf16", "%64", "%65", "%66", "%67");
  else LECT11EXT_PRODUCT(128, "f16", "%64", "%65", "%66", "%67");
#undef LECT11EXT_PRODUCT
}

// sums += a · b for 64 rows of a and sixteen of b (MN-major). A warp's part of a is that of mma.
template <class S, int kColumns>
__device__ inline void wgmma_of_registers(float (&sums)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
#define LECT11EXT_PRODUCT(n, type, matrix_a, matrix_b)                                                       \
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n" LECT11EXT_WGMMA(n, type, "{" matrix_a          \
                                                                                  "}, " matrix_b             \
                                                                                  ", add, 1, 1, 1")          \
               : LECT11EXT_SUMS_##n                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  static_assert(kColumns == 64 || kColumns == 128);
  constexpr bool kBrain = std::is_same_v<S, __nv_bfloat16>;
  if constexpr (kColumns == 64 && kBrain) LECT11EXT_PRODUCT(64, "bf16", "%32, %33, %34, %35", "%36");
  else if constexpr (kColumns == 64) LECT11EXT_PRODUCT(64, "f16", "%32, %33, %34, %35", "%36");
  else if constexpr (kBrain) LECT11EXT_PRODUCT(128, "bf16", "%64, %65, %66, %67", "%68");
  else LECT11EXT_PRODUCT(128, "f16", "%64, %65, %66, %67", "%68");
#undef LECT11EXT_PRODUCT
}

// Two numbers as a word of 16-bit elements, by one instruction.
template <class S>
__device__ inline uint32_t round_pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<S, __nv_bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace lect11ext::cuda
