// One forward pass of a GPT over new tokens of any mix of sequences. Does not use torch.
#pragma once

#include <cstdint>
#include <functional>

#include "cache.h"
#include "schedule.h"

namespace gptfast {

// Receives logits (count, V) of the batch's sequences from `first` on, and the threads that are
// idle meanwhile. Several threads call it at once if they work on parts of their own.
using UseLogits =
    std::function<void(int64_t first, int64_t count, const float* logits, const Parallel&)>;

// Appends the new tokens' keys and values to the cache, where they are kept, and passes the logits
// that follow each sequence's last token to `use`, some sequences at a time. A sequence's logits
// have the same bits in any batch, and whether its tokens are passed at once or in parts. Missing
// entries of `table`, unless it is null, are added first.
void forward(const Model& model, const Batch& batch, Cache& cache, FirstLayerTable* table,
             const UseLogits& use, const Parallel& parallel);

// Writes to logprobs[i] the log-probability of targets[i] after token i of the batch; both are
// (starts[sequences],).
void score(const Model& model, const Batch& batch, Cache& cache, const int64_t* targets,
           float* logprobs, const Parallel& parallel);

}  // namespace gptfast
