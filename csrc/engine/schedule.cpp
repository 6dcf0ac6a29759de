#include "schedule.h"

#include <algorithm>

namespace gptfast {
namespace {

// Where the parts of a batch end, counted in sequences. One thread computes a part on its own and
// keeps the weights and the activations of some tokens in its core's cache. Empty if the parts
// would be too uneven.
std::vector<int64_t> part_ends(const Batch& batch, int threads) {
  const int64_t tokens = batch.count();
  const int64_t parts = threads * ((tokens - 1) / (limits::part_tokens * threads) + 1);
  std::vector<int64_t> ends;
  int64_t first = 0, largest = 0;
  for (int64_t last = 1; last <= batch.sequences; ++last) {
    const int64_t size = batch.part(first, last).count();
    if (size * parts < tokens && last < batch.sequences) continue;
    largest = std::max(largest, size);
    ends.push_back(first = last);
  }
  return 2 * threads * largest > 3 * tokens ? std::vector<int64_t>{} : ends;
}

}  // namespace

Schedule::Schedule(const Model& model, const Batch& batch, int threads)
    : fits_core_(model.layers_bytes() <= limits::core_bytes),
      vocab_size_(model.config().vocab_size) {
  if (threads > 1 && batch.sequences >= threads && fits_core_)
    part_ends_ = part_ends(batch, threads);
  in_blocks_ = fits_core_ && (threads == 1 || !part_ends_.empty());
}

int64_t Schedule::logits_rows(int64_t M) const {
  const int64_t max_rows = std::max<int64_t>(1, std::min(M, limits::logits / vocab_size_));
  return std::min(in_blocks_ ? limits::block_tokens : M, max_rows);
}

Parallel Handoff::with_measured_threshold(Parallel parallel) {
  constexpr int period = 256;
  if (passes_ == 0) min_bytes_per_thread_ = measure(parallel);
  passes_ = min_bytes_per_thread_ == 0 ? 0 : (passes_ + 1) % period;
  if (min_bytes_per_thread_ != 0) parallel.min_bytes_per_thread = min_bytes_per_thread_;
  return parallel;
}

int64_t Handoff::measure(const Parallel& parallel) {
  constexpr int loops = 8;
  // Converts seconds of an empty loop to bytes. Reading so many bytes, half of them in a second
  // thread, takes as long as a real loop costs, which is more than an empty one, since its operands
  // and results move between cores too. Found by trial on near and far cores.
  constexpr double bytes_per_second = 256e9;
  static thread_local char here;  // its address tells threads apart
  std::vector<const char*> who(static_cast<size_t>(parallel.threads));
  double min_seconds = 1.0;
  for (int i = 0; i < loops; ++i) {
    const Clock::time_point start = Clock::now();
    run_tasks(parallel, parallel.threads,
              [&](int64_t task) { who[static_cast<size_t>(task)] = &here; });
    const double seconds = seconds_since(start);
    std::sort(who.begin(), who.end());
    const bool all = std::adjacent_find(who.begin(), who.end()) == who.end();
    if (all) min_seconds = std::min(min_seconds, seconds);
  }
  return min_seconds < 1.0 ? static_cast<int64_t>(min_seconds * bytes_per_second) : 0;
}

}  // namespace gptfast
