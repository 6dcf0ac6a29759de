// One pass of a GPT over new tokens of any mix of sequences, on the kernels' table. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../kernels/kernels.h"

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
};

// New tokens of some sequences, one sequence after the other.
struct DecoderBatch {
  int64_t sequences;
  const int64_t* tokens;  // (starts[sequences],)
  const int64_t* starts;  // (sequences + 1,): those of sequence i are tokens[starts[i]] ..
                          // tokens[starts[i + 1] - 1]
  const int64_t* row;     // (sequences,): its row of the cache
  const int64_t* cached;  // (sequences,): how many of its tokens are in the cache already
};

// Appends the keys and values of the new tokens to the cache and writes the logits (sequences, V)
// that follow each sequence's last token. A sequence's logits have the same bits in any batch, with
// its tokens passed at once or in parts.
void decoder_forward(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                     const KeyValueCache& cache, const FirstLayerTable& table, float* logits,
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
