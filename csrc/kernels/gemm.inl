// C (M, N) = or += A (M, K) B (K, N) in fp32 accumulators, on the operands of pack.inl.
//
// Each element of C is a sum over blocks of KC products, each block summed from zero in the order
// of k, whatever M and N: a row of C has the same bits alone and in a batch. C holds whole panels
// (ldc >= N rounded up to NR).

template <int M, int NV>
inline void write_tile(VF (&acc)[M][NV], float* c, int64_t ldc, bool add) {
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) {
      float* p = c + i * ldc + v * W;
      store(p, add ? load(p) + acc[i][v] : acc[i][v]);
    }
}

// What a microkernel brings into the cache for a later one, step by step of its own loop: large
// weights come from the outer cache or from memory.
struct Ahead {
  const char* data;
  int64_t step;  // bytes

  void fetch(int64_t unit) const { __builtin_prefetch(data + unit * step, 0, 2); }
};

// C (M, NV vectors) from one panel; A's rows are reached from a base pointer per three of them.
template <int M, int NV>
inline void microkernel(int64_t units, Lhs<float> a, const float* b, float* c, int64_t ldc,
                        bool add, Ahead ahead) {
  VF acc[M][NV];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = splat(0.0f);
  const float* base[(M + 2) / 3];
  for (int i = 0; i < M; i += 3) base[i / 3] = a.data + i * a.row;
  for (int64_t u = 0; u < units; ++u, b += 2 * W) {
    ahead.fetch(u);
    VF column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const VF x = splat(base[i / 3][i % 3 * a.row]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] += x * column[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < (M + 2) / 3; ++i) base[i] += a.step;
  }
  write_tile<M, NV>((VF(&)[M][NV])acc, c, ldc, add);
}

#if GPTFAST_BF16_DOT && !GPTFAST_AMX
// The same on pairs of bf16: c += a[2u] b[2u] + a[2u+1] b[2u+1].
template <int M, int NV>
inline void microkernel(int64_t units, Lhs<bf16> a, const bf16* b, float* c, int64_t ldc, bool add,
                        Ahead ahead) {
  __m512 acc[M][NV];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_setzero_ps();
  const bf16* base[(M + 2) / 3];
  for (int i = 0; i < M; i += 3) base[i / 3] = a.data + i * a.row;
  for (int64_t u = 0; u < units; ++u, b += 4 * W) {
    ahead.fetch(u);
    __m512bh column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, base[i / 3] + i % 3 * a.row, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], x, column[v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < (M + 2) / 3; ++i) base[i] += a.step;
  }
  write_tile<M, NV>((VF(&)[M][NV])acc, c, ldc, add);
}
#endif

template <class P>
using Microkernel = void (*)(int64_t, Lhs<P>, const P*, float*, int64_t, bool, Ahead);

// The microkernels of 1 .. MR rows.
template <class P, int NV, int M = Tile<P>::MR>
struct Microkernels : Microkernels<P, NV, M - 1> {
  constexpr Microkernels() { this->rows[M] = microkernel<M, NV>; }
};
template <class P, int NV>
struct Microkernels<P, NV, 0> {
  Microkernel<P> rows[Tile<P>::MR + 1] = {};
};

template <class P>
inline Microkernel<P> microkernel_of(int64_t m, int64_t n) {
  static constexpr Microkernels<P, 1> narrow_ones;
  static constexpr Microkernels<P, 2> wide_ones;
  return n <= W ? narrow_ones.rows[m] : wide_ones.rows[m];
}

// `done(m0, rows, n0, columns)` is called for each tile of C when it is complete and still in the
// L1 cache: columns n0 .. of one panel, rows m0 ...
template <class P, class Done>
inline void gemm(int64_t m, int64_t n, int64_t k, Lhs<P> a, Rhs<P> b, float* c, int64_t ldc,
                 bool add, const Done& done) {
  constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, KU = Tile<P>::KU, KC = Tile<P>::KC;
  const int64_t tiles = divide_up(m, MR), unit_bytes = NR * KU * static_cast<int64_t>(sizeof(P));
  for (int64_t k0 = 0; k0 < k; k0 += KC) {
    const int64_t units = padded_k<P>(min(KC, k - k0)) / KU;
    for (int64_t n0 = 0; n0 < n; n0 += NR) {
      const P* panel = b.rows(k0).columns(n0).data;
      // The next panel, a part of it with each tile; after the last one, this one again.
      const char* next = reinterpret_cast<const char*>(n0 + NR < n ? panel + b.panel : panel);
      for (int64_t m0 = 0; m0 < m; m0 += MR) {
        const Lhs<P> rows = {a.data + m0 * a.row + k0 / KU * a.step, a.row, a.step};
        const Ahead ahead = {next + m0 / MR * units * unit_bytes / tiles, unit_bytes / tiles};
        microkernel_of<P>(min(MR, m - m0), n - n0)(units, rows, panel, c + m0 * ldc + n0, ldc,
                                                   add || k0 > 0, ahead);
        if (k0 + KC >= k) done(m0, min(MR, m - m0), n0, min(NR, n - n0));
      }
    }
  }
}

template <class P>
inline void gemm(int64_t m, int64_t n, int64_t k, Lhs<P> a, Rhs<P> b, float* c, int64_t ldc,
                 bool add) {
  gemm(m, n, k, a, b, c, ldc, add, [](int64_t, int64_t, int64_t, int64_t) {});
}
