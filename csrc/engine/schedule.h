// Who computes what in a pass: made once from the model, the batch and the number of threads, and
// then carried out by forward. No plan changes a bit of any result.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "model.h"

namespace gptfast {

// New tokens of some sequences, one sequence after the other.
struct Batch {
  int64_t sequences;
  const int64_t* tokens;
  const int64_t* starts;  // (sequences + 1,): those of sequence i are tokens[starts[i]] ..
                          // tokens[starts[i + 1] - 1]
  const int64_t* slot;    // (sequences,): its slot of the cache
  const int64_t* cached;  // (sequences,): how many of its tokens are in the cache already
  const uint8_t* kept;    // (sequences,): whether a later pass reads the new ones there; else they
                          // may be left out

  int64_t count() const { return starts[sequences] - starts[0]; }
  int64_t position(int64_t i, int64_t token) const { return cached[i] + token - starts[i]; }
  Batch part(int64_t first, int64_t last) const {
    return {last - first, tokens, starts + first, slot + first, cached + first, kept + first};
  }
};

// All sizes that decide how work is divided.
namespace limits {

// Weights of the layers that stay in a core's own cache beside the activations of a block of
// tokens. Of 2 MiB there fit 3 layers of 128 columns in fp32, 1.2 MB, which is where threads gain
// from working apart; 12 layers of 768 columns are 340 MB.
constexpr int64_t core_bytes = int64_t{2} << 20;
// Tokens that go through all layers before the next ones: 128 rows of 3 C + 4 C columns in fp32 are
// 0.5 MB for C = 128, so that weights and activations stay in the core's cache together.
constexpr int64_t block_tokens = 128;
// Tokens of a part that a thread computes on its own; more of them come in several parts per
// thread, so that none waits long for the last.
constexpr int64_t part_tokens = 4 * block_tokens;
// Rows for which it pays that a thread takes its share of a layer by itself: a product of fewer is
// shorter than the two hand-overs, of up to 1 us each.
constexpr int64_t thread_rows = 16;
// Floats of logits at a time, 16 MB: the outer cache still has them when they are sampled.
constexpr int64_t logits = int64_t{4} << 20;
// Logits to choose a token from, for which a thread joins in: some 2 us of sampling.
constexpr int64_t task_logits = int64_t{1} << 11;
// Rows of the first layer's table that a task copies, of 3 C elements each.
constexpr int64_t task_table_rows = 64;
// Tokens in one pass: enough for the products to be at their full speed, few enough for the
// activations to stay in the outer cache.
constexpr int64_t pass_tokens = 1024;

}  // namespace limits

class Plan {
 public:
  Plan(const Model& model, const Batch& batch, int threads);

  // Calls f(part, first, parallel) for the parts of the batch, which start at its sequence `first`.
  // A part that a thread has for itself goes from tokens to logits without waiting for another.
  template <class F>
  void for_parts(const Batch& batch, const Parallel& parallel, const F& f) const {
    if (part_ends_.empty()) return f(batch, 0, parallel);
    run_tasks(parallel, static_cast<int64_t>(part_ends_.size()), [&](int64_t i) {
      const auto end = part_ends_.begin() + i;
      const int64_t first = i == 0 ? 0 : end[-1];
      f(batch.part(first, *end), first, in_turn);
    });
  }

  // Calls f(block, first) for blocks of a part that go through the layers one after the other.
  template <class F>
  void for_blocks(const Batch& part, const F& f) const {
    const int64_t max_tokens = in_blocks_ ? limits::block_tokens : part.count();
    for (int64_t first = 0, end = 0; first < part.sequences; first = end) {
      for (++end; end < part.sequences && part.part(first, end + 1).count() <= max_tokens;) ++end;
      f(part.part(first, end), first);
    }
  }

  // Calls f(first, count, parallel) for all of M rows; where a core's cache holds the weights, for
  // a share of many rows by each thread, which then waits for others before and after attention
  // alone.
  template <class F>
  void for_rows(int64_t M, const Parallel& parallel, const F& f) const {
    const int64_t shares =
        fits_core_ ? std::min<int64_t>(parallel.threads, M / limits::thread_rows) : 1;
    if (shares <= 1) return f(0, M, parallel);
    const int64_t rows = (M + shares - 1) / shares;
    run_tasks(parallel, shares, [&](int64_t share) {
      const int64_t first = std::min(M, share * rows), count = std::min(rows, M - first);
      if (count > 0) f(first, count, in_turn);
    });
  }

  // Of M rows, how many have their logits computed at a time.
  int64_t logits_rows(int64_t M) const;

 private:
  std::vector<int64_t> part_ends_;  // in sequences; none: all threads share every product
  bool fits_core_;                  // a core's cache holds the weights of all layers
  bool in_blocks_;
  int64_t vocab_size_;
};

// How long the threads take to begin a loop together and to end it: 0.15 us on cores with a common
// cache, 0.75 us on others, and which ones they are on may change.
class Handoff {
 public:
  // The same threads, which join in for as much work as that is worth: measured again from time to
  // time, and until all were there.
  Parallel weighed(Parallel parallel);

 private:
  // 0 where a thread was absent.
  static int64_t measure(const Parallel& parallel);

  int passes_ = 0;
  int64_t min_bytes_per_thread_ = 0;
};

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace gptfast
