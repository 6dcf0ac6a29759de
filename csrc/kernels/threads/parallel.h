// A loop on the kernels' threads.
#pragma once

#include "../kernels.h"

namespace gptfast {

// All tasks on the calling thread. Static, as no kernel's file may share a function with another's.
static inline void run_in_turn(void*, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}
constexpr Parallel in_turn{run_in_turn, 1};

template <class F>
inline void run_tasks(const Parallel& parallel, int64_t tasks, const F& f) {
  parallel.run(
      parallel.pool, tasks,
      [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace gptfast
