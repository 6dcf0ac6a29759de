#include "team.h"

#include <thread>

namespace gptfast {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether `state` is another than `value` within about 20 us.
bool changes_at_once(const std::atomic<int>& state, int value) {
  for (int looks = 0; looks < 500; ++looks, pause())
    if (state.load(std::memory_order_acquire) != value) return true;
  return false;
}

// Within about a millisecond: loops follow one another quickly, and to wake a thread takes long.
bool changes_soon(const std::atomic<int>& state, int value) {
  if (changes_at_once(state, value)) return true;
  for (int looks = 0; looks < 1500; ++looks, std::this_thread::yield())
    if (state.load(std::memory_order_acquire) != value) return true;
  return false;
}

}  // namespace

void Team::run_loop(void* team, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  static_cast<Team*>(team)->loop(tasks, body, context);
}

void Team::loop(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  const auto count = static_cast<int64_t>(members_.size());
  if (tasks <= 1 || count == 1) return run_range({body, context, 0, tasks, false});
  // A member's own tasks are the same part of each loop over the same operands, which it finds in
  // its core's cache.
  const bool shared = tasks > 2 * count;
  for (int64_t i = 0; i < count; ++i) {
    Member& member = members_[static_cast<size_t>(i)];
    member.loop = {body, context, i * tasks / count, (i + 1) * tasks / count, shared};
    member.takes_part = false;
    if (shared) member.next.store(member.loop.first, std::memory_order_relaxed);
    // What is not shared cannot be joined later.
    if (!begun_ && !shared && i > 0) changes_at_once(member.state, absent);
  }
  // All read the line of this and of what follows: it is written where it changes.
  if (!begun_) begun_ = true;
  offer_again();
  work(0);
  for (size_t i = 1; i < members_.size(); ++i) {
    Member& member = members_[i];
    if (!shared && has_tasks(member) && !member.takes_part && !(member.takes_part = offer(member)))
      work(i);
  }
  for (size_t i = 1; i < members_.size(); ++i)
    while (members_[i].takes_part && !changes_soon(members_[i].state, working))
      members_[i].state.wait(working);
  if (failed_.load(std::memory_order_relaxed)) {
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(failure_);
  }
}

// Whether the member takes the loop up.
bool Team::offer(Member& member) {
  int state = member.state.load(std::memory_order_relaxed);
  if (state == watching) return member.state.compare_exchange_strong(state, working);
  if (state == absent && member.state.compare_exchange_strong(state, called))
    member.state.notify_one();
  return false;
}

// To all who do not take part yet.
void Team::offer_again() {
  for (size_t i = 1; i < members_.size(); ++i) {
    Member& member = members_[i];
    if (!member.takes_part && has_tasks(member)) member.takes_part = offer(member);
  }
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
    } else if (!changes_soon(state, watching) && state.compare_exchange_strong(found, absent)) {
      state.wait(absent);
    }
  }
}

void Team::work(size_t index) {
  try {
    const Loop& own = members_[index].loop;
    if (!own.shared) return run_range(own);
    for (size_t i = 0; i < members_.size(); ++i) {
      Member& member = members_[(index + i) % members_.size()];
      int64_t task;
      while ((task = member.next.fetch_add(1, std::memory_order_relaxed)) < member.loop.last) {
        own.body(own.context, task);
        if (index == 0) offer_again();
      }
    }
  } catch (...) {
    if (!failed_.exchange(true)) failure_ = std::current_exception();
  }
}

void Team::run_range(const Loop& loop) {
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
