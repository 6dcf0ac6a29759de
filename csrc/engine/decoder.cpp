#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../kernels/scratch.h"

namespace gptfast {
namespace {

template <class T>
T* take(Frame& frame, int64_t count) {
  return static_cast<T*>(frame.bytes(static_cast<size_t>(count) * sizeof(T)));
}

CacheShape cache_shape(const Decoder& model, int64_t capacity) {
  return {model.dtype, model.block_size, model.n_head, model.head_dim(), capacity};
}

void embed(const Kernels& kernels, const Decoder& model, int64_t count, const int64_t* tokens,
           const int64_t* positions, void* x, const Parallel& parallel) {
  Embedding s = {};
  s.y_dtype = model.dtype;
  s.M = count, s.C = model.n_embd, s.V = model.vocab_size;
  s.idx = tokens;
  s.position = positions;
  s.wte = model.wte;
  s.wpe = model.wpe;
  s.y = x;
  kernels.embedding(s, parallel);
}

class Pass {
 public:
  Pass(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
       const KeyValueCache& cache, const FirstLayerTable& table, const Parallel& parallel)
      : kernels_(kernels),
        model_(model),
        batch_(batch),
        cache_(cache),
        table_(table),
        parallel_(parallel),
        element_(model.element_bytes()),
        M_(batch.count()),
        C_(model.n_embd),
        position_(take<int64_t>(frame_, M_)),
        x_(activation(M_, C_)),
        next_(activation(M_, C_)),
        qkv_(activation(M_, 3 * C_)),
        heads_(activation(M_, C_)) {}

  // The blocks' output for every token, or for the last one of each sequence alone.
  void run(bool last_tokens) {
    for (int64_t i = 0; i < batch_.sequences; ++i)
      for (int64_t t = batch_.starts[i]; t < batch_.starts[i + 1]; ++t)
        position_[t - batch_.starts[0]] = batch_.position(i, t);
    embed(kernels_, model_, M_, tokens(), position_, x_, parallel_);
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      const DecoderLayer& layer = model_.layers[i];
      const bool narrow = last_tokens && i + 1 == model_.layers.size();
      if (model_.attention)
        attend(static_cast<int64_t>(i), narrow);
      else if (narrow)
        keep_last_tokens();
      feed_forward(layer);
    }
  }

  // Calls use(first, count, logits) for blocks of the rows that are left, one after the other.
  void for_logits(const UseLogits& use) {
    constexpr int64_t most = int64_t{4} << 20;
    const int64_t V = model_.vocab_size, rows = std::max<int64_t>(1, std::min(M_, most / V));
    float* logits = take<float>(frame_, rows * V);
    for (int64_t first = 0; first < M_; first += rows) {
      const int64_t count = std::min(rows, M_ - first);
      linear(count, V, at(x_, first * C_), model_.ln_f, model_.lm_head, Param{}, nullptr, logits,
             DType::f32);
      use(first, count, logits);
    }
  }

 private:
  char* activation(int64_t rows, int64_t columns) {
    return take<char>(frame_, rows * columns * element_);
  }
  const int64_t* tokens() const { return batch_.tokens + batch_.starts[0]; }
  char* at(char* data, int64_t offset) const { return data + offset * element_; }
  void copy(const char* from, int64_t count, char* to) const {
    std::memcpy(to, from, static_cast<size_t>(count * element_));
  }

  // What follows the last layer's keys and values is needed for each sequence's last token alone.
  void keep_last_tokens() {
    if (M_ == batch_.sequences) return;
    for (int64_t i = 0; i < batch_.sequences; ++i)
      copy(at(x_, (batch_.starts[i + 1] - 1 - batch_.starts[0]) * C_), C_, at(next_, i * C_));
    std::swap(x_, next_);
    M_ = batch_.sequences;
  }

  void linear(int64_t rows, int64_t columns, const void* x, const Norm& norm, const Weight& weight,
              const Param& bias, const void* residual, void* y, DType y_dtype) {
    kernels_.linear({model_.dtype, rows, C_, columns, x, norm, weight, bias, residual, y, y_dtype},
                    parallel_);
  }

  void feed_forward(const DecoderLayer& layer) {
    Ffn s = {};
    s.dtype = model_.dtype;
    s.M = M_, s.C = C_, s.F = 4 * C_;
    s.x = x_;
    s.norm = layer.ln_2;
    s.w1 = layer.c_fc;
    s.b1 = layer.c_fc_bias;
    s.w2 = layer.mlp_c_proj;
    s.b2 = layer.mlp_c_proj_bias;
    s.gelu = model_.gelu;
    s.y = next_;
    kernels_.ffn(s, parallel_);
    std::swap(x_, next_);
  }

  void attend(int64_t index, bool last_tokens) {
    const DecoderLayer& layer = model_.layers[static_cast<size_t>(index)];
    const bool last_layer = index + 1 == static_cast<int64_t>(model_.layers.size());
    CachedAttention s = {};
    s.shape = cache_shape(model_, cache_.capacity);
    s.sequences = batch_.sequences;
    s.starts = batch_.starts, s.row = batch_.row, s.cached = batch_.cached;
    s.cache = static_cast<char*>(cache_.data) + index * cache_.rows * kernels_.cache_bytes(s.shape);
    s.last_queries = last_tokens;
    s.out = heads_;
    if (last_layer) {
      char* kv = at(qkv_, M_ * C_);
      linear(M_, 2 * C_, x_, layer.ln_1, layer.kv, layer.kv_bias, nullptr, kv, model_.dtype);
      s.k = kv, s.v = at(kv, C_), s.kv_stride = 2 * C_;
      if (last_tokens) keep_last_tokens();
      linear(M_, C_, x_, layer.ln_1, layer.c_attn, layer.c_attn_bias, nullptr, qkv_, model_.dtype);
      s.q = qkv_, s.q_stride = C_;
    } else {
      project(layer, index == 0 && table_.qkv != nullptr);
      s.q = qkv_, s.k = at(qkv_, C_), s.v = at(qkv_, 2 * C_);
      s.q_stride = s.kv_stride = 3 * C_;
    }
    kernels_.attention_cached(s, parallel_);
    linear(M_, C_, heads_, Norm{}, layer.c_proj, layer.c_proj_bias, x_, next_, model_.dtype);
    std::swap(x_, next_);
  }

  void project(const DecoderLayer& layer, bool tabulated) {
    if (!tabulated)
      return linear(M_, 3 * C_, x_, layer.ln_1, layer.c_attn, layer.c_attn_bias, nullptr, qkv_,
                    model_.dtype);
    char* table = static_cast<char*>(table_.qkv);
    constexpr int64_t rows = 64;
    run_tasks(parallel_, (M_ + rows - 1) / rows, [&](int64_t task) {
      for (int64_t m = task * rows; m < std::min(M_, (task + 1) * rows); ++m)
        copy(at(table, table_.entry(model_, tokens()[m], position_[m]) * 3 * C_), 3 * C_,
             at(qkv_, m * 3 * C_));
    });
  }

  const Kernels& kernels_;
  const Decoder& model_;
  const DecoderBatch& batch_;
  const KeyValueCache& cache_;
  const FirstLayerTable table_;
  const Parallel& parallel_;
  Frame frame_;
  int64_t element_, M_, C_;
  int64_t* position_;
  char *x_, *next_, *qkv_, *heads_;
};

// The log-probabilities of a part's targets.
void score_part(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                const KeyValueCache& cache, const int64_t* targets, float* logprobs,
                const Parallel& parallel) {
  const int64_t V = model.vocab_size;
  Pass pass(kernels, model, batch, cache, FirstLayerTable{}, parallel);
  pass.run(false);
  pass.for_logits([&](int64_t first, int64_t count, const float* logits) {
    run_tasks(parallel, count, [&](int64_t i) {
      const float* row = logits + i * V;
      logprobs[first + i] = row[targets[first + i]] - kernels.log_sum_exp(row, V);
    });
  });
}

}  // namespace

std::vector<int64_t> part_ends(const Decoder& model, const DecoderBatch& batch, int threads) {
  // Every thread reads all weights then, which a core's cache is to hold.
  constexpr int64_t most_bytes = int64_t{2} << 20, most_tokens = 64;
  if (threads == 1 || batch.sequences < threads || model.block_bytes() > most_bytes) return {};
  const int64_t tokens = batch.count();
  const int64_t parts = threads * ((tokens - 1) / (most_tokens * threads) + 1);
  std::vector<int64_t> ends;
  int64_t first = 0, largest = 0;
  for (int64_t last = 1; last <= batch.sequences; ++last) {
    const int64_t size = batch.part(first, last).count();
    if (size * parts < tokens && last < batch.sequences) continue;
    largest = std::max(largest, size);
    ends.push_back(first = last);
  }
  return 2 * threads * largest > 3 * tokens ? std::vector<int64_t>{} : ends;
}

void fill_table(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                const FirstLayerTable& table, const Parallel& parallel) {
  if (table.qkv == nullptr || !model.attention) return;
  const int64_t C = model.n_embd;
  std::vector<int64_t> tokens, positions;
  for (int64_t i = 0; i < batch.sequences; ++i)
    for (int64_t t = batch.starts[i]; t < batch.starts[i + 1]; ++t) {
      const int64_t token = batch.tokens[t], position = batch.position(i, t);
      uint8_t& known = table.known[table.entry(model, token, position)];
      if (known) continue;
      known = 1;
      tokens.push_back(token);
      positions.push_back(position);
    }
  const auto count = static_cast<int64_t>(tokens.size());
  if (count == 0) return;
  Frame frame;
  const int64_t row = 3 * C * model.element_bytes();
  char* x = take<char>(frame, count * C * model.element_bytes());
  char* qkv = take<char>(frame, count * row);
  embed(kernels, model, count, tokens.data(), positions.data(), x, parallel);
  const DecoderLayer& layer = model.layers[0];
  kernels.linear({model.dtype, count, C, 3 * C, x, layer.ln_1, layer.c_attn, layer.c_attn_bias,
                  nullptr, qkv, model.dtype},
                 parallel);
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(i);
    std::memcpy(static_cast<char*>(table.qkv) + table.entry(model, tokens[at], positions[at]) * row,
                qkv + i * row, static_cast<size_t>(row));
  }
}

void decoder_forward(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                     const KeyValueCache& cache, const FirstLayerTable& table, const UseLogits& use,
                     const Parallel& parallel) {
  if (batch.sequences == 0) return;
  Pass pass(kernels, model, batch, cache, table, parallel);
  pass.run(true);
  pass.for_logits(use);
}

void decoder_score(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                   const KeyValueCache& cache, const int64_t* targets, float* logprobs,
                   const Parallel& parallel) {
  if (batch.count() == 0) return;
  for_parts(model, batch, parallel,
            [&](const DecoderBatch& part, int64_t, const Parallel& threads) {
              score_part(kernels, model, part, cache, targets + part.starts[0],
                         logprobs + part.starts[0], threads);
            });
}

int64_t cache_row_bytes(const Kernels& kernels, const Decoder& model, int64_t capacity) {
  return static_cast<int64_t>(model.layers.size()) *
         kernels.cache_bytes(cache_shape(model, capacity));
}

void copy_cached(const Kernels& kernels, const Decoder& model, const KeyValueCache& cache,
                 int64_t from, int64_t to, int64_t count, const Parallel& parallel) {
  const CacheShape shape = cache_shape(model, cache.capacity);
  const int64_t layer = cache.rows * kernels.cache_bytes(shape);
  run_tasks(parallel, static_cast<int64_t>(model.layers.size()), [&](int64_t i) {
    kernels.copy_cached(shape, static_cast<char*>(cache.data) + i * layer, from, to, count);
  });
}

}  // namespace gptfast
