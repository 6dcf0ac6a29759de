// Whole generations. The tokens must not depend on the number of slots of the cache, on the number
// of steps per call or on the first layer's table. Covers every sampling option, and stops.
#include "../../csrc/engine/session.h"

#include "model.h"

namespace gptfast::sanitize {
namespace {

struct How {
  const char* name;
  Sampling sampling;
  int64_t stride;
  bool stops;
};

constexpr int64_t top_logprobs = 2, new_tokens = 9;

// Prompts of several lengths, one of them longer than the window, one twice.
std::vector<Prompt> prompts_for(const ModelShape& s) {
  std::vector<Prompt> prompts;
  for (const int64_t length : {int64_t{1}, s.T / 2 + 1, s.T + 3, int64_t{0}, int64_t{2}, s.T}) {
    Prompt each = {{}, 7, static_cast<int64_t>(prompts.size())};
    for (int64_t t = 0; t < length; ++t) each.tokens.push_back(random_below(s.V));
    prompts.push_back(each);
  }
  prompts[3].tokens = prompts[1].tokens;
  return prompts;
}

// All that was generated: each sequence's state, length, tokens and log-probabilities.
std::vector<float> generate(std::shared_ptr<const Model> model, const std::vector<Prompt>& prompts,
                            const How& with, int64_t more, int64_t slots, bool tabulated,
                            double seconds, const Parallel& parallel) {
  const ModelConfig& c = model->config();
  SessionOptions options;
  options.sampling = with.sampling;
  options.max_new_tokens = more;
  options.stride = with.stride;
  options.top_logprobs = top_logprobs;
  options.slots = slots, options.capacity = c.block_size;
  options.first_layer_table = tabulated && c.n_layer > 1 && c.attention;
  if (with.stops) {
    // Token t writes the letter a + t, so that tokens 1 and 0 write the stop string; token 2 is a
    // stop token, and token 3 ends a text.
    options.stop_tokens = {2};
    options.end_token = 3;
    options.stop_strings = {"ba"};
    for (int64_t v = 0; v < c.vocab_size; ++v)
      options.pieces.emplace_back(1, static_cast<char>('a' + v));
  }
  Session session(model, prompts, options);
  while (session.run(seconds, parallel)) {
  }
  std::vector<float> all;
  session.updates([&](int64_t, const Sequence& s, int64_t) {
    expect(s.state != State::waiting && s.state != State::running, "a sequence did not end");
    all.push_back(static_cast<float>(s.state));
    all.push_back(static_cast<float>(s.length()));
    all.insert(all.end(), s.tokens.begin() + s.prompt, s.tokens.end());
    for (const auto* values : {&s.logprobs, &s.top_logprobs})
      all.insert(all.end(), values->begin(), values->end());
    all.insert(all.end(), s.top_tokens.begin(), s.top_tokens.end());
  });
  return all;
}

void session_case(const ModelShape& s, const How& with) {
  RandomParameters parameters(s);
  const std::vector<Prompt> prompts = prompts_for(s);
  const std::string name = format("session %s L%lld %s", sanitize::name(s.dtype),
                                  static_cast<long long>(s.L), with.name);
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    const auto model = parameters.at(kernels, parallel);
    const auto run = [&](int64_t slots, bool tabulated, double seconds) {
      return generate(model, prompts, with, new_tokens, slots, tabulated, seconds, parallel);
    };
    const std::vector<float> all = run(6, true, 1e9);
    expect(all == run(1, true, 1e9), "the tokens depend on the slots that there are");
    expect(all == run(4, false, 1e9), "the tokens depend on the table");
    expect(all == run(3, true, 0.0), "the tokens depend on the steps per call");
    // Rounding may change a token from level to level.
    return std::vector<Result>{{"generation", all, 1.0, false}};
  });
}

// Counts the tokens that forward passes compute.
struct Counted {
  static inline int64_t tokens;
  static inline void (*embedding)(const Embedding&, const Parallel&);

  static Kernels of(const Kernels& kernels) {
    Kernels counting = kernels;
    tokens = 0;
    embedding = kernels.embedding;
    counting.embedding = [](const Embedding& s, const Parallel& parallel) {
      tokens += s.M;
      embedding(s, parallel);
    };
    return counting;
  }
};

// Sequences with the same prompt compute it once, even if the first one ends with its first token;
// and a slot that comes free is reused at once.
void sharing_case(const ModelShape& s) {
  RandomParameters parameters(s);
  constexpr int64_t count = 7;
  std::vector<Prompt> prompts;
  for (int64_t i = 0; i < count; ++i) prompts.push_back({{1, 0, 3, 2, 5, 4}, 0, i});
  const auto prompt = static_cast<int64_t>(prompts[0].tokens.size());
  check("session shares a prompt", s.dtype, [&](const Kernels& level, const Parallel& parallel) {
    const Kernels kernels = Counted::of(level);
    const auto model = parameters.at(kernels, parallel);
    // In the last case the sequences fill the window and share a single slot: each takes over the
    // prompt of the one before.
    for (const auto& [more, slots] : {std::pair{1, 3}, {3, 3}, {7, 1}}) {
      Counted::tokens = 0;
      generate(model, prompts, {"drawn", {1.0f, 0, 1.0f, 0.0f, 1.0f}, 1, false}, more, slots, false,
               1e9, sequential);
      expect(Counted::tokens == prompt - 1 + count * more,
             format("%lld tokens were computed", static_cast<long long>(Counted::tokens)));
    }
    return std::vector<Result>{};
  });
}

}  // namespace

void session_cases() {
  sharing_case({DType::f32, 2, 2, 16, 12, 11, true, true, Gelu::erf, Packing::dense});
  const How cases[] = {
      {"greedy", {0.0f, 0, 1.0f, 0.0f, 1.0f}, 1, false},
      {"greedy, penalty", {0.0f, 0, 1.0f, 0.0f, 1.5f}, 3, false},
      {"top-k", {0.8f, 3, 1.0f, 0.0f, 1.0f}, 1, false},
      {"top-p, window", {1.5f, 0, 0.7f, 0.0f, 1.0f}, 0, false},
      {"all, stops", {2.0f, 6, 0.9f, 0.05f, 1.2f}, 2, true},
  };
  for (const DType dtype : dtypes)
    for (const How& with : cases)
      session_case({dtype, 2, 2, 17, 12, 11, true, true, Gelu::erf, Packing::dense}, with);
  session_case({DType::f32, 1, 3, 8, 12, 11, false, true, Gelu::tanh, Packing::int8}, cases[2]);
  session_case({DType::bf16, 2, 1, 64, 7, 11, true, true, Gelu::erf, Packing::int8}, cases[4]);
  session_case({DType::f32, 2, 3, 17, 7, 11, true, true, Gelu::erf, Packing::int8_vnni}, cases[4]);
  session_case({DType::f32, 2, 2, 16, 12, 11, true, false, Gelu::erf, Packing::dense}, cases[2]);
}

}  // namespace gptfast::sanitize
