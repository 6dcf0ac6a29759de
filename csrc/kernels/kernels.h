// The table of CPU kernels: one instance per instruction-set level, chosen once by
// isa/dispatch.cpp.
//
// Kernels take raw pointers, sizes and strides, and a Parallel that runs their tasks; they use
// neither torch nor templates of the standard library. The only exception that they throw is
// std::bad_alloc. The layer above (csrc/ops) checks the arguments. Sizes and strides are counted in
// elements.
//
//   B batch · T time · C n_embd · H heads · D head_dim · F 4C · V vocab_size
//   M rows of an activation matrix (B*T) · K its columns · N columns of the result
#pragma once

#include <cstdint>

namespace gptfast {

enum class DType : int32_t { f32, bf16 };

constexpr float layer_norm_eps = 1e-5f;

// Runs body(context, task) for each task in [0, tasks), on any thread and in any order. Every task
// writes its own part of the result, so the bits do not depend on the schedule. A task must not
// start a loop on the same pool.
struct Parallel {
  void (*run)(void* pool, int64_t tasks, void (*body)(void* context, int64_t task), void* context);
  int threads;
  void* pool = nullptr;
  // A thread takes part if it reads at least so many bytes of an operand; see tasks.inl.
  int64_t min_bytes_per_thread = int64_t{1} << 16;
};

// Dropout of the elements (i, j) of matrices n; philox.inl defines which ones are dropped.
struct Dropout {
  int32_t threshold;  // the probability times 65536; 0 drops nothing
  uint64_t seed;
  uint32_t stream;  // the index of this dropout in the model
};

// A contiguous parameter, in fp32 or in the activations' dtype. The data of an optional parameter
// may be null.
struct Param {
  const void* data;
  DType dtype;
};

// The gradient of a parameter, in `dtype`. Kernels overwrite it; they do not add to it.
struct ParamGrad {
  void* data;
  DType dtype;
};

// How pack_weight stores a weight: dense, or as 8-bit integers with a scale per output column, for
// products that widen them (int8) or that are computed in integer arithmetic (int8_vnni).
enum class Packing : int32_t { dense, int8, int8_vnni };

// A linear layer's weight (N, K), as nn.Linear stores it. `packed` is the result of pack_weight or
// null; where it is not null, the forward reads it instead of `param`. The backward reads `param`.
struct Weight {
  Param param;
  const void* packed;
  Packing packing;
};

// LayerNorm over the K columns: y = (x - mean) * rstd * weight + bias. A null `weight.data` means
// no normalisation.
struct Norm {
  Param weight;
  Param bias;
  // (M,) each, written by the forward and read by the backward; may be null in the forward.
  float* mean;
  float* rstd;
};

struct NormGrad {
  ParamGrad weight;
  ParamGrad bias;
};

// A (B, H, T, D) tensor whose last stride is 1.
struct Heads {
  void* data;
  int64_t b, h, t;  // strides of the first three dimensions
};

// O = dropout(softmax(scale * Q K' + causal mask)) V. The mask is aligned bottom-right: query i
// sees the keys up to i + Tk - Tq. lse (B, H, 2, Tq) holds each row's log-sum-exp in two parts: the
// maximum m of its scores (for a scale that is not negative) and the sum l of exp(score - m). A row
// whose keys are all masked has O = 0.
struct Attention {
  DType dtype;
  int64_t B, H, Tq, Tk, D;
  Heads q, k, v, out;
  float* lse;  // may be null in the forward
  float scale;
  Dropout dropout;
};

struct AttentionBackward {
  Attention forward;
  Heads dout, dq, dk, dv;
};

// Y = residual + dropout(norm(X) W' + bias), where all parts but W are optional. X (M, K), Y and
// residual (M, N) are contiguous.
struct Linear {
  DType dtype;
  int64_t M, K, N;
  const void* x;
  Norm norm;
  Weight weight;
  Param bias;
  const void* residual;
  void* y;
  DType y_dtype;
  Dropout dropout = {};
};

// Null gradients are not computed; dnorm requires dx.
struct LinearBackward {
  Linear forward;
  const void* dy;   // (M, N)
  const void* add;  // (M, K) added to dx, such as the gradient from a residual; may be null
  void* dx;         // (M, K)
  NormGrad dnorm;
  ParamGrad dweight;
  ParamGrad dbias;
};

enum class Gelu : int32_t { erf, tanh };

// Y = X + dropout(gelu(norm(X) W1' + b1) W2' + b2), with X (M, C), W1 (F, C), W2 (C, F).
struct Ffn {
  DType dtype;
  int64_t M, C, F;
  const void* x;
  Norm norm;
  Weight w1;
  Param b1;
  Weight w2;
  Param b2;
  Gelu gelu;
  Dropout dropout;
  void* hidden;  // (M, F): the input of GELU, kept for the backward; may be null in the forward
  void* y;
};

// Null gradients are not computed; dnorm requires dx.
struct FfnBackward {
  Ffn forward;
  const void* dy;
  void* dx;
  NormGrad dnorm;
  ParamGrad dw1, db1, dw2, db2;
};

enum class Reduction : int32_t { mean, sum, none };

// The loss of row i is w_i (-log softmax(norm(X) W')[target]), or 0 if target = ignore_index; w_i
// is 1 if token_weights is null. `loss` receives the sum of the losses divided by the sum of w_i
// over the rows that contribute, whose target is not ignore_index (mean; 0 if that sum is 0), or
// the sum of the losses (sum), or the loss of each row (none). dx, dnorm and dweight are the
// gradients of the mean or the sum. Null gradients are not computed; dnorm requires dx.
struct CrossEntropy {
  DType dtype;
  int64_t M, K, V;
  const void* x;
  Norm norm;
  Weight weight;
  const int64_t* targets;
  const float* token_weights;
  int64_t ignore_index;
  Reduction reduction;
  float label_smoothing;  // the part of a target's probability that all columns share
  float* loss;            // one element, or (M,) for Reduction::none
  void* dx;
  NormGrad dnorm;
  ParamGrad dweight;
};

// Y[m] = dropout(wte[idx[m]] + wpe[position[m]]); if `position` is null, position[m] is m mod T.
struct Embedding {
  DType y_dtype;
  int64_t M, T, C, V;
  const int64_t* idx;
  const int64_t* position;
  Param wte;  // (V, C)
  Param wpe;  // (>= T, C)
  Dropout dropout;
  void* y;
};

// Null gradients are not computed.
struct EmbeddingBackward {
  Embedding forward;
  const void* dy;
  int64_t padding_idx;  // the row of wte whose gradient is zero; -1: none
  int64_t block_size;   // rows of wpe; rows past T get a zero gradient
  ParamGrad dwte, dwpe;
};

// One parameter of n elements in a step of the optimiser, which updates all but the gradient.
struct AdamWParam {
  float* weight;
  const float* grad;
  float *mean, *square;  // running means of the gradient and its square
  float* average;        // running mean of the weight; null: there is none
  int64_t n;
  float decay, rate, inv_sqrt_correction, pull;  // of this step, defined in adamw.inl
};

struct AdamW {
  const AdamWParam* params;
  int64_t count;
  float beta1, beta2, eps;
  float clip;   // the upper limit of the norm of all gradients together; infinity: no limit
  float* norm;  // receives that norm as it was before clipping
};

// The cache of one layer's keys and values: slots of up to `capacity` tokens, one per running
// sequence. The model's context alone determines the layout, so that no bit of a result depends on
// the capacity.
struct CacheShape {
  DType dtype;
  int64_t context, H, D, capacity;
};

// Causal attention of the new tokens of some sequences to themselves and to earlier tokens, whose
// keys and values are in the cache. The keys and values of the new tokens are appended to the
// cache; where kept[i] is 0 this may be skipped. The new tokens of sequence i are rows
// starts[i] - starts[0] .. starts[i + 1] - starts[0] - 1 of q, k, v and out; its slot of the cache
// is slot[i], which already has cached[i] tokens.
struct CachedAttention {
  CacheShape shape;
  int64_t sequences;
  const int64_t *starts, *slot, *cached;
  const uint8_t* kept;
  const void *q, *k, *v;        // (tokens, H D)
  int64_t q_stride, kv_stride;  // between rows
  void* cache;        // of one layer: slots of cache_bytes() each, zeroed before their first use
  bool last_queries;  // q and out hold only each sequence's last token, (sequences, H D)
  void* out;          // contiguous

  int64_t first_token(int64_t i) const { return starts[i] - starts[0]; }
};

// How the next token is chosen from the logits.
struct Sampling {
  float temperature;         // 0: the most probable token
  int64_t top_k;             // 0: off
  float top_p;               // 1: off
  float min_p;               // 0: off
  float repetition_penalty;  // of the tokens in `seen`; 1: off
};

// The logits from which one token is chosen.
struct SampleRow {
  const float* logits;  // (V,)
  int64_t V;
  const int64_t* seen;  // (seen_count,) tokens of the sequence so far; none without a penalty
  int64_t seen_count;
  uint64_t seed;
  uint32_t sequence, step;  // every pair (sequence_id, step) draws its own random number
  int64_t top_count;        // how many of the most probable tokens to return
  int64_t* top_tokens;      // (top_count,)
  float* top_logprobs;      // (top_count,)
};

struct Sample {
  int64_t token;
  float logprob;  // under softmax(logits)
};

struct Kernels {
  const char* name;
  void (*attention)(const Attention&, const Parallel&);
  void (*attention_backward)(const AttentionBackward&, const Parallel&);
  void (*linear)(const Linear&, const Parallel&);
  void (*linear_backward)(const LinearBackward&, const Parallel&);
  void (*ffn)(const Ffn&, const Parallel&);
  void (*ffn_backward)(const FfnBackward&, const Parallel&);
  void (*cross_entropy)(const CrossEntropy&, const Parallel&);
  void (*embedding)(const Embedding&, const Parallel&);
  void (*embedding_backward)(const EmbeddingBackward&, const Parallel&);
  void (*adamw)(const AdamW&, const Parallel&);
  void (*attention_cached)(const CachedAttention&, const Parallel&);
  int64_t (*cache_bytes)(const CacheShape&);  // bytes of one slot in one layer
  // Copies the first `count` tokens of slot `from` of one layer's cache to slot `to`.
  void (*copy_cached)(const CacheShape&, void* cache, int64_t from, int64_t to, int64_t count);
  Sample (*sample)(const Sampling&, const SampleRow&);
  float (*logprob)(const float* logits, int64_t V, int64_t token);  // under softmax(logits)
  // pack_weight writes a weight (N, K) to `packed` in the layout that this level's products read,
  // for activations of `dtype`; packed_weight_bytes is the size of that layout.
  int64_t (*packed_weight_bytes)(DType dtype, Packing, int64_t N, int64_t K);
  void (*pack_weight)(DType dtype, Packing, Param weight, int64_t N, int64_t K, void* packed,
                      const Parallel&);
  bool vnni;  // whether the level has kernels for Packing::int8_vnni (the processor needs VNNI)
};

}  // namespace gptfast
