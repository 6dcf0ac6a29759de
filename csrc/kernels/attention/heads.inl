// Heads of attention: where a head's rows lie, which keys its queries see, and how heads are
// divided among tasks. Query i sees the keys j < visible_keys(i) = i + 1 + Tk - Tq.
#pragma once

#include "../kernels.h"
#include "../matmul/layout.inl"
#include "../matmul/prefetch.inl"
#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The rows of one head of a (B, H, T, D) tensor.
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

// Adds `rows` rows of head `index` of each tensor to `queue`; the products that are given the queue
// prefetch them.
template <class T, int N>
inline void prefetch_head(const Heads (&all)[N], const Attention& s, int64_t index, int64_t rows,
                          PrefetchQueue& queue) {
  for (const Heads& heads : all) {
    const Head<T> head(heads, index / s.H, index % s.H);
    queue.add(head.data, head.row, rows, s.D);
  }
}

inline int64_t visible_keys(const Attention& s, int64_t query) {
  return max(0, min(s.Tk, query + 1 + s.Tk - s.Tq));
}

// key_terms: which keys, counted from k0, contribute to the sums of the queries from `query` on.
// query_terms: which queries, counted from q0, contribute to the sums of the keys from `key` on.
inline Terms key_terms(const Attention& s, int64_t query, int64_t k0) {
  return {0, query + 1 + s.Tk - s.Tq - k0, 0, 1};
}
inline Terms query_terms(const Attention& s, int64_t key, int64_t q0, int64_t queries) {
  return {key - (s.Tk - s.Tq) - q0, queries, 1, 0};
}

// Divides attention into tasks. With many heads, a task is some of them; with few, each head has
// several parts, of query blocks in the forward and of key blocks in the backward, so that every
// thread has work.
struct HeadTasks {
  int64_t heads, parts, heads_per_task, tasks;

  HeadTasks(const Attention& s, int64_t max_parts, const Parallel& parallel) : heads(s.B * s.H) {
    const int64_t wanted = parallel.threads == 1 ? 1 : 4 * parallel.threads;
    parts = max(1, min(divide_up(wanted, max(1, heads)), max_parts));
    heads_per_task = max(1, heads / (4 * wanted));  // 1 wherever a head has several parts
    tasks = divide_up(heads, heads_per_task) * parts;
  }

  int64_t first_head(int64_t task) const { return task / parts * heads_per_task; }
  int64_t last_head(int64_t task) const { return min(heads, first_head(task) + heads_per_task); }
};

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
