#include "common/cuda/tensor_map.h"

#include "common/cuda/launch.h"

namespace lect11ext::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  constexpr unsigned kSinceVersion = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSinceVersion, cudaEnableDefault, &result);
  if (status != cudaSuccess) cudaGetLastError();
  const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return found ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

bool make_tensor_map(CUtensorMap& map, const MappedTensor& tensor, int rows) {
  static const Encode encode = find_encode();
  constexpr int64_t kElement = 2, kPiece = 16, kMostSize = int64_t{1} << 32, kMostStride = int64_t{1} << 40;
  if (encode == nullptr || reinterpret_cast<uintptr_t>(tensor.data) % kPiece != 0) return false;
  // The driver counts dimensions from the innermost on.
  cuuint64_t sizes[4], strides[3];
  for (int d = 0; d < 4; ++d) {
    if (tensor.sizes[3 - d] < 1 || tensor.sizes[3 - d] > kMostSize) return false;
    sizes[d] = static_cast<cuuint64_t>(tensor.sizes[3 - d]);
  }
  for (int d = 0; d < 3; ++d) {
    // Nothing is ever reached by the stride of a single element, but it is checked like others.
    const int64_t bytes = tensor.sizes[2 - d] == 1 ? kPiece : tensor.strides[2 - d] * kElement;
    if (bytes <= 0 || bytes % kPiece != 0 || bytes >= kMostStride) return false;
    strides[d] = static_cast<cuuint64_t>(bytes);
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      tensor.dtype == DType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(&map, type, 4, const_cast<void*>(tensor.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace lect11ext::cuda
