// A thread team: threads that stay together for many loops.
//
// A parallel region of a thread pool costs several microseconds, as much as a layer of a small
// model takes for one token, and a kernel may have many loops. A team keeps its threads in a single
// region, where each member polls a cache line of its own for the next loop.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#include "../kernels.h"

namespace gptfast {

class Team {
 public:
  explicit Team(int64_t members) : members_(static_cast<size_t>(members)) {}

  // Called by member 0, the leader: calls f(parallel), whose loops the other members share as soon
  // as they have arrived, and then dismisses them.
  template <class F>
  void lead(const F& f) {
    struct Dismissal {
      Team& team;
      ~Dismissal() { team.dismiss(); }
    } at_the_end{*this};
    f(Parallel{run_loop, static_cast<int>(members_.size()), this});
  }
  // Called by every other member: takes part in the loops until the leader dismisses it.
  void follow(int64_t index);

 private:
  // A watching member polls its state. The leader offers it a loop by setting `working`, and then
  // waits until the member has finished and is watching again. An absent member has not arrived
  // yet, or sleeps until the leader sets `called`.
  enum State : int { absent, called, watching, working, dismissed };

  struct Loop {
    void (*body)(void*, int64_t);
    void* context;
    int64_t first, last;  // the member's own tasks
    bool shared;          // members that finish early steal tasks from the others (work stealing)
  };

  // The leader and a member communicate through the first cache line; the second one changes with
  // each task of a shared loop.
  struct alignas(64) Member {
    std::atomic<int> state{absent};
    Loop loop;
    alignas(64) std::atomic<int64_t> next{0};  // the next of its own tasks in a shared loop
    bool takes_part = false;                   // in the current loop; only the leader uses it
  };

  static void run_loop(void* team, int64_t tasks, void (*body)(void*, int64_t), void* context);
  void loop(int64_t tasks, void (*body)(void*, int64_t), void* context);
  static bool has_tasks(const Member& member) { return member.loop.first < member.loop.last; }
  static bool offer(Member& member);
  void offer_again();
  void work(size_t index);
  static void run_range(const Loop& loop);
  void dismiss();

  std::vector<Member> members_;
  bool has_run_loop_ = false;  // whether the team has run a loop of several tasks
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace gptfast
