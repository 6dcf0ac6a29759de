#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../kernels/scratch.h"
#include "../kernels/parallel.h"

namespace gptfast {
namespace {

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
        M_(batch.starts[batch.sequences]),
        C_(model.n_embd),
        position_(take<int64_t>(M_)),
        x_(activation(M_, C_)),
        next_(activation(M_, C_)),
        qkv_(activation(M_, 3 * C_)),
        heads_(activation(M_, C_)) {}

  // The blocks' output for every token, or for the last one of each sequence alone.
  void run(bool last_tokens) {
    embed();
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

  // Logits (count, V) of the rows from `first` on.
  void logits(int64_t first, int64_t count, float* out) {
    linear(count, model_.vocab_size, at(x_, first * C_), model_.ln_f, model_.lm_head, Param{},
           nullptr, out, DType::f32);
  }

 private:
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(frame_.bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  char* activation(int64_t rows, int64_t columns) { return take<char>(rows * columns * element_); }
  char* at(char* data, int64_t offset) const { return data + offset * element_; }
  void copy(const char* from, int64_t count, char* to) const {
    std::memcpy(to, from, static_cast<size_t>(count * element_));
  }

  // What follows the last layer's keys and values is needed for each sequence's last token alone.
  void keep_last_tokens() {
    if (M_ == batch_.sequences) return;
    for (int64_t i = 0; i < batch_.sequences; ++i)
      copy(at(x_, (batch_.starts[i + 1] - 1) * C_), C_, at(next_, i * C_));
    std::swap(x_, next_);
    M_ = batch_.sequences;
  }

  void embed() {
    for (int64_t i = 0; i < batch_.sequences; ++i)
      for (int64_t t = batch_.starts[i]; t < batch_.starts[i + 1]; ++t)
        position_[t] = batch_.cached[i] + t - batch_.starts[i];
    Embedding s = {};
    s.y_dtype = model_.dtype;
    s.M = M_, s.C = C_, s.V = model_.vocab_size;
    s.idx = batch_.tokens;
    s.position = position_;
    s.wte = model_.wte;
    s.wpe = model_.wpe;
    s.y = x_;
    kernels_.embedding(s, parallel_);
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
    s.dtype = model_.dtype;
    s.sequences = batch_.sequences, s.H = model_.n_head, s.D = model_.head_dim();
    s.capacity = cache_.capacity;
    s.starts = batch_.starts, s.row = batch_.row, s.cached = batch_.cached;
    const int64_t layer_bytes = cache_.rows * kernels_.cache_bytes(s.dtype, s.H, s.D, s.capacity);
    s.cache = static_cast<char*>(cache_.data) + index * layer_bytes;
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
    const auto entry = [&](int64_t m) {
      return position_[m] * model_.vocab_size + batch_.tokens[m];
    };
    char* table = static_cast<char*>(table_.qkv);
    std::vector<int64_t> missing;
    for (int64_t m = 0; m < M_; ++m)
      if (!table_.known[entry(m)]) missing.push_back(m);
    const auto count = static_cast<int64_t>(missing.size());
    for (int64_t i = 0; i < count; ++i)
      copy(at(x_, missing[static_cast<size_t>(i)] * C_), C_, at(next_, i * C_));
    if (count > 0)
      linear(count, 3 * C_, next_, layer.ln_1, layer.c_attn, layer.c_attn_bias, nullptr, qkv_,
             model_.dtype);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t to = entry(missing[static_cast<size_t>(i)]);
      copy(at(qkv_, i * 3 * C_), 3 * C_, at(table, to * 3 * C_));
      table_.known[to] = 1;
    }
    constexpr int64_t rows = 64;
    run_tasks(parallel_, (M_ + rows - 1) / rows, [&](int64_t task) {
      for (int64_t m = task * rows; m < std::min(M_, (task + 1) * rows); ++m)
        copy(at(table, entry(m) * 3 * C_), 3 * C_, at(qkv_, m * 3 * C_));
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

}  // namespace

void decoder_forward(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                     const KeyValueCache& cache, const FirstLayerTable& table, float* logits,
                     const Parallel& parallel) {
  if (batch.sequences == 0) return;
  Pass pass(kernels, model, batch, cache, table, parallel);
  pass.run(true);
  pass.logits(0, batch.sequences, logits);
}

void decoder_score(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                   const KeyValueCache& cache, const int64_t* targets, float* logprobs,
                   const Parallel& parallel) {
  const int64_t M = batch.starts[batch.sequences], V = model.vocab_size;
  if (M == 0) return;
  Pass pass(kernels, model, batch, cache, FirstLayerTable{}, parallel);
  pass.run(false);
  const int64_t rows = std::max<int64_t>(1, std::min(M, (int64_t{4} << 20) / V));
  Frame frame;
  float* logits = static_cast<float*>(frame.bytes(static_cast<size_t>(rows * V) * sizeof(float)));
  for (int64_t first = 0; first < M; first += rows) {
    const int64_t count = std::min(rows, M - first);
    pass.logits(first, count, logits);
    run_tasks(parallel, count, [&](int64_t i) {
      const float* row = logits + i * V;
      logprobs[first + i] = row[targets[first + i]] - kernels.log_sum_exp(row, V);
    });
  }
}

int64_t cache_row_bytes(const Kernels& kernels, const Decoder& model, int64_t capacity) {
  return static_cast<int64_t>(model.layers.size()) *
         kernels.cache_bytes(model.dtype, model.n_head, model.head_dim(), capacity);
}

void copy_cached(const Kernels& kernels, const Decoder& model, const KeyValueCache& cache,
                 int64_t from, int64_t to, int64_t count, const Parallel& parallel) {
  const int64_t H = model.n_head, D = model.head_dim();
  const int64_t layer = cache.rows * kernels.cache_bytes(model.dtype, H, D, cache.capacity);
  run_tasks(parallel, static_cast<int64_t>(model.layers.size()), [&](int64_t i) {
    kernels.copy_cached(model.dtype, H, D, cache.capacity,
                        static_cast<char*>(cache.data) + i * layer, from, to, count);
  });
}

}  // namespace gptfast
