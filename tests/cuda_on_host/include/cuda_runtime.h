// A stand-in for CUDA's header, with which a C++ compiler builds the .cu files as they are and runs them on the host.
// Threads of a block are fibers of one thread of the system, which change places at barriers only; blocks run one after
// another, or, in a cooperative grid, each on a system thread of its own. It checks what kernels compute and where they
// write; nothing of their speed, and races only as far as a fixed order of threads shows them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// A block never leaves its system thread, so that block-scope storage of the thread is the block's.
#define __shared__ thread_local

// --- types --------------------------------------------------------------------------------------------------------

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

// --- fibers -------------------------------------------------------------------------------------------------------

namespace cuda_on_host {

enum class Barrier { None, Warp, Block, Grid, Condition, Idle, Sleep };

// Lets the others run until all that take part in the barrier have come to it; `mask` is that of a Warp barrier.
void wait(Barrier barrier, unsigned mask = 0);

// 16 bytes for each lane of the current warp, and the current lane.
using Slot = std::array<unsigned char, 16>;
Slot* warp_slots();
// 64 bytes for each lane, and other ones at every second call of a lane.
struct alignas(16) WideSlot {
  unsigned char bytes[64];
};
WideSlot* wide_slots();
int lane();
[[noreturn]] void fail(const char* what);
// Whether an address is in the block's dynamic shared memory, which instructions for global memory do not reach.
bool is_shared(const void* address);
template <class T>
T* global(T* address) {
  if (is_shared(address)) fail("an access to global memory goes to shared memory");
  return address;
}

// Blocks run one after another, but for groups of `together` neighbours, where that is not 0.
void run(const std::function<void()>& thread, dim3 grid, dim3 block, std::size_t together);
// Whether a block has written closely behind its dynamic shared memory since this was last asked.
bool take_wrote_beyond();

// Every lane of `mask` gives a value and sees those of all.
template <class T>
std::array<T, warpSize> exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(Slot));
  if ((mask >> lane() & 1) == 0) fail("a lane calls a warp function whose mask does not name it");
  std::memcpy(warp_slots()[lane()].data(), &value, sizeof(T));
  wait(Barrier::Warp, mask);
  std::array<T, warpSize> values;
  for (int i = 0; i < warpSize; ++i) std::memcpy(&values[i], warp_slots()[i].data(), sizeof(T));
  wait(Barrier::Warp, mask);
  return values;
}

// The same for whole warps, larger values, and in half the time: values[lane] stays until the next call but one.
template <class T>
struct Values {
  const WideSlot* slots;
  const T& operator[](int lane) const { return *reinterpret_cast<const T*>(slots[lane].bytes); }
};

template <class T>
Values<T> exchange_all(const T& value) {
  static_assert(sizeof(T) <= sizeof(WideSlot) && std::is_trivially_copyable_v<T>);
  WideSlot* const slots = wide_slots();
  std::memcpy(slots[lane()].bytes, &value, sizeof(T));
  wait(Barrier::Warp, ~0u);
  return {slots};
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  const auto values = exchange(mask, value);
  if ((mask >> source & 1) == 0) fail("a lane reads from a lane that is not in the mask");
  return values[source];
}

}  // namespace cuda_on_host

// --- device functions ---------------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Barrier::Block); }
inline int __syncthreads_count(int predicate) {
  static thread_local int count;
  __syncthreads();  // the count before has been read
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  count += predicate != 0;
  __syncthreads();
  return count;
}
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_host::wait(cuda_on_host::Barrier::Warp, mask); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int lane = cuda_on_host::lane();
  return cuda_on_host::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int lane = cuda_on_host::lane(), source = lane ^ lanes;
  return cuda_on_host::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
  const int lane = cuda_on_host::lane(), source = lane + static_cast<int>(distance);
  return cuda_on_host::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
  const int lane = cuda_on_host::lane(), source = lane - static_cast<int>(distance);
  return cuda_on_host::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto values = cuda_on_host::exchange(mask, predicate);
  unsigned ballot = 0;
  for (int i = 0; i < warpSize; ++i) ballot |= static_cast<unsigned>((mask >> i & 1) != 0 && values[i] != 0) << i;
  return ballot;
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T atomicAdd(T* at, T value) { return std::atomic_ref<T>(*at).fetch_add(value); }
template <class T>
T atomicExch(T* at, T value) { return std::atomic_ref<T>(*at).exchange(value); }
template <class T>
T atomicCAS(T* at, T expected, T value) {
  std::atomic_ref<T>(*at).compare_exchange_strong(expected, value);
  return expected;
}

template <class T>
T __ldg(const T* at) { return *cuda_on_host::global(at); }
template <class T>
T __ldcg(const T* at) { return *cuda_on_host::global(at); }
void __nanosleep(unsigned);
template <class T>
void __stwb(T* at, T value) { *cuda_on_host::global(at) = value; }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
// The greater of each half.
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xFFFFu, b & 0xFFFFu);
}
inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }

inline void sincospi(double x, double* sine, double* cosine) {
  const double half_turns = std::remainder(x, 2.0);  // exact: no digit of x is lost to a product with π
  *sine = std::sin(half_turns * 3.14159265358979323846);
  *cosine = std::cos(half_turns * 3.14159265358979323846);
}
inline void sincospif(float x, float* sine, float* cosine) {
  double wide_sine, wide_cosine;
  sincospi(x, &wide_sine, &wide_cosine);
  *sine = static_cast<float>(wide_sine);
  *cosine = static_cast<float>(wide_cosine);
}

// --- the runtime's functions --------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorIllegalAddress = 700 };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8
};

namespace cuda_on_host {
// One multiprocessor: what a library does only for large problems begins at a small size here. Tests set others.
inline constexpr unsigned kMostShared = 227 * 1024;
inline int multiprocessors = 1, most_shared = kMostShared, compute_major = 8;
inline thread_local cudaError_t last_error = cudaSuccess;
// What the latest launch asked for: shared memory, and blocks that run together.
inline std::size_t shared_bytes = 0, blocks_together = 0;

template <class... Params, std::size_t... I>
void call(void (*kernel)(Params...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<Params*>(args[I])...);
}

template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, void** args, std::size_t shared,
                   std::size_t together) {
  constexpr unsigned kMaxThreads = 1024, kMaxGridX = 0x7FFFFFFF, kMaxGridYZ = 65535;
  const auto outside = [](std::size_t n, unsigned most) { return n == 0 || n > most; };
  if (outside(std::size_t{block.x} * block.y * block.z, kMaxThreads) || outside(grid.x, kMaxGridX) ||
      outside(grid.y, kMaxGridYZ) || outside(grid.z, kMaxGridYZ) || shared > kMostShared) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  shared_bytes = shared;
  blocks_together = together;
  run([&] { call(kernel, args, std::index_sequence_for<Params...>()); }, grid, block, together);
  return take_wrote_beyond() ? last_error = cudaErrorIllegalAddress : cudaSuccess;
}
}  // namespace cuda_on_host

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaErrorIllegalAddress) return "cudaErrorIllegalAddress";
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorIllegalAddress) return "written beyond the dynamic shared memory";
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_host::multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = cuda_on_host::compute_major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_on_host::most_shared; break;
  }
  return cudaSuccess;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
inline constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) { return cudaSuccess; }

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {0};
  return cudaSuccess;
}

template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** args, std::size_t shared = 0,
                             cudaStream_t = nullptr) {
  return cuda_on_host::launch(kernel, grid, block, args, shared, 0);
}

template <class... Params>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** args,
                                        std::size_t shared = 0, cudaStream_t = nullptr) {
  return cuda_on_host::launch(kernel, grid, block, args, shared, std::size_t{grid.x} * grid.y * grid.z);
}
