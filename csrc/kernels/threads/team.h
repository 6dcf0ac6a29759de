// Threads that stay together for many loops.
//
// A parallel region of a thread pool costs several microseconds, which is what a small model takes
// for a layer of one token, and a kernel may have many loops. A team holds its threads in a single
// region; each watches a cache line of its own for the next loop.
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

  // For member 0: calls f(parallel), whose loops the others share as soon as they have come, and
  // then dismisses them.
  template <class F>
  void lead(const F& f) {
    struct Dismissal {
      Team& team;
      ~Dismissal() { team.dismiss(); }
    } at_the_end{*this};
    f(Parallel{run_loop, static_cast<int>(members_.size()), this});
  }
  // For every other member: takes part in the loops until it is dismissed.
  void follow(int64_t index);

 private:
  // A member that watches takes up what it is offered, and is then waited for. One that is absent
  // has not come yet, or sleeps until it is called.
  enum State : int { absent, called, watching, working, dismissed };

  struct Loop {
    void (*body)(void*, int64_t);
    void* context;
    int64_t first, last;  // the member's own tasks
    bool shared;          // who has done his own takes those of others
  };

  // All that passes between the leader and a member lies in one cache line.
  struct alignas(64) Member {
    std::atomic<int> state{absent};
    Loop loop;
    alignas(64) std::atomic<int64_t> next{0};  // of the tasks of a shared loop
    bool takes_part = false;                   // for the leader
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
  bool begun_ = false;  // has had a loop
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace gptfast
