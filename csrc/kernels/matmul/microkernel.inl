// Microkernels: each computes one tile of a product, as many sums as fit in the registers, from the
// operands of layout.inl.
#pragma once

#include "../simd/vec.inl"
#include "layout.inl"
#include "prefetch.inl"
#include "step.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// C (M, NV vectors) = or += acc.
template <int M, int NV>
inline void write_tile(const VF (&acc)[M][NV], float* c, int64_t ldc, bool add) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* p = c + i * ldc + v * W;
      store(p, add ? load(p) + acc[i][v] : acc[i][v]);
    }
}

// C (M, NV vectors) = or += A B with one panel of B, over `units` units of K. One base pointer per
// three rows of A addresses them. All loops over accumulators have a pragma that unrolls them: g++
// keeps an array that a loop indexes in memory before and after the sums, which costs as much as 8
// steps of the sums.
template <int M, int NV, class P>
inline void microkernel(int64_t units, const Lhs<P>& a, const P* b, float* c, int64_t ldc, bool add,
                        const Prefetch& prefetch) {
  using S = Step<P>;
  constexpr int KU = Tile<P>::KU;
  VF acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = splat(0.0f);
  const P* base[(M + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < (M + 2) / 3; ++i) base[i] = a.data + 3 * i * a.row;
  for (int64_t u = 0; u < units; ++u, b += 2 * W * KU) {
    prefetch.fetch(u);
    typename S::Vector column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = S::read(b + v * W * KU);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const typename S::Vector x = S::repeat(base[i / 3] + i % 3 * a.row);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] = S::add(acc[i][v], x, column[v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < (M + 2) / 3; ++i) base[i] += a.step;
  }
  write_tile<M, NV>(acc, c, ldc, add);
}

// Lhs and Prefetch are passed by reference. A copy would be written field by field and then read as
// one vector, and such a load waits until all earlier stores have reached the cache. g++ also joins
// scalars into vectors with that effect, unless -fno-tree-slp-vectorize (setup.py) forbids it.
template <class P>
using Microkernel = void (*)(int64_t, const Lhs<P>&, const P*, float*, int64_t, bool,
                             const Prefetch&);

// The maximum number of rows of a tile that is n <= NR columns wide.
template <class P>
constexpr int tile_rows_for(int64_t n) {
  return n <= W ? Tile<P>::MR_NARROW : Tile<P>::MR;
}

// The table of microkernels for tiles of NV vectors: rows[m] computes m >= 1 rows.
template <class P, int NV, int M = tile_rows_for<P>(NV * W)>
struct Microkernels : Microkernels<P, NV, M - 1> {
  constexpr Microkernels() { this->rows[M] = microkernel<M, NV, P>; }
};
template <class P, int NV>
struct Microkernels<P, NV, 0> {
  Microkernel<P> rows[tile_rows_for<P>(NV * W) + 1] = {};
};

template <class P>
inline Microkernel<P> microkernel_of(int64_t m, int64_t n) {
  static constexpr Microkernels<P, 1> one_vector;
  static constexpr Microkernels<P, 2> two_vectors;
  return n <= W ? one_vector.rows[m] : two_vectors.rows[m];
}

// One row of A times NV vectors of each of PANELS panels, `panel` elements apart. A single row
// needs several panels at once, because each step of a sum waits for the one before.
template <int PANELS, int NV, class P, class B>
inline void row_kernel(int64_t units, const Lhs<P>& a, const B* b, int64_t panel, float* c,
                       bool add) {
  using S = Step<P>;
  constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;
  VF acc[PANELS][NV];
#pragma GCC unroll 8
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[p][v] = splat(0.0f);
  for (int64_t u = 0; u < units; ++u, b += NR * KU) {
    const typename S::Vector x = S::repeat(a.data + u * a.step);
#pragma GCC unroll 8
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        acc[p][v] = S::add(acc[p][v], x, S::read(b + p * panel + v * W * KU));
  }
#pragma GCC unroll 8
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* sum = c + p * NR + v * W;
      store(sum, add ? load(sum) + acc[p][v] : acc[p][v]);
    }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
