// Heads of attention: where the rows of one lie, what its queries see, and how heads are shared
// out. Query i sees the keys j < visible_keys(i) = i + 1 + Tk - Tq.

template <class T>
struct Head {
  const T* data = nullptr;
  int64_t row = 0;  // stride

  Head() = default;
  Head(const Heads& all, int64_t b, int64_t h)
      : data(static_cast<const T*>(all.data) + b * all.b + h * all.h), row(all.t) {}
  const T* at(int64_t t) const { return data + t * row; }
  T* out(int64_t t) const { return const_cast<T*>(at(t)); }
};

// Has the products that are given `upcoming` fetch `rows` rows of head `index` of each of these.
template <class T, int N>
inline void expect_head(const Heads (&all)[N], const Attention& s, int64_t index, int64_t rows,
                        Upcoming& upcoming) {
  for (const Heads& heads : all) {
    const Head<T> head(heads, index / s.H, index % s.H);
    upcoming.add(head.data, head.row, rows, s.D);
  }
}

inline int64_t visible_keys(const Attention& s, int64_t query) {
  return max(0, min(s.Tk, query + 1 + s.Tk - s.Tq));
}

// lse = ln sum_j exp(scale s_j) of the queries from q0 on, whose scores times scale log2(e) have
// the maximum m and the sum l of exp2(. - m); a query that sees no key has l = 0.
inline void write_lse(const Attention& s, int64_t head, int64_t q0, int64_t rows, const float* m,
                      const float* l) {
  constexpr double ln2 = 1 / log2e_exactly;
  constexpr float high = static_cast<float>(ln2), low = static_cast<float>(ln2 - high);
  for_vectors(rows, [&](int64_t i, auto part) {
    const VF highest = load(m + i, part), sums = load(l + i, part);
    const VF lse = highest * high + (highest * low + log(sums));
    store(s.lse + head * s.Tq + q0 + i, sums == 0.0f ? splat(no_score) : lse, part);
  });
}

// How the work is cut into tasks: with many heads, some of them per task; with few, every head in
// parts, so that every thread has work.
struct HeadTasks {
  int64_t heads, parts, heads_per_task, tasks;

  HeadTasks(const Attention& s, int64_t most_parts, const Parallel& parallel) : heads(s.B * s.H) {
    const int64_t wanted = parallel.threads == 1 ? 1 : 4 * parallel.threads;
    parts = max(1, min(divide_up(wanted, max(1, heads)), most_parts));
    heads_per_task = max(1, heads / (4 * wanted));  // 1 wherever a head has several parts
    tasks = divide_up(heads, heads_per_task) * parts;
  }

  int64_t first_head(int64_t task) const { return task / parts * heads_per_task; }
  int64_t last_head(int64_t task) const { return min(heads, first_head(task) + heads_per_task); }
};
