// A layer's weights in the order in which its kernels read them.
#pragma once

#include "common/cuda/launch.h"
#include "recurrent/cuda/layer_product.cuh"

namespace lect11ext::cuda {

// Lays out weight_hh as pieces of 16 bytes, [tiles, chunks, kColumns, 8, 4]. Forward, column j of a tile holds gate j's
// rows of its units; backward, where kColumns is one, it holds the units' columns of all gates, one gate after another.
template <class S, bool kTensorCores, bool kBackward>
__global__ void pack_kernel(const __grid_constant__ LayerCommon args, int64_t gates, uint4* panels, int64_t pieces) {
  constexpr int kElements = kVector<S>;
  const int64_t H = args.hidden, depth = cuda_depth(H, sizeof(S)), columns = kBackward ? 1 : gates;
  const int64_t chunks = depth * (kBackward ? gates : 1) * static_cast<int64_t>(sizeof(S)) / kCudaChunkBytes;
  const S* weight = static_cast<const S*>(args.weight_hh);
  for (int64_t i = int64_t{blockIdx.x} * kLayerThreads + threadIdx.x; i < pieces;
       i += int64_t{gridDim.x} * kLayerThreads) {
    const int64_t unit = i / (columns * chunks * kPieces) * kTile + i % kPieces / kQuarters;
    const int64_t column = i / kPieces % columns, chunk = i / (columns * kPieces) % chunks;
    const int64_t k = (chunk * kQuarters + i % kQuarters) * kElements;
    Pack<S, kElements> piece = Pack<S, kElements>::zero();
    for (int e = 0; e < kElements; ++e) {
      const int64_t along = (k + e) % depth, gate = kBackward ? (k + e) / depth : column;
      if (unit >= H || along >= H) continue;
      const int64_t row = gate * H + (kBackward ? along : unit), at = kBackward ? unit : along;
      piece.data[e] = weight[row * args.weight_hh_stride + at];
    }
    uint4 words;
    memcpy(&words, &piece, sizeof(words));
    panels[i] = WarpProduct<S, kTensorCores, 1>::rounded(words);
  }
}

template <class S, bool kTensorCores, bool kBackward>
void pack_weights(const LayerCommon& args, int64_t gates, void* panels, void* stream) {
  const int64_t depth = cuda_depth(args.hidden, sizeof(S));
  const int64_t pieces = cuda_tiles(args.hidden) * kTile * gates * depth / kVector<S>;
  launch(pack_kernel<S, kTensorCores, kBackward>, grid_stride_blocks(pieces, kLayerThreads), dim3(kLayerThreads), 0,
         stream, args, gates, static_cast<uint4*>(panels), pieces);
}

}  // namespace lect11ext::cuda
