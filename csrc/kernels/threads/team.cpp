#include "team.h"

#include <thread>

namespace gptfast {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether `state` differs from `value` within about 20 us.
bool changes_within_20us(const std::atomic<int>& state, int value) {
  for (int looks = 0; looks < 500; ++looks, pause())
    if (state.load(std::memory_order_acquire) != value) return true;
  return false;
}

// The same within about a millisecond: the next loop usually follows soon, and waking a thread that
// sleeps takes long.
bool changes_soon(const std::atomic<int>& state, int value) {
  if (changes_within_20us(state, value)) return true;
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
  // Each member owns the same range of tasks in every loop of this size, so that it finds the
  // operands of repeated loops in its core's cache.
  const bool shared = tasks > 2 * count;
  for (int64_t i = 0; i < count; ++i) {
    Member& member = members_[static_cast<size_t>(i)];
    member.loop = {body, context, i * tasks / count, (i + 1) * tasks / count, shared};
    member.takes_part = false;
    if (shared) member.next.store(member.loop.first, std::memory_order_relaxed);
    // A member cannot join an unshared loop while the leader works, so the team's first loop waits
    // a little for the members to arrive.
    if (!has_run_loop_ && !shared && i > 0) changes_within_20us(member.state, absent);
  }
  // All members read the cache line that holds has_run_loop_ and its neighbours, so it is written
  // only when it changes.
  if (!has_run_loop_) has_run_loop_ = true;
  offer_again();
  work(0);
  // The leader itself does the tasks of members that still cannot take up an unshared loop.
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

// Offers the current loop to a member; returns whether the member takes part. Wakes an absent
// member for later loops.
bool Team::offer(Member& member) {
  int state = member.state.load(std::memory_order_relaxed);
  if (state == watching) return member.state.compare_exchange_strong(state, working);
  if (state == absent && member.state.compare_exchange_strong(state, called))
    member.state.notify_one();
  return false;
}

// Offers the loop to all members that do not take part yet.
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

// Runs the tasks of member `index` and, in a shared loop, then steals tasks from the others.
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

// Called when all members are idle.
void Team::dismiss() {
  for (size_t i = 1; i < members_.size(); ++i) {
    members_[i].state.store(dismissed);
    members_[i].state.notify_one();
  }
}

}  // namespace gptfast
