// Loops of a thread team: each task runs once, whichever members come and whenever they do, and
// exceptions reach the caller.
#include "../../csrc/kernels/threads/team.h"

#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>

#include "../../csrc/kernels/threads/parallel.h"
#include "harness.h"

namespace gptfast::sanitize {
namespace {

constexpr int64_t members = 5;

struct Failure : std::runtime_error {
  Failure() : std::runtime_error("a task failed") {}
};

void rest(int64_t microseconds) {
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

// Calls f with a team of which `come` members follow, member i after `after` * i microseconds.
template <class F>
void with_team(int64_t come, int64_t after, const F& f) {
  Team team(members);
  std::vector<std::thread> others;
  for (int64_t i = 1; i <= come; ++i)
    others.emplace_back([&team, i, after] {
      if (after > 0) rest(after * i);
      team.follow(i);
    });
  try {
    team.lead(f);
  } catch (const Failure&) {
    for (std::thread& other : others) other.join();
    throw;
  }
  for (std::thread& other : others) other.join();
}

// How often each task ran, where a task takes this many microseconds.
std::vector<float> counts(const Parallel& parallel, int64_t tasks, int64_t microseconds) {
  const auto runs = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(tasks) + 1);
  run_tasks(parallel, tasks, [&](int64_t task) {
    ++runs[static_cast<size_t>(task)];
    if (microseconds > 0) rest(microseconds);
  });
  return {runs.get(), runs.get() + tasks};
}

void expect_once(const Parallel& parallel, int64_t tasks, int64_t microseconds) {
  const std::vector<float> once(static_cast<size_t>(tasks), 1.0f);
  expect(counts(parallel, tasks, microseconds) == once,
         format("a task of %d ran not once", static_cast<int>(tasks)));
}

bool fails(int64_t come, int64_t tasks, int64_t failing) {
  try {
    with_team(come, 0, [&](const Parallel& parallel) {
      run_tasks(parallel, tasks, [&](int64_t task) {
        if (task == failing) throw Failure();
      });
      expect(false, "a loop went on after a failure");
    });
  } catch (const Failure&) {
    return true;
  }
  return false;
}

std::vector<Result> run_team(int64_t come) {
  for (const int64_t after : {0, 300}) {
    with_team(come, after, [&](const Parallel& parallel) {
      for (const int64_t tasks : {0, 1, 2, 5, 9, 10, 11, 40})
        for (const int64_t microseconds : {0, 50}) expect_once(parallel, tasks, microseconds);
      for (int i = 0; i < 300; ++i) expect_once(parallel, 1 + i % 12, 0);
      rest(5000);  // long enough for the others to fall asleep
      for (int i = 0; i < 20; ++i) expect_once(parallel, 2 + i, 20);
    });
    with_team(come, after, [](const Parallel&) {});
  }
  for (const int64_t tasks : {5, 40})
    for (const int64_t failing : {int64_t{0}, tasks / 2, tasks - 1})
      expect(fails(come, tasks, failing), "a failure got lost");
  return {};
}

}  // namespace

void team_cases() {
  for (int64_t come = 0; come < members; ++come)
    check(format("team, %d come", static_cast<int>(come)), DType::f32,
          [come](const Kernels&, const Parallel&) { return run_team(come); });
}

}  // namespace gptfast::sanitize
