// The layout of the operands of the matrix products, as the microkernels read them.
//
// The right-hand side B (K, N) is packed in panels of NR columns, [N / NR][K / KU][NR][KU],
// zero-padded in both directions. A unit, KU elements of one column, is contiguous: KU is 1 for
// fp32 and 2 for bf16 (what a dot instruction consumes). The left-hand side A (M, K) is read in
// place, row by row, or through a packed transpose.
#pragma once

#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The element type in which products read activations of type T: bf16 only where the processor
// multiplies bf16, else float.
template <class T>
struct OperandOf {
  using type = float;
};
#if GPTFAST_BF16_DOT
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
#endif

// The sizes of a product of P: a tile has up to MR rows and NR columns.
template <class P>
struct Tile;

template <>
struct Tile<float> {
  // MR x 2 accumulators fill the register file except for what the operands need.
  static constexpr int MR = W == 16 ? 12 : 6;
  static constexpr int MR_NARROW = W == 16 ? 16 : 8;  // rows of a tile that is one vector wide
  static constexpr int NR = 2 * W;
  static constexpr int KU = 1;
  static constexpr int KPAD = 1;  // K is padded to a multiple of this
  // Sums over K are split into blocks of KC products. Short sums lose less to rounding than one
  // long sum, and the part of a panel in use (48 KB for 384 products and 16 lanes) stays in the L2
  // cache; shorter blocks would add to C more often.
  // Where bf16 is multiplied as fp32, packed bf16 weights are widened one block at a time, and half
  // the depth keeps that block in the L1 cache. KC is the same for weights that are not packed, so
  // that the sums are the same.
  static constexpr int KC = GPTFAST_BF16_DOT ? 384 : 192;
};

template <>
struct Tile<bf16> {
#if GPTFAST_AMX
  static constexpr int MR = 32;
  static constexpr int MR_NARROW = 32;
  static constexpr int KPAD = 32;
#else
  static constexpr int MR = 12;
  static constexpr int MR_NARROW = 16;
  static constexpr int KPAD = 2;
#endif
  static constexpr int NR = 2 * W;
  static constexpr int KU = 2;
  static constexpr int KC = 768;
};

// The left-hand side A (M, K); by rows, step is KU, and by columns, row is KU.
template <class P>
struct Lhs {
  const P* data;
  int64_t row, step;  // A[i][KU u + e] is data[i * row + u * step + e]

  Lhs rows(int64_t m) const { return {data + m * row, row, step}; }
  Lhs columns(int64_t k) const { return {data + k / Tile<P>::KU * step, row, step}; }
};

// The packed right-hand side B (K, N).
template <class P>
struct Rhs {
  const P* data;
  int64_t panel;  // elements from one panel to the next

  Rhs columns(int64_t n) const { return {data + n / Tile<P>::NR * panel, panel}; }
  Rhs rows(int64_t k) const { return {data + k * Tile<P>::NR, panel}; }
};

template <class P>
inline int64_t padded_k(int64_t k) {
  return round_up(k, Tile<P>::KPAD);
}
template <class P>
inline int64_t padded_n(int64_t n) {
  return round_up(n, Tile<P>::NR);
}
template <class P>
inline int64_t panel_elements(int64_t k) {
  return padded_k<P>(k) * Tile<P>::NR;
}
template <class P>
inline int64_t rhs_elements(int64_t k, int64_t n) {
  return panel_elements<P>(k) * divide_up(n, Tile<P>::NR);
}

// Loads W units (KU elements each) of a row as 32-bit lanes. Only the first `count` elements exist;
// the others are zero.
template <class S>
inline VF load_units(const S* p, int64_t count, float) {
  return load_count(p, count);
}
#if GPTFAST_BF16_DOT
template <class S>
inline VF load_units(const S* p, int64_t count, bf16) {
  return (VF)narrow_both(load_raw(p, count), load_raw(p + W, count - W));
}
#endif

// Packs one panel of B from its transpose: column n of B is row n of src (K contiguous), for
// n < count <= NR. The last vector of columns is filled up with zeros. A vector without any column
// is not written, and the microkernels do not read it.
template <class P, class S>
inline void pack_panel_transposed(const S* src, int64_t ld, int64_t k, int64_t count, P* dst) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  const int64_t units = padded_k<P>(k) / KU;
  for (int64_t u0 = 0; u0 < units; u0 += W)
    for (int64_t n0 = 0; n0 < count; n0 += W) {
      VF r[W];
      for (int i = 0; i < W; ++i)
        r[i] = n0 + i < count ? load_units(src + (n0 + i) * ld + u0 * KU, k - u0 * KU, P{})
                              : splat(0.0f);
      transpose(r);
      for (int i = 0; i < W && u0 + i < units; ++i)
        __builtin_memcpy(dst + (u0 + i) * NR * KU + n0 * KU, &r[i], sizeof r[i]);
    }
}

// Packs W columns of one unit of rows: of `row`, and for bf16 also of `next` (null: zeros). Only
// the first `count` columns exist.
template <class S>
inline void pack_row_pair(const S* row, const S*, int64_t count, float* dst) {
  store(dst, load_count(row, count));
}
#if GPTFAST_BF16_DOT
template <class S>
inline void pack_row_pair(const S* row, const S* next, int64_t count, bf16* dst) {
  const VU pair = interleave(narrow_both(load_raw(row, count), load_raw(next, next ? count : 0)));
  __builtin_memcpy(dst, &pair, sizeof pair);
}
#endif

// Packs columns [n0, n0 + width) of src (K, N) as [K / KU][width][KU], with zeros past the ends of
// src; width is a multiple of W.
template <class P, class S>
inline void pack_rows(const S* src, int64_t ld, int64_t k, int64_t n, int64_t n0, int64_t width,
                      P* dst) {
  constexpr int KU = Tile<P>::KU;
  const int64_t padded = padded_k<P>(k);
  for (int64_t i = 0; i < padded; i += KU)
    for (int64_t j = 0; j < width; j += W) {
      P* unit = dst + i * width + j * KU;
      const S* row = src + i * ld + n0 + j;
      if (i < k)
        pack_row_pair(row, i + 1 < k ? row + ld : nullptr, n - n0 - j, unit);
      else
        for (int e = 0; e < W * KU; ++e) unit[e] = P{};
    }
}

// The unmasked terms of each row of C = A B: row i sums over k in [from(i), to(i)). The masked
// terms must not contribute at all; to multiply them by 0 is not enough, as 0 times an infinity or
// a NaN is not 0.
struct Terms {
  int64_t first, last;                // those of row 0
  int first_step = 0, last_step = 0;  // how much they grow from one row to the next

  int64_t from(int64_t i) const { return max(0, first + i * first_step); }
  int64_t to(int64_t i) const { return max(0, last + i * last_step); }
  Terms rows(int64_t i) const {
    return {first + i * first_step, last + i * last_step, first_step, last_step};
  }
  Terms columns(int64_t k) const { return {first - k, last - k, first_step, last_step}; }
};

// Packs all panels of B = src', with src (N, K).
template <class P, class S>
inline Rhs<P> pack_transposed(const S* src, int64_t ld, int64_t k, int64_t n, P* dst) {
  const int64_t panel = panel_elements<P>(k);
  for (int64_t n0 = 0, p = 0; n0 < n; n0 += Tile<P>::NR, ++p)
    pack_panel_transposed(src + n0 * ld, ld, k, min(Tile<P>::NR, n - n0), dst + p * panel);
  return {dst, panel};
}

// Packs all panels of B = src (K, N).
template <class P, class S>
inline Rhs<P> pack_straight(const S* src, int64_t ld, int64_t k, int64_t n, P* dst) {
  const int64_t panel = panel_elements<P>(k);
  for (int64_t n0 = 0, p = 0; n0 < n; n0 += Tile<P>::NR, ++p)
    pack_rows(src, ld, k, n, n0, Tile<P>::NR, dst + p * panel);
  return {dst, panel};
}

// The stride, in elements, for rows of `elements` elements: a multiple of 64 bytes that does not
// map all rows onto the same few sets of the L1 cache.
template <class P>
constexpr int64_t row_stride(int64_t elements) {
  const int64_t bytes = round_up(elements * static_cast<int64_t>(sizeof(P)), 64);
  return (bytes % 2048 == 0 ? bytes + 64 : bytes) / static_cast<int64_t>(sizeof(P));
}

// The rows of x (m, k) as a left-hand side: in place where the type and the padding allow, else
// copied to `copy`, which has room for m * row_stride<P>(padded_k<P>(k)) elements.
template <class P, class T>
inline Lhs<P> lhs_rows(const T* x, int64_t ld, int64_t m, int64_t k, P* copy) {
  constexpr int KU = Tile<P>::KU;
  if constexpr (sizeof(P) == sizeof(T))
    if (k % Tile<P>::KPAD == 0) return {reinterpret_cast<const P*>(x), ld, KU};
  const int64_t stride = row_stride<P>(padded_k<P>(k));
  for (int64_t i = 0; i < m; ++i) {
    P* row = copy + i * stride;
    for_vectors(k, [&](int64_t j, auto part) { store(row + j, load(x + i * ld + j, part), part); });
    for (int64_t j = k; j < padded_k<P>(k); ++j) row[j] = P{};
  }
  return {copy, stride, KU};
}

// Whether a product that is added to C starts its sums from C, so that it rounds differently from a
// product that is summed from zero and then added.
template <class P>
constexpr bool starts_from_c = GPTFAST_AMX && sizeof(P) == sizeof(bf16);

// Whether a packed transpose X' is stored by rows, with K contiguous, as tile registers load it.
template <class P>
constexpr bool lhs_by_rows = GPTFAST_AMX && sizeof(P) == sizeof(bf16);

// The width to which the m columns of X (k, m) are padded when they are packed as the rows of
// X' (m, k); it does not map all units onto the same few sets of the L1 cache.
template <class P>
inline int64_t transposed_width(int64_t m) {
  const int64_t width = round_up(m, W);
  return width * Tile<P>::KU * static_cast<int64_t>(sizeof(P)) % 2048 == 0 ? width + W : width;
}
template <class P>
inline int64_t lhs_transposed_elements(int64_t k, int64_t m) {
  const int64_t packed = padded_k<P>(k) * transposed_width<P>(m);
  return lhs_by_rows<P> ? 2 * packed : packed;
}

// Transposes a matrix of pairs (units, width) into rows (width, units) of pairs, as tile registers
// load X'.
inline void transpose_pairs(const bf16* pairs, int64_t units, int64_t width, bf16* rows,
                            int64_t stride) {
  for (int64_t u0 = 0; u0 < units; u0 += W)
    for (int64_t i0 = 0; i0 < width; i0 += W) {
      VF r[W];
      for (int i = 0; i < W; ++i)
        __builtin_memcpy(&r[i], pairs + ((u0 + i) * width + i0) * 2, sizeof r[i]);
      transpose(r);
      for (int i = 0; i < W; ++i)
        __builtin_memcpy(rows + (i0 + i) * stride + u0 * 2, &r[i], sizeof r[i]);
    }
}

// X (k, m) as the left-hand side X' (m, k): in place where the type allows, else packed into
// `copy`, which has room for lhs_transposed_elements<P>(k, m) elements.
template <class P, class S>
inline Lhs<P> lhs_transposed(const S* x, int64_t ld, int64_t k, int64_t m, P* copy) {
  constexpr int KU = Tile<P>::KU;
  if constexpr (sizeof(P) == sizeof(S) && KU == 1) return {x, 1, ld};
  const int64_t width = transposed_width<P>(m), padded = padded_k<P>(k);
  pack_rows(x, ld, k, m, 0, width, copy);
  if constexpr (!lhs_by_rows<P>) {
    return {copy, KU, width * KU};
  } else {
    transpose_pairs(copy, padded / KU, width, copy + padded * width, padded);
    return {copy + padded * width, padded, KU};
  }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
