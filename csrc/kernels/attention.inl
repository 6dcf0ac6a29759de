// Causal attention in blocks with an online softmax (Dao, "FlashAttention-2", arXiv:2307.08691), no
// (T, T) matrix in memory. Query i sees the keys j < visible(i) = i + 1 + Tk - Tq.
//
// One task computes some query blocks of one head. Key blocks start at multiples of KEYS whatever
// the query, and a row's steps depend on that row alone: its bits are the same in any batch, and
// whether its keys were cached or not.

constexpr int64_t QUERIES = 96;  // a multiple of every MR and KPAD, and of DROPOUT_ROWS
constexpr int64_t KEYS = 128;
constexpr float no_score = -__builtin_inff();

template <class T>
struct Head {
  const T* data;
  int64_t row;  // stride

  Head(const Heads& all, int64_t b, int64_t h)
      : data(static_cast<const T*>(all.data) + b * all.b + h * all.h), row(all.t) {}
  const T* at(int64_t t) const { return data + t * row; }
  T* out(int64_t t) const { return const_cast<T*>(at(t)); }
};

inline int64_t visible_keys(const Attention& s, int64_t query) {
  return max(0, min(s.Tk, query + 1 + s.Tk - s.Tq));
}

// Parts that one head is split into so that every thread has work.
inline int64_t parts_per_head(const Attention& s, int64_t most, const Parallel& parallel) {
  const int64_t wanted = divide_up(4 * parallel.threads, max(1, s.B * s.H));
  return parallel.threads == 1 ? 1 : max(1, min(wanted, most));
}

// One row of one key block, s the products q . k:
//   m' = max(m, max_j s_j c), p_j = exp2(s_j c - m'), l' = l exp2(m - m') + sum_j p_j, with c =
//   scale log2(e)
// s becomes p, zero from `count` to `width`. Returns exp2(m - m'), by which the row of O is to be
// multiplied.
inline float softmax_step(float* s, int64_t count, int64_t width, float c, float& m, float& l) {
  float rescale = 1.0f;
  if (count > 0) {
    VF row_max = splat(m);
    for_vectors(count, [&](int64_t j, auto part) {
      row_max = vmax(row_max, only(load(s + j, part) * c, part, no_score));
    });
    const float highest = max(row_max);
    VF total = splat(0.0f);
    for_vectors(count, [&](int64_t j, auto part) {
      const VF p = exp2(load(s + j, part) * c - highest);
      store(s + j, p, part);
      total += only(p, part);
    });
    rescale = m == no_score ? 0.0f : exp2(splat(m - highest))[0];
    l = l * rescale + sum(total);
    m = highest;
  }
  for (int64_t j = max(count, 0); j < width; ++j) s[j] = 0.0f;
  return rescale;
}

template <class T>
struct AttentionTask {
  using P = typename OperandOf<T>::type;
  static constexpr int MR = Tile<P>::MR;

  const Attention& s;
  int64_t head;  // b * H + h
  Head<T> q, k, v, out;
  int64_t ld;  // of O
  float c;
  Frame frame;
  Rhs<P> keys, values;
  float *scores, *o;
  P *q_copy, *p_copy;
  float m[QUERIES], l[QUERIES];

  AttentionTask(const Attention& s, int64_t head, int64_t used_keys)
      : s(s),
        head(head),
        q(s.q, head / s.H, head % s.H),
        k(s.k, head / s.H, head % s.H),
        v(s.v, head / s.H, head % s.H),
        out(s.out, head / s.H, head % s.H),
        ld(padded_n<P>(s.D)),
        c(s.scale * log2e),
        keys(pack_transposed(k.data, k.row, s.D, used_keys,
                             take<P>(frame, rhs_elements<P>(s.D, used_keys)))),
        values(pack_straight(v.data, v.row, used_keys, s.D,
                             take<P>(frame, rhs_elements<P>(used_keys, s.D)))),
        scores(take<float>(frame, QUERIES * KEYS)),
        o(take<float>(frame, QUERIES * ld)),
        q_copy(take<P>(frame, QUERIES * row_stride<P>(padded_k<P>(s.D)))),
        p_copy(take<P>(frame, QUERIES * row_stride<P>(KEYS))) {}

  // Keys of the block from k0 on that any row before `row` of the query block sees.
  int64_t block_keys(int64_t q0, int64_t row, int64_t k0) const {
    return min(KEYS, visible_keys(s, q0 + row - 1) - k0);
  }

  void query_block(int64_t q0) {
    const int64_t rows = min(QUERIES, s.Tq - q0), last = visible_keys(s, q0 + rows - 1);
    const Lhs<P> queries = lhs_rows(q.at(q0), q.row, rows, s.D, q_copy);
    for (int64_t i = 0; i < rows; ++i) {
      m[i] = no_score;
      l[i] = 0.0f;
    }
    for (int64_t k0 = 0; k0 < last; k0 += KEYS) {
      for (int64_t r0 = 0; r0 < rows; r0 += MR)
        softmax_tile(queries, q0, r0, min(MR, rows - r0), k0);
      apply_dropout(s.dropout, head, q0, k0, rows, min(KEYS, last - k0), scores, KEYS);
      for (int64_t r0 = 0; r0 < rows; r0 += MR) {
        const int64_t tile = min(MR, rows - r0), count = block_keys(q0, r0 + tile, k0);
        if (count <= 0) continue;
        const Lhs<P> p = lhs_rows(scores + r0 * KEYS, KEYS, tile, count, p_copy);
        gemm(tile, s.D, count, p, values.rows(k0), o + r0 * ld, ld, k0 > 0);
      }
    }
    for (int64_t i = 0; i < rows; ++i) finish_query(q0 + i, i);
  }

  // S = Q K' and its softmax for `tile` rows from r0 on; rows of O that have a value already are
  // rescaled.
  void softmax_tile(Lhs<P> queries, int64_t q0, int64_t r0, int64_t tile, int64_t k0) {
    const int64_t width = block_keys(q0, r0 + tile, k0);
    if (width <= 0) return;
    float* block = scores + r0 * KEYS;
    gemm(tile, width, s.D, Lhs<P>{queries.data + r0 * queries.row, queries.row, queries.step},
         keys.columns(k0), block, KEYS, false);
    for (int64_t i = r0; i < r0 + tile; ++i) {
      const int64_t count = min(width, visible_keys(s, q0 + i) - k0);
      const float rescale = softmax_step(scores + i * KEYS, count, width, c, m[i], l[i]);
      if (k0 > 0 && rescale != 1.0f)
        for (int64_t j = 0; j < ld; j += W) store(o + i * ld + j, load(o + i * ld + j) * rescale);
    }
  }

  // O / l, and lse = ln sum_j exp(scale s_j).
  void finish_query(int64_t query, int64_t i) {
    const bool sees_none = l[i] == 0.0f;
    const float inverse = sees_none ? 0.0f : 1.0f / l[i];
    for_vectors(s.D, [&](int64_t j, auto part) {
      const VF value = sees_none ? splat(0.0f) : load(o + i * ld + j, part) * inverse;
      store(out.out(query) + j, value, part);
    });
    if (s.lse)
      s.lse[head * s.Tq + query] = sees_none ? no_score : m[i] / log2e + __builtin_logf(l[i]);
  }
};

template <class T>
void attention_typed(const Attention& s, const Parallel& parallel) {
  const int64_t blocks = divide_up(s.Tq, QUERIES), parts = parts_per_head(s, blocks, parallel);
  run_tasks(parallel, s.B * s.H * parts, [&](int64_t task) {
    // Later parts see more keys: they come first.
    const int64_t head = task / parts, part = parts - 1 - task % parts;
    const int64_t first = blocks * part / parts * QUERIES,
                  last = min(s.Tq, blocks * (part + 1) / parts * QUERIES);
    AttentionTask<T> attention(s, head, visible_keys(s, last - 1));
    for (int64_t q0 = first; q0 < last; q0 += QUERIES) attention.query_block(q0);
  });
}

void attention(const Attention& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return attention_typed<float>(s, parallel);
  attention_typed<bf16>(s, parallel);
}
