// Loops over tasks, on the threads of a Parallel or on the calling thread.
#pragma once

#include "../kernels.h"

namespace gptfast {

// Runs all tasks on the calling thread. Static, because the files of different levels must not
// share a function (kernels.inl).
static inline void run_sequentially(void*, int64_t tasks, void (*body)(void*, int64_t),
                                    void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}
constexpr Parallel sequential{run_sequentially, 1};

// Calls f(task) for each task in [0, tasks).
template <class F>
inline void run_tasks(const Parallel& parallel, int64_t tasks, const F& f) {
  parallel.run(
      parallel.pool, tasks,
      [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace gptfast
