#include "generator.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "../kernels/threads/parallel.h"

namespace gptfast {
namespace {

// Tokens in one pass: enough for the products to be at their full speed, few enough for the
// activations to stay in the outer cache.
constexpr int64_t most_tokens = 1024;

using Clock = std::chrono::steady_clock;

// How long the threads take to begin a loop together and to end it: 0.15 us on cores with a common
// cache, 0.75 us on others, and which ones they are on may change.
class Handoff {
 public:
  // The same threads, which join in for as much work as that is worth: measured again from time to
  // time, and until all were there.
  Parallel weighed(Parallel parallel) {
    if (passes_ == 0) worth_ = measure(parallel);
    passes_ = worth_ == 0 ? 0 : (passes_ + 1) % period;
    if (worth_ != 0) parallel.worth = worth_;
    return parallel;
  }

 private:
  static constexpr int loops = 8, period = 256;
  // Reading this much, of which a second thread takes half, is as long as a loop costs beyond an
  // empty one, whose operands and results change cores too: found by trial on near and far cores.
  static constexpr double bytes_per_second = 256e9;

  // 0 where a thread was absent.
  static int64_t measure(const Parallel& parallel) {
    static thread_local char here;  // its address tells threads apart
    std::vector<const char*> who(static_cast<size_t>(parallel.threads));
    double least = 1.0;
    for (int i = 0; i < loops; ++i) {
      const Clock::time_point start = Clock::now();
      run_tasks(parallel, parallel.threads,
                [&](int64_t task) { who[static_cast<size_t>(task)] = &here; });
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      std::sort(who.begin(), who.end());
      const bool all = std::adjacent_find(who.begin(), who.end()) == who.end();
      if (all) least = std::min(least, seconds);
    }
    return least < 1.0 ? static_cast<int64_t>(least * bytes_per_second) : 0;
  }

  int passes_ = 0;
  int64_t worth_ = 0;
};

class Generator {
 public:
  Generator(const Kernels& kernels, const Decoder& model, const KeyValueCache& cache,
            const FirstLayerTable& table, const Sequences& sequences,
            const GeneratorOptions& options, const Parallel& parallel)
      : kernels_(kernels),
        model_(model),
        cache_(cache),
        table_(table),
        sequences_(sequences),
        options_(options),
        parallel_(parallel),
        holder_(static_cast<size_t>(cache.rows), -1) {
    for (int64_t i = 0; i < sequences.count; ++i) {
      const Sequence& s = sequences.all[i];
      if (state(s) == State::running) {
        running_.push_back(i);
        holder_[static_cast<size_t>(s.row)] = i;
      }
      if (state(s) == State::waiting) waiting_.push_back(i);
    }
    std::reverse(waiting_.begin(), waiting_.end());  // the next one is at the back
    // A call that ran out of time stopped before those with the fewest tokens.
    const auto generated = [&](int64_t i) {
      return sequences.all[i].length - sequences.all[i].prompt;
    };
    std::stable_sort(running_.begin(), running_.end(),
                     [&](int64_t a, int64_t b) { return generated(a) < generated(b); });
    for (int64_t row = cache.rows - 1; row >= 0; --row)
      if (holder_[static_cast<size_t>(row)] < 0) free_rows_.push_back(row);
  }

  Outcome run() {
    do {
      admit();
      for (const int64_t i : running_) slide(sequences_.all[i]);
      forget_ended();
      step();
      forget_ended();
    } while (unfinished() > 0 && invalid_ < 0 && have_places() && !time_is_up());
    return {unfinished(), invalid_};
  }

 private:
  static State state(const Sequence& s) { return static_cast<State>(s.state); }
  bool time_is_up() const { return seconds_since(start_) >= options_.seconds; }
  static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }
  int64_t unfinished() const { return static_cast<int64_t>(running_.size() + waiting_.size()); }

  // Whether there is a place for each one's next token.
  bool have_places() const {
    return std::all_of(running_.begin(), running_.end(), [&](int64_t i) {
      return sequences_.all[i].length < sequences_.all[i].limit;
    });
  }

  void end(Sequence& s, State how) { s.state = static_cast<int64_t>(how); }

  void forget_ended() {
    const auto ended = [&](int64_t i) {
      const Sequence& s = sequences_.all[i];
      if (state(s) == State::running) return false;
      if (state(s) == State::invalid && (invalid_ < 0 || i < invalid_)) invalid_ = i;
      free_rows_.push_back(s.row);
      return true;
    };
    running_.erase(std::remove_if(running_.begin(), running_.end(), ended), running_.end());
  }

  // Gives free rows to the sequences that wait, in order but for those whose twin is about to
  // compute what they need.
  void admit() {
    std::vector<int64_t> later;
    while (!free_rows_.empty() && !waiting_.empty()) {
      const int64_t i = waiting_.back();
      waiting_.pop_back();
      Sequence& s = sequences_.all[i];
      s.row = free_rows_.back();
      s.offset = s.cached = 0;
      move_window(s);
      if (!share_prompt(s)) {
        later.push_back(i);
        continue;
      }
      holder_[static_cast<size_t>(s.row)] = i;
      end(s, State::running);
      running_.push_back(i);
      free_rows_.pop_back();
    }
    waiting_.insert(waiting_.end(), later.rbegin(), later.rend());
  }

  // Copies the keys and values of the prompt, but for its last token, from the row of a sequence
  // with the same prompt, which may have ended. False where there is one that has yet to compute
  // them: waiting is cheaper.
  bool share_prompt(Sequence& s) {
    const int64_t shared = s.prompt - s.offset - 1;
    if (shared <= 0 || !model_.attention) return true;
    for (const int64_t other : holder_) {
      if (other < 0) continue;
      const Sequence& twin = sequences_.all[other];
      if (twin.twin != s.twin || twin.offset != s.offset) continue;
      if (twin.cached < shared && state(twin) == State::running) return false;
      if (twin.cached < shared) continue;  // it ended before it computed any
      if (twin.row != s.row)
        copy_cached(kernels_, model_, cache_, twin.row, s.row, shared, parallel_);
      s.cached = shared;
      return true;
    }
    return true;
  }

  void move_window(Sequence& s) {
    const int64_t over = s.length - s.offset - model_.block_size;
    if (over <= 0 || options_.stride == 0) return;
    s.offset += (over + options_.stride - 1) / options_.stride * options_.stride;
    s.cached = 0;  // positions are absolute: all keys and values change
  }

  // Whether no later pass reads the keys and values of the window: it has moved, away from those
  // that a twin could use, and will have moved again by the next token.
  bool read_once(const Sequence& s) const {
    return s.cached == 0 && s.length > s.prompt && options_.stride > 0 &&
           s.length - s.offset == model_.block_size;
  }

  void slide(Sequence& s) {
    move_window(s);
    if (s.length - s.offset > model_.block_size) end(s, State::window);
    if (!model_.attention) s.cached = s.length - s.offset - 1;  // no token sees another
  }

  // One token for every running sequence, in passes of some of them, while there is time.
  void step() {
    for (size_t first = 0; first < running_.size() && (first == 0 || !time_is_up());) {
      int64_t tokens = 0;
      size_t last = first;
      while (last < running_.size()) {
        const Sequence& s = sequences_.all[running_[last]];
        tokens += s.length - s.offset - s.cached;
        if (last > first && tokens > most_tokens) break;
        ++last;
      }
      pass(running_.data() + first, static_cast<int64_t>(last - first));
      first = last;
    }
  }

  void pass(const int64_t* chosen, int64_t count) {
    tokens_.clear(), row_.clear(), cached_.clear(), kept_.clear();
    starts_.assign(1, 0);
    for (int64_t n = 0; n < count; ++n) {
      Sequence& s = sequences_.all[chosen[n]];
      const int64_t* text = sequences_.tokens + s.begin;
      tokens_.insert(tokens_.end(), text + s.offset + s.cached, text + s.length);
      starts_.push_back(static_cast<int64_t>(tokens_.size()));
      row_.push_back(s.row);
      cached_.push_back(s.cached);
      const bool kept = !read_once(s);
      kept_.push_back(kept);
      s.cached = kept ? s.length - s.offset : 0;
    }
    const DecoderBatch batch = {count,       tokens_.data(), starts_.data(),
                                row_.data(), cached_.data(), kept_.data()};
    fill_table(kernels_, model_, batch, table_, parallel_);
    if (count < parallel_.threads) return extend(batch, chosen, handoff_.weighed(parallel_));
    for_parts(model_, batch, parallel_,
              [&](const DecoderBatch& part, int64_t first, const Parallel& parallel) {
                extend(part, chosen + first, parallel);
              });
  }

  // By one token each, while their logits are in the cache.
  void extend(const DecoderBatch& batch, const int64_t* chosen, const Parallel& parallel) {
    constexpr int64_t worth = int64_t{1} << 11;  // logits, for a thread to join in
    const int64_t V = model_.vocab_size, rows = std::max<int64_t>(1, worth / V);
    const auto use = [&](int64_t first, int64_t count, const float* logits) {
      run_tasks(parallel, (count + rows - 1) / rows, [&](int64_t task) {
        for (int64_t n = task * rows; n < std::min(count, (task + 1) * rows); ++n)
          append(sequences_.all[chosen[first + n]], logits + n * V);
      });
    };
    decoder_forward(kernels_, model_, batch, cache_, table_, use, parallel);
  }

  // Chooses the next token; a sequence is written by its own task alone.
  void append(Sequence& s, const float* logits) {
    const int64_t place = s.begin + s.length, k = sequences_.alternatives;
    const int64_t* text = sequences_.tokens + s.begin;
    SampleRow row = {};
    row.logits = logits, row.V = model_.vocab_size;
    row.seen = text, row.seen_count = s.length;
    row.seed = static_cast<uint64_t>(s.seed);
    row.sequence = static_cast<uint32_t>(s.number);
    row.step = static_cast<uint32_t>(s.length - s.prompt);
    row.alternatives = k;
    row.alternative = sequences_.alternative + place * k;
    row.alternative_logprob = sequences_.alternative_logprob + place * k;
    const Sample chosen = kernels_.sample(options_.sampling, row);
    if (!std::isfinite(chosen.logprob)) return end(s, State::invalid);
    const Stops& stops = options_.stops;
    const int64_t* last = stops.tokens + stops.token_count;
    if (std::find(stops.tokens, last, chosen.token) != last) return end(s, State::stop);
    sequences_.tokens[place] = chosen.token;
    sequences_.logprobs[place] = chosen.logprob;
    ++s.length;
    if (ends_with_stop(s))
      end(s, State::stop);
    else if (s.length == s.limit && s.beyond == 0)
      end(s, State::length);
  }

  // Whether the last token completed a stop string: one that ends within what it wrote.
  bool ends_with_stop(const Sequence& s) const {
    const Texts &strings = options_.stops.strings, &pieces = options_.stops.pieces;
    for (int64_t i = 0; i < strings.count; ++i) {
      const int64_t* token = sequences_.tokens + s.begin + s.length - 1;
      for (int64_t after = 0; after < pieces.size(*token); ++after)
        if (writes(s, strings.data + strings.starts[i], strings.size(i), after)) return true;
    }
    return false;
  }

  // Whether the generated text, but for its last `after` bytes, ends with these.
  bool writes(const Sequence& s, const uint8_t* bytes, int64_t size, int64_t after) const {
    const Texts& pieces = options_.stops.pieces;
    int64_t t = s.length - 1, skip = after;
    while (size > 0) {
      if (t < s.prompt) return false;
      const int64_t token = sequences_.tokens[s.begin + t--];
      const uint8_t* piece = pieces.data + pieces.starts[token];
      for (int64_t j = pieces.size(token) - 1 - skip; j >= 0 && size > 0; --j)
        if (piece[j] != bytes[--size]) return false;
      skip = 0;
    }
    return true;
  }

  const Kernels& kernels_;
  const Decoder& model_;
  const KeyValueCache& cache_;
  const FirstLayerTable& table_;
  const Sequences& sequences_;
  const GeneratorOptions& options_;
  const Parallel& parallel_;
  const Clock::time_point start_ = Clock::now();
  int64_t invalid_ = -1;
  Handoff handoff_;
  std::vector<int64_t> running_, waiting_, free_rows_;
  std::vector<int64_t> holder_;  // whose keys and values a row of the cache has; -1: unknown
  std::vector<int64_t> tokens_, starts_, row_, cached_;
  std::vector<uint8_t> kept_;
};

}  // namespace

Outcome generator_run(const Kernels& kernels, const Decoder& model, const KeyValueCache& cache,
                      const FirstLayerTable& table, const Sequences& sequences,
                      const GeneratorOptions& options, const Parallel& parallel) {
  return Generator(kernels, model, cache, table, sequences, options, parallel).run();
}

}  // namespace gptfast
