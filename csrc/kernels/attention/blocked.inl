// Causal attention in blocks with an online softmax (Dao, "FlashAttention-2", arXiv:2307.08691), no
// (T, T) matrix in memory. Query i sees the keys j < visible(i) = i + 1 + Tk - Tq.
//
// One task computes some query blocks of one head, or of several heads in turn. Key blocks start at
// multiples of KEYS for every query, and the steps of a row depend on that row alone, so its result
// has the same bits in any batch.
#pragma once

#include "../kernels.h"
#include "../matmul/epilogue.inl"
#include "../matmul/gemm.inl"
#include "../matmul/layout.inl"
#include "../matmul/masked.inl"
#include "../matmul/microkernel.inl"
#include "../matmul/prefetch.inl"
#include "../simd/elements.inl"
#include "../simd/math.inl"
#include "../simd/philox.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "../threads/scratch.h"
#include "heads.inl"
#include "softmax.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t QUERIES = 96;  // a multiple of every MR, MR_NARROW and KPAD, and of DROPOUT_ROWS
constexpr int64_t KEYS = 128;

// Stride between rows of scores. The padding keeps the same column of many rows out of a single set
// of the L1 cache: the backward reads columns in place.
constexpr int64_t SCORES_STRIDE = KEYS + 16;

// Computes one head at a time: holds the head's packed keys and values, and scratch memory for one
// block of queries.
template <class T>
struct BlockedAttention {
  using P = typename OperandOf<T>::type;

  const Attention& s;
  int64_t head;  // b * H + h
  Head<T> q, out;
  int64_t ld;  // row stride of o
  float c;
  ScratchFrame frame;
  P *key_panels, *value_panels;
  Rhs<P> keys, values;
  float *scores, *o;
  P *q_copy, *p_copy;
  float m[QUERIES], l[QUERIES];
  PrefetchQueue queue;

  BlockedAttention(const Attention& s, int64_t used_keys)
      : s(s),
        ld(padded_n<P>(s.D)),
        c(s.scale * log2e),
        key_panels(alloc<P>(frame, rhs_elements<P>(s.D, used_keys))),
        value_panels(alloc<P>(frame, rhs_elements<P>(used_keys, s.D))),
        scores(alloc<float>(frame, QUERIES * SCORES_STRIDE)),
        o(alloc<float>(frame, QUERIES * ld)),
        q_copy(alloc<P>(frame, QUERIES * row_stride<P>(padded_k<P>(s.D)))),
        p_copy(alloc<P>(frame, QUERIES * row_stride<P>(KEYS))) {}

  void start_head(int64_t index, int64_t used_keys) {
    const Head<T> k(s.k, index / s.H, index % s.H), v(s.v, index / s.H, index % s.H);
    start_head(index, pack_transposed(k.data, k.row, s.D, used_keys, key_panels),
               pack_straight(v.data, v.row, used_keys, s.D, value_panels));
  }
  void start_head(int64_t index, Rhs<P> packed_keys, Rhs<P> packed_values) {
    head = index, keys = packed_keys, values = packed_values;
    q = {s.q, index / s.H, index % s.H}, out = {s.out, index / s.H, index % s.H};
  }

  // Queues the next head's rows, which the products of the present head prefetch.
  void prefetch_next(int64_t index, int64_t used_keys) {
    queue.clear();
    prefetch_head<T>({s.k, s.v}, s, index, used_keys, queue);
    prefetch_head<T>({s.q, s.out}, s, index, s.Tq, queue);
  }

  // How many keys of the block from k0 on are seen by any row before `row` of the query block.
  int64_t block_keys(int64_t q0, int64_t row, int64_t k0) const {
    return min(KEYS, visible_keys(s, q0 + row - 1) - k0);
  }

  void query_block(int64_t q0) {
    const int64_t rows = min(QUERIES, s.Tq - q0), last = visible_keys(s, q0 + rows - 1);
    const Lhs<P> queries = lhs_rows(q.at(q0), q.row, rows, s.D, q_copy);
    start_rows(rows);
    for (int64_t k0 = 0; k0 < last; k0 += KEYS) {
      const int64_t max_tile = tile_rows_for<P>(last - k0);
      for (int64_t r0 = 0; r0 < rows; r0 += max_tile)
        softmax_tile(queries, q0, r0, min(max_tile, rows - r0), k0);
      drop_probabilities(q0, rows, k0);
      const int64_t seen_by_all = max(0, block_keys(q0, 1, k0));
      const bool finite =
          finite_rows(values.rows(k0), s.D, seen_by_all, padded_k<P>(block_keys(q0, rows, k0)));
      for (int64_t r0 = 0; r0 < rows; r0 += max_tile) {
        const int64_t tile = min(max_tile, rows - r0), count = block_keys(q0, r0 + tile, k0);
        if (count <= 0) continue;
        gemm_masked(finite, key_terms(s, q0 + r0, k0), tile, s.D, count,
                    probabilities(r0, tile, count), values.rows(k0), o + r0 * ld, ld, k0 > 0,
                    &queue);
      }
    }
    finish_queries(q0, rows);
  }

  void start_rows(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      m[i] = neg_inf;
      l[i] = 0.0f;
    }
  }

  // Whether softmax_rows writes probabilities directly in the type that P V reads. With dropout it
  // does not, because apply_dropout changes them in fp32 first.
  bool writes_operands() const { return sizeof(P) < sizeof(float) && s.dropout.threshold == 0; }
  static constexpr int64_t narrow_stride = row_stride<P>(KEYS);
  P* narrow_row(int64_t i) const { return p_copy + i * narrow_stride; }

  Lhs<P> probabilities(int64_t r0, int64_t rows, int64_t keys) const {
    if (writes_operands()) return {narrow_row(r0), narrow_stride, Tile<P>::KU};
    return lhs_rows(scores + r0 * SCORES_STRIDE, SCORES_STRIDE, rows, keys, p_copy);
  }

  // Applies dropout to groups of DROPOUT_ROWS rows, which share their random blocks, up to the last
  // key that any row of the group sees.
  void drop_probabilities(int64_t q0, int64_t rows, int64_t k0) {
    for (int64_t r0 = 0; r0 < rows; r0 += DROPOUT_ROWS) {
      const int64_t count = min(DROPOUT_ROWS, rows - r0);
      apply_dropout(s.dropout, head, q0 + r0, k0, count, block_keys(q0, r0 + count, k0),
                    scores + r0 * SCORES_STRIDE, SCORES_STRIDE);
    }
  }

  // S = Q K' for `tile` rows from r0 on, then for each row, with c = scale log2(e),
  //   m' = max(m, max_j s_j), p_j = exp2(c (s_j - m')), l' = l exp2(c (m - m')) + sum_j p_j
  // and rows of O that have a value already are multiplied by exp2(c (m - m')).
  void softmax_tile(const Lhs<P>& queries, int64_t q0, int64_t r0, int64_t tile, int64_t k0) {
    const int64_t width = block_keys(q0, r0 + tile, k0);
    if (width <= 0) return;
    gemm(tile, width, s.D, queries.rows(r0), keys.columns(k0), scores + r0 * SCORES_STRIDE,
         SCORES_STRIDE, false, NoEpilogue{}, &queue);
    for_vectors(tile, [&](int64_t i, auto part) {
      softmax_rows(q0, r0 + i, min(W, tile - i), k0, width, part);
    });
  }

  // The softmax of softmax_tile for the rows [first, first + n), n <= W; vectors such as `now` and
  // `factor` hold one row per lane. Within a row, vectors of keys that all of these rows see come
  // first, without a mask, then those on the diagonal.
  template <class Part>
  void softmax_rows(int64_t q0, int64_t first, int64_t n, int64_t k0, int64_t width, Part part) {
    const int64_t padded = padded_k<P>(width);
    const int64_t seen = q0 + first + 1 + s.Tk - s.Tq - k0;  // by the first row; row i sees i more
    const int64_t unmasked = max(0, min(width, seen)) / W * W;
    const auto for_keys = [&](int64_t i, auto&& f) {
      for (int64_t j = 0; j < unmasked; j += W) f(j, Full{});
      for (int64_t j = unmasked; j < padded; j += W)
        f(j, Tail{static_cast<int>(min(width, seen + i) - j)});
    };
    VF of_row[W];
    for (int64_t i = n; i < W; ++i) of_row[i] = splat(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      const float* row = scores + (first + i) * SCORES_STRIDE;
      VF highest = splat(neg_inf);
      for_keys(i, [&](int64_t j, auto keys) {
        highest = vmax(highest, mask(load(row + j), keys, neg_inf));
      });
      of_row[i] = highest;
    }
    const VF highest = reduce_each(of_row, n, Max{}), before = load(m + first, part),
             now = vmax(before, highest);
    const VF factor = before == neg_inf ? splat(0.0f) : exp2(exponent(before, now, c));
    float now_of[W], rescale[W];
    // If all scores so far are -inf, 0 is subtracted in place of the maximum: the probabilities are
    // then 0, not NaN, until a later block has other scores.
    store(now_of, now == neg_inf ? splat(0.0f) : now), store(rescale, factor);
    for (int64_t i = 0; i < n; ++i) {
      float* row = scores + (first + i) * SCORES_STRIDE;
      P* narrow = narrow_row(first + i);
      VF total = splat(0.0f);
      for_keys(i, [&](int64_t j, auto keys) {
        const VF p = mask(probability(exponent(load(row + j), now_of[i], c), P{}), keys);
        if (writes_operands())
          store(narrow + j, p, Full{});
        else
          store(row + j, p);
        total += p;
      });
      of_row[i] = total;
    }
    store(m + first, now, part);
    store(l + first, load(l + first, part) * factor + reduce_each(of_row, n, Add{}), part);
    if (k0 == 0) return;
    for (int64_t i = 0; i < n; ++i) {
      float* sums = o + (first + i) * ld;
      if (rescale[i] != 1.0f)
        for (int64_t j = 0; j < ld; j += W) store(sums + j, load(sums + j) * rescale[i]);
    }
  }

  // Writes O / l: NaN for a row whose scores are all -inf, 0 for a row that sees no key.
  void finish_queries(int64_t q0, int64_t rows) {
    if (s.lse) RowSums(s, head).write(q0, rows, m, l);
    float inverse[QUERIES];
    for_vectors(rows,
                [&](int64_t i, auto part) { store(inverse + i, 1.0f / load(l + i, part), part); });
    for (int64_t i = 0; i < rows; ++i) {
      T* row = out.out(q0 + i);
      if (visible_keys(s, q0 + i) == 0)
        for_vectors(s.D, [&](int64_t j, auto part) { store(row + j, splat(0.0f), part); });
      else
        for_vectors(s.D, [&](int64_t j, auto part) {
          store(row + j, load(o + i * ld + j, part) * inverse[i], part);
        });
    }
  }
};

template <class T>
void blocked_attention(const Attention& s, const Parallel& parallel) {
  const int64_t blocks = divide_up(s.Tq, QUERIES);
  const HeadTasks split(s, blocks, parallel);
  run_tasks(parallel, split.tasks, [&](int64_t task) {
    // Later parts see more keys and take longer, so they start first.
    const int64_t part = split.parts - 1 - task % split.parts;
    const int64_t first = blocks * part / split.parts * QUERIES,
                  last = min(s.Tq, blocks * (part + 1) / split.parts * QUERIES);
    const int64_t used_keys = visible_keys(s, last - 1);
    BlockedAttention<T> attention(s, used_keys);
    for (int64_t head = split.first_head(task); head < split.last_head(task); ++head) {
      attention.start_head(head, used_keys);
      if (head + 1 < split.last_head(task)) attention.prefetch_next(head + 1, used_keys);
      for (int64_t q0 = first; q0 < last; q0 += QUERIES) attention.query_block(q0);
    }
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
