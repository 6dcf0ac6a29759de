// How the rows and columns of a product are divided among tasks.
#pragma once

#include "../kernels.h"
#include "../simd/vec.inl"
#include "../threads/parallel.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Rows of an activation matrix per task, few enough for the task's scratch memory to stay in the L2
// cache: a multiple of every MR and KPAD and of DROPOUT_ROWS.
constexpr int64_t ROWS = GPTFAST_AMX ? 96 : 48;

// How many of `tasks` equal tasks a thread must run to be worth the time that it takes to join in.
// `work` is the number of bytes that the multiplications of all tasks read of one operand, in
// total: with few rows, a product takes as long as reading its weight.
inline int64_t min_tasks_per_thread(int64_t tasks, int64_t work, const Parallel& parallel) {
  return max(1, min(tasks, divide_up(tasks * parallel.min_bytes_per_thread, max(1, work))));
}

// Calls f(m0, rows, n0, width, columns) for the blocks (rows, width) of a result (M, N), in
// parallel; `columns` is the maximum width of a block. A column of the result is a product with
// `column_bytes` of a weight. An fp32 block stays in the L2 cache, and is so wide that the norm of
// its rows, which every block of these rows computes, is a small part of the work. With few rows,
// consecutive tasks read the same part of the weight.
template <class F>
inline void for_blocks(int64_t M, int64_t N, int64_t column_bytes, int nr, const Parallel& parallel,
                       const F& f) {
  const int64_t block = M <= 2 * ROWS ? max(1, M) : ROWS, row_blocks = divide_up(M, block);
  const int64_t max_columns = min(1024, round_up((64 << 10) / block, nr));
  const bool few_rows = row_blocks < 2 * parallel.threads;
  const int64_t wanted = row_blocks == 1 ? parallel.threads : 2 * parallel.threads;
  const int64_t shared = few_rows ? divide_up(wanted, max(1, row_blocks)) : 1;
  const int64_t min_columns = min_tasks_per_thread(N, block * N * column_bytes, parallel);
  const int64_t parts = min(shared * divide_up(N, shared * max_columns), divide_up(N, min_columns));
  const int64_t columns = round_up(divide_up(N, max(parts, divide_up(N, max_columns))), nr);
  const int64_t column_blocks = divide_up(N, columns), tasks = row_blocks * column_blocks;
  const int64_t group = min_columns < N ? 1 : max(1, tasks);  // too little work: a single task
  run_tasks(parallel, divide_up(tasks, group), [&](int64_t first) {
    for (int64_t task = first * group; task < min(tasks, (first + 1) * group); ++task) {
      const int64_t m0 = (few_rows ? task % row_blocks : task / column_blocks) * block;
      const int64_t n0 = (few_rows ? task / row_blocks : task % column_blocks) * columns;
      f(m0, min(block, M - m0), n0, min(columns, N - n0), columns);
    }
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
