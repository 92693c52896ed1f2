// What derivatives ask of a tile of pairs of queries and keys: weights to be summed against its columns, from up to six
// products and what is known of every query. Equations: dot_product.h.
//
// Operands are counted alike on both sides, of queries and of keys: 0 the query, key; 1 grad_out, value; 2 and 3 their
// tangents. Products that belong together have one kind from each side, so that one code has queries as rows (the
// gradient of the query, of the mask, tangents) or keys as rows (the gradients of key and value).
#pragma once

#include "attention/cuda/dot_product_score.cuh"

namespace lect11ext::cuda {

// What a kernel is for. …Tangent: the same of the backward's tangent.
enum class Part { Query, Key, Mask, Tangent, QueryTangent, KeyTangent, MaskTangent };

inline constexpr int kKinds = 4;

// Of an operand of every kind: where it begins in shared memory, in elements; −1 where there is none.
struct KindOffsets {
  int of[kKinds];
};

struct DerivativeSettings {
  SequenceTiles tiles;
  int64_t chunks;  // of the columns that are summed
  int warps, stages;
  bool rows_shared;
  bool plain;       // scores are multiples of products, and nothing is dropped
  bool mask_pairs;  // along the kernel's columns
  KindOffsets rows, columns;
  int rows_size, stage_size;
  bool query_side_aligned[kKinds], key_side_aligned[kKinds];
  bool pairs_aligned[2];  // of the outputs
  size_t shared_bytes;
  const void *delta, *delta_t;  // C [batch, heads, queries]: D and its tangent
  void *out_t, *lse_t;          // of Part::Tangent
  AttentionStrides out_t_strides;
  // Of the mask's gradients.
  int64_t mask_sizes[4], splits;
  void* mask_parts;    // C [splits, the mask's elements]
  const int* only_if;  // null: run; else a flag: kernels for finite numbers run where it is 0, others where it is not
};

template <int kDim>
struct DerivativePlan : DerivativeSettings {
  TileShape<kDim> shape[2];  // of kinds 0 and 2, and of 1 and 3
};

// All of them take the largest of the structs. `out_t` and `lse_t` are those of the backward's tangent.
using DerivativeArgs = AttentionBackwardTangent;

template <class S, Part kPart>
struct Pairs {
  using C = Compute<S>;
  static constexpr bool kKeysAreRows = kPart == Part::Key || kPart == Part::KeyTangent;
  static constexpr bool kTangents = kPart >= Part::Tangent, kGradients = kPart != Part::Tangent;
  static constexpr bool kOfMask = kPart == Part::Mask || kPart == Part::MaskTangent;
  // Whether sums over columns of kind 0 and 2, and of kind 1 and 3, are asked for.
  static constexpr bool kFirst = !kOfMask && kGradients, kSecond = kKeysAreRows || kPart == Part::Tangent;

  static constexpr bool uses_row(int kind) { return (kind < 2 || kTangents) && (kGradients || kind % 2 == 0); }
  static constexpr bool uses_column(int kind) { return kind < 2 || kTangents; }

  __host__ __device__ static const AttentionOperand& query_side(const DerivativeArgs& args, int kind) {
    return kind == 0 ? args.query : kind == 1 ? args.grad_out : kind == 2 ? args.query_t : args.grad_out_t;
  }
  __host__ __device__ static const AttentionOperand& key_side(const DerivativeArgs& args, int kind) {
    return kind == 0 ? args.key : kind == 1 ? args.value : kind == 2 ? args.key_t : args.value_t;
  }
  __host__ __device__ static const AttentionOperand& row(const DerivativeArgs& args, int kind) {
    return kKeysAreRows ? key_side(args, kind) : query_side(args, kind);
  }
  __host__ __device__ static const AttentionOperand& column(const DerivativeArgs& args, int kind) {
    return kKeysAreRows ? query_side(args, kind) : key_side(args, kind);
  }

  // What is known of a query.
  struct Known {
    C lse, delta, lse_t, delta_t;
  };

  static __device__ Known known(const DerivativeArgs& args, const DerivativeSettings& plan, int64_t number) {
    const auto at = [&](const void* data) { return data == nullptr ? C(0) : static_cast<const C*>(data)[number]; };
    Known known{usable(at(args.lse)), 0, 0, 0};
    if constexpr (kGradients) known.delta = at(plan.delta);
    if constexpr (kGradients && kTangents) known.lse_t = at(args.lse_t), known.delta_t = at(plan.delta_t);
    return known;
  }

  // The lse of a query that sees nothing becomes +∞, which makes its weights zero.
  static __device__ C usable(C lse) { return lse == -infinity<C>() ? infinity<C>() : lse; }

  // Of a pair at first its score and the products of kind 1: g·v, 2: q̇·k + q·k̇, 3: ġ·v + g·v̇; at last its weights.
  // capped: u / softcap, or 0. mask_t: the mask's tangent. Adds to lse_t, the sum of p·ṫ.
  static __device__ void weigh(const DerivativeArgs& args, const Known& known, C kept, C capped, C mask_t, C& first,
                               C& second, C& first_t, C& second_t, C& lse_t) {
    const C scale = C(args.scale);
    const C p = weight_of(first - known.lse);
    const C slope = C(1) - capped * capped;  // of u over s
    const C inner = kept * second - known.delta, grad = p * inner;
    C u_t = 0, t_t = 0;
    if constexpr (kTangents) {
      u_t = first_t * scale * slope;
      t_t = u_t + mask_t;
    }
    if constexpr (kPart == Part::Tangent) {
      lse_t += p * t_t;
      second = kept * p * t_t;
      second_t = kept * p;
    } else if constexpr (kTangents) {
      const C p_t = p * (t_t - known.lse_t);
      const C grad_t = p_t * inner + p * (kept * second_t - known.delta_t);
      if constexpr (kOfMask) {
        first = grad_t;
      } else {
        C bend = 0;  // of the slope's own tangent
        if (args.softcap != 0) bend = C(2) * capped * u_t / C(args.softcap);
        first = (grad_t * slope - grad * bend) * scale;
        first_t = grad * slope * scale;
        second = kept * p_t;
        second_t = kept * p;
      }
    } else if constexpr (kOfMask) {
      first = grad;
    } else {
      first = grad * slope * scale;
      second = kept * p;
    }
  }
};

}  // namespace lect11ext::cuda
