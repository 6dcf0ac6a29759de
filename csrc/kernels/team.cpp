#include "team.h"

#include <thread>

namespace gptfast {
namespace {

// Whether `state` is another than `value` soon. Loops follow one another within microseconds; a
// thread that has waited longer lets others run before it looks again.
bool changes(const std::atomic<int>& state, int value) {
  for (int looks = 0; looks < 2000; ++looks) {
    if (state.load(std::memory_order_acquire) != value) return true;
    if (looks >= 500) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return false;
}

}  // namespace

void Team::run_loop(void* team, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  static_cast<Team*>(team)->loop(tasks, body, context);
}

void Team::loop(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  const auto count = static_cast<int64_t>(members_.size());
  if (tasks <= 1 || count == 1) return work_alone({body, context, 0, tasks, false});
  // A member's own tasks are the same part of each loop over the same operands, which it finds in
  // its core's cache.
  const bool shared = tasks > 2 * count;
  for (int64_t i = 0; i < count; ++i) {
    Member& member = members_[static_cast<size_t>(i)];
    member.loop = {body, context, i * tasks / count, (i + 1) * tasks / count, shared};
    if (shared) member.next.store(member.loop.first, std::memory_order_relaxed);
  }
  for (size_t i = 1; i < members_.size(); ++i) members_[i].takes_part = offer(members_[i]);
  work(0);
  for (size_t i = 1; i < members_.size(); ++i) {
    Member& member = members_[i];
    if (!member.takes_part && !shared) work(i);
    while (member.takes_part && !changes(member.state, working)) member.state.wait(working);
  }
  if (failed_) std::rethrow_exception(failure_);
}

// Whether the member takes it up.
bool Team::offer(Member& member) {
  int state = watching;
  if (member.state.compare_exchange_strong(state, working)) return true;
  if (state == absent && member.state.compare_exchange_strong(state, called))
    member.state.notify_one();
  return false;
}

void Team::follow(int64_t index) {
  const auto member = static_cast<size_t>(index);
  std::atomic<int>& state = members_[member].state;
  for (;;) {
    int found = state.load(std::memory_order_acquire);
    if (found == dismissed) {
      return;
    } else if (found == working) {
      work(member);
      state.store(watching);
      state.notify_one();
    } else if (found != watching) {
      state.compare_exchange_strong(found, watching);
    } else if (!changes(state, watching) && state.compare_exchange_strong(found, absent)) {
      state.wait(absent);
    }
  }
}

void Team::work(size_t index) {
  try {
    const Loop& own = members_[index].loop;
    if (!own.shared) return work_alone(own);
    for (size_t i = 0; i < members_.size(); ++i) {
      Member& member = members_[(index + i) % members_.size()];
      int64_t task;
      while ((task = member.next.fetch_add(1, std::memory_order_relaxed)) < member.loop.last)
        own.body(own.context, task);
    }
  } catch (...) {
    if (!failed_.exchange(true)) failure_ = std::current_exception();
  }
}

void Team::work_alone(const Loop& loop) {
  for (int64_t task = loop.first; task < loop.last; ++task) loop.body(loop.context, task);
}

// Nobody works then.
void Team::dismiss() {
  for (size_t i = 1; i < members_.size(); ++i) {
    members_[i].state.store(dismissed);
    members_[i].state.notify_one();
  }
}

}  // namespace gptfast
