// Operands of the matrix products: how rows and columns are laid out for the microkernels.
//
// The right-hand side B (K, N) lies in panels of NR columns, [N / NR][K / KU][NR][KU], zero-padded
// in both directions. KU elements of one column stand together: 1 for fp32, 2 for bf16 (what a dot
// instruction consumes). The left-hand side A (M, K) is read in place, row by row, or through a
// packed transpose.
#pragma once

#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// What a product of activations of type T is computed from: bf16 only where the processor
// multiplies bf16.
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

template <class P>
struct Tile;

template <>
struct Tile<float> {
  static constexpr int MR =
      W == 16 ? 12 : 6;  // MR x 2 accumulators fill the register file but for the operands
  static constexpr int TALL = W == 16 ? 16 : 8;  // rows where one vector of columns is left
  static constexpr int NR = 2 * W;
  static constexpr int KU = 1;
  static constexpr int KPAD = 1;  // K is padded to a multiple of this
  // Products are summed up in blocks of this many: short sums lose less to rounding than one long
  // one, and the part of a panel in use (48 KB with 16 lanes) stays in the L2 cache. Shorter blocks
  // add to C more often.
  // Without products of bf16, weights of bf16 are widened a block at a time, which half of that
  // keeps in the L1 cache; packed or not, they have the same sums.
  static constexpr int KC = GPTFAST_BF16_DOT ? 384 : 192;
};

template <>
struct Tile<bf16> {
#if GPTFAST_AMX
  static constexpr int MR = 32;
  static constexpr int TALL = 32;
  static constexpr int KPAD = 32;
#else
  static constexpr int MR = 12;
  static constexpr int TALL = 16;
  static constexpr int KPAD = 2;
#endif
  static constexpr int NR = 2 * W;
  static constexpr int KU = 2;
  static constexpr int KC = 768;
};

template <class P>
struct Lhs {
  const P* data;
  int64_t row, step;  // A[i][KU u + e] is data[i * row + u * step + e]

  Lhs rows(int64_t m) const { return {data + m * row, row, step}; }
  Lhs columns(int64_t k) const { return {data + k / Tile<P>::KU * step, row, step}; }
};

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

// W units (KU elements each) of a row, of which `count` elements exist, as 32-bit lanes.
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

// One panel of B from the columns' own rows: column n of B is row n of src (K contiguous), n <
// count <= NR. Zeros follow up to whole vectors; a vector of columns that do not exist is left as
// it is, and the microkernels do not read it.
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

// Columns [n0, n0 + width) of src (K, N), a multiple of W, as [K / KU][width][KU], zeros past the
// ends of src.
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

// Which terms row i of C = A B has of its sums over k: from(i) to to(i). The others are not
// products with 0, as 0 times what is not finite is not 0.
struct Terms {
  int64_t first, last;
  int first_step = 0, last_step = 0;  // from one row to the next

  int64_t from(int64_t i) const { return max(0, first + i * first_step); }
  int64_t to(int64_t i) const { return max(0, last + i * last_step); }
  Terms rows(int64_t i) const {
    return {first + i * first_step, last + i * last_step, first_step, last_step};
  }
  Terms columns(int64_t k) const { return {first - k, last - k, first_step, last_step}; }
};

// All panels of B whose columns are the rows of src (N, K).
template <class P, class S>
inline Rhs<P> pack_transposed(const S* src, int64_t ld, int64_t k, int64_t n, P* dst) {
  const int64_t panel = panel_elements<P>(k);
  for (int64_t n0 = 0, p = 0; n0 < n; n0 += Tile<P>::NR, ++p)
    pack_panel_transposed(src + n0 * ld, ld, k, min(Tile<P>::NR, n - n0), dst + p * panel);
  return {dst, panel};
}

// All panels of B = src (K, N).
template <class P, class S>
inline Rhs<P> pack_straight(const S* src, int64_t ld, int64_t k, int64_t n, P* dst) {
  const int64_t panel = panel_elements<P>(k);
  for (int64_t n0 = 0, p = 0; n0 < n; n0 += Tile<P>::NR, ++p)
    pack_rows(src, ld, k, n, n0, Tile<P>::NR, dst + p * panel);
  return {dst, panel};
}

// A distance between rows that fills whole vectors and does not map rows onto one set of the L1
// cache.
template <class P>
constexpr int64_t row_stride(int64_t elements) {
  const int64_t bytes = round_up(elements * static_cast<int64_t>(sizeof(P)), 64);
  return (bytes % 2048 == 0 ? bytes + 64 : bytes) / static_cast<int64_t>(sizeof(P));
}

// Rows of x (m, k) as a left-hand side: in place where the type and the padding allow, else copied
// to `copy`, which holds m * row_stride<P>(k) elements.
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

// Whether a product that is added to C starts from it, and so is not what it is from zero, added.
template <class P>
constexpr bool starts_from_c = GPTFAST_AMX && sizeof(P) == sizeof(bf16);

// Whether the left-hand side X' is packed as rows, with its K contiguous.
template <class P>
constexpr bool lhs_by_rows = GPTFAST_AMX && sizeof(P) == sizeof(bf16);

// The width at which the columns of X (k, m) are packed to serve as rows of X' (m, k).
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

// A matrix of pairs (units, width) as rows of pairs: what a tile register wants of X'.
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

// X (k, m) as the left-hand side X' (m, k): in place where the type allows, else through `copy`,
// which holds lhs_transposed_elements<P>(k, m).
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
