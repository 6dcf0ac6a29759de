#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../kernels/threads/scratch.h"

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

// Whether a core's cache holds all weights beside the activations of some tokens.
bool fits_a_core(const Decoder& model) { return model.block_bytes() <= int64_t{2} << 20; }
constexpr int64_t block_tokens = 128;

// Whether blocks of so many tokens go through the layers one after the other.
bool in_blocks(const Decoder& model, const Parallel& parallel) {
  return parallel.threads == 1 && fits_a_core(model);
}

// Calls f(block, first) for them, or for the whole batch; they start at its sequence `first`.
template <class F>
void for_blocks(const Decoder& model, const DecoderBatch& batch, const Parallel& parallel,
                const F& f) {
  const int64_t most = in_blocks(model, parallel) ? block_tokens : batch.count();
  for (int64_t first = 0, end = 0; first < batch.sequences; first = end) {
    for (++end; end < batch.sequences && batch.part(first, end + 1).count() <= most;) ++end;
    f(batch.part(first, end), first);
  }
}

// Rows of activations, and what the layers do to each of them by itself.
class Rows {
 public:
  Rows(const Kernels& kernels, const Decoder& model, int64_t count, const Parallel& parallel)
      : kernels_(kernels),
        model_(model),
        parallel_(parallel),
        M_(count),
        C_(model.n_embd),
        x_(matrix(C_)),
        next_(matrix(C_)),
        heads_(matrix(C_)) {}

  // As many rows of so many columns, uninitialised.
  char* matrix(int64_t columns) {
    return take<char>(frame_, M_ * columns * model_.element_bytes());
  }
  char* x(int64_t row = 0) const { return at(x_, row); }
  char* heads(int64_t row = 0) const { return at(heads_, row); }

  // Y (count, columns) = norm(X) W' + bias of the rows from `first` on.
  void project(int64_t first, int64_t count, int64_t columns, const Norm& norm,
               const Weight& weight, const Param& bias, void* y, DType y_dtype,
               const Parallel& parallel) const {
    kernels_.linear(
        {model_.dtype, count, C_, columns, x(first), norm, weight, bias, nullptr, y, y_dtype},
        parallel);
  }

  // What follows a layer's attention, for some rows: X = Z + ffn(Z), Z = X + heads W' + bias.
  void finish(const DecoderLayer& layer, int64_t first, int64_t count, const Parallel& parallel) {
    char *x = this->x(first), *next = at(next_, first);
    if (model_.attention) {
      kernels_.linear({model_.dtype, count, C_, C_, heads(first), Norm{}, layer.c_proj,
                       layer.c_proj_bias, x, next, model_.dtype},
                      parallel);
    } else {
      std::memcpy(next, x, static_cast<size_t>(at(x, count) - x));
    }
    Ffn s = {};
    s.dtype = model_.dtype;
    s.M = count, s.C = C_, s.F = 4 * C_;
    s.x = next;
    s.norm = layer.ln_2;
    s.w1 = layer.c_fc;
    s.b1 = layer.c_fc_bias;
    s.w2 = layer.mlp_c_proj;
    s.b2 = layer.mlp_c_proj_bias;
    s.gelu = model_.gelu;
    s.y = x;
    kernels_.ffn(s, parallel);
  }

  // What follows the last layer's attention: calls use(first, count, logits) for some rows at a
  // time.
  void for_logits(const UseLogits& use) {
    finish(model_.layers.back(), 0, M_, parallel_);
    constexpr int64_t most = int64_t{4} << 20;
    const int64_t V = model_.vocab_size;
    const int64_t rows = std::min(in_blocks(model_, parallel_) ? block_tokens : M_,
                                  std::max<int64_t>(1, std::min(M_, most / V)));
    float* logits = take<float>(frame_, rows * V);
    for (int64_t first = 0; first < M_; first += rows) {
      const int64_t count = std::min(rows, M_ - first);
      project(first, count, V, model_.ln_f, model_.lm_head, Param{}, logits, DType::f32, parallel_);
      use(first, count, logits);
    }
  }

 private:
  char* at(char* data, int64_t row) const { return data + row * C_ * model_.element_bytes(); }

  const Kernels& kernels_;
  const Decoder& model_;
  const Parallel& parallel_;
  Frame frame_;
  int64_t M_, C_;
  char *x_, *next_, *heads_;
};

// New tokens up to the last layer's attention; what follows it is done for rows, each by itself.
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
        M_(batch.count()),
        C_(model.n_embd),
        rows_(kernels, model, M_, parallel),
        position_(take<int64_t>(frame_, M_)),
        qkv_(rows_.matrix(3 * C_)) {}

  // For all tokens, in rows of its own.
  Rows& run() {
    run_layers();
    if (model_.attention) attend_last(rows_, 0, M_);
    return rows_;
  }

  // For each sequence's last token, in rows of `last` from `first` on.
  void run(Rows& last, int64_t first) {
    run_layers();
    for (int64_t i = 0; i < batch_.sequences; ++i)
      copy(rows_.x(batch_.starts[i + 1] - 1 - batch_.starts[0]), C_, last.x(first + i));
    if (model_.attention) attend_last(last, first, batch_.sequences);
  }

 private:
  const int64_t* tokens() const { return batch_.tokens + batch_.starts[0]; }
  char* at(char* data, int64_t offset) const { return data + offset * model_.element_bytes(); }
  void copy(const char* from, int64_t count, char* to) const {
    std::memcpy(to, from, static_cast<size_t>(count * model_.element_bytes()));
  }

  // All but what follows the last one's queries, keys and values.
  void run_layers() {
    for (int64_t i = 0; i < batch_.sequences; ++i)
      for (int64_t t = batch_.starts[i]; t < batch_.starts[i + 1]; ++t)
        position_[t - batch_.starts[0]] = batch_.position(i, t);
    const auto last = static_cast<int64_t>(model_.layers.size()) - 1;
    for (int64_t i = 0; i <= last; ++i) {
      for_rows([&](int64_t first, int64_t count, const Parallel& parallel) {
        if (i == 0)
          embed(kernels_, model_, count, tokens() + first, position_ + first, rows_.x(first),
                parallel);
        else
          rows_.finish(layer(i - 1), first, count, parallel);
        if (model_.attention) project(i, i == last, first, count, parallel);
      });
      if (model_.attention && i < last) attend(i);
    }
  }

  // Calls f(first, count, parallel) for all rows; where a core's cache holds the weights, for a
  // part of many rows by each thread, which then waits for others before and after attention alone.
  template <class F>
  void for_rows(const F& f) const {
    constexpr int64_t worth = 16;
    const int64_t parts =
        fits_a_core(model_) ? std::min<int64_t>(parallel_.threads, M_ / worth) : 1;
    if (parts <= 1) return f(0, M_, parallel_);
    const int64_t most = (M_ + parts - 1) / parts;
    run_tasks(parallel_, parts, [&](int64_t part) {
      const int64_t first = std::min(M_, part * most), count = std::min(most, M_ - first);
      if (count > 0) f(first, count, in_turn);
    });
  }

  const DecoderLayer& layer(int64_t i) const { return model_.layers[static_cast<size_t>(i)]; }

  // Queries, keys and values (M, 3 C); of the last layer keys and values (M, 2 C).
  void project(int64_t index, bool last, int64_t first, int64_t count, const Parallel& parallel) {
    if (index == 0 && table_.qkv != nullptr) return look_up(first, count, parallel);
    const int64_t columns = (last ? 2 : 3) * C_;
    rows_.project(first, count, columns, layer(index).ln_1,
                  last ? layer(index).kv : layer(index).c_attn,
                  last ? layer(index).kv_bias : layer(index).c_attn_bias, at(qkv_, first * columns),
                  model_.dtype, parallel);
  }

  CachedAttention attention(int64_t layer) const {
    CachedAttention s = {};
    s.shape = cache_shape(model_, cache_.capacity);
    s.sequences = batch_.sequences;
    s.starts = batch_.starts, s.row = batch_.row, s.cached = batch_.cached, s.kept = batch_.kept;
    s.cache = static_cast<char*>(cache_.data) + layer * cache_.rows * kernels_.cache_bytes(s.shape);
    return s;
  }

  void attend(int64_t index) {
    CachedAttention s = attention(index);
    s.q = qkv_, s.k = at(qkv_, C_), s.v = at(qkv_, 2 * C_);
    s.q_stride = s.kv_stride = 3 * C_;
    s.out = rows_.heads();
    kernels_.attention_cached(s, parallel_);
  }

  // With queries of `count` rows of `to`.
  void attend_last(const Rows& to, int64_t first, int64_t count) {
    const auto last = static_cast<int64_t>(model_.layers.size()) - 1;
    char *kv = qkv_, *q = at(qkv_, M_ * 2 * C_);
    to.project(first, count, C_, layer(last).ln_1, layer(last).c_attn, layer(last).c_attn_bias, q,
               model_.dtype, parallel_);
    CachedAttention s = attention(last);
    s.q = q, s.k = kv, s.v = at(kv, C_);
    s.q_stride = C_, s.kv_stride = 2 * C_;
    s.last_queries = count < M_;
    s.out = to.heads(first);
    kernels_.attention_cached(s, parallel_);
  }

  void look_up(int64_t first, int64_t count, const Parallel& parallel) const {
    const int64_t width = 3 * C_;
    constexpr int64_t rows = 64;
    run_tasks(parallel, (count + rows - 1) / rows, [&](int64_t task) {
      const int64_t last = std::min(first + count, first + (task + 1) * rows);
      for (int64_t m = first + task * rows; m < last; ++m)
        copy(at(static_cast<char*>(table_.qkv),
                table_.entry(model_, tokens()[m], position_[m]) * width),
             width, at(qkv_, m * width));
    });
  }

  const Kernels& kernels_;
  const Decoder& model_;
  const DecoderBatch& batch_;
  const KeyValueCache& cache_;
  const FirstLayerTable table_;
  const Parallel& parallel_;
  int64_t M_, C_;
  Rows rows_;
  Frame frame_;
  int64_t* position_;
  char* qkv_;
};

}  // namespace

std::vector<int64_t> part_ends(const Decoder& model, const DecoderBatch& batch, int threads) {
  constexpr int64_t most_tokens = 4 * block_tokens;
  if (threads == 1 || batch.sequences < threads || !fits_a_core(model)) return {};
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
  Rows last(kernels, model, batch.sequences, parallel);
  for_blocks(model, batch, parallel, [&](const DecoderBatch& block, int64_t first) {
    Pass(kernels, model, block, cache, table, parallel).run(last, first);
  });
  last.for_logits(use);
}

void decoder_score(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                   const KeyValueCache& cache, const int64_t* targets, float* logprobs,
                   const Parallel& parallel) {
  if (batch.count() == 0) return;
  const int64_t V = model.vocab_size;
  for_parts(model, batch, parallel,
            [&](const DecoderBatch& part, int64_t, const Parallel& threads) {
              for_blocks(model, part, threads, [&](const DecoderBatch& block, int64_t) {
                Pass pass(kernels, model, block, cache, FirstLayerTable{}, threads);
                pass.run().for_logits([&](int64_t first, int64_t count, const float* logits) {
                  run_tasks(threads, count, [&](int64_t i) {
                    const int64_t at = block.starts[0] + first + i;
                    const float* row = logits + i * V;
                    logprobs[at] = kernels.logprob(row, V, targets[at]);
                  });
                });
              });
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
