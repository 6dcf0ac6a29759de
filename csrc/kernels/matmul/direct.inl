// Products of so few rows that they read the right-hand side in place, because packing it for
// gemm.inl would cost more than the product. Each element of C is one sum in a fixed reduction
// order, whatever else is computed along with it.
#pragma once

#include "../simd/vec.inl"
#include "layout.inl"
#include "step.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Loads the operands of Step (step.inl) from unpacked matrices. units(): W units of KU elements of
// one row, or the elements of a Tail. rows() (bf16): W columns of one unit, whose two elements are
// in different rows, in packed order; a null row is read as zeros.
template <class P>
struct InPlace;

template <>
struct InPlace<float> {
  template <class T, class Part>
  static VF units(const T* row, Part part) {
    return load(row, part);
  }
};

#if GPTFAST_BF16_DOT
template <>
struct InPlace<bf16> {
  static __m512bh units(const bf16* row, Full) { return Step<bf16>::read(row); }
  static __m512bh units(const bf16* row, Tail t) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << t.count) - 1, row);
  }
  static __m512bh rows(const bf16* row, const bf16* next, Full) {
    const auto read = [](const bf16* from) {
      return from ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : __m256i{};
    };
    return pair(read(row), read(next));
  }
  static __m512bh rows(const bf16* row, const bf16* next, Tail t) {
    const auto read = [&](const bf16* from) {
      const __mmask16 mask = static_cast<__mmask16>((1u << t.count) - 1);
      return from ? _mm256_maskz_loadu_epi16(mask, from) : __m256i{};
    };
    return pair(read(row), read(next));
  }

 private:
  static __m512bh pair(__m256i row, __m256i next) {
    return (__m512bh)interleave(narrow_both((VH)row, (VH)next));
  }
};
#endif

// A tile of C = A B' is one vector: the dot products of ROWS rows of A with COLUMNS rows of B, row
// by row. Each dot product has the same bits in a tile of any shape.
constexpr int DOT_ROWS = W / 4, DOT_COLUMNS = 4;

// One such tile. Row i of A begins at x + a(i), and row j of B at y + b(j).
template <class P, int ROWS = DOT_ROWS, int COLUMNS = DOT_COLUMNS, class T, class A, class B>
[[gnu::always_inline]] inline VF dot_tile(int64_t k, const T* x, const A& a, const T* y,
                                          const B& b) {
  static_assert(ROWS * COLUMNS == W, "a tile is one vector");
  using S = Step<P>;
  VF acc[W];
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) acc[l] = splat(0.0f);
  const auto step = [&](auto part) __attribute__((always_inline)) {
    typename S::Vector column[COLUMNS];
#pragma GCC unroll 16
    for (int j = 0; j < COLUMNS; ++j) column[j] = InPlace<P>::units(y + b(j), part);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const typename S::Vector row = InPlace<P>::units(x + a(i), part);
#pragma GCC unroll 16
      for (int j = 0; j < COLUMNS; ++j)
        acc[COLUMNS * i + j] = S::add(acc[COLUMNS * i + j], row, column[j]);
    }
  };
  constexpr int64_t elements = W * Tile<P>::KU;
  for (; k >= elements; k -= elements, x += elements, y += elements) step(Full{});
  if (k > 0) step(Tail{static_cast<int>(k)});
  return reduce_each(acc, W, Add{});
}

// The first `tiles` tiles of A (m, k) B (n, k)', m <= DOT_ROWS, side by side. Rows past the end
// repeat the last row.
template <class P, class T>
inline void dot_tiles(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                      int64_t ldb, int64_t tiles, VF* to) {
  const int64_t whole = m < DOT_ROWS ? 0 : min(tiles, n / DOT_COLUMNS);
  for (int64_t tile = 0; tile < whole; ++tile, b += DOT_COLUMNS * ldb)
    to[tile] = dot_tile<P>(k, a, [&](int i) { return i * lda; }, b, [&](int j) { return j * ldb; });
  for (int64_t tile = whole; tile < tiles; ++tile, b += DOT_COLUMNS * ldb) {
    const int64_t columns = n - tile * DOT_COLUMNS;
    to[tile] = dot_tile<P>(
        k, a, [&](int i) { return min(i, m - 1) * lda; }, b,
        [&](int j) { return min(j, columns - 1) * ldb; });
  }
}

// The dot products of one row of A with n rows of B, W per vector. Lanes past the end repeat the
// last product.
template <class P, class T>
inline void dot_row(int64_t n, int64_t k, const T* a, const T* b, int64_t ldb, VF* to) {
  const auto row = [](int) { return 0; };
  for (; n >= W; n -= W, b += W * ldb)
    *to++ = dot_tile<P, 1, W>(k, a, row, b, [&](int j) { return j * ldb; });
  if (n > 0) *to = dot_tile<P, 1, W>(k, a, row, b, [&](int j) { return min(j, n - 1) * ldb; });
}

// Load and store a tile, a DOT_ROWS x DOT_COLUMNS block of a matrix.
inline VF load_tile(const float* from, int64_t ld) {
#if GPTFAST_VECTOR_BYTES == 64
  const __m512 two = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(from)),
                                        _mm_loadu_ps(from + ld), 1),
               three = _mm512_insertf32x4(two, _mm_loadu_ps(from + 2 * ld), 2);
  return (VF)_mm512_insertf32x4(three, _mm_loadu_ps(from + 3 * ld), 3);
#elif GPTFAST_VECTOR_BYTES == 32
  return (VF)_mm256_loadu2_m128(from + ld, from);
#else
  return load(from);
#endif
}
template <class P>
inline void store_tile(P* to, int64_t ld, VF x) {
  P rows[W];
  store(rows, x, Full{});
#pragma GCC unroll 4
  for (int i = 0; i < DOT_ROWS; ++i)
    __builtin_memcpy(to + i * ld, rows + i * DOT_COLUMNS, DOT_COLUMNS * sizeof *to);
}

// acc += A B for NV vectors of columns, where a unit has two terms, one of which may be masked in a
// row.
template <int M, int NV, class P, class T, class Part>
[[gnu::always_inline]] inline void sum_units(const Terms& terms, const Lhs<P>& a, const T* b,
                                             int64_t ldb, VF (&acc)[M][NV], Part part) {
  using S = Step<P>;
  constexpr int KU = Tile<P>::KU;
  // All rows have both terms of the units from all_from to all_to.
  int64_t t = terms.from(0) / KU * KU;
  const int64_t all_from = round_up(terms.from(M - 1), KU), all_to = terms.to(0) / KU * KU,
                end = terms.to(M - 1);
  const P* unit = a.data + t / KU * a.step;
  b += t * ldb;
  const auto add_partly_masked_units = [&](int64_t until) __attribute__((always_inline)) {
    for (; t < until; t += KU, unit += a.step, b += KU * ldb)
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        P x[KU];
        bool has[KU], any = false;
        for (int e = 0; e < KU; ++e) {
          has[e] = terms.from(i) <= t + e && t + e < terms.to(i);
          x[e] = has[e] ? unit[i * a.row + e] : P{};
          any |= has[e];
        }
        if (!any) continue;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          acc[i][v] = S::add(acc[i][v], S::repeat(x),
                             InPlace<P>::rows(has[0] ? b + v * W : nullptr,
                                              has[KU - 1] ? b + ldb + v * W : nullptr, part));
      }
  };
  add_partly_masked_units(min(all_from, end));
  for (; t < all_to; t += KU, unit += a.step, b += KU * ldb) {
    typename S::Vector column[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) column[v] = InPlace<P>::rows(b + v * W, b + ldb + v * W, part);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const typename S::Vector x = S::repeat(unit + i * a.row);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = S::add(acc[i][v], x, column[v]);
    }
  }
  add_partly_masked_units(end);
}

// NV vectors of columns of C (M, n) = A (M, k) B (k, n), over the unmasked terms of each row.
template <int M, int NV, class P, class T, class Part>
[[gnu::always_inline]] inline void sum_tile(const Terms& terms, const Lhs<P>& a, const T* b,
                                            int64_t ldb, T* c, int64_t ldc, Part part) {
  using S = Step<P>;
  constexpr int KU = Tile<P>::KU;
  VF acc[M][NV];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = splat(0.0f);
  if constexpr (KU == 1) {
    int64_t t = terms.from(0);
    const P* unit = a.data + t * a.step;
    b += t * ldb;
    // Adds term t to rows FIRST .. LAST - 1, and advances t.
    const auto add_term = [&]<int FIRST, int LAST>() __attribute__((always_inline)) {
      typename S::Vector column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = InPlace<P>::units(b + v * W, part);
#pragma GCC unroll 4
      for (int i = FIRST; i < LAST; ++i) {
        const typename S::Vector x = S::repeat(unit + i * a.row);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = S::add(acc[i][v], x, column[v]);
      }
      ++t, unit += a.step, b += ldb;
    };
    // Row i starts (if first_step) or ends (if last_step) i terms after row 0: start() adds the
    // terms that not all rows have yet, end() those that not all rows have any more.
    const auto start = [&]<int I>(const auto& next) __attribute__((always_inline)) {
      if constexpr (I < M) {
        if (t == terms.first + I - 1 && t < terms.last) add_term.template operator()<0, I>();
        next.template operator()<I + 1>(next);
      }
    };
    const auto end = [&]<int I>(const auto& next) __attribute__((always_inline)) {
      if constexpr (I < M) {
        if (t == terms.last + I - 1) add_term.template operator()<I, M>();
        next.template operator()<I + 1>(next);
      }
    };
    if (terms.first_step) start.template operator()<1>(start);
    while (t < terms.last) add_term.template operator()<0, M>();
    if (terms.last_step) end.template operator()<1>(end);
  } else {
    sum_units(terms, a, b, ldb, acc, part);
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + i * ldc + v * W, acc[i][v], part);
}

constexpr int SUM_ROWS = 4, SUM_VECTORS = W == 16 ? 4 : 2;  // accumulators; leave registers for B

// All columns of C (M, n), over the unmasked terms of each row.
template <int M, class P, class T>
[[gnu::always_inline]] inline void sum_rows(int64_t n, const Terms& terms, const Lhs<P>& a,
                                            const T* b, int64_t ldb, T* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + SUM_VECTORS * W <= n; j += SUM_VECTORS * W)
    sum_tile<M, SUM_VECTORS>(terms, a, b + j, ldb, c + j, ldc, Full{});
  for_vectors(n - j, [&](int64_t more, auto part) {
    sum_tile<M, 1>(terms, a, b + j + more, ldb, c + j + more, ldc, part);
  });
}

// C (m, n) = A (m, k) B (k, n) for m <= SUM_ROWS, over the unmasked terms of each row.
template <class P, class T>
[[gnu::always_inline]] inline void gemm_in_place(int64_t m, int64_t n, const Terms& terms,
                                                 const Lhs<P>& a, const T* b, int64_t ldb, T* c,
                                                 int64_t ldc) {
  if (m == SUM_ROWS) return sum_rows<SUM_ROWS>(n, terms, a, b, ldb, c, ldc);
  for (int64_t i = 0; i < m; ++i)
    sum_rows<1>(n, terms.rows(i), a.rows(i), b, ldb, c + i * ldc, ldc);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
