#include "autoencoder/hashing.h"

#include "common/cuda/launch.h"
#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Of a grid-stride loop.
__device__ inline int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t stride_of_items() { return static_cast<int64_t>(gridDim.x) * kThreads; }

template <class T>
__global__ void __launch_bounds__(kThreads) binarize_kernel(Binarize args) {
  const T threshold = static_cast<T>(args.threshold);
  for (int64_t i = first_item(); i < args.shape.numel; i += stride_of_items()) {
    const T x = read<T>(args.input.data, args.input.dtype, locate(args.shape, args.input, i).offset);
    const T bit = x > threshold ? T(1) : T(0);
    write<T>(args.out, args.input.dtype, i, x == x ? bit : x);
  }
}

// A warp reads 32 neighbours of a row and its first lanes write the bytes. Lanes read the elements of a byte in reverse
// order, which puts the first of them in the byte's most significant bit.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackBits args) {
  const T threshold = static_cast<T>(args.threshold);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t words = (args.columns + kWarp - 1) / kWarp, bytes = args.bytes();
  for (int64_t i = first_item(); i < args.rows * words * kWarp; i += stride_of_items()) {
    const int64_t row = divide(i / kWarp, words), word = i / kWarp - row * words;
    const int64_t column = word * kWarp + (lane ^ 7);
    bool bit = false;
    if (column < args.columns) {
      const int64_t element = row * args.columns + column;
      bit = args.input.data == nullptr ? args.bits[element] != 0
                                       : read<T>(args.input.data, args.input.dtype,
                                                 locate(args.shape, args.input, element).offset) > threshold;
    }
    const unsigned bits = __ballot_sync(~0u, bit);
    const int64_t byte = word * (kWarp / 8) + lane;
    if (lane < kWarp / 8 && byte < bytes) args.codes[row * bytes + byte] = static_cast<uint8_t>(bits >> 8 * lane);
  }
}

template <class Bits>
__global__ void __launch_bounds__(kThreads) unpack_kernel(UnpackBits args) {
  Bits* out = static_cast<Bits*>(args.out);
  for (int64_t i = first_item(); i < args.rows * args.columns; i += stride_of_items()) {
    const int64_t row = divide(i, args.columns);
    const int64_t column = i - row * args.columns;
    const bool bit = (args.codes[row * args.bytes + column / 8] >> (7 - static_cast<int>(column % 8)) & 1) != 0;
    out[i] = bit ? static_cast<Bits>(args.one) : Bits(0);
  }
}

}  // namespace

void binarize(const Binarize& args, void* stream) {
  if (args.shape.numel == 0) return;
  const auto kernel = args.input.dtype == DType::Double ? binarize_kernel<double> : binarize_kernel<float>;
  launch(kernel, grid_stride_blocks(args.shape.numel, kThreads), kThreads, 0, stream, args);
}

void pack_bits(const PackBits& args, void* stream) {
  const int64_t items = args.rows * ((args.columns + kWarp - 1) / kWarp) * kWarp;
  if (items == 0) return;
  const bool wide = args.input.data != nullptr && args.input.dtype == DType::Double;
  launch(wide ? pack_kernel<double> : pack_kernel<float>, grid_stride_blocks(items, kThreads), kThreads, 0, stream,
         args);
}

void unpack_bits(const UnpackBits& args, void* stream) {
  const int64_t items = args.rows * args.columns;
  if (items == 0) return;
  const auto kernel = args.item_size == 1   ? unpack_kernel<uint8_t>
                      : args.item_size == 2 ? unpack_kernel<uint16_t>
                      : args.item_size == 4 ? unpack_kernel<uint32_t>
                                            : unpack_kernel<uint64_t>;
  launch(kernel, grid_stride_blocks(items, kThreads), kThreads, 0, stream, args);
}

}  // namespace lect11ext::cuda
