// C (M, N) = or += A (M, K) B (K, N) in fp32 accumulators, on the operands of pack.inl.
//
// Each element of C is a sum over blocks of KC products, each block summed from zero in the order
// of k, whatever M and N: a row of C has the same bits alone and in a batch. (On tiles it is one
// sum over all of K, which starts from C where that is added to.) C holds whole panels (ldc >= N
// rounded up to NR).

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

// What a microkernel brings into the cache for a later one, step by step of its own loop: large
// weights come from the outer cache or from memory.
struct Ahead {
  const char* data;
  int64_t step;  // bytes

  void fetch(int64_t unit) const { __builtin_prefetch(data + unit * step, 0, 2); }
};

// C (M, NV vectors) from one panel; A's rows are reached from a base pointer per three of them. All
// loops over accumulators are unrolled by name: g++ keeps an array that a loop indexes in memory,
// before and after the sums, which costs as much as 8 steps of them.
template <int M, int NV>
inline void microkernel(int64_t units, const Lhs<float>& a, const float* b, float* c, int64_t ldc,
                        bool add, const Ahead& ahead) {
  VF acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = splat(0.0f);
  const float* base[(M + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < (M + 2) / 3; ++i) base[i] = a.data + 3 * i * a.row;
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
#pragma GCC unroll 8
    for (int i = 0; i < (M + 2) / 3; ++i) base[i] += a.step;
  }
  write_tile<M, NV>(acc, c, ldc, add);
}

#if GPTFAST_BF16_DOT && !GPTFAST_AMX
// The same on pairs of bf16: c += a[2u] b[2u] + a[2u+1] b[2u+1].
template <int M, int NV>
inline void microkernel(int64_t units, const Lhs<bf16>& a, const bf16* b, float* c, int64_t ldc,
                        bool add, const Ahead& ahead) {
  VF acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = splat(0.0f);
  const bf16* base[(M + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < (M + 2) / 3; ++i) base[i] = a.data + 3 * i * a.row;
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
      for (int v = 0; v < NV; ++v)
        acc[i][v] = (VF)_mm512_dpbf16_ps((__m512)acc[i][v], x, column[v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < (M + 2) / 3; ++i) base[i] += a.step;
  }
  write_tile<M, NV>(acc, c, ldc, add);
}
#endif

// By reference: to read at once what was just written in parts waits for all earlier writes to
// reach the cache. g++ joins scalars into vectors that do so too, unless it is told not to
// (setup.py).
template <class P>
using Microkernel = void (*)(int64_t, const Lhs<P>&, const P*, float*, int64_t, bool, const Ahead&);

// Rows of a tile that is `n` columns wide, at most NR.
template <class P>
constexpr int tile_rows_for(int64_t n) {
  return n <= W ? Tile<P>::TALL : Tile<P>::MR;
}

// The microkernels of 1 row and more.
template <class P, int NV, int M = tile_rows_for<P>(NV * W)>
struct Microkernels : Microkernels<P, NV, M - 1> {
  constexpr Microkernels() { this->rows[M] = microkernel<M, NV>; }
};
template <class P, int NV>
struct Microkernels<P, NV, 0> {
  Microkernel<P> rows[tile_rows_for<P>(NV * W) + 1] = {};
};

template <class P>
inline Microkernel<P> microkernel_of(int64_t m, int64_t n) {
  static constexpr Microkernels<P, 1> narrow_ones;
  static constexpr Microkernels<P, 2> wide_ones;
  return n <= W ? narrow_ones.rows[m] : wide_ones.rows[m];
}

// The vectors that a product reads of B, dense or narrower (pack.inl), and the step
//   acc += sum_e x_e b_e
// of KU products that the microkernels do for each row.
template <class P>
struct Step;

template <>
struct Step<float> {
  using Vector = VF;
  static VF repeat(const float* x) { return splat(*x); }
  static VF read(const float* b) { return load(b); }
  static VF read(const bf16* b) { return load(b, Full{}); }
  static VF read(const int8_t* b) { return widen_bytes(b); }
  static VF add(VF acc, VF x, VF b) { return acc + x * b; }
};

#if GPTFAST_BF16_DOT
template <>
struct Step<bf16> {
  using Vector = __m512bh;
  static Vector repeat(const bf16* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vector read(const bf16* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static Vector read(const int8_t* b) {
    return _mm512_cvtne2ps_pbh((__m512)widen_bytes(b + W), (__m512)widen_bytes(b));
  }
  static VF add(VF acc, Vector x, Vector b) { return (VF)_mm512_dpbf16_ps((__m512)acc, x, b); }
};
#endif

// One row of A times NV vectors of each of PANELS panels: a row alone needs several panels at once,
// as every sum waits for its last step.
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

// How many products are one sum: KC, or where the blocks that are widened are twice as large, half.
template <class P, class B>
constexpr int64_t sum_depth =
    GPTFAST_BF16_DOT && sizeof(B) < sizeof(P) ? Tile<P>::KC / 2 : Tile<P>::KC;

// gemm() for one row; panels of B `panel` apart.
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

// An epilogue is called for each tile of C, columns n0 .. of some panels, rows m0 .., when it is
// complete and still in the L1 cache: done(m0, rows, n0, columns). One that reads or writes memory
// of its own has it brought into the cache while the tile is computed, by `fetch`.
template <class Fetch, class Done>
struct Fetching {
  Fetch fetch;
  Done done;

  void operator()(int64_t m0, int64_t rows, int64_t n0, int64_t columns) const {
    done(m0, rows, n0, columns);
  }
};
template <class Fetch, class Done>
Fetching(Fetch, Done) -> Fetching<Fetch, Done>;

template <class Done>
inline void fetch_for(const Done&, int64_t, int64_t, int64_t, int64_t) {}
template <class Fetch, class Done>
inline void fetch_for(const Fetching<Fetch, Done>& epilogue, int64_t m0, int64_t rows, int64_t n0,
                      int64_t columns) {
  epilogue.fetch(m0, rows, n0, columns);
}

// Brings a block of a matrix into the cache, to be read or, with WRITE, to be written.
template <bool WRITE, class T>
inline void fetch_block(const T* p, int64_t ld, int64_t rows, int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += line) __builtin_prefetch(p + i * ld + j, WRITE);
}

// Matrices of the next task: a product that is given them has each microkernel fetch lines of them,
// one per step, where it would fetch the product's next panel.
class Upcoming {
 public:
  void clear() { count = at = row = line = 0, bytes = 0; }

  // Rows of `length` elements; matrices beyond a part of the L2 cache are left out.
  template <class T>
  void add(const T* data, int64_t ld, int64_t rows, int64_t length) {
    constexpr int64_t element = sizeof(T), most = 512 << 10;
    bytes += rows * length * element;
    if (count == MOST || bytes > most) return;
    if (ld == length)
      matrices[count++] = {reinterpret_cast<const char*>(data), 64,
                           divide_up(rows * length * element, 64), 1};
    else
      matrices[count++] = {reinterpret_cast<const char*>(data), ld * element, rows,
                           divide_up(length * element, 64)};
  }

  // For a microkernel of so many steps.
  Ahead next(int64_t units, const Ahead& otherwise) {
    if (at == count) return otherwise;
    const Matrix& from = matrices[at];
    const Ahead found = {from.data + row * from.step + line * 64, from.step};
    row += units;
    if (row >= from.rows) row = 0, ++line;
    if (line == from.lines) line = 0, ++at;
    return found;
  }

 private:
  struct Matrix {
    const char* data;
    int64_t step, rows, lines;  // bytes from row to row; lines of 64 bytes in each
  };
  static constexpr int MOST = 8;
  Matrix matrices[MOST];
  int count = 0, at = 0;
  int64_t row = 0, line = 0, bytes = 0;
};

struct NoEpilogue {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};
constexpr NoEpilogue no_epilogue;

template <class P, class Done>
inline void gemm(int64_t m, int64_t n, int64_t k, const Lhs<P>& a, Rhs<P> b, float* c, int64_t ldc,
                 bool add, const Done& done, Upcoming* upcoming = nullptr) {
  constexpr int MR = Tile<P>::MR, NR = Tile<P>::NR, KU = Tile<P>::KU, KC = Tile<P>::KC;
  if (m == 1) return gemm_row(n, k, a, b.data, b.panel, c, add, done);
  const int64_t unit_bytes = NR * KU * static_cast<int64_t>(sizeof(P)),
                part = unit_bytes / divide_up(m, MR);
  for (int64_t k0 = 0; k0 < k; k0 += KC) {
    const int64_t units = padded_k<P>(min(KC, k - k0)) / KU;
    for (int64_t n0 = 0; n0 < n; n0 += NR) {
      const P* panel = b.rows(k0).columns(n0).data;
      // The next panel, a part of it with each tile; after the last one, this one again.
      Ahead ahead = {reinterpret_cast<const char*>(n0 + NR < n ? panel + b.panel : panel), part};
      const int64_t columns = min(NR, n - n0), most = tile_rows_for<P>(columns);
      for (int64_t m0 = 0; m0 < m; m0 += most, ahead.data += units * part) {
        const Lhs<P> rows = a.rows(m0).columns(k0);
        const int64_t tile = min(most, m - m0);
        const bool last = k0 + KC >= k;
        if (last) fetch_for(done, m0, tile, n0, columns);
        microkernel_of<P>(tile, columns)(units, rows, panel, c + m0 * ldc + n0, ldc, add || k0 > 0,
                                         upcoming ? upcoming->next(units, ahead) : ahead);
        if (last) done(m0, tile, n0, columns);
      }
    }
  }
}

template <class P>
inline void gemm(int64_t m, int64_t n, int64_t k, const Lhs<P>& a, Rhs<P> b, float* c, int64_t ldc,
                 bool add) {
  gemm(m, n, k, a, b, c, ldc, add, no_epilogue);
}
