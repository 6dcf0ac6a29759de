// Products with a masked left-hand side A. Its masked elements are zeros, by which a tile
// multiplies the rows of B that some rows of A see and others do not. If such a row of B is not
// finite, each row of A is multiplied separately.
#pragma once

#include "../simd/elements.inl"
#include "../simd/vec.inl"
#include "../threads/scratch.h"
#include "epilogue.inl"
#include "gemm.inl"
#include "layout.inl"
#include "prefetch.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Whether rows [first, last) of B (k, n), and the rows that share a unit with them, are finite.
template <class P>
inline bool finite_rows(Rhs<P> b, int64_t n, int64_t first, int64_t last) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  const int64_t from = first / KU * KU * NR, to = round_up(last, KU) * NR;
  VF zero[4] = {};
  for (int64_t n0 = 0; n0 < n; n0 += NR) {
    const P* panel = b.columns(n0).data;
    int64_t i = from;
    for (; i + 4 * W <= to; i += 4 * W)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) zero[v] += load(panel + i + v * W, Full{}) * 0.0f;
    for (; i < to; i += W) zero[0] += load(panel + i, Full{}) * 0.0f;
  }
  return sum((zero[0] + zero[1]) + (zero[2] + zero[3])) == 0.0f;
}

// A copy of B (k, n) in `copy`, with zeros in place of all rows but [first, last).
template <class P>
inline Rhs<P> with_only_rows(Rhs<P> b, int64_t n, int64_t k, int64_t first, int64_t last, P* copy) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  const Rhs<P> alone = {copy, panel_elements<P>(k)};
  for (int64_t n0 = 0; n0 < n; n0 += NR) {
    const P* from = b.columns(n0).data;
    P* to = copy + n0 / NR * alone.panel;
    for (int64_t i = 0; i < alone.panel; ++i) {
      const int64_t row = i / (NR * KU) * KU + i % KU;
      to[i] = first <= row && row < last ? from[i] : P{};
    }
  }
  return alone;
}

// C (m, n) = or += A (m, k) B (k, n) over the unmasked terms of each row, with the bits of gemm().
// `finite`: the rows of B that only some rows of A see are known to be finite.
template <class P>
inline void gemm_masked(bool finite, const Terms& terms, int64_t m, int64_t n, int64_t k,
                        const Lhs<P>& a, Rhs<P> b, float* c, int64_t ldc, bool add,
                        PrefetchQueue* queue) {
  if (finite) return gemm(m, n, k, a, b, c, ldc, add, NoEpilogue{}, queue);
  ScratchFrame frame;
  P* copy = alloc<P>(frame, rhs_elements<P>(k, n));
  for (int64_t i = 0; i < m; ++i)
    gemm(1, n, k, a.rows(i), with_only_rows(b, n, k, terms.from(i), terms.to(i), copy), c + i * ldc,
         ldc, add);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
