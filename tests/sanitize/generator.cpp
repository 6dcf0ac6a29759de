// Whole generations: any number of rows of the cache, any number of steps per call, with and
// without the table of the first layer give the same tokens; every option of sampling; stops.
#include "../../csrc/engine/generator.h"

#include <cstring>

#include "model.h"

namespace gptfast::sanitize {
namespace {

struct Options {
  const char* name;
  Sampling sampling;
  int64_t stride;
  bool stops;
};

struct Memory {
  std::vector<Sequence> sequences;
  std::vector<int64_t> tokens, alternative;
  std::vector<float> logprobs, alternative_logprob;
};

constexpr int64_t alternatives = 2, new_tokens = 9;

// Prompts of several lengths, one of them longer than the window, one twice.
Memory memory_for(const ModelShape& s) {
  Memory m;
  const int64_t lengths[] = {1, s.T / 2 + 1, s.T + 3, s.T / 2 + 1, 2, s.T};
  int64_t begin = 0;
  for (int64_t i = 0; i < 6; ++i) {
    Sequence each = {};
    each.begin = begin;
    each.length = each.prompt = lengths[i];
    each.limit = lengths[i] + new_tokens;
    each.seed = 7, each.number = i, each.twin = i == 3 ? 1 : i;
    m.sequences.push_back(each);
    begin += each.limit;
  }
  const auto places = static_cast<size_t>(begin);
  m.tokens.resize(places);
  m.alternative.resize(places * alternatives);
  m.logprobs.resize(places);
  m.alternative_logprob.resize(places * alternatives);
  for (int64_t& token : m.tokens) token = random_below(s.V);
  for (int64_t t = 0; t < lengths[1]; ++t)
    m.tokens[static_cast<size_t>(m.sequences[3].begin + t)] =
        m.tokens[static_cast<size_t>(m.sequences[1].begin + t)];
  return m;
}

// All that was generated: lengths, how each ended, tokens and log-probabilities.
std::vector<float> generate(const ModelShape& s, const Decoder& model, Memory m,
                            const Options& with, int64_t rows, bool tabulated, double seconds,
                            const Kernels& kernels, const Parallel& parallel) {
  const Guarded cache(static_cast<size_t>(rows * cache_row_bytes(kernels, model, s.T)), 64, 0);
  const Buffer qkv(s.T * s.V * 3 * s.H * s.D, s.dtype);
  std::vector<uint8_t> known(static_cast<size_t>(s.T * s.V));
  const FirstLayerTable table =
      tabulated && s.L > 1 ? FirstLayerTable{qkv.data(), known.data()} : FirstLayerTable{};
  // Token t writes the letter a + t; the stop string is what tokens 1 and 0 write, a stop is 2.
  std::vector<uint8_t> letters;
  std::vector<int64_t> starts;
  for (int64_t v = 0; v <= s.V; ++v) {
    letters.push_back(static_cast<uint8_t>('a' + v));
    starts.push_back(v);
  }
  const uint8_t string[] = {'b', 'a'};
  const int64_t string_starts[] = {0, 2}, token = 2;
  GeneratorOptions options = {};
  options.sampling = with.sampling;
  options.stride = with.stride;
  options.seconds = seconds;
  if (with.stops)
    options.stops = {&token, 1, {string, string_starts, 1}, {letters.data(), starts.data(), s.V}};
  const Sequences sequences = {m.sequences.data(),
                               static_cast<int64_t>(m.sequences.size()),
                               m.tokens.data(),
                               m.logprobs.data(),
                               alternatives,
                               m.alternative.data(),
                               m.alternative_logprob.data()};
  const KeyValueCache memory = {cache.data(), rows, s.T};
  while (generator_run(kernels, model, memory, table, sequences, options, parallel).unfinished >
         0) {
    for (Sequence& each : m.sequences) {
      if (each.length < each.limit || each.beyond == 0) continue;
      ++each.limit, --each.beyond;  // a place more
    }
  }
  std::vector<float> all;
  for (const Sequence& each : m.sequences) {
    expect(each.state > static_cast<int64_t>(State::running), "a sequence did not end");
    all.push_back(static_cast<float>(each.state));
    all.push_back(static_cast<float>(each.length));
    for (int64_t place = each.begin + each.prompt; place < each.begin + each.length; ++place) {
      const auto at = static_cast<size_t>(place);
      all.push_back(static_cast<float>(m.tokens[at]));
      all.push_back(m.logprobs[at]);
      for (size_t i = at * alternatives; i < (at + 1) * alternatives; ++i) {
        all.push_back(static_cast<float>(m.alternative[i]));
        all.push_back(m.alternative_logprob[i]);
      }
    }
  }
  return all;
}

void generator_case(const ModelShape& s, const Options& with) {
  const Model parameters(s);
  const Memory memory = memory_for(s);
  const std::string name = format("generator %s L%lld %s", sanitize::name(s.dtype),
                                  static_cast<long long>(s.L), with.name);
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    std::deque<Guarded> packed;
    const Decoder model = parameters.at(kernels, parallel, packed);
    const auto run = [&](int64_t rows, bool tabulated, double seconds) {
      return generate(s, model, memory, with, rows, tabulated, seconds, kernels, parallel);
    };
    const std::vector<float> all = run(6, true, 1e9);
    expect(all == run(1, true, 1e9), "the tokens depend on the rows that there are");
    expect(all == run(4, false, 1e9), "the tokens depend on the table");
    expect(all == run(3, true, 0.0), "the tokens depend on the steps per call");
    Memory little = memory;
    for (size_t i = 0; i < little.sequences.size(); ++i) {
      little.sequences[i].beyond = static_cast<int64_t>(i);
      little.sequences[i].limit -= little.sequences[i].beyond;
    }
    expect(all == generate(s, model, little, with, 4, true, 1e9, kernels, parallel),
           "the tokens depend on the places that there are at first");
    // Rounding may change a token from level to level.
    return std::vector<Result>{{"generation", all, 1.0, false}};
  });
}

// How many tokens the passes computed.
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

// Sequences with one prompt compute it once, also where the first ends with its first token; and a
// row that comes free is taken at once.
void sharing_case(const ModelShape& s) {
  const Model parameters(s);
  constexpr int64_t count = 7, prompt = 6;
  const std::vector<int64_t> text = {1, 0, 3, 2, 5, 4};
  check("generator shares a prompt", s.dtype, [&](const Kernels& level, const Parallel& parallel) {
    const Kernels kernels = Counted::of(level);
    std::deque<Guarded> packed;
    const Decoder model = parameters.at(kernels, parallel, packed);
    // The last ones fill the window, in a single row: each copies from the one before.
    for (const auto& [more, rows] : {std::pair{1, 3}, {3, 3}, {7, 1}}) {
      Memory m;
      for (int64_t i = 0; i < count; ++i) {
        Sequence each = {};
        each.begin = static_cast<int64_t>(m.tokens.size());
        each.length = each.prompt = prompt, each.limit = prompt + more;
        each.number = i;
        m.sequences.push_back(each);
        m.tokens.insert(m.tokens.end(), text.begin(), text.end());
        m.tokens.resize(m.tokens.size() + static_cast<size_t>(more));
      }
      m.logprobs.resize(m.tokens.size());
      m.alternative.resize(m.tokens.size() * alternatives);
      m.alternative_logprob.resize(m.tokens.size() * alternatives);
      Counted::tokens = 0;
      generate(s, model, m, {"drawn", {1.0f, 0, 1.0f, 0.0f, 1.0f}, 1, false}, rows, false, 1e9,
               kernels, in_turn);
      expect(Counted::tokens == prompt - 1 + count * more,
             format("%lld tokens were computed", static_cast<long long>(Counted::tokens)));
    }
    return std::vector<Result>{};
  });
}

}  // namespace

void generator_cases() {
  sharing_case({DType::f32, 2, 2, 16, 12, 11, true, true, Gelu::erf, Packing::dense});
  const Options options[] = {
      {"greedy", {0.0f, 0, 1.0f, 0.0f, 1.0f}, 1, false},
      {"greedy, penalty", {0.0f, 0, 1.0f, 0.0f, 1.5f}, 3, false},
      {"top-k", {0.8f, 3, 1.0f, 0.0f, 1.0f}, 1, false},
      {"top-p, window", {1.5f, 0, 0.7f, 0.0f, 1.0f}, 0, false},
      {"all, stops", {2.0f, 6, 0.9f, 0.05f, 1.2f}, 2, true},
  };
  for (const DType dtype : dtypes)
    for (const Options& with : options)
      generator_case({dtype, 2, 2, 17, 12, 11, true, true, Gelu::erf, Packing::dense}, with);
  generator_case({DType::f32, 1, 3, 8, 12, 11, false, true, Gelu::tanh, Packing::int8}, options[2]);
  generator_case({DType::bf16, 2, 1, 64, 7, 11, true, true, Gelu::erf, Packing::int8}, options[4]);
  generator_case({DType::f32, 2, 3, 17, 7, 11, true, true, Gelu::erf, Packing::int8_vnni},
                 options[4]);
  generator_case({DType::f32, 2, 2, 16, 12, 11, true, false, Gelu::erf, Packing::dense},
                 options[2]);
}

}  // namespace gptfast::sanitize
