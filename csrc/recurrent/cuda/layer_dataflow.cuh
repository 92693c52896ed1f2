// Layers without a barrier: what the blocks of a team need of one another's last step they read where it is written
// anyway, in the output (backward: in the gradients of the sums), and a number that is not there yet is seen in itself.
// The tensor is filled beforehand with words that no arithmetic gives, and a warp reads its part of the product again
// until none of these is left. From one step to the next there is one write and one read of the L2 cache, where a
// counter takes a write, a count, a look at it and a read.
//
// Numbers of 16 bits are written one by one and read by eights: a word of which one half has come is absent by the
// other.
//
// For the plain case (is_plain below), in which a thread's units are always the same: their states stay in registers,
// as do the weights, and what a step reads besides is asked for a step ahead. All else: layer_team.cuh.
#pragma once

#include <bit>
#include <cstdlib>
#include <type_traits>

#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "recurrent/cuda/layer_plan.cuh"

namespace lect11ext::cuda {

// --- words that are not there yet -----------------------------------------------------------------------------------

// All ones: a NaN that no arithmetic and no rounding gives.
inline constexpr uint32_t kAbsent = ~0u;

// Of two words the one that says whether either is absent: the greater, in halves for types of 16 bits.
template <class S>
__device__ inline uint32_t newest(uint32_t a, uint32_t b) {
  if constexpr (sizeof(S) == 4) return a > b ? a : b;
  else return __vmaxu2(a, b);
}
template <class S>
__device__ inline bool is_there(uint32_t newest) {
  if constexpr (sizeof(S) == 4) return newest != kAbsent;
  else return (newest & 0xFFFF) != 0xFFFF && newest >> 16 != 0xFFFF;
}

// What another block may be writing.
__device__ inline uint4 read_shared_with_others(const void* from) {
  uint4 words;
#if defined(__CUDA_ARCH__)
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
#else
  const volatile uint32_t* const word = static_cast<const volatile uint32_t*>(from);
  words = {word[0], word[1], word[2], word[3]};
#endif
  return words;
}

template <class S>
__device__ inline void write_for_others(S* to, S value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) == 4) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(__float_as_uint(value)) : "memory");
  } else {
    uint16_t bits;
    memcpy(&bits, &value, sizeof(bits));
    asm volatile("st.relaxed.gpu.global.b16 [%0], %1;" ::"l"(to), "h"(bits) : "memory");
  }
#else
  std::conditional_t<sizeof(S) == 4, uint32_t, uint16_t> bits;
  memcpy(&bits, &value, sizeof(bits));
  *reinterpret_cast<volatile decltype(bits)*>(to) = bits;
#endif
}

// Fills rows of `width` pieces of 16 bytes, over time.
template <class S>
__global__ void absent_kernel(S* tensor, TimeStrides strides, int64_t batch, int64_t width, int64_t pieces) {
  for (int64_t i = int64_t{blockIdx.x} * kLayerThreads + threadIdx.x; i < pieces;
       i += int64_t{gridDim.x} * kLayerThreads) {
    const int64_t row = divide(i, width), t = divide(row, batch);
    S* const first = tensor + t * strides.step + (row - t * batch) * strides.row;
    reinterpret_cast<uint4*>(first)[i - row * width] = uint4{kAbsent, kAbsent, kAbsent, kAbsent};
  }
}

// --- who does what ------------------------------------------------------------------------------------------------

// A block has a team's rows of `tiles` tiles of hidden units.
struct DataflowPlan {
  int64_t teams, members;
  int tiles;       // of a block: 1 or 2
  int per_warp;    // chunks of the depth, of each part, that a warp multiplies: a power of two
  int row_groups;  // of 16 rows
  int64_t batch;   // of all parts of it
  int turns;       // of the warps' sums: 2 where there is room for those of the step before beside a step's
  size_t shared_bytes;
};

inline constexpr int kGroupRows = 16, kDataflowItems = 2;  // units of rows of a thread

// Registers of a thread for weights; what is beyond is in shared memory. The addresses of eight chunks take their room.
constexpr int held_weights(int per_warp) { return per_warp == 8 ? 96 : 128; }

// Sums of the warps.
__host__ __device__ inline int dataflow_sums(const DataflowPlan& plan, int columns) {
  return plan.turns * plan.row_groups * kLayerWarps * kGroupRows * sum_stride(columns * plan.tiles);
}

// Environment variables for measuring and for trouble, read at every call: LECT11EXT_LAYER_DATAFLOW=0 leaves all layers
// to layer_team.cuh, LECT11EXT_LAYER_TILES (1 or 2) sets the tiles of a block.
inline int64_t layer_wish(const char* variable, int64_t otherwise) {
  const char* const wish = std::getenv(variable);
  return wish == nullptr || *wish == '\0' ? otherwise : std::strtol(wish, nullptr, 10);
}

// For `batch` rows; `parts` of the depth of what is multiplied, `columns` of a tile's product. No tiles: not for this
// way.
inline DataflowPlan plan_dataflow(int64_t hidden, int64_t batch, int element, int parts, int columns) {
  constexpr int kMostChunks = 8;  // of a part, for which there are builds
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const auto room = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const int64_t tiles = cuda_tiles(hidden), chunks = cuda_depth(hidden, element) * element / kCudaChunkBytes;
  const int64_t share = (chunks + kLayerWarps - 1) / kLayerWarps;
  if (share > kMostChunks) return {};
  const auto plan_of = [&](int own) {
    DataflowPlan plan{};
    plan.tiles = own;
    plan.members = (tiles + own - 1) / own;
    if (plan.members > multiprocessors) return DataflowPlan{};
    plan.teams = std::clamp<int64_t>((batch + kGroupRows - 1) / kGroupRows, 1, multiprocessors / plan.members);
    const int64_t rows = (batch + plan.teams - 1) / plan.teams;
    plan.row_groups = static_cast<int>((rows + kGroupRows - 1) / kGroupRows);
    if (plan.row_groups * kGroupRows * own * kTile > kDataflowItems * kLayerThreads) return DataflowPlan{};
    plan.per_warp = std::bit_ceil(static_cast<unsigned>(share));
    const int weights = plan.per_warp * parts * columns * own * 4;
    const int kept = std::max(0, weights - held_weights(plan.per_warp)) * kLayerThreads;
    for (plan.turns = 2; plan.turns > 0; --plan.turns) {
      plan.shared_bytes = (dataflow_sums(plan, columns) + size_t(kept)) * sizeof(float);
      if (plan.shared_bytes <= room) return plan;
    }
    return DataflowPlan{};
  };
  // Two tiles halve the blocks that read a row, and double what each does with it: worth it, by the H100 and the H200,
  // where many read it, and where weights and few rows leave the registers to ask for all of a row at a time.
  constexpr int64_t kManyReaders = 32, kFewRows = 8;
  const bool two = tiles >= kManyReaders && (batch >= kFewRows || share < 3);
  const int wish = static_cast<int>(layer_wish("LECT11EXT_LAYER_TILES", two ? 2 : 1));
  const DataflowPlan plan = plan_of(wish == 2 ? 2 : 1);
  return plan.tiles != 0 ? plan : plan_of(wish == 2 ? 1 : 2);
}

inline bool is_plain(const LayerCommon& args, bool tensor_cores, int element) {
  const auto in_pieces = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % kVectorBytes == 0; };
  return layer_wish("LECT11EXT_LAYER_DATAFLOW", 1) != 0 && args.cell != LayerCell::GruResetFirst && tensor_cores &&
         args.steps > 0 && args.dtype != DType::Double && !args.sigmoid_candidate && args.peephole == nullptr &&
         args.norm == nullptr && args.hidden_mask == nullptr && args.lengths == nullptr && args.reset == nullptr &&
         !args.zoneout_h.acts() && !args.zoneout_c.acts() && args.hidden * element % kVectorBytes == 0 &&
         in_pieces(args.h);
}

// Whether rows over time begin at multiples of 16 bytes.
template <class S>
bool rows_are_aligned(const void* tensor, TimeStrides strides) {
  return is_aligned<S, kVector<S>>(tensor) && (strides.step | strides.row) % kVector<S> == 0;
}

// Fills rows of `width` elements.
template <class S>
void make_absent(const LayerCommon& args, void* tensor, TimeStrides strides, int64_t width, void* stream) {
  const int64_t row_pieces = width / kVector<S>, pieces = args.steps * args.batch * row_pieces;
  launch(absent_kernel<S>, grid_stride_blocks(pieces, kLayerThreads), dim3(kLayerThreads), 0, stream,
         static_cast<S*>(tensor), strides, args.batch, row_pieces, pieces);
}

// --- a block ------------------------------------------------------------------------------------------------------

// Products of kParts parts of the depth with kColumns columns of each of kTiles tiles, of which a warp multiplies every
// eighth chunk, kPer of each part.
template <class S, int kParts, int kColumns, int kTiles, int kPer>
class DataflowBlock {
 public:
  // Of what this thread works at, number i: of one unit, in several rows.
  struct Item {
    int b, unit;
    bool exists;
  };

  __device__ DataflowBlock(const LayerCommon& args, const DataflowPlan& plan, const void* panels, float* shared)
      : hidden_(static_cast<int>(args.hidden)),
        row_groups_(plan.row_groups),
        turns_(plan.turns),
        sums_(shared),
        kept_(reinterpret_cast<uint4*>(shared + dataflow_sums(plan, kColumns)) + threadIdx.x) {
    const int64_t team = blockIdx.x / plan.members, member = blockIdx.x % plan.members;
    first_row_ = static_cast<int>(args.batch * team / plan.teams);
    rows_ = static_cast<int>(args.batch * (team + 1) / plan.teams - first_row_);
    first_unit_ = static_cast<int>(member) * kTiles * kTile;
    const Lane lane;
    const int chunks = static_cast<int>(cuda_depth(hidden_, sizeof(S))) / kChunk;
    const uint4* const from = static_cast<const uint4*>(panels);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int part = i / kPer, chunk = lane.warp + i % kPer * kLayerWarps;
#pragma unroll
      for (int column = 0; column < kTiles * kColumns; ++column) {
        const int64_t tile = member * kTiles + column / kColumns;
        const int64_t at = (tile * kParts * chunks + part * chunks + chunk) * kColumns + column % kColumns;
        const bool exists = chunk < chunks && tile * kTile < hidden_;
        const uint4 weights = exists ? from[at * kPieces + lane.lane] : uint4{0, 0, 0, 0};
        if (i < kHeld) held_[i][column] = weights;
        else kept_[((i - kHeld) * kTiles * kColumns + column) * kLayerThreads] = weights;
      }
    }
  }

  __device__ Item item(int i) const {
    const int n = threadIdx.x + i * kLayerThreads, row = n / (kTiles * kTile);
    const int unit = first_unit_ + n % (kTiles * kTile);
    return {first_row_ + row, unit, row < rows_ && unit < hidden_};
  }

  // The step's product; `of`, rows of kParts · hidden elements, begins with the batch's first. kChecked: they may not
  // be there yet. Afterwards `sum` gives it.
  template <bool kChecked>
  __device__ void multiply(const S* of, int64_t stride) {
    const Lane lane;
    __syncwarp();                      // lanes may have come apart over their units
    if (turns_ == 1) __syncthreads();  // slower threads may be reading the sums of the step before
    else turn_ ^= 1;
    for (int group = 0; group < row_groups_; ++group) {
      const int rows = rows_ - group * kGroupRows;
      const S* const first = of + (first_row_ + group * kGroupRows + lane.g) * stride + lane.q * kVector<S>;
      WarpProduct<S, true, kTiles * kColumns> product;
#pragma unroll
      for (int begin = 0; begin < kChunks; begin += kAhead) {
        typename WarpProduct<S, true, kTiles * kColumns>::Operand ahead[kAhead];
        read<kChecked>(ahead, begin, first, stride, rows - lane.g);
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int i = begin + j;
          if (i < kHeld) product.multiply(ahead[j], [&](int t) { return held_[i][t]; }, kGroupRows);
          else if (i < kChunks) product.multiply(ahead[j], [&](int t) { return kept(i, t); }, kGroupRows);
        }
      }
      product.store(sums_of(group, lane.warp), lane, kGroupRows);
    }
    __syncthreads();
  }

  static_assert(kLayerThreads % (kTiles * kTile) == 0);

  // Of item i, in the order of the warps.
  __device__ void sum(int i, float (&sums)[kColumns]) const {
    const int n = threadIdx.x + i * kLayerThreads, row = n / (kTiles * kTile), unit = n % (kTiles * kTile);
    const float* from =
        sums_of(row / kGroupRows, 0) + row % kGroupRows * kStride + unit / kTile * kColumns * kTile + unit % kTile;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kLayerWarps; ++warp) sum += from[warp * kGroupRows * kStride + column * kTile];
      sums[column] = sum;
    }
  }

 private:
  static constexpr int kChunk = static_cast<int>(kCudaChunkBytes / sizeof(S)), kChunks = kParts * kPer;
  static constexpr int kHeld = std::min(kChunks, held_weights(kPer) / (kTiles * kColumns * 4));
  static constexpr int kStride = sum_stride(kTiles * kColumns);
  // Chunks on their way at a time: as many as the registers hold beside weights and sums.
  static constexpr int kWeights = kHeld * kTiles * kColumns * 4;
  static constexpr int kAhead = kWeights <= 64 ? std::min(kHeld, 8) : kPer < 8 || kTiles * kColumns < 4 ? 4 : 2;

  __device__ uint4 kept(int i, int column) const {
    return kept_[((i - kHeld) * kTiles * kColumns + column) * kLayerThreads];
  }

  __device__ float* sums_of(int group, int warp) const {
    return sums_ + ((turn_ * row_groups_ + group) * kLayerWarps + warp) * kGroupRows * kStride;
  }

  // Chunks begin … of a lane's two rows, of which there are `left` from its first.
  template <bool kChecked, class Operand>
  __device__ void read(Operand (&ahead)[kAhead], int begin, const S* first, int64_t stride, int left) const {
    const Lane lane;
    for (;;) {
      uint32_t seen = 0;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = begin + j, at = (lane.warp + i % kPer * kLayerWarps) * kChunk;
        const bool inside = i < kChunks && at + lane.q * kVector<S> < hidden_;
        const S* const piece = first + i / kPer * hidden_ + at;
        const auto take = [&](bool wanted, const S* from) {
          return wanted ? read_shared_with_others(from) : uint4{0, 0, 0, 0};
        };
        ahead[j].low = take(inside && left > 0, piece);
        ahead[j].high = take(inside && left > 8, piece + 8 * stride);
        for (const uint4& words : {ahead[j].low, ahead[j].high}) {
          seen = newest<S>(newest<S>(seen, words.x), newest<S>(words.y, newest<S>(words.z, words.w)));
        }
      }
      if (!kChecked || __all_sync(~0u, is_there<S>(seen))) return;
      pause();
    }
  }

  const int hidden_, row_groups_, turns_;
  int first_row_, first_unit_, rows_, turn_ = 0;  // a part of a batch has few rows
  float* const sums_;                             // [turns, row groups, warps, 16, kStride]
  uint4* const kept_;                             // this thread's of [chunks beyond kHeld, columns, threads]
  uint4 held_[kHeld][kTiles * kColumns];
};

// A batch is cut into as few parts as leave each of them a plan. Rows of a part; 0 where there is no plan.
inline int64_t rows_of_part(const LayerCommon& args, int element, int parts, int columns) {
  for (int64_t count = 1; count <= args.batch; ++count) {
    const int64_t rows = (args.batch + count - 1) / count;
    if (plan_dataflow(args.hidden, rows, element, parts, columns).tiles != 0) return rows;
    if (rows <= kGroupRows) break;
  }
  return 0;
}

// Moves pointers to where row `first` of the batch begins.
template <class S, class... Pointers>
void move_to(int64_t first, Pointers&... pointers) {
  ((pointers =
        pointers == nullptr ? nullptr : static_cast<S*>(const_cast<void*>(static_cast<const void*>(pointers))) + first),
   ...);
}

// Calls f with the numbers of tiles and of chunks, for which there are builds.
template <class F>
void with_dataflow(const DataflowPlan& plan, F f) {
  const auto with_tiles = [&](auto tiles) {
    const auto with_chunks = [&](auto per) {
      if (plan.per_warp == per.value) f(tiles, per);
    };
    with_chunks(std::integral_constant<int, 1>{});
    with_chunks(std::integral_constant<int, 2>{});
    with_chunks(std::integral_constant<int, 4>{});
    with_chunks(std::integral_constant<int, 8>{});
  };
  plan.tiles == 1 ? with_tiles(std::integral_constant<int, 1>{}) : with_tiles(std::integral_constant<int, 2>{});
}

// Calls f with the storage type and the cell, if the layer is plain; false where it is not, or where f says so.
template <class Args, class F>
bool with_plain(const Args& args, F f) {
  const bool is_float = args.dtype == DType::Float;
  if (!is_plain(args, args.tensor_cores || !is_float, is_float ? 4 : 2)) return false;
  bool done = false;
  with_type(args.dtype, [&](auto* type) {
    if constexpr (!std::is_same_v<decltype(type), double*>) {
      done = args.cell == LayerCell::Lstm ? f(type, std::integral_constant<LayerCell, LayerCell::Lstm>{})
                                          : f(type, std::integral_constant<LayerCell, LayerCell::Gru>{});
    }
  });
  return done;
}

template <class Args>
void launch_dataflow(void (*kernel)(Args, DataflowPlan), const Args& args, const DataflowPlan& plan, void* stream) {
  launch_together(kernel, dim3(static_cast<unsigned>(plan.teams * plan.members)), kLayerThreads, plan.shared_bytes,
                  stream, args, plan);
}

// --- gates, to about 1e-6 of one: what is multiplied has at most eleven bits -----------------------------------------

inline constexpr float kLogarithm = 1.44269504088896341f;  // binary, of e
__device__ inline float quick_sigmoid(float x) { return reciprocal(1.0f + power_of_two(-kLogarithm * x)); }
__device__ inline float quick_tanh(float x) {
  constexpr float kSeries = 0.25f;  // below, 1 − 2σ(−2x) would cancel; the first term left out is x⁸/46 of the value
  const float z = x * x;
  const float small = x * fmaf(z, fmaf(z, fmaf(z, -17.0f / 315, 2.0f / 15), -1.0f / 3), 1.0f);
  const float large = 1.0f - 2.0f * reciprocal(1.0f + power_of_two(2 * kLogarithm * x));
  return z < kSeries * kSeries ? small : large;
}

}  // namespace lect11ext::cuda
