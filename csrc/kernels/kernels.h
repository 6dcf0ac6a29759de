// The table of CPU kernels: one instance per instruction set, chosen once by isa/dispatch.cpp.
//
// Kernels see raw pointers, sizes and strides, and a Parallel to run tasks on; no torch, and no
// templates of the standard library.
// They throw std::bad_alloc alone. Arguments are checked one layer up (csrc/ops). Sizes and strides
// are counted in elements.
//
//   B batch · T time · C n_embd · H heads · D head_dim · F 4C · V vocab_size
//   M rows of an activation matrix (B*T) · K its columns · N columns of the result
#pragma once

#include <cstdint>

namespace gptfast {

enum class DType : int32_t { f32, bf16 };

constexpr float layer_norm_eps = 1e-5f;

// Runs body(context, task) for each task in [0, tasks): any thread, any order. Every task writes
// its own part of the result, so the bits do not depend on the schedule. A task starts no loop of
// the same pool.
struct Parallel {
  void (*run)(void* pool, int64_t tasks, void (*body)(void* context, int64_t task), void* context);
  int threads;
  void* pool = nullptr;
  int64_t min_bytes_per_thread =
      int64_t{1} << 16;  // bytes of an operand that a thread joins in for; see tasks.inl
};

// Element (i, j) of matrix n is dropped as philox.inl says.
struct Dropout {
  int32_t threshold;  // the probability in 65536ths; 0 drops nothing
  uint64_t seed;
  uint32_t stream;  // which dropout of the model this is
};

// A parameter, contiguous: fp32, or of the activations' dtype. data may be null where it is
// optional.
struct Param {
  const void* data;
  DType dtype;
};

// The gradient of a parameter, written (not added to), in dtype.
struct ParamGrad {
  void* data;
  DType dtype;
};

// How pack_weight keeps a weight: in what the activations' products read, or in 8-bit whole numbers
// with a scale per output, for products that widen them or that are done in whole numbers.
enum class Packing : int32_t { dense, int8, int8_vnni };

// A linear layer's weight (N, K), as nn.Linear keeps it. `packed`, when not null, is what
// pack_weight made of it, and is read instead by a forward; a backward reads `param`.
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
  float* mean;  // (M,) written by the forward, read by the backward; the forward takes null
  float* rstd;
};

struct NormGrad {
  ParamGrad weight;
  ParamGrad bias;
};

// A (B, H, T, D) tensor whose last stride is 1.
struct Heads {
  void* data;
  int64_t b, h, t;  // strides
};

// O = dropout(softmax(scale * Q K' + causal mask)) V; the mask is aligned bottom-right: query i
// sees keys up to i + Tk - Tq. lse (B, H, 2, Tq) is the log-sum-exp of the rows' scores in two
// parts, the maximum of the scores and the sum of their exponentials below it, for a scale that
// is not negative. A row that sees no key has O = 0.
struct Attention {
  DType dtype;
  int64_t B, H, Tq, Tk, D;
  Heads q, k, v, out;
  float* lse;  // the forward takes null
  float scale;
  Dropout dropout;
};

struct AttentionBackward {
  Attention forward;
  Heads dout, dq, dk, dv;
};

// Y = residual + norm(X) W' + bias, each part but W optional. X (M, K), Y and residual (M, N),
// contiguous.
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
};

// A null gradient is not computed; dx is needed for dnorm.
struct LinearBackward {
  Linear forward;
  const void* dy;   // (M, N)
  const void* add;  // (M, K): what else dx is to hold, as the gradient that x has by a residual;
                    // may be null
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
  void* hidden;  // (M, F) before GELU, kept for the backward; the forward takes null
  void* y;
};

// A null gradient is not computed; dx is needed for dnorm.
struct FfnBackward {
  Ffn forward;
  const void* dy;
  void* dx;
  NormGrad dnorm;
  ParamGrad dw1, db1, dw2, db2;
};

enum class Reduction : int32_t { mean, sum, none };

// Row i's loss is w_i (-log softmax(norm(X) W')[target]), 0 where target = ignore_index; w_i is 1
// where token_weights is null. The sum of the losses is divided by that of the w_i of the rows that
// count (mean; 0 where that is 0), or is what is asked for (sum); or the losses are (none). dx and
// the others are the gradients of the mean or the sum; a null one is not computed, dx being needed
// for dnorm.
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
  float* loss;  // one, or of reduction none (M,)
  void* dx;
  NormGrad dnorm;
  ParamGrad dweight;
};

// Y[m] = dropout(wte[idx[m]] + wpe[position[m]]); positions are m mod T when `position` is null.
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

// A null gradient is not computed.
struct EmbeddingBackward {
  Embedding forward;
  const void* dy;
  int64_t padding_idx;  // this row's gradient is zero; -1: none
  int64_t block_size;   // rows of wpe; those past T get zero
  ParamGrad dwte, dwpe;
};

// One parameter of an optimiser step, n elements; weight, mean and square are updated.
struct AdamWParam {
  float* weight;
  const float* grad;
  float *mean, *square;  // running means of the gradient and its square
  int64_t n;
  float decay, rate, root;  // of this step, as adamw.inl says
};

struct AdamW {
  const AdamWParam* params;
  int64_t count;
  float beta1, beta2, eps;
  float clip;   // the largest norm of all gradients together; infinity for any
  float* norm;  // receives it, as it was
};

// The keys and values of one layer: rows, one for a sequence, of up to `capacity` tokens. The
// model's context decides how they lie, whatever the capacity, so that no bit depends on it.
struct CacheShape {
  DType dtype;
  int64_t context, H, D, capacity;
};

// The new tokens of some sequences attend to themselves and to those before them, whose keys and
// values the cache has; theirs are added to it, or need not be where kept[i] is 0. Sequence i has
// rows starts[i] .. starts[i + 1] - 1 of q, k, v and out, row[i] of the cache, and cached[i] tokens
// there already.
struct CachedAttention {
  CacheShape shape;
  int64_t sequences;
  const int64_t *starts, *slot, *cached;
  const uint8_t* kept;
  const void *q, *k, *v;        // (tokens, H D)
  int64_t q_stride, kv_stride;  // between their rows
  void* cache;        // of one layer: rows of cache_bytes(), zeroed before their first use
  bool last_queries;  // q and out have each sequence's last token alone, (sequences, H D)
  void* out;          // contiguous

  int64_t first_token(int64_t i) const { return starts[i] - starts[0]; }
};

// How a token is chosen from its logits.
struct Sampling {
  float temperature;  // 0: the likeliest
  int64_t top_k;      // 0: no limit, as for the others 1, 0, 1
  float top_p;
  float min_p;
  float repetition_penalty;  // of the tokens seen before
};

struct SampleRow {
  const float* logits;  // (V,)
  int64_t V;
  const int64_t* seen;  // (seen_count,)
  int64_t seen_count;
  uint64_t seed;
  uint32_t sequence, step;  // each draws its own number
  int64_t top_count;        // how many of the likeliest tokens are wanted
  int64_t* top_tokens;      // (alternatives,)
  float* top_logprobs;
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
  int64_t (*cache_bytes)(const CacheShape&);  // of one row
  // Rows of one layer's cache: `to` receives the first `count` tokens of `from`.
  void (*copy_cached)(const CacheShape&, void* cache, int64_t from, int64_t to, int64_t count);
  Sample (*sample)(const Sampling&, const SampleRow&);
  float (*logprob)(const float* logits, int64_t V, int64_t token);  // under softmax(logits)
  // A weight (N, K) in the layout that this instruction set multiplies by, for activations of
  // `dtype`.
  int64_t (*packed_weight_bytes)(DType dtype, Packing, int64_t N, int64_t K);
  void (*pack_weight)(DType dtype, Packing, Param weight, int64_t N, int64_t K, void* packed,
                      const Parallel&);
  bool vnni;  // takes Packing::int8_vnni, on a processor that has VNNI
};

}  // namespace gptfast
