// Attention of queries that see few keys, as all do in a context of some characters. The rows are
// read in place: scores are tiles of dot products (gemm_in_place.inl), each tile a vector whose
// lane l is query l / 4 and key l % 4, and the softmax of a tile's queries happens in registers.
//
// Which queries come here depends on what each of them sees alone, and so do a query's bits.

constexpr int64_t FEW_KEYS = 16;

// The first query of a head that sees more.
inline int64_t first_of_many(const Attention& s) {
  return max(0, min(s.Tq, FEW_KEYS + s.Tq - s.Tk));
}

// All lanes of a tile's row combined, in each of them.
template <class F>
inline VF reduce_row(VF x, const F& combine) {
  x = combine(x, swap_lanes<2>(x, AllLanes{}));
  return combine(x, swap_lanes<1>(x, AllLanes{}));
}

template <class T>
struct FewKeys {
  using P = typename OperandOf<T>::type;
  static constexpr int64_t BLOCK = 32;  // queries at a time: a multiple of DROPOUT_ROWS
  static constexpr int64_t TILES = FEW_KEYS / DOT_COLUMNS;

  // Scores or the like of SUM_ROWS queries.
  struct Tiles {
    VF x[SUM_ROWS / DOT_ROWS][TILES];
  };

  const Attention& s;
  float c;
  int64_t head = 0;
  Head<T> q, k, v, out;
  alignas(64) float factors[BLOCK * FEW_KEYS];  // of dropout

  explicit FewKeys(const Attention& s) : s(s), c(s.scale * log2e) {}

  void start_head(int64_t index) {
    const int64_t b = index / s.H, h = index % s.H;
    head = index;
    q = {s.q, b, h}, k = {s.k, b, h}, v = {s.v, b, h}, out = {s.out, b, h};
  }

  // Tiles of keys that any of some queries sees, those from i on that are computed together.
  int64_t tiles_of(int64_t i, int64_t queries) const {
    return divide_up(visible_keys(s, i + queries - 1), DOT_COLUMNS);
  }

  void dots(const Head<T>& x, int64_t i, int64_t queries, const Head<T>& y, Tiles& to) const {
    const int64_t tiles = tiles_of(i, queries);
    for (int64_t r = 0; r < queries; r += DOT_ROWS)
      dot_tiles<P>(min(DOT_ROWS, queries - r), s.Tk, s.D, x.at(i + r), x.row, y.data, y.row, tiles,
                   to.x[r / DOT_ROWS]);
  }

  // x where a query of tile n sees the key, those from query i on.
  VF only_seen(VF x, int64_t i, int64_t n, float other = 0.0f) const {
    const VI key = (lanes() & (DOT_COLUMNS - 1)) - (lanes() >> 2);
    const int64_t seen = i + 1 + s.Tk - s.Tq - n * DOT_COLUMNS;
    return key < static_cast<int>(seen) ? x : splat(other);
  }

  // Of a tile's rows, in each of a row's lanes.
  struct Statistics {
    VF highest, total;
  };

  // Scores of DOT_ROWS queries from i on become probabilities:
  //   p_ij = exp2(c s_ij - m_i) / l_i, m_i = max_j c s_ij, l_i = sum_j exp2(c s_ij - m_i)
  Statistics softmax(VF (&x)[TILES], int64_t i, int64_t tiles) const {
    VF highest = splat(no_score), total = splat(0.0f);
    for (int64_t n = 0; n < tiles; ++n) {
      x[n] = only_seen(x[n] * c, i, n, no_score);
      highest = vmax(highest, x[n]);
    }
    highest = reduce_row(highest, Higher{});
    for (int64_t n = 0; n < tiles; ++n) {
      x[n] = only_seen(probability(x[n] - highest, P{}), i, n);
      total += x[n];
    }
    total = reduce_row(total, Add{});
    const VF inverse = total == 0.0f ? splat(0.0f) : 1.0f / total;  // 0 of one that sees no key
    for (int64_t n = 0; n < tiles; ++n) x[n] *= inverse;
    return {highest, total};
  }

  void draw_factors(int64_t q0, int64_t rows) {
    if (s.dropout.threshold == 0) return;
    for (int64_t i = 0; i < rows; i += DROPOUT_ROWS)
      for (int64_t j = 0; j < FEW_KEYS; j += W) {
        const Keep keep = dropout_factors(s.dropout, head, q0 + i, j);
        for (int64_t row = 0; row < DROPOUT_ROWS; ++row)
          store(factors + (i + row) * FEW_KEYS + j, keep.factor[row]);
      }
  }
};

template <class T>
struct FewKeysForward : FewKeys<T> {
  using Base = FewKeys<T>;
  using Base::BLOCK, Base::TILES, Base::s, Base::head, Base::q, Base::k, Base::v, Base::out,
      Base::factors;
  using typename Base::P, typename Base::Tiles, typename Base::Statistics;
  alignas(64) P p[BLOCK * FEW_KEYS];
  float m[BLOCK], l[BLOCK];

  explicit FewKeysForward(const Attention& s) : Base(s) {}

  // The queries first .. last of a head. The next ones' scores are computed between the softmax of
  // some and their sums, which so need not wait for it.
  void attend(int64_t index, int64_t first, int64_t last) {
    Base::start_head(index);
    for (int64_t q0 = first; q0 < last; q0 += BLOCK) {
      const int64_t rows = min(BLOCK, last - q0);
      const auto count = [&](int64_t r0) { return min(SUM_ROWS, rows - r0); };
      Tiles scores[2];
      Base::draw_factors(q0, rows);
      Base::dots(q, q0, count(0), k, scores[0]);
      for (int64_t r0 = 0, now = 0; r0 < rows; r0 += SUM_ROWS, now = 1 - now) {
        const int64_t tiles = Base::tiles_of(q0 + r0, count(r0));
        for (int64_t r = 0; r < count(r0); r += DOT_ROWS)
          probabilities(q0, r0 + r, tiles, scores[now].x[r / DOT_ROWS]);
        const int64_t next = r0 + SUM_ROWS;
        if (next < rows) Base::dots(q, q0 + next, count(next), k, scores[1 - now]);
        gemm_in_place(count(r0), s.D, visible_keys(s, q0 + r0 + count(r0) - 1),
                      Lhs<P>{p + r0 * FEW_KEYS, FEW_KEYS, Tile<P>::KU}, v.data, v.row,
                      out.out(q0 + r0), out.row);
      }
      if (s.lse) write_lse(q0, rows);
    }
  }

  // P of DOT_ROWS queries, from row r of the block on, with dropout.
  void probabilities(int64_t q0, int64_t r, int64_t tiles, VF (&x)[TILES]) {
    const Statistics of_rows = Base::softmax(x, q0 + r, tiles);
    for (int64_t n = 0; n < tiles; ++n) {
      const int64_t at = r * FEW_KEYS + n * DOT_COLUMNS;
      if (s.dropout.threshold > 0) x[n] *= load_tile(factors + at, FEW_KEYS);
      store_tile(p + at, FEW_KEYS, x[n]);
    }
    for (int64_t row = 0; row < DOT_ROWS; ++row) {
      m[r + row] = of_rows.highest[row * DOT_COLUMNS];
      l[r + row] = of_rows.total[row * DOT_COLUMNS];
    }
  }

  void write_lse(int64_t q0, int64_t rows) const {
    for_vectors(rows, [&](int64_t i, auto part) {
      const VF sums = load(l + i, part), lse = load(m + i, part) * (1 / log2e) + log(sums);
      store(s.lse + head * s.Tq + q0 + i, sums == 0.0f ? splat(no_score) : lse, part);
    });
  }
};

// The backward of heads whose queries all see few keys, as attention_grad.inl states it.
template <class T>
struct FewKeysBackward : FewKeys<T> {
  using Base = FewKeys<T>;
  using Base::BLOCK, Base::TILES, Base::s, Base::q, Base::k, Base::v, Base::factors;
  using typename Base::P, typename Base::Tiles;
  const AttentionGrad& grad;
  Head<T> dout, dq, dk, dv;
  alignas(64) float p[BLOCK * FEW_KEYS];
  alignas(64) float ds[BLOCK * FEW_KEYS];
  P* copy;

  static bool takes(const Attention& s) { return s.Tk <= FEW_KEYS && s.Tq <= BLOCK; }

  FewKeysBackward(const AttentionGrad& grad, Frame& frame)
      : Base(grad.forward),
        grad(grad),
        copy(take<P>(frame, max(lhs_transposed_elements<P>(BLOCK, FEW_KEYS),
                                BLOCK * row_stride<P>(padded_k<P>(FEW_KEYS))))) {}

  void attend(int64_t index) {
    const int64_t b = index / s.H, h = index % s.H;
    Base::start_head(index);
    dout = {grad.dout, b, h}, dq = {grad.dq, b, h}, dk = {grad.dk, b, h}, dv = {grad.dv, b, h};
    Base::draw_factors(0, s.Tq);
    for (int64_t i = 0; i < s.Tq; i += SUM_ROWS) probabilities(i, min(SUM_ROWS, s.Tq - i));
    key_grads(p, dout, dv);
    key_grads(ds, q, dk);
    const Lhs<P> rows = lhs_rows(ds, FEW_KEYS, s.Tq, s.Tk, copy);
    for (int64_t i = 0; i < s.Tq; i += SUM_ROWS) {
      const int64_t count = min(SUM_ROWS, s.Tq - i);
      gemm_in_place(count, s.D, visible_keys(s, i + count - 1), rows.rows(i), k.data, k.row,
                    dq.out(i), dq.row);
    }
  }

  // p f and dS of SUM_ROWS queries, of which there are some.
  void probabilities(int64_t first, int64_t queries) {
    Tiles scores, dp;
    Base::dots(q, first, queries, k, scores);
    Base::dots(dout, first, queries, v, dp);
    for (int64_t r = 0; r < queries; r += DOT_ROWS)
      probabilities(first + r, Base::tiles_of(first, queries), scores.x[r / DOT_ROWS],
                    dp.x[r / DOT_ROWS]);
  }
  void probabilities(int64_t i, int64_t tiles, VF (&of)[TILES], VF (&dp)[TILES]) {
    Base::softmax(of, i, tiles);
    VF delta = splat(0.0f);
    for (int64_t n = 0; n < tiles; ++n) {
      const int64_t at = i * FEW_KEYS + n * DOT_COLUMNS;
      dp[n] = Base::only_seen(dp[n], i, n);
      VF kept = of[n];
      if (s.dropout.threshold > 0) {
        const VF factor = load_tile(factors + at, FEW_KEYS);
        dp[n] *= factor;
        kept *= factor;
      }
      store_tile(p + at, FEW_KEYS, kept);
      delta += of[n] * dp[n];
    }
    delta = reduce_row(delta, Add{});
    for (int64_t n = 0; n < tiles; ++n)
      store_tile(ds + i * FEW_KEYS + n * DOT_COLUMNS, FEW_KEYS, of[n] * (dp[n] - delta) * s.scale);
  }

  // to = X' Y, a key's sum over the queries that see it.
  void key_grads(const float* x, const Head<T>& y, const Head<T>& to) {
    const Lhs<P> a = lhs_transposed(x, FEW_KEYS, s.Tq, s.Tk, copy);
    for (int64_t j = 0; j < s.Tk; j += SUM_ROWS) {
      const int64_t from = max(0, j + s.Tq - s.Tk) / Tile<P>::KU * Tile<P>::KU;
      gemm_in_place(min(SUM_ROWS, s.Tk - j), s.D, s.Tq - from, a.rows(j).columns(from), y.at(from),
                    y.row, to.out(j), to.row);
    }
  }
};
