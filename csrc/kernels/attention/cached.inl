// Attention of new tokens to themselves and to earlier tokens, whose keys and values are cached. A
// query's result has the same bits whichever of its keys are new. The layout of the cache, and with
// it the model's context, decides between small.inl and blocked.inl.
#pragma once

#include "../kernels.h"
#include "../matmul/gemm.inl"
#include "../matmul/layout.inl"
#include "../matmul/tasks.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "blocked.inl"
#include "cache.inl"
#include "heads.inl"
#include "small.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The attention of sequence i. Tk counts its cached tokens too, but k and v hold the new ones
// alone.
template <class T>
Attention of_sequence(const CachedAttention& s, int64_t i) {
  const int64_t H = s.shape.H, D = s.shape.D, count = s.starts[i + 1] - s.starts[i],
                token = s.first_token(i), query = s.last_queries ? i : token;
  const auto heads = [&](const void* data, int64_t row, int64_t stride) {
    return Heads{const_cast<T*>(static_cast<const T*>(data)) + row * stride, 0, D, stride};
  };
  Attention a = {};
  a.dtype = s.shape.dtype;
  a.B = 1, a.H = H, a.Tq = s.last_queries ? 1 : count, a.Tk = s.cached[i] + count, a.D = D;
  a.q = heads(s.q, query, s.q_stride), a.out = heads(s.out, query, H * D);
  a.k = heads(s.k, token, s.kv_stride), a.v = heads(s.v, token, s.kv_stride);
  a.scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(D)));
  return a;
}

// One sequence, of which a task computes some heads.
template <class Cached>
struct CachedTask {
  using T = typename Cached::Input;

  const CachedAttention& s;
  int64_t i;
  Attention a;

  CachedTask(const CachedAttention& s, int64_t i) : s(s), i(i), a(of_sequence<T>(s, i)) {}

  Cached cached(int64_t h) const { return {s.shape, s.cache, s.slot[i] * a.H + h}; }
  void append(int64_t h) const {
    cached(h).append({a.k, 0, h}, {a.v, 0, h}, s.cached[i], a.Tk - s.cached[i]);
  }
};

// For short contexts: keys and values are read in place, from the cache or, if it has none of this
// sequence, from the new tokens' projection.
template <class T>
void attend_heads(CachedTask<PlainHead<T>>& task, int64_t first, int64_t last) {
  const bool has_others = task.s.cached[task.i] > 0;
  for (int64_t h = first; h < last && (has_others || task.s.kept[task.i]); ++h) task.append(h);
  Attention& a = task.a;
  if (has_others) {
    const PlainHead<T> head = task.cached(0);
    const int64_t size = PlainHead<T>::elements(task.s.shape.capacity, a.D);
    a.k = {head.keys, 0, size, a.D}, a.v = {head.values, 0, size, a.D};
  }
  SmallAttention<T> small(a);
  for (int64_t h = first; h < last; ++h) small.attend(h, 0, a.Tq);
}

// Computes heads [h, h + rows) of a sequence's single query, whose own key is in the cache by now.
// Each row of `attention` is one head, so that the rows' sums are independent and overlap.
template <class T>
void attend_token(const CachedTask<PackedHead<T>>& task, BlockedAttention<T>& attention, int64_t h,
                  int64_t rows) {
  using P = typename OperandOf<T>::type;
  const Attention& a = task.a;
  attention.out = {a.out, 0, h}, attention.out.row = a.D;
  const Head<T> q(a.q, 0, h);
  const Lhs<P> queries = lhs_rows(q.data, a.D, rows, a.D, attention.q_copy);
  attention.start_rows(rows);
  for (int64_t k0 = 0; k0 < a.Tk; k0 += KEYS) {
    const int64_t width = min(KEYS, a.Tk - k0);
    for (int64_t i = 0; i < rows; ++i)
      gemm(1, width, a.D, queries.rows(i), task.cached(h + i).packed_keys().columns(k0),
           attention.scores + i * SCORES_STRIDE, SCORES_STRIDE, false);
    for_vectors(rows, [&](int64_t i, auto part) {
      attention.softmax_rows(0, i, min(W, rows - i), k0, width, part);
    });
    for (int64_t i = 0; i < rows; ++i)
      gemm(1, a.D, width, attention.probabilities(i, 1, width),
           task.cached(h + i).packed_values().rows(k0), attention.o + i * attention.ld,
           attention.ld, k0 > 0);
  }
  attention.finish_queries(0, rows);
}

// Computes part `part` of `parts` of a head's query blocks.
template <class T>
void attend_blocks(const CachedTask<PackedHead<T>>& task, BlockedAttention<T>& attention, int64_t h,
                   int64_t part, int64_t parts) {
  const int64_t blocks = divide_up(task.a.Tq, QUERIES);
  attention.start_head(h, task.cached(h).packed_keys(), task.cached(h).packed_values());
  for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
    attention.query_block(block * QUERIES);
}

template <class T>
void attend_heads(const CachedTask<PackedHead<T>>& task, int64_t first, int64_t last) {
  BlockedAttention<T> attention(task.a, 0);
  if (task.a.Tq == 1) {
    for (int64_t h = first; h < last; ++h) task.append(h);
    for (int64_t h = first; h < last; h += QUERIES)
      attend_token(task, attention, h, min(QUERIES, last - h));
    return;
  }
  for (int64_t h = first; h < last; ++h) {
    task.append(h);
    attend_blocks(task, attention, h, 0, 1);
  }
}

template <class Cached>
void attention_cached_in(const CachedAttention& s, const Parallel& parallel) {
  using Task = CachedTask<Cached>;
  const int64_t H = s.shape.H, heads = s.sequences * H;
  int64_t work = 0;  // bytes of the keys and values that all queries read
  for (int64_t i = 0; i < s.sequences; ++i) {
    const Attention a = Task(s, i).a;
    work += 2 * a.Tq * a.Tk * H * a.D * static_cast<int64_t>(sizeof(typename Cached::Element));
  }
  const int64_t per_task =
      max(heads / (16 * parallel.threads), min_tasks_per_thread(heads, work, parallel));
  if constexpr (Cached::packed) {
    if (heads < parallel.threads && per_task < heads) {
      const int64_t parts = 4 * parallel.threads;
      run_tasks(parallel, heads, [&](int64_t head) { Task(s, head / H).append(head % H); });
      return run_tasks(parallel, heads * parts, [&](int64_t n) {
        const int64_t head = n / parts;
        const Task task(s, head / H);
        BlockedAttention<typename Cached::Input> attention(task.a, 0);
        attend_blocks(task, attention, head % H, parts - 1 - n % parts, parts);
      });
    }
  }
  run_tasks(parallel, divide_up(heads, per_task), [&](int64_t n) {
    const int64_t last = min(heads, (n + 1) * per_task);
    for (int64_t head = n * per_task, end = 0; head < last; head = end) {
      end = min(last, (head / H + 1) * H);
      Task task(s, head / H);
      attend_heads(task, head % H, head % H + end - head);
    }
  });
}

void attention_cached(const CachedAttention& s, const Parallel& parallel) {
  with_head_type(s.shape,
                 [&](auto of) { attention_cached_in<typename decltype(of)::type>(s, parallel); });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
