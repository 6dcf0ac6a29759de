// How the work of a forward pass is divided: a schedule is made once from the model, the batch and
// the number of threads, and forward.cpp carries it out. Results have the same bits under any.
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
  const int64_t* starts;  // (sequences + 1,): sequence i has tokens[starts[i]] ..
                          // tokens[starts[i + 1] - 1]
  const int64_t* slot;    // (sequences,): its slot of the cache
  const int64_t* cached;  // (sequences,): how many of its tokens are in the cache already
  const uint8_t* kept;    // (sequences,): whether a later pass reads the new tokens' keys and
                          // values from the cache; if not, they may be left out

  int64_t count() const { return starts[sequences] - starts[0]; }
  int64_t position(int64_t i, int64_t token) const { return cached[i] + token - starts[i]; }
  // Sequences [first, last).
  Batch part(int64_t first, int64_t last) const {
    return {last - first, tokens, starts + first, slot + first, cached + first, kept + first};
  }
};

// The sizes that decide how the work is divided. A ratio is the time of generation with another
// value over the time with this one, on 2 cores with AVX2, models S and L of bench_generate.py in
// fp32, the best of 14 calls each in turn; there, differences below 0.05 are noise.
namespace limits {

// Bytes of the layers' weights that stay in a core's own cache beside the activations of a block of
// tokens. 2 layers of 128 columns in fp32 fit (1.6 MB), and there threads gain from working apart;
// 12 layers of 768 columns are 340 MB.
constexpr int64_t core_bytes = int64_t{2} << 20;
// Tokens that go through all layers before the next ones: 128 rows of 3 C + 4 C columns in fp32 are
// 0.5 MB for C = 128, so that weights and activations stay in the core's cache together. 32 to 512
// tokens: 0.98 to 1.02, but 1.28 at 64, because a block then has one prompt of 60 tokens, not two.
constexpr int64_t block_tokens = 128;
// Tokens of a part that a thread computes on its own. With more tokens, each thread has several
// parts, so that none waits long for the last. 128 to 4096 tokens: 0.99 to 1.02; with more threads,
// fewer large parts would leave some of them idle.
constexpr int64_t part_tokens = 4 * block_tokens;
// Fewest rows for which a thread computes its share of a layer by itself: a product of fewer takes
// less time than the two hand-overs, of up to 1 us each.
constexpr int64_t thread_rows = 16;
// Floats of logits at a time, 16 MB: they are still in the outer cache when tokens are sampled. A
// text of 512 tokens is scored as fast with 4 to 128 MB (0.93 to 1.0); 16 bounds the memory.
constexpr int64_t logits = int64_t{4} << 20;
// Logits per task of sampling: some 2 us of work, for which a thread joins in. 2^8 to 2^20 with 64
// texts: 1.00 to 1.02.
constexpr int64_t task_logits = int64_t{1} << 11;
// Rows of the first layer's table that a task copies, of 3 C elements each. 8: 1.01 to 1.03; 512
// and 2^20: 0.99 to 1.01.
constexpr int64_t task_table_rows = 64;
// Tokens in one forward pass: enough for the products to reach their full speed, few enough for the
// activations to stay in the outer cache. 256: 1.02 to 1.10, 512: 1.01 to 1.05, 2048: 1.01 to 1.2,
// 8192: 0.98 to 1.08.
constexpr int64_t pass_tokens = 1024;

}  // namespace limits

class Schedule {
 public:
  Schedule(const Model& model, const Batch& batch, int threads);

  // Calls f(part, first, parallel) for the parts of the batch; a part starts at the batch's
  // sequence `first`. A thread that has a part for itself goes from tokens to logits without
  // waiting for others.
  template <class F>
  void for_parts(const Batch& batch, const Parallel& parallel, const F& f) const {
    if (part_ends_.empty()) return f(batch, 0, parallel);
    run_tasks(parallel, static_cast<int64_t>(part_ends_.size()), [&](int64_t i) {
      const auto end = part_ends_.begin() + i;
      const int64_t first = i == 0 ? 0 : end[-1];
      f(batch.part(first, *end), first, sequential);
    });
  }

  // Calls f(block, first) for blocks of a part, which go through all layers one after the other; a
  // block starts at the part's sequence `first`.
  template <class F>
  void for_blocks(const Batch& part, const F& f) const {
    const int64_t max_tokens = in_blocks_ ? limits::block_tokens : part.count();
    for (int64_t first = 0, end = 0; first < part.sequences; first = end) {
      for (++end; end < part.sequences && part.part(first, end + 1).count() <= max_tokens;) ++end;
      f(part.part(first, end), first);
    }
  }

  // Calls f(first, count, parallel) for all M rows. If a core's cache holds the weights and there
  // are enough rows, each thread has a share of them and waits for the others only before and after
  // attention.
  template <class F>
  void for_rows(int64_t M, const Parallel& parallel, const F& f) const {
    const int64_t shares =
        fits_core_ ? std::min<int64_t>(parallel.threads, M / limits::thread_rows) : 1;
    if (shares <= 1) return f(0, M, parallel);
    const int64_t rows = (M + shares - 1) / shares;
    run_tasks(parallel, shares, [&](int64_t share) {
      const int64_t first = std::min(M, share * rows), count = std::min(rows, M - first);
      if (count > 0) f(first, count, sequential);
    });
  }

  // How many of M rows have their logits computed at a time.
  int64_t logits_rows(int64_t M) const;

 private:
  std::vector<int64_t> part_ends_;  // in sequences; empty: all threads share every product
  bool fits_core_;                  // a core's cache holds the weights of all layers
  bool in_blocks_;                  // each thread takes block_tokens at a time
  int64_t vocab_size_;
};

// Measures how long the threads take to begin and end a loop together: 0.15 us on cores with a
// common cache, 0.75 us on others. The threads may move to other cores meanwhile.
class Handoff {
 public:
  // The same threads, with min_bytes_per_thread as measured. Measures again from time to time, and
  // until all threads have been present.
  Parallel with_measured_threshold(Parallel parallel);

 private:
  // Returns min_bytes_per_thread, or 0 if a thread was absent.
  static int64_t measure(const Parallel& parallel);

  int passes_ = 0;
  int64_t min_bytes_per_thread_ = 0;
};

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace gptfast
