// Token plus position embedding with dropout, and its backward. The backward divides the columns
// among the tasks and adds the rows in order, so that a gradient has the same bits for any number
// of threads.
#pragma once

#include "../kernels.h"
#include "../matmul/tasks.inl"
#include "../simd/elements.inl"
#include "../simd/philox.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "../threads/scratch.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

template <class Y>
void embedding_typed(const Embedding& s, const Parallel& parallel) {
  const int64_t C = s.C, ld = round_up(C, W);
  const int64_t bytes = s.M * C * 2 * static_cast<int64_t>(sizeof(float));
  const int64_t task_rows =
      min(ROWS, round_up(min_tasks_per_thread(s.M, bytes, parallel), DROPOUT_ROWS));
  Y* y = static_cast<Y*>(s.y);
  run_tasks(parallel, divide_up(s.M, task_rows), [&](int64_t block) {
    const int64_t m0 = block * task_rows, rows = min(task_rows, s.M - m0);
    ScratchFrame frame;
    float* sum = alloc<float>(frame, rows * ld);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t m = m0 + i, position = s.position ? s.position[m] : m % s.T;
      with_elements(s.wte, [&](auto* wte) {
        with_elements(s.wpe, [&](auto* wpe) {
          for_vectors(C, [&](int64_t j, auto part) {
            store(sum + i * ld + j,
                  load(wte + s.idx[m] * C + j, part) + load(wpe + position * C + j, part), part);
          });
        });
      });
    }
    apply_dropout(s.dropout, 0, m0, 0, rows, C, sum, ld);
    for (int64_t i = 0; i < rows; ++i)
      for_vectors(C, [&](int64_t j, auto part) {
        store(y + (m0 + i) * C + j, load(sum + i * ld + j, part), part);
      });
  });
}

// The fp32 rows in which a gradient is summed: the gradient itself, or a copy that finish() rounds
// to bf16. `total` is null if the gradient is not wanted.
struct GradRows {
  ParamGrad grad;
  int64_t rows, n;
  float* total;

  GradRows(const ParamGrad& grad, int64_t rows, int64_t n, ScratchFrame& frame,
           const Parallel& parallel)
      : grad(grad),
        rows(rows),
        n(n),
        total(grad.dtype == DType::f32 ? static_cast<float*>(grad.data)
                                       : alloc<float>(frame, rows * n)) {
    constexpr int64_t per_task = 1 << 16;
    if (total == nullptr) return;
    run_tasks(parallel, divide_up(rows * n, per_task), [&](int64_t task) {
      const int64_t count = min(per_task, rows * n - task * per_task);
      __builtin_memset(total + task * per_task, 0, static_cast<size_t>(count) * sizeof(float));
    });
  }

  void finish() const {
    if (grad.dtype != DType::f32) write_grad(grad, 0, total, rows * n);
  }
};

template <class T>
void embedding_backward_typed(const EmbeddingBackward& s, const Parallel& parallel) {
  const Embedding& f = s.forward;
  const int64_t C = f.C;
  const T* dy = static_cast<const T*>(s.dy);
  ScratchFrame frame;
  const GradRows dwte(s.dwte, f.V, C, frame, parallel),
      dwpe(s.dwpe, s.block_size, C, frame, parallel);
  run_tasks(parallel, divide_up(C, W), [&](int64_t task) {
    const int64_t j = task * W;
    const auto add = [&](float* row, VF value, auto part) {
      store(row, load(row, part) + value, part);
    };
    const auto rows_from = [&](int64_t m0, auto part) {
      DropoutFactors factors;
      if (f.dropout.threshold > 0) factors = dropout_factors(f.dropout, 0, m0, j);
      for (int64_t m = m0; m < min(f.M, m0 + DROPOUT_ROWS); ++m) {
        VF g = load(dy + m * C + j, part);
        if (f.dropout.threshold > 0) g *= factors.row[m - m0];
        if (dwte.total && f.idx[m] != s.padding_idx) add(dwte.total + f.idx[m] * C + j, g, part);
        if (dwpe.total) add(dwpe.total + m % f.T * C + j, g, part);
      }
    };
    for (int64_t m0 = 0; m0 < f.M; m0 += DROPOUT_ROWS)
      if (j + W <= C)
        rows_from(m0, Full{});
      else
        rows_from(m0, Tail{static_cast<int>(C - j)});
  });
  dwte.finish();
  dwpe.finish();
}

void embedding(const Embedding& s, const Parallel& parallel) {
  if (s.y_dtype == DType::f32) return embedding_typed<float>(s, parallel);
  embedding_typed<bf16>(s, parallel);
}

void embedding_backward(const EmbeddingBackward& s, const Parallel& parallel) {
  if (s.forward.y_dtype == DType::f32) return embedding_backward_typed<float>(s, parallel);
  embedding_backward_typed<bf16>(s, parallel);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
