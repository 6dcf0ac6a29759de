// Incremental decoding: one pass of a GPT over new tokens of any mix of sequences, on the kernels'
// table. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../kernels/kernels.h"

namespace gptfast {

struct DecoderLayer {
  Norm ln_1;
  Weight c_attn;
  Param c_attn_bias;
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
};

// Keys and values of `rows` sequences: (L, 2, rows, H, block_size, D).
struct KeyValueCache {
  void* data;
  int64_t rows;
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
                     const KeyValueCache& cache, float* logits, const Parallel& parallel);

}  // namespace gptfast
