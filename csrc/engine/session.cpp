#include "session.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

namespace gptfast {
namespace {

// Reserves memory for `more` elements, at least doubling it, so that the threads that append them
// allocate nothing.
template <class T>
void make_room(std::vector<T>& values, size_t more) {
  const size_t needed = values.size() + more;
  if (needed > values.capacity()) values.reserve(std::max(needed, 2 * values.capacity()));
}

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument("generate: " + sentence);
}

}  // namespace

Session::Session(std::shared_ptr<const Model> model, std::vector<Prompt> prompts,
                 SessionOptions options)
    : model_(std::move(model)),
      options_(std::move(options)),
      cache_(*model_, options_.slots, options_.capacity),
      reported_(prompts.size()),
      slot_owner_(static_cast<size_t>(options_.slots), -1) {
  if (options_.first_layer_table) table_ = std::make_unique<FirstLayerTable>(*model_);
  std::map<std::vector<int64_t>, int64_t> first;
  for (size_t i = 0; i < prompts.size(); ++i) {
    Sequence s = {};
    s.prompt = static_cast<int64_t>(prompts[i].tokens.size());
    s.same_prompt = first.try_emplace(prompts[i].tokens, static_cast<int64_t>(i)).first->second;
    s.tokens = std::move(prompts[i].tokens);
    s.seed = prompts[i].seed, s.sequence_id = prompts[i].sequence_id;
    if (options_.max_new_tokens == 0) s.state = State::length;
    sequences_.push_back(std::move(s));
  }
  check();
  for (auto i = static_cast<int64_t>(sequences_.size()) - 1; i >= 0; --i)
    if (sequence(i).state == State::waiting) waiting_.push_back(i);
  for (int64_t slot = options_.slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

void Session::check() const {
  const ModelConfig& c = model_->config();
  const Sampling& s = options_.sampling;
  require(s.temperature >= 0 && s.top_k >= 0 && s.top_p > 0 && s.top_p <= 1 && s.min_p >= 0 &&
              s.min_p <= 1 && s.repetition_penalty > 0 && options_.max_new_tokens >= 0 &&
              options_.stride >= 0 && options_.stride <= c.block_size &&
              options_.top_logprobs >= 0 && options_.top_logprobs <= c.vocab_size,
          "an option is out of its range");
  require(options_.slots > 0 || sequences_.empty(), "slots must be above 0");
  require(
      options_.stop_strings.empty() || static_cast<int64_t>(options_.pieces.size()) == c.vocab_size,
      "pieces must be one per token where there are stop strings");
  require(table_ == nullptr || (c.attention && c.n_layer > 1),
          "first_layer_table is for a model with attention in two layers");
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const Sequence& each = sequences_[i];
    const std::string name = "prompt " + std::to_string(i);
    require(each.prompt > 0, name + " must have a token");
    // Compared without the sum of prompt and max_new_tokens, which could overflow.
    const int64_t room = c.block_size - std::min(c.block_size, each.prompt);
    const int64_t longest = c.block_size - room + std::min(options_.max_new_tokens - 1, room);
    require(!c.attention || options_.max_new_tokens == 0 || longest <= options_.capacity,
            name + " must fit into the cache's capacity");
    model_->check_tokens("generate", each.tokens);
  }
}

int64_t Session::bytes() const {
  return cache_.bytes() + (table_ ? FirstLayerTable::bytes(*model_) : 0);
}

bool Session::run(double seconds, const Parallel& parallel) {
  const Clock::time_point start = Clock::now();
  const auto time_is_up = [&] { return seconds_since(start) >= seconds; };
  // The last call may have run out of time before it reached some sequences: those with the fewest
  // tokens come first.
  std::stable_sort(running_.begin(), running_.end(), [&](int64_t a, int64_t b) {
    return sequence(a).generated() < sequence(b).generated();
  });
  while (!finished() && invalid_ < 0) {
    admit(parallel);
    for (const int64_t i : running_) slide(sequence(i));
    release_ended();
    step(time_is_up, parallel);
    release_ended();
    if (time_is_up()) break;
  }
  return !finished();
}

// Takes ended sequences off the running ones, frees their slots and notes the first invalid one.
void Session::release_ended() {
  const auto ended = [&](int64_t i) {
    Sequence& s = sequence(i);
    if (s.state == State::running) return false;
    if (s.state == State::invalid && (invalid_ < 0 || i < invalid_)) invalid_ = i;
    free_slots_.push_back(s.slot);
    s.seen = {}, s.is_seen = {};
    return true;
  };
  running_.erase(std::remove_if(running_.begin(), running_.end(), ended), running_.end());
}

// Gives free slots to waiting sequences, in order, except those whose prompt a running sequence has
// yet to compute.
void Session::admit(const Parallel& parallel) {
  std::vector<int64_t> later;
  while (!free_slots_.empty() && !waiting_.empty()) {
    const int64_t i = waiting_.back();
    waiting_.pop_back();
    Sequence& s = sequence(i);
    s.slot = free_slots_.back();
    s.offset = s.cached = 0;
    move_window(s);
    if (!share_prompt(s, parallel)) {
      later.push_back(i);
      continue;
    }
    slot_owner_[static_cast<size_t>(s.slot)] = i;
    if (options_.sampling.repetition_penalty != 1.0f) s.see_all(model_->config().vocab_size);
    s.state = State::running;
    running_.push_back(i);
    free_slots_.pop_back();
  }
  waiting_.insert(waiting_.end(), later.rbegin(), later.rend());
}

// Copies the keys and values of the prompt, except for its last token, from the slot of a sequence
// with the same prompt, which may have ended. Returns false if that sequence has yet to compute
// them: it is cheaper to wait.
bool Session::share_prompt(Sequence& s, const Parallel& parallel) {
  const int64_t shared = s.prompt - s.offset - 1;
  if (shared <= 0 || !model_->config().attention) return true;
  for (const int64_t other : slot_owner_) {
    if (other < 0) continue;
    const Sequence& same = sequence(other);
    if (same.same_prompt != s.same_prompt || same.offset != s.offset) continue;
    if (same.cached < shared && same.state == State::running) return false;
    if (same.cached < shared) continue;  // it ended before it computed them
    if (same.slot != s.slot) cache_.copy(same.slot, s.slot, shared, parallel);
    s.cached = shared;
    return true;
  }
  return true;
}

// Moves a window that exceeds block_size by whole strides, and discards its cached tokens.
void Session::move_window(Sequence& s) const {
  const int64_t over = s.window() - model_->config().block_size;
  if (over <= 0 || options_.stride == 0) return;
  s.offset += (over + options_.stride - 1) / options_.stride * options_.stride;
  s.cached = 0;  // positions are absolute: all keys and values change
}

// Moves the window before the next token; ends a sequence whose full window does not move.
void Session::slide(Sequence& s) const {
  move_window(s);
  if (s.window() > model_->config().block_size) s.state = State::window;
  if (!model_->config().attention) s.cached = s.window() - 1;  // no token attends to another
}

// Whether no later pass reads the keys and values of the window: it has moved past the prompt that
// other sequences could share, and will move again before the next token.
bool Session::never_reread(const Sequence& s) const {
  return s.cached == 0 && s.generated() > 0 && options_.stride > 0 &&
         s.window() == model_->config().block_size;
}

// Generates one token for every running sequence, in forward passes over some of them, until time
// is up.
template <class TimeIsUp>
void Session::step(const TimeIsUp& time_is_up, const Parallel& parallel) {
  for (size_t first = 0; first < running_.size() && (first == 0 || !time_is_up());) {
    int64_t tokens = 0;
    size_t last = first;
    while (last < running_.size()) {
      const Sequence& s = sequence(running_[last]);
      tokens += s.window() - s.cached;
      if (last > first && tokens > limits::pass_tokens) break;
      ++last;
    }
    pass(running_.data() + first, static_cast<int64_t>(last - first), parallel);
    first = last;
  }
}

void Session::pass(const int64_t* chosen, int64_t count, const Parallel& parallel) {
  tokens_.clear(), slot_.clear(), cached_.clear(), kept_.clear();
  starts_.assign(1, 0);
  const auto tops = static_cast<size_t>(options_.top_logprobs);
  for (int64_t n = 0; n < count; ++n) {
    Sequence& s = sequence(chosen[n]);
    tokens_.insert(tokens_.end(), s.tokens.begin() + s.offset + s.cached, s.tokens.end());
    starts_.push_back(static_cast<int64_t>(tokens_.size()));
    slot_.push_back(s.slot);
    cached_.push_back(s.cached);
    const bool kept = !never_reread(s);
    kept_.push_back(kept);
    s.cached = kept ? s.window() : 0;
    make_room(s.tokens, 1), make_room(s.logprobs, 1);
    make_room(s.top_tokens, tops), make_room(s.top_logprobs, tops);
    if (!s.is_seen.empty()) make_room(s.seen, 1);
  }
  const Batch batch = {count,        tokens_.data(), starts_.data(),
                       slot_.data(), cached_.data(), kept_.data()};
  const int64_t V = model_->config().vocab_size;
  const int64_t rows = std::max<int64_t>(1, limits::task_logits / V);
  // Chooses the next tokens while their logits are in the cache; each sequence is written by one
  // task.
  const auto use = [&](int64_t first, int64_t n, const float* logits, const Parallel& idle) {
    run_tasks(idle, (n + rows - 1) / rows, [&](int64_t task) {
      for (int64_t i = task * rows; i < std::min(n, (task + 1) * rows); ++i)
        append(sequence(chosen[first + i]), logits + i * V);
    });
  };
  const Parallel threads =
      count < parallel.threads ? handoff_.with_measured_threshold(parallel) : parallel;
  forward(*model_, batch, cache_, table_.get(), use, threads);
}

// Chooses a token from its logits and appends it, or ends the sequence.
void Session::append(Sequence& s, const float* logits) const {
  const int64_t k = options_.top_logprobs;
  const auto end = s.top_tokens.size();
  s.top_tokens.resize(end + static_cast<size_t>(k));
  s.top_logprobs.resize(end + static_cast<size_t>(k));
  SampleRow row = {};
  row.logits = logits, row.V = model_->config().vocab_size;
  row.seen = s.seen.data(), row.seen_count = static_cast<int64_t>(s.seen.size());
  row.seed = static_cast<uint64_t>(s.seed);
  row.sequence = static_cast<uint32_t>(s.sequence_id);
  row.step = static_cast<uint32_t>(s.generated());
  row.top_count = k;
  row.top_tokens = s.top_tokens.data() + end;
  row.top_logprobs = s.top_logprobs.data() + end;
  const Sample chosen = model_->kernels().sample(options_.sampling, row);
  const auto& stops = options_.stop_tokens;
  const bool ended = chosen.token == options_.end_token;
  const bool stopped = std::find(stops.begin(), stops.end(), chosen.token) != stops.end();
  const bool finite = std::isfinite(chosen.logprob);
  if (!finite || ended || stopped) {
    s.state = !finite ? State::invalid : ended ? State::end : State::stop;
    s.top_tokens.resize(end), s.top_logprobs.resize(end);
    return;
  }
  s.tokens.push_back(chosen.token);
  s.see(chosen.token);
  s.logprobs.push_back(chosen.logprob);
  if (ends_with_stop(s))
    s.state = State::stop;
  else if (s.generated() == options_.max_new_tokens)
    s.state = State::length;
}

// Whether the last token completed a stop string: one that ends within the bytes that it wrote.
bool Session::ends_with_stop(const Sequence& s) const {
  for (const std::string& stop : options_.stop_strings) {
    const size_t written = options_.pieces[static_cast<size_t>(s.tokens.back())].size();
    for (size_t after = 0; after < written; ++after)
      if (text_ends_with(s, stop, after)) return true;
  }
  return false;
}

// Whether the generated text without its last `after` bytes ends with `bytes`.
bool Session::text_ends_with(const Sequence& s, const std::string& bytes, size_t after) const {
  size_t left = bytes.size(), skip = after;
  for (int64_t t = s.length() - 1; left > 0; --t, skip = 0) {
    if (t < s.prompt) return false;
    const auto token = static_cast<size_t>(s.tokens[static_cast<size_t>(t)]);
    const std::string& piece = options_.pieces[token];
    for (size_t j = piece.size() - skip; j > 0 && left > 0; --j)
      if (piece[j - 1] != bytes[--left]) return false;
  }
  return true;
}

}  // namespace gptfast
