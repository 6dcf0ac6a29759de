// One pass of a GPT over new tokens of any mix of sequences. No torch.
#pragma once

#include <cstdint>
#include <functional>

#include "cache.h"
#include "schedule.h"

namespace gptfast {

// Receives logits (count, V) of the batch's sequences from `first` on, and the threads that have
// nothing else to do meanwhile; called by several threads at once where they work apart.
using UseLogits =
    std::function<void(int64_t first, int64_t count, const float* logits, const Parallel&)>;

// Appends the keys and values of the new tokens that are kept to the cache and hands over the
// logits that follow each sequence's last token, some sequences at a time. A sequence's logits have
// the same bits in any batch, with its tokens passed at once or in parts. A table that is given has
// its missing entries added first.
void forward(const Model& model, const Batch& batch, Cache& cache, FirstLayerTable* table,
             const UseLogits& use, const Parallel& parallel);

// Writes the log-probability of targets[i] after token i of the batch, (starts[sequences],).
void score(const Model& model, const Batch& batch, Cache& cache, const int64_t* targets,
           float* logprobs, const Parallel& parallel);

}  // namespace gptfast
