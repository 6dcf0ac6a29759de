// Attention of new tokens on keys and values that a cache keeps packed, as attention.inl would pack
// them: a step of one token packs that token alone, and its result has the same bits.
//
// A head of a cache row is K' (D, capacity), then V (capacity, D). The rows of V that padding reads
// past the last token must be finite: a new cache is zeroed.

template <class T>
struct CachedHead {
  using P = typename OperandOf<T>::type;
  static constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU;

  int64_t D, capacity;
  P *keys, *values;

  // Head number `index` of a layer's cache, counted over its rows.
  CachedHead(void* cache, int64_t index, int64_t D, int64_t capacity)
      : D(D),
        capacity(capacity),
        keys(static_cast<P*>(cache) + index * elements(capacity, D)),
        values(keys + rhs_elements<P>(D, capacity)) {}
  CachedHead(const CachedAttention& s, int64_t row, int64_t h)
      : CachedHead(s.cache, row * s.H + h, s.D, s.capacity) {}

  static int64_t elements(int64_t capacity, int64_t D) {
    return rhs_elements<P>(D, capacity) + rhs_elements<P>(capacity, D);
  }

  Rhs<P> packed_keys() const { return {keys, panel_elements<P>(D)}; }
  Rhs<P> packed_values() const { return {values, panel_elements<P>(capacity)}; }

  // Tokens [from, from + count), their keys and values `ld` apart.
  void append(const T* k, const T* v, int64_t ld, int64_t from, int64_t count) const {
    if (from == 0) {
      pack_transposed(k, ld, D, count, keys);
      for (int64_t n0 = 0; n0 < D; n0 += NR)
        pack_rows(v, ld, count, D, n0, NR, values + n0 / NR * packed_values().panel);
      return;
    }
    for (int64_t t = 0; t < count; ++t) append_token(k + t * ld, v + t * ld, from + t);
  }

  void copy_from(const CachedHead& other, int64_t count) const {
    const int64_t panels = divide_up(count, NR) * packed_keys().panel;
    __builtin_memcpy(keys, other.keys, static_cast<size_t>(panels) * sizeof(P));
    for (int64_t n0 = 0; n0 < D; n0 += NR) {
      const int64_t at = n0 / NR * packed_values().panel;
      __builtin_memcpy(values + at, other.values + at,
                       static_cast<size_t>(padded_k<P>(count) * NR) * sizeof(P));
    }
  }

 private:
  // A column of K', KU elements of it together; a row of V, beside its neighbour where KU is 2.
  void append_token(const T* k, const T* v, int64_t t) const {
    P* column = keys + t / NR * packed_keys().panel + t % NR * KU;
    const int64_t whole = D / KU * KU;
    for (int64_t d = 0; d < whole; d += KU, column += NR * KU) copy_unit(k + d, column);
    for (int64_t d = whole; d < padded_k<P>(D); d += KU, column += NR * KU) {
      T last[KU] = {};
      if (d < D) last[0] = k[d];
      copy_unit(last, column);
    }
    P* row = values + t / KU * NR * KU;
    for (int64_t n0 = 0; n0 < D; n0 += NR, row += packed_values().panel)
      for (int64_t j = 0; j < NR; j += W)
        put_row(load_count(v + n0 + j, D - n0 - j), t, row + j * KU);
  }

  static void copy_unit(const P* from, P* to) { __builtin_memcpy(to, from, KU * sizeof(P)); }
  static void put_row(VF x, int64_t, float* to) { store(to, x); }
#if GPTFAST_BF16_DOT
  // The upper halves of x's lanes become row t of a pair of rows.
  static void put_row(VF x, int64_t t, bf16* to) {
    VU pair;
    __builtin_memcpy(&pair, to, sizeof pair);
    pair = t % KU == 0 ? (VU)x >> 16 : (pair & 0xffff) | (VU)x;
    __builtin_memcpy(to, &pair, sizeof pair);
  }
#else
  static void copy_unit(const bf16* from, float* to) {
    const uint32_t wide = static_cast<uint32_t>(from->bits) << 16;
    __builtin_memcpy(to, &wide, sizeof wide);
  }
#endif
};

// The queries of sequence i.
inline Attention queries_of(const CachedAttention& s, int64_t i) {
  const int64_t C = s.H * s.D, element = s.dtype == DType::f32 ? sizeof(float) : sizeof(bf16);
  const int64_t count = s.starts[i + 1] - s.starts[i],
                first = s.last_queries ? i : s.first_token(i);
  const auto at = [&](const void* data, int64_t offset) {
    return const_cast<char*>(static_cast<const char*>(data)) + offset * element;
  };
  Attention a = {};
  a.dtype = s.dtype;
  a.B = 1, a.H = s.H, a.Tq = s.last_queries ? 1 : count, a.Tk = s.cached[i] + count, a.D = s.D;
  a.q = {at(s.q, first * s.q_stride), 0, s.D, s.q_stride};
  a.out = {at(s.out, first * C), 0, s.D, C};
  a.scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(s.D)));
  return a;
}

// Heads h .. of the one query of a sequence, whose keys are the cached ones: a row of `task` is a
// head, so that a row's sums need not wait for those of the one before.
template <class T>
void attend_token(AttentionTask<T>& task, const CachedAttention& s, int64_t row, int64_t h,
                  int64_t rows) {
  using P = typename OperandOf<T>::type;
  const Attention& a = task.s;
  task.out = {a.out, 0, h}, task.out.row = a.D;
  const Head<T> q(a.q, 0, h);
  const Lhs<P> queries = lhs_rows(q.data, a.D, rows, a.D, task.q_copy);
  task.start_rows(rows);
  for (int64_t k0 = 0; k0 < a.Tk; k0 += KEYS) {
    const int64_t width = min(KEYS, a.Tk - k0);
    for (int64_t i = 0; i < rows; ++i)
      gemm(1, width, a.D, queries.rows(i), CachedHead<T>(s, row, h + i).packed_keys().columns(k0),
           task.scores + i * SCORES, SCORES, false);
    for_vectors(rows, [&](int64_t i, auto part) {
      task.softmax_rows(0, i, min(W, rows - i), k0, width, part);
    });
    for (int64_t i = 0; i < rows; ++i)
      gemm(1, a.D, width, task.probabilities(i, 1, width),
           CachedHead<T>(s, row, h + i).packed_values().rows(k0), task.o + i * task.ld, task.ld,
           k0 > 0);
  }
  task.finish_queries(0, 0, rows);
}

template <class T>
void attention_cached_typed(const CachedAttention& s, const Parallel& parallel) {
  const int64_t C = s.H * s.D, heads = s.sequences * s.H;
  int64_t work = 0;  // bytes of keys and values, once per query
  for (int64_t i = 0; i < s.sequences; ++i) {
    const Attention a = queries_of(s, i);
    work += 2 * a.Tq * a.Tk * C * static_cast<int64_t>(sizeof(typename OperandOf<T>::type));
  }
  const auto start = [&](int64_t i, int64_t h) {
    const int64_t first = s.first_token(i) * s.kv_stride + h * s.D;
    CachedHead<T>(s, s.row[i], h)
        .append(static_cast<const T*>(s.k) + first, static_cast<const T*>(s.v) + first, s.kv_stride,
                s.cached[i], s.starts[i + 1] - s.starts[i]);
  };
  const auto attend = [&](AttentionTask<T>& attention, int64_t i, int64_t h, int64_t part,
                          int64_t parts) {
    const CachedHead<T> cache(s, s.row[i], h);
    const int64_t blocks = divide_up(attention.s.Tq, QUERIES);
    attention.start_head(h, cache.packed_keys(), cache.packed_values());
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
      attention.query_block(block * QUERIES);
  };
  const int64_t per_task =
      max(heads / (16 * parallel.threads), tasks_worth_a_thread(heads, work, parallel));
  if (heads >= parallel.threads || per_task == heads) {
    run_tasks(parallel, divide_up(heads, per_task), [&](int64_t task) {
      const int64_t last = min(heads, (task + 1) * per_task);
      for (int64_t head = task * per_task; head < last;) {
        const int64_t i = head / s.H, end = min(last, (i + 1) * s.H);
        const Attention a = queries_of(s, i);
        AttentionTask<T> attention(a, 0);
        if (a.Tq == 1) {
          for (int64_t h = head; h < end; ++h) start(i, h % s.H);
          for (; head < end; head = min(end, head + QUERIES))
            attend_token(attention, s, s.row[i], head % s.H, min(QUERIES, end - head));
        }
        for (; head < end; ++head) {
          start(i, head % s.H);
          attend(attention, i, head % s.H, 0, 1);
        }
      }
    });
    return;
  }
  const int64_t parts = 4 * parallel.threads;
  run_tasks(parallel, heads, [&](int64_t head) { start(head / s.H, head % s.H); });
  run_tasks(parallel, heads * parts, [&](int64_t task) {
    const int64_t head = task / parts;
    const Attention a = queries_of(s, head / s.H);
    AttentionTask<T> attention(a, 0);
    attend(attention, head / s.H, head % s.H, parts - 1 - task % parts, parts);
  });
}

void attention_cached(const CachedAttention& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return attention_cached_typed<float>(s, parallel);
  attention_cached_typed<bf16>(s, parallel);
}

// Of one row and layer.
int64_t cache_bytes(DType dtype, int64_t H, int64_t D, int64_t capacity) {
  using P = OperandOf<bf16>::type;
  return H * (dtype == DType::f32 ? CachedHead<float>::elements(capacity, D) * sizeof(float)
                                  : CachedHead<bf16>::elements(capacity, D) * sizeof(P));
}

template <class T>
void copy_cached_typed(int64_t H, int64_t D, int64_t capacity, void* cache, int64_t from,
                       int64_t to, int64_t count) {
  for (int64_t h = 0; h < H; ++h)
    CachedHead<T>(cache, to * H + h, D, capacity)
        .copy_from(CachedHead<T>(cache, from * H + h, D, capacity), count);
}
void copy_cached(DType dtype, int64_t H, int64_t D, int64_t capacity, void* cache, int64_t from,
                 int64_t to, int64_t count) {
  if (dtype == DType::f32) return copy_cached_typed<float>(H, D, capacity, cache, from, to, count);
  copy_cached_typed<bf16>(H, D, capacity, cache, from, to, count);
}
