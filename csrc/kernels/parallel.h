// A loop on the kernels' threads.
#pragma once

#include "kernels.h"

namespace gptfast {

template <class F>
inline void run_tasks(const Parallel& parallel, int64_t tasks, const F& f) {
  parallel.run(
      parallel.pool, tasks,
      [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace gptfast
