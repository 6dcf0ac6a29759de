// Generation for any mix of prompts: which sequences run, what their windows hold, how they end. A
// sequence's tokens do not depend on the others, nor on the memory or the threads there are.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "forward.h"

namespace gptfast {

enum class State {
  waiting,
  running,
  length,   // has all tokens that it may have
  stop,     // met a stop
  window,   // filled a window that does not move
  invalid,  // the model's logits are not finite
};

struct SessionOptions {
  Sampling sampling = {1.0f, 0, 1.0f, 0.0f, 1.0f};
  int64_t max_new_tokens = 0;             // per sequence
  int64_t stride = 0;                     // how far a full window moves; 0: not at all
  int64_t top_logprobs = 0;               // how many of the likeliest tokens to report for each
  std::vector<int64_t> stop_tokens;       // each ends a sequence and is left out of it
  std::vector<std::string> stop_strings;  // bytes; each ends a sequence, its own tokens included
  std::vector<std::string> pieces;        // the bytes that each token writes, for stop_strings
  int64_t slots = 1;                      // sequences that run at once
  int64_t capacity = 1;                   // tokens that a slot of the cache has room for
  bool first_layer_table = false;         // whether to keep what the first layer projects
};

// A text to continue, and the key and number of its draws.
struct Prompt {
  std::vector<int64_t> tokens;
  int64_t seed, sequence_id;
};

struct Sequence {
  std::vector<int64_t> tokens;  // the prompt's first
  std::vector<float> logprobs;  // of the generated ones
  // The likeliest tokens in place of each generated one, top_logprobs of them, and theirs.
  std::vector<int64_t> top_tokens;
  std::vector<float> top_logprobs;
  int64_t prompt;  // how many tokens it has
  int64_t seed, sequence_id;
  int64_t same_prompt;  // the first sequence with this prompt
  State state = State::waiting;
  int64_t offset = 0;  // where its window starts
  int64_t cached = 0;  // tokens of the window that the cache has
  int64_t slot = -1;   // of the cache, while it runs

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t generated() const { return length() - prompt; }
  int64_t window() const { return length() - offset; }
};

class Session {
 public:
  // Throws std::invalid_argument for options and prompts that the model does not have or the cache
  // no room for.
  Session(std::shared_ptr<const Model> model, std::vector<Prompt> prompts, SessionOptions options);

  // Makes steps, a token for each of the sequences that have a slot of the cache, in passes of some
  // of them; a slot that comes free takes the next sequence that waits. Ends after `seconds`, but
  // not before the first pass, or where a sequence is invalid. Returns whether there is more to do.
  bool run(double seconds, const Parallel& parallel);

  // The first sequence whose logits were not finite; -1: none.
  int64_t invalid() const { return invalid_; }
  const SessionOptions& options() const { return options_; }
  // Of the cache and the first layer's table.
  int64_t bytes() const;

  // Calls f(i, sequence, first) for each sequence that has changed since the last call, all of them
  // at first: its tokens from number `first` of the generated ones on are new.
  template <class F>
  void updates(const F& f) {
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const Sequence& s = sequences_[i];
      Reported& before = reported_[i];
      if (before.any && before.count == s.generated() && before.state == s.state) continue;
      f(static_cast<int64_t>(i), s, before.count);
      before = {true, s.generated(), s.state};
    }
  }

 private:
  struct Reported {
    bool any = false;
    int64_t count = 0;
    State state = State::waiting;
  };

  void check() const;
  Sequence& sequence(int64_t i) { return sequences_[static_cast<size_t>(i)]; }
  bool finished() const { return running_.empty() && waiting_.empty(); }
  void admit(const Parallel& parallel);
  bool share_prompt(Sequence& s, const Parallel& parallel);
  void move_window(Sequence& s) const;
  void slide(Sequence& s) const;
  bool read_once(const Sequence& s) const;
  void forget_ended();
  template <class TimeIsUp>
  void step(const TimeIsUp& time_is_up, const Parallel& parallel);
  void pass(const int64_t* chosen, int64_t count, const Parallel& parallel);
  void append(Sequence& s, const float* logits) const;
  bool ends_with_stop(const Sequence& s) const;
  bool writes(const Sequence& s, const std::string& bytes, size_t after) const;

  std::shared_ptr<const Model> model_;
  SessionOptions options_;
  Cache cache_;
  std::unique_ptr<FirstLayerTable> table_;
  std::vector<Sequence> sequences_;
  std::vector<Reported> reported_;
  std::vector<int64_t> running_, waiting_, free_slots_;  // the next one to take is at the back
  std::vector<int64_t> holder_;  // whose keys and values a slot of the cache has; -1: nobody's
  int64_t invalid_ = -1;
  Handoff handoff_;
  std::vector<int64_t> tokens_, starts_, slot_, cached_;  // a pass's batch
  std::vector<uint8_t> kept_;
};

}  // namespace gptfast
