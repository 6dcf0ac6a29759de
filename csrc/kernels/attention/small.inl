// Attention over few keys, as in a model whose context is some dozens of characters. Rows are read
// in place: scores are tiles of dot products (direct.inl), each tile a vector whose lane l is query
// l / 4 and key l % 4, and the softmax of a tile's queries happens in registers. A single query has
// tiles of its own, with the same bits.
//
// attention.inl chooses this algorithm for a call by its number of keys, cache.inl for the engine
// by the model's context.
#pragma once

#include "../kernels.h"
#include "../matmul/direct.inl"
#include "../matmul/layout.inl"
#include "../simd/elements.inl"
#include "../simd/math.inl"
#include "../simd/philox.inl"
#include "../simd/vec.inl"
#include "../threads/scratch.h"
#include "heads.inl"
#include "softmax.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t MAX_SMALL_KEYS = 64;

// The largest number of keys for which reading in place beats packing, measured on AVX2 (forward
// and backward, D 32 to 128): in fp32 the two meet between 64 and 80 keys, in bf16 at 48, because
// its elements are widened at each use. Packing pays sooner with short vectors, and with AMX tiles,
// whose products take little of the time.
template <class T, class P = typename OperandOf<T>::type>
constexpr int64_t max_small_keys = W < 8                   ? (sizeof(T) < sizeof(P) ? 0 : 16)
                                   : lhs_by_rows<P>        ? 16
                                   : sizeof(T) < sizeof(P) ? 40
                                                           : MAX_SMALL_KEYS;

// Combines all lanes of each row of a tile; every lane of the row receives the result.
template <class F>
inline VF reduce_row(VF x, const F& combine) {
  x = combine(x, swap_lanes<2>(x, AllLanes{}));
  return combine(x, swap_lanes<1>(x, AllLanes{}));
}

// Computes one head at a time.
template <class T>
struct SmallAttention {
  using P = typename OperandOf<T>::type;
  static constexpr int64_t BLOCK = 64;  // queries per block, a multiple of DROPOUT_ROWS
  static constexpr int64_t TILES = MAX_SMALL_KEYS / DOT_COLUMNS;

  // Tiles of scores, or of dP, of SUM_ROWS queries.
  struct Tiles {
    VF x[SUM_ROWS / DOT_ROWS][TILES];
  };

  const Attention& s;
  float c;
  int64_t head = 0;
  Head<T> q, k, v, out;
  alignas(64) float factors[DROPOUT_ROWS * MAX_SMALL_KEYS];
  alignas(64) P p[SUM_ROWS * MAX_SMALL_KEYS];
  float m[BLOCK], l[BLOCK];

  explicit SmallAttention(const Attention& s) : s(s), c(s.scale * log2e) {}

  void start_head(int64_t index) {
    const int64_t b = index / s.H, h = index % s.H;
    head = index;
    q = {s.q, b, h}, k = {s.k, b, h}, v = {s.v, b, h}, out = {s.out, b, h};
  }

  // Computes a head's queries [first, last). The scores of the next SUM_ROWS queries are computed
  // between the softmax of the present ones and their product with V, which therefore need not wait
  // for the softmax.
  void attend(int64_t index, int64_t first, int64_t last) {
    start_head(index);
    if (last - first == 1 && s.dropout.threshold == 0) return attend_one(first);
    for (int64_t q0 = first; q0 < last; q0 += BLOCK) {
      const int64_t rows = min(BLOCK, last - q0);
      const auto count = [&](int64_t r0) { return min(SUM_ROWS, rows - r0); };
      Tiles scores[2];
      dots(q, q0, count(0), k, scores[0]);
      for (int64_t r0 = 0, now = 0; r0 < rows; r0 += SUM_ROWS, now = 1 - now) {
        const int64_t tiles = tiles_of(q0 + r0, count(r0)), next = r0 + SUM_ROWS;
        draw_factors(q0 + r0);
        for (int64_t r = 0; r < count(r0); r += DOT_ROWS)
          probabilities(q0, r0 + r, tiles, scores[now].x[r / DOT_ROWS]);
        if (next < rows) dots(q, q0 + next, count(next), k, scores[1 - now]);
        gemm_in_place(count(r0), s.D, key_terms(s, q0 + r0, 0),
                      Lhs<P>{p, MAX_SMALL_KEYS, Tile<P>::KU}, v.data, v.row, out.out(q0 + r0),
                      out.row);
      }
      if (s.lse) RowSums(s, head).write(q0, rows, m, l);
    }
  }

  // Computes a single query, as in decode: a vector holds its scores of W keys, and the sum over
  // the keys has the same order as in tiles.
  [[gnu::noinline]] void attend_one(int64_t i) {
    const int64_t keys = visible_keys(s, i), vectors = divide_up(keys, W);
    VF x[MAX_SMALL_KEYS / W], highest = splat(neg_inf), total = splat(0.0f);
    dot_row<P>(keys, s.D, q.at(i), k.data, k.row, x);
    const auto seen = [&](int64_t n) { return Tail{static_cast<int>(min(W, keys - n * W))}; };
    for (int64_t n = 0; n < vectors; ++n) highest = vmax(highest, mask(x[n], seen(n), neg_inf));
    highest = splat(max(highest));
    for (int64_t n = 0; n < vectors; ++n) {
      x[n] = mask(unnormalized_probability(x[n], highest), seen(n));
      total = add_in_tile_order(total, x[n]);
    }
    total = splat(reduce_row(total, Add{})[0]);
    const VF inverse = inverse_of(total);
    for (int64_t n = 0; n < vectors; ++n) store(p + n * W, x[n] * inverse, Full{});
    gemm_in_place(1, s.D, key_terms(s, i, 0), Lhs<P>{p, MAX_SMALL_KEYS, Tile<P>::KU}, v.data, v.row,
                  out.out(i), out.row);
    m[0] = highest[0], l[0] = total[0];
    if (s.lse) RowSums(s, head).write(i, 1, m, l);
  }

  // In the first DOT_COLUMNS lanes, sum + x[0 ..] + x[DOT_COLUMNS ..] + ..., in this order: the
  // order in which tiles are added.
  template <int S = 0>
  static VF add_in_tile_order(VF sum, VF x) {
    if constexpr (S == W)
      return sum;
    else
      return add_in_tile_order<S + DOT_COLUMNS>(sum + rotate<S>(x, AllLanes{}), x);
  }

  // Writes P of DOT_ROWS queries, from row r of the block on, with dropout, and their m and l.
  void probabilities(int64_t q0, int64_t r, int64_t tiles, VF (&x)[TILES]) {
    const Statistics of_rows = softmax(x, q0 + r, tiles);
    for (int64_t n = 0; n < tiles; ++n) {
      if (s.dropout.threshold > 0) x[n] *= factors_of(q0 + r, n);
      store_tile(p + r % SUM_ROWS * MAX_SMALL_KEYS + n * DOT_COLUMNS, MAX_SMALL_KEYS, x[n]);
    }
    for (int64_t row = 0; row < DOT_ROWS; ++row) {
      m[r + row] = of_rows.highest[row * DOT_COLUMNS];
      l[r + row] = of_rows.total[row * DOT_COLUMNS];
    }
  }

  // How many tiles of keys any of the queries [i, i + queries) sees.
  int64_t tiles_of(int64_t i, int64_t queries) const {
    return divide_up(visible_keys(s, i + queries - 1), DOT_COLUMNS);
  }

  // Tiles of X Y' for the queries from i on: scores Q K', or dP = dO V'.
  void dots(const Head<T>& x, int64_t i, int64_t queries, const Head<T>& y, Tiles& to) const {
    const int64_t tiles = tiles_of(i, queries);
    for (int64_t r = 0; r < queries; r += DOT_ROWS)
      dot_tiles<P>(min(DOT_ROWS, queries - r), s.Tk, s.D, x.at(i + r), x.row, y.data, y.row, tiles,
                   to.x[r / DOT_ROWS]);
  }

  // x, with `other` where the key is masked, for tile n of the queries from i on.
  VF mask_unseen(VF x, int64_t i, int64_t n, float other = 0.0f) const {
    const VI key = (lanes() & (DOT_COLUMNS - 1)) - (lanes() >> 2);
    const int64_t seen = i + 1 + s.Tk - s.Tq - n * DOT_COLUMNS;
    return key < static_cast<int>(seen) ? x : splat(other);
  }

  // Maximum and sum of each row of a tile, repeated in all lanes of the row.
  struct Statistics {
    VF highest, total;
  };

  // A probability before it is divided by the sum of its row.
  VF unnormalized_probability(VF x, VF highest) const {
    return probability(exponent(x, highest, c), P{});
  }

  // 1 / total, but 0 for a query that sees no key.
  static VF inverse_of(VF total) { return total == 0.0f ? splat(0.0f) : 1.0f / total; }

  // Turns the scores of DOT_ROWS queries from i on into probabilities, 0 where the key is masked.
  Statistics softmax(VF (&x)[TILES], int64_t i, int64_t tiles) const {
    VF highest = splat(neg_inf), total = splat(0.0f);
    for (int64_t n = 0; n < tiles; ++n) highest = vmax(highest, mask_unseen(x[n], i, n, neg_inf));
    highest = reduce_row(highest, Max{});
    for (int64_t n = 0; n < tiles; ++n) {
      x[n] = mask_unseen(unnormalized_probability(x[n], highest), i, n);
      total += x[n];
    }
    total = reduce_row(total, Add{});
    const VF inverse = inverse_of(total);
    for (int64_t n = 0; n < tiles; ++n) x[n] *= inverse;
    return {highest, total};
  }

  // Draws the dropout factors of DROPOUT_ROWS queries from i on, unless i lies within a group that
  // has been drawn already.
  void draw_factors(int64_t i) {
    if (s.dropout.threshold == 0 || i % DROPOUT_ROWS > 0) return;
    const int64_t keys = min(MAX_SMALL_KEYS, visible_keys(s, i + DROPOUT_ROWS - 1));
    for (int64_t j = 0; j < keys; j += W) {
      const DropoutFactors drawn = dropout_factors(s.dropout, head, i, j);
      for (int64_t row = 0; row < DROPOUT_ROWS; ++row)
        store(factors + row * MAX_SMALL_KEYS + j, drawn.row[row]);
    }
  }
  VF factors_of(int64_t i, int64_t n) const {
    return load_tile(factors + i % DROPOUT_ROWS * MAX_SMALL_KEYS + n * DOT_COLUMNS, MAX_SMALL_KEYS);
  }
};

// The backward over few keys, with the formulas of blocked_backward.inl. The softmax is recomputed
// from the scores.
template <class T>
struct SmallAttentionBackward {
  using P = typename OperandOf<T>::type;
  using Small = SmallAttention<T>;
  static constexpr int64_t TILES = Small::TILES;
  static constexpr int64_t MAX_QUERIES = MAX_SMALL_KEYS + DROPOUT_ROWS;
  static_assert(SUM_ROWS == DOT_COLUMNS, "keys that are summed together are of one tile");

  const AttentionBackward& grad;
  const Attention& s;
  int64_t start;  // row 0 of p and ds is this query; the queries before it see no key
  Small small;
  Head<T> dout, dq, dk, dv;
  alignas(64) float p[MAX_QUERIES * MAX_SMALL_KEYS];  // p f
  alignas(64) float ds[MAX_QUERIES * MAX_SMALL_KEYS];
  ScratchFrame frame;
  P* copy;

  explicit SmallAttentionBackward(const AttentionBackward& grad)
      : grad(grad),
        s(grad.forward),
        start(max(0, s.Tq - s.Tk) / DROPOUT_ROWS * DROPOUT_ROWS),
        small(s),
        copy(alloc<P>(frame, max(lhs_transposed_elements<P>(MAX_QUERIES, MAX_SMALL_KEYS),
                                 MAX_QUERIES * row_stride<P>(padded_k<P>(MAX_SMALL_KEYS))))) {}

  void attend(int64_t index) {
    const int64_t b = index / s.H, h = index % s.H;
    small.start_head(index);
    dout = {grad.dout, b, h}, dq = {grad.dq, b, h}, dk = {grad.dk, b, h}, dv = {grad.dv, b, h};
    const auto count = [&](int64_t i) { return min(SUM_ROWS, s.Tq - i); };
    for (int64_t i = start; i < s.Tq; i += SUM_ROWS) {
      typename Small::Tiles scores, dp;
      small.dots(small.q, i, count(i), small.k, scores);
      small.dots(dout, i, count(i), small.v, dp);
      small.draw_factors(i);
      for (int64_t r = 0; r < count(i); r += DOT_ROWS)
        score_grads(i + r, small.tiles_of(i, count(i)), scores.x[r / DOT_ROWS], dp.x[r / DOT_ROWS]);
    }
    key_grads(p, dout, dv);
    key_grads(ds, small.q, dk);
    const Lhs<P> rows = lhs_rows(ds, MAX_SMALL_KEYS, s.Tq - start, s.Tk, copy);
    for (int64_t i = 0; i < start; ++i)
      for_vectors(s.D, [&](int64_t j, auto part) { store(dq.out(i) + j, splat(0.0f), part); });
    for (int64_t i = start; i < s.Tq; i += SUM_ROWS)
      gemm_in_place(count(i), s.D, key_terms(s, i, 0), rows.rows(i - start), small.k.data,
                    small.k.row, dq.out(i), dq.row);
  }

  // Writes p f and dS of DOT_ROWS queries from i on. Turns `of` from scores into p, and multiplies
  // dP by f.
  void score_grads(int64_t i, int64_t tiles, VF (&of)[TILES], VF (&dp)[TILES]) {
    const auto at = [&](int64_t n) { return (i - start) * MAX_SMALL_KEYS + n * DOT_COLUMNS; };
    small.softmax(of, i, tiles);
    VF delta = splat(0.0f);
    for (int64_t n = 0; n < tiles; ++n) {
      VF kept = of[n];
      dp[n] = small.mask_unseen(dp[n], i, n);
      if (s.dropout.threshold > 0) {
        const VF factor = small.factors_of(i, n);
        dp[n] *= factor;
        kept *= factor;
      }
      store_tile(p + at(n), MAX_SMALL_KEYS, kept);
      delta += of[n] * dp[n];
    }
    delta = reduce_row(delta, Add{});
    for (int64_t n = 0; n < tiles; ++n)
      store_tile(ds + at(n), MAX_SMALL_KEYS, of[n] * (dp[n] - delta) * s.scale);
  }

  // to = X' Y: each key's row is the sum over the queries that see it.
  void key_grads(const float* x, const Head<T>& y, const Head<T>& to) {
    const int64_t rows = s.Tq - start;
    const Lhs<P> a = lhs_transposed(x, MAX_SMALL_KEYS, rows, s.Tk, copy);
    for (int64_t j = 0; j < s.Tk; j += SUM_ROWS)
      gemm_in_place(min(SUM_ROWS, s.Tk - j), s.D, query_terms(s, j, start, rows), a.rows(j),
                    y.at(start), y.row, to.out(j), to.row);
  }
};

template <class T>
void small_attention(const Attention& s, const Parallel& parallel) {
  const int64_t blocks = divide_up(s.Tq, SmallAttention<T>::BLOCK);
  const HeadTasks split(s, blocks, parallel);
  run_tasks(parallel, split.tasks, [&](int64_t task) {
    const int64_t part = task % split.parts,
                  first = blocks * part / split.parts * SmallAttention<T>::BLOCK,
                  last = min(s.Tq, blocks * (part + 1) / split.parts * SmallAttention<T>::BLOCK);
    SmallAttention<T> small(s);
    for (int64_t head = split.first_head(task); head < split.last_head(task); ++head)
      small.attend(head, first, last);
  });
}

template <class T>
void small_attention_backward(const AttentionBackward& grad, const Parallel& parallel) {
  const HeadTasks split(grad.forward, 1, parallel);
  run_tasks(parallel, split.tasks, [&](int64_t task) {
    SmallAttentionBackward<T> small(grad);
    for (int64_t head = split.first_head(task); head < split.last_head(task); ++head)
      small.attend(head);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
