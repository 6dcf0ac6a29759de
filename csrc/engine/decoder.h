// One pass of a GPT over new tokens of any mix of sequences, on the kernels' table. No torch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../kernels/threads/parallel.h"

namespace gptfast {

struct DecoderLayer {
  Norm ln_1;
  Weight c_attn;  // of the last layer the rows of q alone
  Param c_attn_bias;
  Weight kv;  // of the last layer: the rows of k and v
  Param kv_bias;
  Weight c_proj;
  Param c_proj_bias;
  Norm ln_2;
  Weight c_fc;
  Param c_fc_bias;
  Weight mlp_c_proj;
  Param mlp_c_proj_bias;
};

struct Decoder {
  DType dtype;
  int64_t block_size, vocab_size, n_head, n_embd;
  bool attention;
  Gelu gelu;
  Param wte, wpe;
  std::vector<DecoderLayer> layers;
  Norm ln_f;
  Weight lm_head;

  int64_t head_dim() const { return n_embd / n_head; }
  int64_t element_bytes() const { return dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t); }
  int64_t block_bytes() const {  // of the weights of all layers, 12 C^2 each
    const bool narrow = layers.front().c_fc.packing != Packing::dense;
    return static_cast<int64_t>(layers.size()) * 12 * n_embd * n_embd *
           (narrow ? 1 : element_bytes());
  }
};

// Keys and values of `rows` sequences of up to `capacity` tokens each: per layer, rows of the
// kernels' cache_bytes(). Zero before its first use.
struct KeyValueCache {
  void* data;
  int64_t rows, capacity;
};

// What the first layer's projection gives depends on (token, position) alone, so a window that
// slides meets the same values again: row position * V + token of `qkv` (T * V, 3 C) has them once
// known[row] is set. Null data: there is none.
struct FirstLayerTable {
  void* qkv;
  uint8_t* known;

  static int64_t entry(const Decoder& model, int64_t token, int64_t position) {
    return position * model.vocab_size + token;
  }
};

// New tokens of some sequences, one sequence after the other.
struct DecoderBatch {
  int64_t sequences;
  const int64_t* tokens;
  const int64_t* starts;  // (sequences + 1,): those of sequence i are tokens[starts[i]] ..
                          // tokens[starts[i + 1] - 1]
  const int64_t* row;     // (sequences,): its row of the cache
  const int64_t* cached;  // (sequences,): how many of its tokens are in the cache already
  const uint8_t* kept;    // (sequences,): whether a later pass reads the new ones there; else they
                          // may be left out

  int64_t count() const { return starts[sequences] - starts[0]; }
  int64_t position(int64_t i, int64_t token) const { return cached[i] + token - starts[i]; }
  DecoderBatch part(int64_t first, int64_t last) const {
    return {last - first, tokens, starts + first, row + first, cached + first, kept + first};
  }
};

// Where the parts of a batch end, counted in sequences, that a thread each computes on its own from
// tokens to logits: it waits for no other, and keeps the weights and the activations of some tokens
// in its core's cache. None where the threads had better share every product.
std::vector<int64_t> part_ends(const Decoder& model, const DecoderBatch& batch, int threads);

// Calls f(part, first, parallel) for the parts of a batch, which start at its sequence `first`.
template <class F>
void for_parts(const Decoder& model, const DecoderBatch& batch, const Parallel& parallel,
               const F& f) {
  const std::vector<int64_t> ends = part_ends(model, batch, parallel.threads);
  if (ends.empty()) return f(batch, 0, parallel);
  run_tasks(parallel, static_cast<int64_t>(ends.size()), [&](int64_t i) {
    const auto end = ends.begin() + i;
    const int64_t first = i == 0 ? 0 : end[-1];
    f(batch.part(first, *end), first, in_turn);
  });
}

// Has the table know the first layer of a batch's tokens.
void fill_table(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                const FirstLayerTable& table, const Parallel& parallel);

// Receives logits (count, V) of the rows from `first` on.
using UseLogits = std::function<void(int64_t first, int64_t count, const float* logits)>;

// Appends the keys and values of the new tokens that are kept to the cache and hands over the
// logits that follow each sequence's last token, some sequences at a time. A sequence's logits have
// the same bits in any batch, with its tokens passed at once or in parts. A table that is given
// knows the batch's tokens.
void decoder_forward(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                     const KeyValueCache& cache, const FirstLayerTable& table, const UseLogits& use,
                     const Parallel& parallel);

// Writes the log-probability of targets[i] after token i of the batch, (starts[sequences],).
void decoder_score(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                   const KeyValueCache& cache, const int64_t* targets, float* logprobs,
                   const Parallel& parallel);

// Bytes of one row of the cache, all layers.
int64_t cache_row_bytes(const Kernels& kernels, const Decoder& model, int64_t capacity);

// Copies the keys and values of the first `count` tokens from one row of the cache to another.
void copy_cached(const Kernels& kernels, const Decoder& model, const KeyValueCache& cache,
                 int64_t from, int64_t to, int64_t count, const Parallel& parallel);

}  // namespace gptfast
