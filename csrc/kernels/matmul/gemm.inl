// C (M, N) = or += A (M, K) B (K, N) in fp32 accumulators, on the operands of layout.inl.
//
// Each element of C is a sum over blocks of KC products, and each block is summed from zero in the
// order of k, whatever M and N are: a row of C has the same bits alone and in a batch. (On AMX
// tiles it is one sum over all of K, which starts from C if the product is added to C.) C holds
// whole panels (ldc >= N rounded up to NR).
#pragma once

#include "../simd/vec.inl"
#include "epilogue.inl"
#include "layout.inl"
#include "microkernel.inl"
#include "prefetch.inl"
#if GPTFAST_AMX
#include "amx.inl"
#endif

namespace gptfast::GPTFAST_LEVEL {
namespace {

// How many products are summed from zero, for panels of B: KC, or half of it where the levels that
// multiply bf16 widen B block by block (packed.inl), because KC is twice as large there.
template <class P, class B>
constexpr int64_t sum_depth =
    GPTFAST_BF16_DOT && sizeof(B) < sizeof(P) ? Tile<P>::KC / 2 : Tile<P>::KC;

// gemm() for one row of A. The panels of B are `panel` elements apart; B may be narrower than P.
template <class P, class B, class Done>
inline void gemm_row(int64_t n, int64_t k, const Lhs<P>& a, const B* b, int64_t panel, float* c,
                     bool add, const Done& done) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  constexpr int64_t KC = sum_depth<P, B>;
  for (int64_t k0 = 0; k0 < k; k0 += KC, b += KC * NR) {
    const int64_t units = padded_k<P>(min(KC, k - k0)) / KU;
    const Lhs<P> from = a.columns(k0);
    const bool more = add || k0 > 0;
    for (int64_t n0 = 0; n0 < n;) {
      const B* at = b + n0 / NR * panel;
      const int64_t panels = min(4, (n - n0) / NR), columns = min(n - n0, max(1, panels) * NR);
      if (panels == 4)
        row_kernel<4, 2>(units, from, at, panel, c + n0, more);
      else if (panels == 3)
        row_kernel<3, 2>(units, from, at, panel, c + n0, more);
      else if (panels == 2)
        row_kernel<2, 2>(units, from, at, panel, c + n0, more);
      else if (columns > W)
        row_kernel<1, 2>(units, from, at, panel, c + n0, more);
      else
        row_kernel<1, 1>(units, from, at, panel, c + n0, more);
      if (k0 + KC >= k) done(0, 1, n0, columns);
      n0 += columns;
    }
  }
}

// C (m, n) = or (with `add`) += A B. Calls the epilogue `done` for each tile (epilogue.inl), and
// prefetches the matrices of `queue`, if it has one, for the next task.
template <class P, class Done = NoEpilogue>
inline void gemm(int64_t m, int64_t n, int64_t k, const Lhs<P>& a, Rhs<P> b, float* c, int64_t ldc,
                 bool add, const Done& done = {}, PrefetchQueue* queue = nullptr) {
  constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, KU = Tile<P>::KU, KC = Tile<P>::KC;
  if (m == 1) return gemm_row(n, k, a, b.data, b.panel, c, add, done);
  const int64_t unit_bytes = NR * KU * static_cast<int64_t>(sizeof(P)),
                part = unit_bytes / divide_up(m, MR);
  for (int64_t k0 = 0; k0 < k; k0 += KC) {
    const int64_t units = padded_k<P>(min(KC, k - k0)) / KU;
    for (int64_t n0 = 0; n0 < n; n0 += NR) {
      const P* panel = b.rows(k0).columns(n0).data;
      // Each tile prefetches its part of the next panel; in the last panel, of the same one again.
      Prefetch prefetch = {reinterpret_cast<const char*>(n0 + NR < n ? panel + b.panel : panel),
                           part};
      const int64_t columns = min(NR, n - n0), max_tile = tile_rows_for<P>(columns);
      for (int64_t m0 = 0; m0 < m; m0 += max_tile, prefetch.data += units * part) {
        const Lhs<P> rows = a.rows(m0).columns(k0);
        const int64_t tile = min(max_tile, m - m0);
        const bool last = k0 + KC >= k;
        if (last) fetch_for(done, m0, tile, n0, columns);
        microkernel_of<P>(tile, columns)(units, rows, panel, c + m0 * ldc + n0, ldc, add || k0 > 0,
                                         queue ? queue->next(units, prefetch) : prefetch);
        if (last) done(m0, tile, n0, columns);
      }
    }
  }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
