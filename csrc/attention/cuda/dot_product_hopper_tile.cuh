// Tiles as TMA lays them and wgmma reads them, and what a warpgroup does with its 64 rows of sums.
#pragma once

#include "attention/cuda/dot_product_hopper_launch.cuh"
#include "attention/cuda/dot_product_score.cuh"
#include "common/cuda/hopper.cuh"

namespace lect11ext::cuda {

inline constexpr int kGroupRows = 64;  // that a warpgroup owns

// Registers a thread when one warpgroup loads and kGroups compute: what they have must not be more than they began
// with, or they wait for ever.
template <int kGroups>
struct GroupRegisters {
  static constexpr int kLoader = kGroups == 3 ? 32 : 24, kCompute = kGroups == 3 ? 160 : 240;
  static constexpr int kAtStart = 65536 / (kWarpgroup * (kGroups + 1)) / 8 * 8;
  static_assert(kLoader + kGroups * kCompute <= (kGroups + 1) * kAtStart);
};

// kRows × kColumns elements of 16 bits, 64 columns beside one another in a slab of rows of 128 bytes.
template <int kRows, int kColumns>
struct SlabTile {
  static constexpr int kSlabs = kColumns / 64, kRowBytes = 128, kSlabBytes = kRows * kRowBytes;
  static constexpr int kBytes = kSlabs * kSlabBytes, kEightRows = 8 * kRowBytes;
  static constexpr int kParts = kColumns / 16, kRowParts = kRows / 16;  // sixteen columns, sixteen rows

  // One thread starts it. The barrier is to expect kBytes.
  __device__ static void load(uint32_t to, const CUtensorMap& map, uint32_t barrier, int position, int head,
                              int batch) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      load_box(to + slab * kSlabBytes, map, barrier, 64 * slab, position, head, batch);
    }
  }

  // Sixteen columns of rows from `first_row` on, a multiple of eight, to be summed along them.
  __device__ static uint64_t along(uint32_t tile, int first_row, int part) {
    constexpr int kPartsOfSlab = 4, kPartBytes = 32;
    return moved(matrix_descriptor(tile + first_row * kRowBytes, 16, kEightRows),
                 part / kPartsOfSlab * kSlabBytes + part % kPartsOfSlab * kPartBytes);
  }

  // Sixteen rows, all columns, to be summed down the rows.
  __device__ static uint64_t down(uint32_t tile, int part) {
    return moved(matrix_descriptor(tile, kSlabBytes, kEightRows), 2 * part * kEightRows);
  }

  // Where the two elements lie whose first column is `column`, an even one.
  __device__ static int offset(int row, int column) {
    const int piece = column / 8 % 8;
    return column / 64 * kSlabBytes + row * kRowBytes + ((piece ^ row % 8) << 4) + column % 8 * 2;
  }
};

// Starts sums = rows · columnsᵀ: 64 rows of a tile from `first_row` on, and all rows of another, both in shared memory.
template <class S, class Rows, class Columns, int kTiles>
__device__ inline void start_scores(float (&sums)[kTiles][4], uint32_t rows, int first_row, uint32_t columns) {
  static_assert(Rows::kParts == Columns::kParts && Columns::kRowParts == kTiles / 2);
  wgmma_of_shared<S, 8 * kTiles, false>(sums, Rows::along(rows, first_row, 0), Columns::along(columns, 0, 0));
#pragma unroll
  for (int part = 1; part < Rows::kParts; ++part) {
    wgmma_of_shared<S, 8 * kTiles, true>(sums, Rows::along(rows, first_row, part), Columns::along(columns, 0, part));
  }
}

// Starts sums += weights · tile, of weights in registers.
template <class S, class Tile, int kParts, int kTiles>
__device__ inline void start_columns(float (&sums)[kTiles][4], const uint32_t (&weights)[kParts][4], uint32_t tile) {
  static_assert(Tile::kRowParts == kParts && Tile::kParts == kTiles / 2);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    wgmma_of_registers<S, 8 * kTiles>(sums, weights[part], Tile::down(tile, part));
  }
}

// Sums as a left operand, along their columns: a lane has what it needs of them. Those that keeps(i) does not name,
// elements counted tile by tile, are zero.
template <class S, int kTiles, class Keeps>
__device__ inline void to_weights(uint32_t (&weights)[kTiles / 2][4], const float (&sums)[kTiles][4], Keeps keeps) {
#pragma unroll
  for (int part = 0; part < kTiles / 2; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tile = 2 * part + i / 2, first = i % 2 * 2;
      const auto element = [&](int e) { return keeps(4 * tile + e) ? sums[tile][e] : 0.0f; };
      weights[part][i] = round_pair<S>(element(first), element(first + 1));
    }
  }
}

template <class S, int kTiles>
__device__ inline void to_weights(uint32_t (&weights)[kTiles / 2][4], const float (&sums)[kTiles][4]) {
  to_weights<S>(weights, sums, [](int) { return true; });
}

// A thread's place in its warpgroup, and its rows: `row` and the eighth behind it.
struct GroupLane {
  int warp, lane, g, q, row;
  __device__ explicit GroupLane(int thread = static_cast<int>(threadIdx.x))
      : warp(thread % kWarpgroup / 32), lane(thread % 32), g(lane / 4), q(lane % 4), row(16 * warp + g) {}
};

// Barriers and stages that fill and empty in turn: `full` counts the bytes that TMA brings, `empty` the warps that have
// read. Use number n of the ring is that of stage n % kStages.
template <int kStages>
struct Ring {
  uint32_t full, empty;  // kStages barriers each

  __device__ static int stage(int n) { return n % kStages; }
  __device__ void init(int full_arrivals, int warps) const {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, full_arrivals);
      barrier_init(empty + 8 * i, warps);
    }
  }
  __device__ uint32_t full_barrier(int n) const { return full + 8 * stage(n); }
  __device__ void wait_full(int n) const { barrier_wait(full_barrier(n), n / kStages & 1); }
  // The first time every stage is empty.
  __device__ void wait_empty(int n) const { barrier_wait(empty + 8 * stage(n), (n / kStages & 1) ^ 1); }
  __device__ void release(int n, const GroupLane& lane) const {
    if (lane.lane == 0) barrier_arrive(empty + 8 * stage(n));
  }
};

// Dynamic shared memory from its first multiple of 1024 bytes on, as the permutation of tiles wants it; kSlack bytes
// are asked for besides.
struct AlignedShared {
  static constexpr int kSlack = 1024;
  uint32_t address;
  unsigned char* data;

  __device__ explicit AlignedShared(unsigned char* shared) {
    const uint32_t first = shared_address(shared);
    address = (first + kSlack - 1) / kSlack * kSlack;
    data = shared + (address - first);
  }
};

// Of the columns 0 … kTiles · 8 − 1 of a row those stay that lie between two bounds, both included; others become
// `other`. Bounds count from the lane's first column on.
template <int kTiles>
__device__ inline void keep_between(float (&sums)[kTiles][4], int half, int low, int high, float other) {
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int column = i / 2 * 8 + i % 2;
    float& x = sums[i / 2][2 * half + i % 2];
    if (column < low || column > high) x = other;
  }
}

// Where a warp's sixteen rows of an output lie, from which they are written piece by piece of sixteen bytes.
template <class S>
struct OutRows {
  S* first;
  int64_t distance;
  int count, pieces;  // of rows, perhaps fewer than none; of a row

  // f(row, piece) is what goes there; kPieces: of a whole row.
  template <int kPieces, class F>
  __device__ void write(const GroupLane& lane, F f) const {
    constexpr int kRows = 32 / kPieces;  // at a time
    static_assert(kPieces * kRows == 32);
    const int piece = lane.lane % kPieces;
    S* to = first + lane.lane / kPieces * distance + piece * 8;
#pragma unroll
    for (int i = 0; i < 16; i += kRows, to += kRows * distance) {
      const int row = i + lane.lane / kPieces;
      const uint4 words = f(row, piece);
      if (row < count && piece < pieces) __stwb(reinterpret_cast<uint4*>(to), words);
    }
  }
};

// Writes a warp's sixteen rows of sums, each multiplied by a factor, by way of its rows of a tile in shared memory that
// nothing reads any more, so that memory is written in whole rows.
template <class S, class Tile, int kTiles>
__device__ inline void write_rows(const float (&sums)[kTiles][4], const float (&factors)[2], unsigned char* tile,
                                  int first_row, const GroupLane& lane, const OutRows<S>& rows) {
  const int own = first_row + 16 * lane.warp;
  __syncwarp();
#pragma unroll
  for (int part = 0; part < kTiles / 2; ++part) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const x = &sums[2 * part + i / 2][i % 2 * 2];
      words[i] = round_pair<S>(x[0] * factors[i % 2], x[1] * factors[i % 2]);
    }
    store_matrices(tile + Tile::offset(own + lane.lane % 16, 16 * part + lane.lane / 16 * 8), words);
  }
  __syncwarp();
  rows.template write<kTiles>(lane, [&](int row, int piece) {
    return *reinterpret_cast<const uint4*>(tile + Tile::offset(own + row, 8 * piece));
  });
}

}  // namespace lect11ext::cuda
