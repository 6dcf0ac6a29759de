// The backward of blocked.inl. Probabilities are recomputed from each row's maximum m and sum l;
// FlashAttention-2's algorithm 2 stores m + log(l) instead, which loses the digits of log(l) when m
// is large. With the dropout factors f and delta_i = sum_j p_ij dP_ij f_ij = sum_d dO_id O_id:
//   p = exp2(c (s - m)) / l, dV = (p f)' dO, dP = dO V', dS = scale p (dP f - delta), dQ = dS K,
//   dK = dS' Q
//
// A query whose keys all lie in one block computes delta as the first sum: it rounds as dP does, so
// less of the rounding error remains in the difference dP f - delta. The other queries compute
// delta as the second sum.
//
// A head's dQ is the sum over its key blocks in order. With many heads, one task computes a head
// block by block. With few heads, a task is one key block, and the blocks' contributions to dQ are
// added afterwards in the same order: the bits are the same.
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
#include "blocked.inl"
#include "heads.inl"
#include "softmax.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The first query to whose dQ a key block contributes, rounded down to a whole block of queries.
// Key block 0 begins at query 0: it writes the zeros of queries that see no key.
inline int64_t first_query(const Attention& s, int64_t block) {
  return block == 0 ? 0 : max(0, block * KEYS - (s.Tk - s.Tq)) / QUERIES * QUERIES;
}

inline bool sees_one_block(const Attention& s, int64_t query) {
  return visible_keys(s, query) <= KEYS;
}

// Writes delta of a head's queries [first, last) to `delta` (Tq,), as the second sum; skips the
// queries that use the first sum.
template <class T>
inline void sum_deltas(const AttentionBackward& grad, int64_t head, int64_t first, int64_t last,
                       float* delta) {
  const Attention& s = grad.forward;
  const Head<T> out(s.out, head / s.H, head % s.H), dout(grad.dout, head / s.H, head % s.H);
  for (int64_t i = first; i < last; ++i) {
    if (sees_one_block(s, i)) continue;
    VF total = splat(0.0f);
    for_vectors(s.D, [&](int64_t j, auto part) {
      total += load(dout.at(i) + j, part) * load(out.at(i) + j, part);
    });
    delta[i] = sum(total);
  }
}

// Computes one head at a time, one pair of a key block and a query block after the other.
template <class T>
struct BlockedAttentionBackward {
  using P = typename OperandOf<T>::type;
  static constexpr int MR = Tile<P>::MR, KPAD = Tile<P>::KPAD;

  const AttentionBackward& grad;
  const Attention& s;
  int64_t head;
  Head<T> q, k, v, dout, dq, dk, dv;
  int64_t ld;
  float c;
  ScratchFrame frame;
  const float* delta;  // (Tq,)
  float* dq_total;     // (Tq, ld)
  float *p, *ds, *dk_total, *dv_total, *dq_tile;
  P *keys_copy, *values_copy, *key_rows_copy, *q_copy, *dout_copy, *q_panels, *dout_panels, *p_copy,
      *ds_copy;
  PrefetchQueue queue;

  explicit BlockedAttentionBackward(const AttentionBackward& grad)
      : grad(grad),
        s(grad.forward),
        ld(padded_n<P>(s.D)),
        c(s.scale * log2e),
        p(alloc<float>(frame, QUERIES * SCORES_STRIDE)),
        ds(alloc<float>(frame, QUERIES * SCORES_STRIDE)),
        dk_total(alloc<float>(frame, KEYS * ld)),
        dv_total(alloc<float>(frame, KEYS * ld)),
        dq_tile(alloc<float>(frame, starts_from_c<P> ? MR * ld : 0)),
        keys_copy(alloc<P>(frame, rhs_elements<P>(s.D, KEYS))),
        values_copy(alloc<P>(frame, rhs_elements<P>(s.D, KEYS))),
        key_rows_copy(alloc<P>(frame, rhs_elements<P>(KEYS, s.D))),
        q_copy(alloc<P>(frame, QUERIES * row_stride<P>(padded_k<P>(s.D)))),
        dout_copy(alloc<P>(frame, QUERIES * row_stride<P>(padded_k<P>(s.D)))),
        q_panels(alloc<P>(frame, rhs_elements<P>(QUERIES, s.D))),
        dout_panels(alloc<P>(frame, rhs_elements<P>(QUERIES, s.D))),
        p_copy(alloc<P>(frame, lhs_transposed_elements<P>(QUERIES, KEYS))),
        ds_copy(alloc<P>(
            frame, max(lhs_transposed_elements<P>(QUERIES, KEYS), QUERIES * row_stride<P>(KEYS)))) {
  }

  // `dq_sums` (Tq, ld) receives the head's dQ, or one key block's contribution to it.
  void start_head(int64_t index, const float* deltas, float* dq_sums) {
    const int64_t b = index / s.H, h = index % s.H;
    head = index, delta = deltas, dq_total = dq_sums;
    q = {s.q, b, h}, k = {s.k, b, h}, v = {s.v, b, h};
    dout = {grad.dout, b, h}, dq = {grad.dq, b, h}, dk = {grad.dk, b, h}, dv = {grad.dv, b, h};
  }

  void prefetch_next(int64_t index) {
    queue.clear();
    prefetch_head<T>({s.k, s.v, grad.dk, grad.dv}, s, index, s.Tk, queue);
    prefetch_head<T>({s.q, grad.dout, s.out, grad.dq}, s, index, s.Tq, queue);
  }

  // A block of keys and values, packed as right-hand sides: K' and V' for S and dP, K for dQ.
  struct KeyBlock {
    int64_t k0, keys;
    Rhs<P> keys_t, values_t, key_rows;
  };

  // Writes dK and dV of a key block, and writes its contribution to dQ or, with `add`, adds it.
  void key_block(int64_t block, bool add) {
    const int64_t k0 = block * KEYS, keys = min(KEYS, s.Tk - k0), from = first_query(s, block);
    const KeyBlock packed = {k0, keys, pack_transposed(k.at(k0), k.row, s.D, keys, keys_copy),
                             pack_transposed(v.at(k0), v.row, s.D, keys, values_copy),
                             pack_straight(k.at(k0), k.row, keys, s.D, key_rows_copy)};
    if (from >= s.Tq) {
      clear_rows(dk_total, keys);
      clear_rows(dv_total, keys);
    }
    for (int64_t q0 = from; q0 < s.Tq; q0 += QUERIES) query_block(q0, packed, add, q0 > from);
    for (int64_t j = 0; j < keys; ++j) {
      copy_row(dk_total + j * ld, s.D, dk.out(k0 + j));
      copy_row(dv_total + j * ld, s.D, dv.out(k0 + j));
    }
  }

  // Computes the contributions of one query block and one key block to dQ (written, or added with
  // `add_queries`) and to dK and dV (written, or added with `add_keys`).
  void query_block(int64_t q0, const KeyBlock& block, bool add_queries, bool add_keys) {
    const int64_t rows = min(QUERIES, s.Tq - q0), k0 = block.k0, keys = block.keys;
    const Lhs<P> queries = lhs_rows(q.at(q0), q.row, rows, s.D, q_copy);
    const Lhs<P> douts = lhs_rows(dout.at(q0), dout.row, rows, s.D, dout_copy);
    const int64_t width = round_up(keys, W);
    const int64_t max_tile = tile_rows_for<P>(keys);
    const auto multiply = [&](const Lhs<P>& a, const Rhs<P>& b, float* to) {
      for (int64_t r0 = 0; r0 < rows; r0 += max_tile) {
        const int64_t tile = min(max_tile, rows - r0),
                      count = min(keys, visible_keys(s, q0 + r0 + tile - 1) - k0);
        if (count > 0)
          gemm(tile, count, s.D, a.rows(r0), b, to + r0 * SCORES_STRIDE, SCORES_STRIDE, false,
               NoEpilogue{}, &queue);
      }
    };
    multiply(queries, block.keys_t, p);
    multiply(douts, block.values_t, ds);
    for (int64_t r0 = 0; r0 < rows; r0 += DROPOUT_ROWS)
      probability_rows(q0, r0, min(DROPOUT_ROWS, rows - r0), k0, keys, width);

    const Lhs<P> p_t = lhs_transposed(p, SCORES_STRIDE, rows, keys, p_copy);
    add_key_grads(p_t, pack_straight(dout.at(q0), dout.row, rows, s.D, dout_panels), dv_total, q0,
                  rows, k0, keys, add_keys);
    const Lhs<P> ds_t = lhs_transposed(ds, SCORES_STRIDE, rows, keys, ds_copy);
    add_key_grads(ds_t, pack_straight(q.at(q0), q.row, rows, s.D, q_panels), dk_total, q0, rows, k0,
                  keys, add_keys);
    const int64_t seen_by_all = max(0, visible_keys(s, q0) - k0),
                  seen_by_any = min(keys, visible_keys(s, q0 + rows - 1) - k0);
    const bool finite = finite_rows(block.key_rows, s.D, seen_by_all, padded_k<P>(seen_by_any));
    for (int64_t r0 = 0; r0 < rows; r0 += MR) {
      const int64_t tile = min(MR, rows - r0),
                    count = min(keys, visible_keys(s, q0 + r0 + tile - 1) - k0);
      float* sums = dq_total + (q0 + r0) * ld;
      if (count <= 0) {
        if (!add_queries) clear_rows(sums, tile);
        continue;
      }
      const Lhs<P> ds_rows = lhs_rows(ds + r0 * SCORES_STRIDE, SCORES_STRIDE, tile, count, ds_copy);
      const bool via_tile = add_queries && starts_from_c<P>;
      gemm_masked(finite, key_terms(s, q0 + r0, k0), tile, s.D, count, ds_rows, block.key_rows,
                  via_tile ? dq_tile : sums, ld, add_queries && !via_tile, &queue);
      for (int64_t j = 0; via_tile && j < tile * ld; j += W)
        store(sums + j, load(sums + j) + load(dq_tile + j));
    }
  }

  void clear_rows(float* sums, int64_t rows) const {
    __builtin_memset(sums, 0, static_cast<size_t>(rows * ld) * sizeof(float));
  }

  // Turns p from scores s into p f, and ds from dP into dS, for up to DROPOUT_ROWS rows; both are 0
  // where the key is masked.
  void probability_rows(int64_t q0, int64_t r0, int64_t rows, int64_t k0, int64_t keys,
                        int64_t width) {
    struct Row {
      int64_t seen;  // keys of the block that the row sees
      float m, l;    // l is kept as 1 / l, or as log2(l) where P is bf16 and needs fewer digits
      bool summed;   // delta is the first sum, known at the end of this block
      VF delta;
    } of_row[DROPOUT_ROWS];
    constexpr bool by_inverse = sizeof(P) == sizeof(float);
    const RowSums sums(s, head);
    float of_sums[DROPOUT_ROWS];
    for_vectors(rows, [&](int64_t row, auto part) {
      const VF l = load(sums.l + q0 + r0 + row, part);
      store(of_sums + row, by_inverse ? 1.0f / l : log(l) * log2e, part);
    });
    alignas(64) float prob[DROPOUT_ROWS][KEYS];  // p of rows whose delta is not known yet
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query = q0 + r0 + row;
      const bool summed = sees_one_block(s, query);
      of_row[row] = {min(keys, visible_keys(s, query) - k0), sums.m[query], of_sums[row], summed,
                     splat(summed ? 0.0f : delta[query])};
    }
    DropoutFactors factors;
    const auto step = [&](Row& at, int64_t row, int64_t j, auto part) {
      float* p_at = p + (r0 + row) * SCORES_STRIDE + j;
      float* ds_at = ds + (r0 + row) * SCORES_STRIDE + j;
      const VF power = exponent(load(p_at), at.m, c);
      const VF of =
          mask(by_inverse ? probability(power, P{}) * at.l : probability(power - at.l, P{}), part);
      VF kept = of, dp = mask(load(ds_at), part);
      if (s.dropout.threshold > 0) {
        dp *= factors.row[row];
        kept *= factors.row[row];
      }
      store(p_at, kept);
      if (!at.summed) return store(ds_at, mask(of * (dp - at.delta) * s.scale, part));
      at.delta += of * dp;
      store(prob[row] + j, of);
      store(ds_at, dp);
    };
    const int64_t seen = max(0, min(width, round_up(of_row[rows - 1].seen, W)));  // by any row
    for (int64_t j = 0; j < seen; j += W) {
      if (s.dropout.threshold > 0) factors = dropout_factors(s.dropout, head, q0 + r0, k0 + j);
      for (int64_t row = 0; row < rows; ++row) {
        Row& at = of_row[row];
        if (at.seen >= j + W)
          step(at, row, j, Full{});
        else
          step(at, row, j, Tail{static_cast<int>(max(0, at.seen - j))});
      }
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = seen; j < width; j += W) {
        store(p + (r0 + row) * SCORES_STRIDE + j, splat(0.0f));
        store(ds + (r0 + row) * SCORES_STRIDE + j, splat(0.0f));
      }
    for (int64_t row = 0; row < rows; ++row) {
      if (!of_row[row].summed) continue;
      const float d = sum(of_row[row].delta);
      float* ds_row = ds + (r0 + row) * SCORES_STRIDE;
      for_vectors(max(0, of_row[row].seen), [&](int64_t j, auto part) {
        store(ds_row + j, mask(load(prob[row] + j) * (load(ds_row + j) - d) * s.scale, part));
      });
    }
  }

  // total (keys, D) = A B, or += with `add`, where A (keys, rows) is (p f)' or dS'; each tile of
  // keys sums over the queries that see it.
  void add_key_grads(const Lhs<P>& a, Rhs<P> b, float* total, int64_t q0, int64_t rows, int64_t k0,
                     int64_t keys, bool add) {
    const Terms terms = query_terms(s, k0, q0, rows);
    const bool finite =
        finite_rows(b, s.D, terms.from(0) / KPAD * KPAD, min(rows, terms.from(keys - 1)));
    for (int64_t j0 = 0; j0 < keys; j0 += MR) {
      const int64_t tile = min(MR, keys - j0);
      const int64_t seen_from = terms.from(j0) / KPAD * KPAD;
      if (seen_from >= rows) {
        if (!add) clear_rows(total + j0 * ld, keys - j0);
        break;
      }
      gemm_masked(finite, terms.rows(j0).columns(seen_from), tile, s.D, rows - seen_from,
                  a.rows(j0).columns(seen_from), b.rows(seen_from), total + j0 * ld, ld, add,
                  &queue);
    }
  }
};

// For many heads: a task computes some heads, each head's key blocks in order.
template <class T>
void attention_backward_by_heads(const AttentionBackward& grad, const HeadTasks& split,
                                 const Parallel& parallel) {
  const Attention& s = grad.forward;
  run_tasks(parallel, split.tasks, [&](int64_t task) {
    BlockedAttentionBackward<T> backward(grad);
    float* delta = alloc<float>(backward.frame, s.Tq);
    float* dq = alloc<float>(backward.frame, s.Tq * backward.ld);
    for (int64_t head = split.first_head(task); head < split.last_head(task); ++head) {
      sum_deltas<T>(grad, head, 0, s.Tq, delta);
      backward.start_head(head, delta, dq);
      if (head + 1 < split.last_head(task)) backward.prefetch_next(head + 1);
      if (s.Tk == 0) backward.clear_rows(dq, s.Tq);
      for (int64_t block = 0; block * KEYS < s.Tk; ++block) backward.key_block(block, block > 0);
      for (int64_t i = 0; i < s.Tq; ++i) copy_row(dq + i * backward.ld, s.D, backward.dq.out(i));
    }
  });
}

// For few heads: `at_once` key blocks of every head run at a time, each with memory of its own for
// its contribution to dQ. These are then added in the order of the key blocks.
template <class T>
void attention_backward_by_blocks(const AttentionBackward& grad, int64_t at_once,
                                  const Parallel& parallel) {
  const Attention& s = grad.forward;
  const int64_t heads = s.B * s.H, blocks = divide_up(s.Tk, KEYS);
  const auto for_query_blocks = [&](const auto& f) {
    run_tasks(parallel, heads * divide_up(s.Tq, QUERIES), [&](int64_t task) {
      const int64_t q0 = task / heads * QUERIES;
      f(task % heads, q0, min(s.Tq, q0 + QUERIES));
    });
  };
  const int64_t ld = padded_n<typename OperandOf<T>::type>(s.D), size = s.Tq * ld;
  ScratchFrame frame;
  float* total = alloc<float>(frame, heads * size);
  float* contributions = alloc<float>(frame, heads * at_once * size);
  float* delta = alloc<float>(frame, heads * s.Tq);
  for_query_blocks([&](int64_t head, int64_t first, int64_t last) {
    sum_deltas<T>(grad, head, first, last, delta + head * s.Tq);
  });
  for (int64_t first = 0; first < blocks; first += at_once) {
    const int64_t count = min(at_once, blocks - first);
    run_tasks(parallel, heads * count, [&](int64_t task) {
      BlockedAttentionBackward<T> backward(grad);
      const int64_t head = task / count;
      backward.start_head(head, delta + head * s.Tq, contributions + task * size);
      backward.key_block(first + task % count, false);
    });
    for_query_blocks([&](int64_t head, int64_t q0, int64_t last) {
      const Head<T> dq(grad.dq, head / s.H, head % s.H);
      for (int64_t i = q0; i < last; ++i) {
        float* sums = total + head * size + i * ld;
        for (int64_t n = 0; n < count && first_query(s, first + n) <= q0; ++n) {
          const float* more = contributions + (head * count + n) * size + i * ld;
          for (int64_t j = 0; j < ld; j += W)
            store(sums + j, first + n == 0 ? load(more + j) : load(sums + j) + load(more + j));
        }
        if (first + count == blocks) copy_row(sums, s.D, dq.out(i));
      }
    });
  }
}

template <class T>
void blocked_attention_backward(const AttentionBackward& grad, const Parallel& parallel) {
  const HeadTasks split(grad.forward, divide_up(grad.forward.Tk, KEYS), parallel);
  if (split.parts == 1) return attention_backward_by_heads<T>(grad, split, parallel);
  attention_backward_by_blocks<T>(grad, split.parts, parallel);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
