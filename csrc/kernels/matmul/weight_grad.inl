// dW (N, K) = dY' X summed over all rows, for the backward of linear layers.
//
// The rows are divided into blocks of ROWS, the blocks into parts, each with a sum of its own, and
// the blocks of a part into chunks. The code that produces dY and X packs the operands of a chunk,
// whose product is then added to the part's sum. If there are enough parts, each is the work of
// one thread, whose operands stay in that core's cache; otherwise all threads share the chunks of
// one part after the other. The parts depend on the shape alone and chunks are multiples of KC
// rows, so the reduction order of every element of dW does not depend on the number of threads.
#pragma once

#include "../kernels.h"
#include "../simd/elements.inl"
#include "../simd/philox.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "../threads/scratch.h"
#include "gemm.inl"
#include "layout.inl"
#include "tasks.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

static_assert(Tile<float>::KC % ROWS == 0 && Tile<bf16>::KC % ROWS == 0 &&
              ROWS % DROPOUT_ROWS == 0);

// One part of the rows: row blocks [first, first + blocks), in chunks of `chunk` blocks, which the
// threads of `parallel` share. rows_in_all counts the rows of all parts.
struct RowPart {
  int64_t index, first, blocks, chunk, rows_in_all;
  Parallel parallel;

  // Rows of this part from `block` on.
  int64_t rows_from(int64_t block) const {
    return min(rows_in_all, (first + blocks) * ROWS) - block * ROWS;
  }

  // For each chunk, calls produce(block, slot) for its blocks, where slot is the block's index in
  // the chunk, and then accumulate(rows, add) for its rows; `add` is true from the second chunk on.
  template <class Produce, class Accumulate>
  void for_chunks(const Produce& produce, const Accumulate& accumulate) const {
    for (int64_t from = first; from < first + blocks; from += chunk) {
      run_tasks(parallel, min(chunk, first + blocks - from),
                [&](int64_t slot) { produce(from + slot, slot); });
      accumulate(min(chunk * ROWS, rows_from(from)), from > first);
    }
  }
};

// Row blocks per chunk if all threads share it: as many as have operands that fit in the outer
// cache, but at least one per thread, rounded up to a multiple of KC rows.
template <class P>
inline int64_t blocks_per_chunk(int64_t rows, int64_t elements_per_row, const Parallel& parallel) {
  constexpr int64_t cache_bytes = int64_t{16} << 20;
  const int64_t fitting = cache_bytes / (ROWS * elements_per_row * static_cast<int64_t>(sizeof(P)));
  return min(divide_up(rows, ROWS), round_up(max(fitting, parallel.threads), Tile<P>::KC / ROWS));
}

// Divides `rows` rows into parts, for weight gradients of `sum_floats` elements in total: into
// several parts only if their sums are small.
template <class P>
class RowParts {
 public:
  RowParts(int64_t rows, int64_t sum_floats, int64_t elements_per_row, const Parallel& parallel)
      : rows_(rows),
        blocks_(divide_up(rows, ROWS)),
        count_(1),
        shared_chunk_(blocks_per_chunk<P>(rows, elements_per_row, parallel)),
        parallel_(parallel) {
    constexpr int64_t max_parts = 8, min_blocks_per_sum = 8,
                      max_floats = int64_t{1} << 18;  // half of the L2 cache
    while (sum_floats <= max_floats && count_ < max_parts &&
           blocks_ >= 2 * count_ * min_blocks_per_sum)
      count_ *= 2;
  }

  int64_t blocks() const { return blocks_; }
  int64_t count() const { return count_; }

  // Calls f(part) for each part: in parallel if the parts divide evenly among the threads.
  template <class F>
  void for_each(const F& f) const {
    if (count_ > 1 && count_ % parallel_.threads == 0) {
      run_tasks(parallel_, count_, [&](int64_t i) { f(part(i, Tile<P>::KC / ROWS, sequential)); });
    } else {
      for (int64_t i = 0; i < count_; ++i) f(part(i, shared_chunk_, parallel_));
    }
  }

 private:
  RowPart part(int64_t i, int64_t chunk, const Parallel& parallel) const {
    const int64_t first = i * blocks_ / count_, last = (i + 1) * blocks_ / count_;
    return {i, first, last - first, min(chunk, last - first), rows_, parallel};
  }

  int64_t rows_, blocks_, count_, shared_chunk_;
  const Parallel& parallel_;
};

// The weight gradient's sum over each part of the rows, and their total.
template <class P>
class WeightSums {
 public:
  WeightSums(const ParamGrad& grad, int64_t n, int64_t k, int64_t parts, ScratchFrame& frame)
      : grad_(grad), n_(n), k_(k), ld_(padded_n<P>(k)), parts_(parts) {
    // The first part is summed directly in the caller's gradient if that has the same layout.
    const bool in_place = grad.dtype == DType::f32 && ld_ == k_;
    first_ = in_place ? static_cast<float*>(grad.data) : alloc<float>(frame, n * ld_);
    others_ = alloc<float>(frame, (parts - 1) * n * ld_);
  }

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int64_t ld() const { return ld_; }
  float* part(int64_t i) const { return i == 0 ? first_ : others_ + (i - 1) * n_ * ld_; }

  // Writes the total to the caller's gradient. `empty`: there were no rows, so that the sums are
  // not initialised.
  void finish(bool empty, const Parallel& parallel) const {
    if (empty) __builtin_memset(first_, 0, static_cast<size_t>(n_ * ld_) * sizeof(float));
    const bool in_place = first_ == grad_.data;
    if (in_place && parts_ == 1) return;
    const int64_t per_task = divide_up(n_, 4 * parallel.threads);
    run_tasks(parallel, divide_up(n_, per_task), [&](int64_t task) {
      for (int64_t i = task * per_task; i < min(n_, (task + 1) * per_task); ++i) {
        float* row = first_ + i * ld_;
        for_vectors(parts_ > 1 ? k_ : 0, [&](int64_t j, auto part) {
          VF total = load(row + j, part);
          for (int64_t p = 1; p < parts_; ++p) total += load(this->part(p) + i * ld_ + j, part);
          store(row + j, total, part);
        });
        if (!in_place) write_grad(grad_, i * k_, row, k_);
      }
    });
  }

 private:
  ParamGrad grad_;
  int64_t n_, k_, ld_, parts_;
  float *first_, *others_;
};

constexpr int64_t no_limit = INT64_MAX;

// The packed operands of a chunk of `chunk` blocks, and their product.
template <class P>
class WeightGrad {
 public:
  static constexpr int64_t GROUP = lhs_by_rows<P> ? 64 : 48;  // columns of dY packed together

  // `max_rows` limits how many rows of the weight (columns of dY) are packed at a time.
  WeightGrad(const WeightSums<P>& sums, int64_t part, int64_t chunk, ScratchFrame& frame,
             int64_t max_rows = no_limit)
      : k_(sums.k()),
        ld_(sums.ld()),
        chunk_rows_(chunk * ROWS),
        total_(sums.part(part)),
        lhs_(alloc<P>(frame, chunk_rows_ * round_up(min(sums.n(), max_rows), GROUP))),
        rhs_(alloc<P>(frame, rhs_elements<P>(chunk_rows_, k_))) {}

  // Packs dy (rows, n), which is columns [first, first + n) of dY in one block of the chunk;
  // `first` is a multiple of GROUP.
  template <class S>
  void set_dy(int64_t block, const S* dy, int64_t ld, int64_t rows, int64_t first,
              int64_t n) const {
    for (int64_t n0 = 0; n0 < n; n0 += GROUP) {
      P* group = lhs_ + (first + n0) * chunk_rows_;
      if constexpr (!lhs_by_rows<P>) {
        pack_rows(dy, ld, rows, n, n0, GROUP, group + block * ROWS * GROUP);
      } else {
        P pairs[ROWS * GROUP];
        pack_rows(dy, ld, rows, n, n0, GROUP, pairs);
        transpose_pairs(pairs, padded_k<P>(rows) / 2, GROUP, group + block * ROWS, chunk_rows_);
      }
    }
  }

  // Packs x (rows, columns), which is columns [k0, k0 + columns) of X in that block; k0 is a
  // multiple of NR.
  template <class S>
  void set_x(int64_t block, const S* x, int64_t ld, int64_t rows, int64_t k0,
             int64_t columns) const {
    constexpr int NR = Tile<P>::NR;
    const Rhs<P> to = chunk_x().rows(block * ROWS).columns(k0);
    for (int64_t n0 = 0; n0 < columns; n0 += NR)
      pack_rows(x, ld, rows, columns, n0, NR, const_cast<P*>(to.columns(n0).data));
  }

  // Rows [first, first + n) of dW = or += dY' X over the first `rows` rows of the chunk, where dY
  // is the first n packed columns.
  void accumulate(int64_t rows, bool add, int64_t first, int64_t n,
                  const Parallel& parallel) const {
    constexpr int KU = Tile<P>::KU, k_per_task = 2 * Tile<P>::NR;
    const int64_t k_tasks = divide_up(k_, k_per_task);
    run_tasks(parallel, divide_up(n, GROUP) * k_tasks, [&](int64_t task) {
      const int64_t n0 = task / k_tasks * GROUP, k0 = task % k_tasks * k_per_task;
      const P* group = lhs_ + n0 * chunk_rows_;
      const Lhs<P> dy =
          lhs_by_rows<P> ? Lhs<P>{group, chunk_rows_, KU} : Lhs<P>{group, KU, GROUP * KU};
      gemm(min(GROUP, n - n0), min(k_per_task, k_ - k0), rows, dy, chunk_x().columns(k0),
           total_ + (first + n0) * ld_ + k0, ld_, add);
    });
  }

 private:
  // The columns of dY are packed in groups, [N / GROUP][chunk rows / KU][GROUP][KU], or by rows of
  // dY', [N][chunk rows] (lhs_by_rows), so that a task reads its group contiguously.
  static_assert(GROUP % Tile<P>::MR == 0 && GROUP % W == 0);

  Rhs<P> chunk_x() const { return {rhs_, panel_elements<P>(chunk_rows_)}; }

  int64_t k_, ld_, chunk_rows_;
  float* total_;
  P *lhs_, *rhs_;
};

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
