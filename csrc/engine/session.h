// Generation for any mix of prompts: which sequences run, what their windows hold, how they end. A
// sequence's tokens do not depend on the other sequences, on the available memory or on the number
// of threads.
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
  length,   // has max_new_tokens tokens
  stop,     // generated a stop token or a stop string
  end,      // generated the token that ends a text
  window,   // filled a window that does not move
  invalid,  // the model's logits are not finite
};

struct SessionOptions {
  Sampling sampling = {1.0f, 0, 1.0f, 0.0f, 1.0f};
  int64_t max_new_tokens = 0;             // per sequence
  int64_t stride = 0;                     // tokens by which a full window moves; 0: it does not
  int64_t top_logprobs = 0;               // how many of the most probable tokens to report each
  std::vector<int64_t> stop_tokens;       // each ends a sequence and is not part of it
  int64_t end_token = -1;                 // likewise, the tokenizer's; -1: none
  std::vector<std::string> stop_strings;  // bytes; each ends a sequence and is part of it
  std::vector<std::string> pieces;        // the bytes that each token writes, for stop_strings
  int64_t slots = 1;                      // sequences that run at once
  int64_t capacity = 1;                   // tokens that a slot of the cache can hold
  bool first_layer_table = false;         // whether to keep the first layer's projections
};

// A text to continue; seed and sequence_id are the key of its random stream.
struct Prompt {
  std::vector<int64_t> tokens;
  int64_t seed, sequence_id;
};

struct Sequence {
  std::vector<int64_t> tokens;  // of the prompt, then the generated ones
  std::vector<float> logprobs;  // of the generated tokens
  // For each generated token, the SessionOptions::top_logprobs most probable tokens in its place,
  // and their log-probabilities.
  std::vector<int64_t> top_tokens;
  std::vector<float> top_logprobs;
  // The distinct tokens so far, and for each id whether it is among them, while the sequence runs
  // with a repetition penalty. To go through all of its tokens at each step takes quadratic time.
  std::vector<int64_t> seen;
  std::vector<bool> is_seen;
  int64_t prompt;  // its number of tokens
  int64_t seed, sequence_id;
  int64_t same_prompt;  // index of the first sequence with this prompt
  State state = State::waiting;
  int64_t offset = 0;  // index of the window's first token
  int64_t cached = 0;  // tokens of the window that are in the cache
  int64_t slot = -1;   // of the cache, once it runs

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t generated() const { return length() - prompt; }
  int64_t window() const { return length() - offset; }

  void see_all(int64_t vocab_size) {
    is_seen.assign(static_cast<size_t>(vocab_size), false);
    for (const int64_t token : tokens) see(token);
  }
  void see(int64_t token) {
    if (is_seen.empty() || is_seen[static_cast<size_t>(token)]) return;
    is_seen[static_cast<size_t>(token)] = true;
    seen.push_back(token);
  }
};

class Session {
 public:
  // Throws std::invalid_argument for options and prompts that are not valid for the model or do not
  // fit into the cache.
  Session(std::shared_ptr<const Model> model, std::vector<Prompt> prompts, SessionOptions options);

  // Runs steps, each of which generates a token for every sequence that has a slot of the cache, in
  // forward passes over some of them. A slot that comes free goes to the next waiting sequence.
  // Returns after `seconds`, but not before the first pass, or once a sequence is invalid; the
  // result is whether there is more to do.
  bool run(double seconds, const Parallel& parallel);

  // The first sequence whose logits were not finite; -1 if there is none.
  int64_t invalid() const { return invalid_; }
  const SessionOptions& options() const { return options_; }
  // Bytes of the cache and of the first layer's table.
  int64_t bytes() const;

  // Calls f(i, sequence, first) for each sequence that has changed since the last call; the first
  // call reports all. Its generated tokens from index `first` on are new.
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
  // What `updates` has last reported of a sequence.
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
  bool never_reread(const Sequence& s) const;
  void release_ended();
  template <class TimeIsUp>
  void step(const TimeIsUp& time_is_up, const Parallel& parallel);
  void pass(const int64_t* chosen, int64_t count, const Parallel& parallel);
  void append(Sequence& s, const float* logits) const;
  bool ends_with_stop(const Sequence& s) const;
  bool text_ends_with(const Sequence& s, const std::string& bytes, size_t after) const;

  std::shared_ptr<const Model> model_;
  SessionOptions options_;
  Cache cache_;
  std::unique_ptr<FirstLayerTable> table_;
  std::vector<Sequence> sequences_;
  std::vector<Reported> reported_;
  std::vector<int64_t> running_, waiting_, free_slots_;  // the next one is at the back
  std::vector<int64_t> slot_owner_;  // the sequence whose keys and values a slot has; -1: none
  int64_t invalid_ = -1;
  Handoff handoff_;
  std::vector<int64_t> tokens_, starts_, slot_, cached_;  // the batch of a pass
  std::vector<uint8_t> kept_;
};

}  // namespace gptfast
