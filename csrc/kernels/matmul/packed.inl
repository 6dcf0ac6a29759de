// Products with a PackedWeight. Elements narrower than P are widened in blocks of one panel, each
// of which stays in the L1 cache for all rows. The sums have the order of gemm.inl, so a row has
// the same bits in any batch.
#pragma once

#include "../simd/vec.inl"
#include "epilogue.inl"
#include "gemm.inl"
#include "layout.inl"
#include "step.inl"
#include "vnni.inl"
#include "weights.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// gemm() with elements of B that are narrower than P.
template <class P, class S, class Done>
inline void gemm_widened(int64_t m, int64_t n, int64_t k, const Lhs<P>& a, const S* b,
                         int64_t panel, float* c, int64_t ldc, bool add, const Done& done) {
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  constexpr int64_t KC = sum_depth<P, S>;
  if (m == 1 && !lhs_by_rows<P>) return gemm_row(n, k, a, b, panel, c, add, done);
  alignas(64) P block[KC * NR];
  for (int64_t n0 = 0; n0 < n; n0 += NR, b += panel)
    for (int64_t k0 = 0; k0 < k; k0 += KC) {
      const int64_t depth = min(KC, k - k0);
      const auto finish = [&](int64_t i0, int64_t rows, int64_t, int64_t columns) {
        if (k0 + KC >= k) done(i0, rows, n0, columns);
      };
      for (int64_t i = 0; i < panel_elements<P>(depth); i += W * KU) {
        const typename Step<P>::Vector x = Step<P>::read(b + k0 * NR + i);
        __builtin_memcpy(block + i, &x, sizeof x);
      }
      gemm(m, min(NR, n - n0), depth, a.columns(k0), Rhs<P>{block, 0}, c + n0, ldc, add || k0 > 0,
           finish);
    }
}

template <class P, class Done = NoEpilogue>
inline void gemm(int64_t m, int64_t n, int64_t k, const Lhs<P>& a, const PackedWeight<P>& b,
                 float* c, int64_t ldc, bool add, const Done& done = {}) {
  switch (b.format) {
    case WeightFormat::dense:
      return gemm(m, n, k, a, b.dense(), c, ldc, add, done);
    case WeightFormat::bf16:
      if constexpr (sizeof(P) > sizeof(bf16))
        gemm_widened(m, n, k, a, static_cast<const bf16*>(b.data), b.panel, c, ldc, add, done);
      return;
    case WeightFormat::int8:
      return gemm_widened(m, n, k, a, static_cast<const int8_t*>(b.data), b.panel, c, ldc, add,
                          done);
    case WeightFormat::int8_vnni:
#if GPTFAST_VNNI
      gemm_vnni(m, n, k, a.data, a.row, static_cast<const int8_t*>(b.data), b.panel, c, ldc, add,
                done);
#endif
      return;
  }
}

// Multiplies the columns of c (rows, n) by their scales, which are null for a dense weight. The
// products are stored before anything is added to them, so that no compiler contracts both into
// fused multiply-adds in some places only.
inline void apply_scales(const float* scales, int64_t rows, int64_t n, float* c, int64_t ldc) {
  if (!scales) return;
  for (int64_t i = 0; i < rows; ++i)
    for_vectors(n, [&](int64_t j, auto part) {
      store(c + i * ldc + j, load(c + i * ldc + j, part) * load(scales + j, part), part);
    });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
