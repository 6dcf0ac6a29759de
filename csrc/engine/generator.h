// Generation for any mix of sequences: which ones run, what their windows hold, how they end. A
// sequence's tokens do not depend on the others, nor on the memory or the threads there are.
#pragma once

#include <cstdint>

#include "decoder.h"

namespace gptfast {

enum class State : int64_t {
  waiting,
  running,
  length,   // has all tokens that it may have
  stop,     // met a stop
  window,   // filled a window that does not move
  invalid,  // the model's logits are not finite
};

// A row of an int64 matrix that Python fills.
struct Sequence {
  int64_t begin;   // of its tokens among those of all sequences
  int64_t length;  // how many it has, the prompt's first
  int64_t prompt, limit;
  int64_t offset;  // where its window starts
  int64_t cached;  // tokens of the window that the cache has
  int64_t row;     // of the cache, while it runs
  int64_t state;
  int64_t seed, number;  // of its draws
  int64_t twin;          // the first sequence with the same prompt
  int64_t beyond;        // tokens that it may have beyond `limit`, once it has places for them
};
constexpr int64_t sequence_fields = sizeof(Sequence) / sizeof(int64_t);

struct Sequences {
  Sequence* all;
  int64_t count;
  int64_t* tokens;
  float* logprobs;       // of the generated tokens, in their tokens' places
  int64_t alternatives;  // how many of the likeliest tokens to keep for each
  int64_t* alternative;  // (places, alternatives)
  float* alternative_logprob;
};

// Lists of bytes: element i is data[starts[i]] .. data[starts[i + 1] - 1].
struct Texts {
  const uint8_t* data;
  const int64_t* starts;
  int64_t count;

  int64_t size(int64_t i) const { return starts[i + 1] - starts[i]; }
};

// A stop token ends a sequence and is left out of it. A stop string ends it too, the tokens that
// wrote it included.
struct Stops {
  const int64_t* tokens;
  int64_t token_count;
  Texts strings;
  Texts pieces;  // what each token writes
};

struct GeneratorOptions {
  Sampling sampling;
  int64_t stride;  // how far a full window moves; 0: not at all
  Stops stops;
  double seconds;  // no pass starts later than this, but for the first
};

struct Outcome {
  int64_t unfinished;
  int64_t invalid;  // the first sequence that has ended so; -1: none
};

// Makes steps, a token for each of the sequences that have a row of the cache, in passes of some of
// them; a row that comes free takes the next sequence that waits. Ends early where one is invalid,
// or has no place left for a token that it may have.
Outcome generator_run(const Kernels& kernels, const Decoder& model, const KeyValueCache& cache,
                      const FirstLayerTable& table, const Sequences& sequences,
                      const GeneratorOptions& options, const Parallel& parallel);

}  // namespace gptfast
