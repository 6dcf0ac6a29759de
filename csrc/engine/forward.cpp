#include "forward.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../kernels/threads/scratch.h"

namespace gptfast {
namespace {

void embed(const Model& model, int64_t count, const int64_t* tokens, const int64_t* positions,
           void* x, const Parallel& parallel) {
  Embedding s = {};
  s.y_dtype = model.dtype();
  s.M = count, s.C = model.config().n_embd, s.V = model.config().vocab_size;
  s.idx = tokens;
  s.position = positions;
  s.wte = model.wte();
  s.wpe = model.wpe();
  s.y = x;
  model.kernels().embedding(s, parallel);
}

// Rows of activations, and the steps of the model that compute each row by itself.
class Rows {
 public:
  Rows(const Model& model, const Schedule& schedule, int64_t count, const Parallel& parallel)
      : kernels_(model.kernels()),
        model_(model),
        schedule_(schedule),
        parallel_(parallel),
        M_(count),
        C_(model.config().n_embd),
        x_(matrix(C_)),
        next_(matrix(C_)),
        heads_(matrix(C_)) {}

  // Memory for M rows of `columns` columns, uninitialised.
  char* matrix(int64_t columns) {
    return alloc<char>(frame_, M_ * columns * model_.element_bytes());
  }
  char* x(int64_t row = 0) const { return at(x_, row); }
  char* heads(int64_t row = 0) const { return at(heads_, row); }

  // Y (count, columns) = norm(X) W' + bias for `count` rows from `first` on.
  void project(int64_t first, int64_t count, int64_t columns, const Norm& norm,
               const Weight& weight, const Param& bias, void* y, DType y_dtype,
               const Parallel& parallel) const {
    kernels_.linear(
        {model_.dtype(), count, C_, columns, x(first), norm, weight, bias, nullptr, y, y_dtype},
        parallel);
  }

  // The rest of a layer after its attention, for some rows:
  //   X = Z + ffn(Z), Z = X + heads W' + bias
  void finish(const Model::Layer& layer, int64_t first, int64_t count, const Parallel& parallel) {
    char *x = this->x(first), *next = at(next_, first);
    if (model_.config().attention) {
      kernels_.linear({model_.dtype(), count, C_, C_, heads(first), Norm{}, layer.c_proj,
                       layer.c_proj_bias, x, next, model_.dtype()},
                      parallel);
    } else {
      std::memcpy(next, x, static_cast<size_t>(at(x, count) - x));
    }
    Ffn s = {};
    s.dtype = model_.dtype();
    s.M = count, s.C = C_, s.F = 4 * C_;
    s.x = next;
    s.norm = layer.ln_2;
    s.w1 = layer.c_fc;
    s.b1 = layer.c_fc_bias;
    s.w2 = layer.mlp_c_proj;
    s.b2 = layer.mlp_c_proj_bias;
    s.gelu = model_.config().gelu;
    s.y = x;
    kernels_.ffn(s, parallel);
  }

  // The rest of the model after the last layer's attention: calls `use` with the logits of some
  // rows at a time.
  void for_logits(const UseLogits& use) {
    finish(model_.layers().back(), 0, M_, parallel_);
    const int64_t V = model_.config().vocab_size, rows = schedule_.logits_rows(M_);
    float* logits = alloc<float>(frame_, rows * V);
    for (int64_t first = 0; first < M_; first += rows) {
      const int64_t count = std::min(rows, M_ - first);
      project(first, count, V, model_.ln_f(), model_.lm_head(), Param{}, logits, DType::f32,
              parallel_);
      use(first, count, logits, parallel_);
    }
  }

 private:
  char* at(char* data, int64_t row) const { return data + row * C_ * model_.element_bytes(); }

  const Kernels& kernels_;
  const Model& model_;
  const Schedule& schedule_;
  const Parallel& parallel_;
  ScratchFrame frame_;
  int64_t M_, C_;
  char *x_, *next_, *heads_;
};

// One forward pass over new tokens, up to the last layer's attention. The rest computes each row by
// itself and is left to Rows.
class Pass {
 public:
  Pass(const Model& model, const Schedule& schedule, const Batch& batch, Cache& cache,
       const FirstLayerTable* table, const Parallel& parallel)
      : kernels_(model.kernels()),
        model_(model),
        schedule_(schedule),
        batch_(batch),
        cache_(cache),
        table_(table),
        parallel_(parallel),
        M_(batch.count()),
        C_(model.config().n_embd),
        rows_(model, schedule, M_, parallel),
        position_(alloc<int64_t>(frame_, M_)),
        qkv_(rows_.matrix(3 * C_)) {}

  // Computes all tokens; returns this pass's own rows.
  Rows& run() {
    run_layers();
    if (model_.config().attention) attend_last(rows_, 0, M_);
    return rows_;
  }

  // Computes each sequence's last token, into rows of `last` from `first` on.
  void run(Rows& last, int64_t first) {
    run_layers();
    for (int64_t i = 0; i < batch_.sequences; ++i)
      copy(rows_.x(batch_.starts[i + 1] - 1 - batch_.starts[0]), C_, last.x(first + i));
    if (model_.config().attention) attend_last(last, first, batch_.sequences);
  }

 private:
  const int64_t* tokens() const { return batch_.tokens + batch_.starts[0]; }
  char* at(char* data, int64_t offset) const { return data + offset * model_.element_bytes(); }
  void copy(const char* from, int64_t count, char* to) const {
    std::memcpy(to, from, static_cast<size_t>(count * model_.element_bytes()));
  }

  // Runs the layers up to the last one's keys and values, before its attention.
  void run_layers() {
    for (int64_t i = 0; i < batch_.sequences; ++i)
      for (int64_t t = batch_.starts[i]; t < batch_.starts[i + 1]; ++t)
        position_[t - batch_.starts[0]] = batch_.position(i, t);
    const auto last = static_cast<int64_t>(model_.layers().size()) - 1;
    for (int64_t i = 0; i <= last; ++i) {
      schedule_.for_rows(
          M_, parallel_, [&](int64_t first, int64_t count, const Parallel& parallel) {
            if (i == 0)
              embed(model_, count, tokens() + first, position_ + first, rows_.x(first), parallel);
            else
              rows_.finish(layer(i - 1), first, count, parallel);
            if (model_.config().attention) project(i, i == last, first, count, parallel);
          });
      if (model_.config().attention && i < last) attend(i);
    }
  }

  const Model::Layer& layer(int64_t i) const { return model_.layers()[static_cast<size_t>(i)]; }

  // Projects queries, keys and values, (M, 3 C); in the last layer keys and values alone, (M, 2 C).
  void project(int64_t index, bool last, int64_t first, int64_t count, const Parallel& parallel) {
    if (index == 0 && table_ != nullptr) return look_up(first, count, parallel);
    const int64_t columns = (last ? 2 : 3) * C_;
    rows_.project(first, count, columns, layer(index).ln_1,
                  last ? layer(index).kv : layer(index).c_attn,
                  last ? layer(index).kv_bias : layer(index).c_attn_bias, at(qkv_, first * columns),
                  model_.dtype(), parallel);
  }

  // The arguments that the attention of every layer shares.
  CachedAttention attention(int64_t layer) const {
    CachedAttention s = {};
    s.shape = cache_.shape();
    s.sequences = batch_.sequences;
    s.starts = batch_.starts, s.slot = batch_.slot, s.cached = batch_.cached, s.kept = batch_.kept;
    s.cache = cache_.layer(layer);
    return s;
  }

  void attend(int64_t index) {
    CachedAttention s = attention(index);
    s.q = qkv_, s.k = at(qkv_, C_), s.v = at(qkv_, 2 * C_);
    s.q_stride = s.kv_stride = 3 * C_;
    s.out = rows_.heads();
    kernels_.attention_cached(s, parallel_);
  }

  // The last layer's attention: projects and uses the queries of `count` rows of `to` alone.
  void attend_last(const Rows& to, int64_t first, int64_t count) {
    const auto last = static_cast<int64_t>(model_.layers().size()) - 1;
    char *kv = qkv_, *q = at(qkv_, M_ * 2 * C_);
    to.project(first, count, C_, layer(last).ln_1, layer(last).c_attn, layer(last).c_attn_bias, q,
               model_.dtype(), parallel_);
    CachedAttention s = attention(last);
    s.q = q, s.k = kv, s.v = at(kv, C_);
    s.q_stride = C_, s.kv_stride = 2 * C_;
    s.last_queries = count < M_;
    s.out = to.heads(first);
    kernels_.attention_cached(s, parallel_);
  }

  // Copies the first layer's projections from the table.
  void look_up(int64_t first, int64_t count, const Parallel& parallel) const {
    constexpr int64_t rows = limits::task_table_rows;
    run_tasks(parallel, (count + rows - 1) / rows, [&](int64_t task) {
      const int64_t last = std::min(first + count, first + (task + 1) * rows);
      for (int64_t m = first + task * rows; m < last; ++m)
        copy(table_->row(tokens()[m], position_[m]), 3 * C_, at(qkv_, m * 3 * C_));
    });
  }

  const Kernels& kernels_;
  const Model& model_;
  const Schedule& schedule_;
  const Batch& batch_;
  Cache& cache_;
  const FirstLayerTable* table_;
  const Parallel& parallel_;
  int64_t M_, C_;
  Rows rows_;
  ScratchFrame frame_;
  int64_t* position_;
  char* qkv_;
};

// Computes the table's missing entries for a batch's tokens.
void fill(FirstLayerTable& table, const Model& model, const Batch& batch,
          const Parallel& parallel) {
  const int64_t C = model.config().n_embd;
  std::vector<int64_t> tokens, positions;
  for (int64_t i = 0; i < batch.sequences; ++i)
    for (int64_t t = batch.starts[i]; t < batch.starts[i + 1]; ++t) {
      const int64_t token = batch.tokens[t], position = batch.position(i, t);
      if (table.mark_known(token, position)) continue;
      tokens.push_back(token);
      positions.push_back(position);
    }
  const auto count = static_cast<int64_t>(tokens.size());
  if (count == 0) return;
  ScratchFrame frame;
  char* x = alloc<char>(frame, count * C * model.element_bytes());
  char* qkv = alloc<char>(frame, count * table.row_bytes());
  embed(model, count, tokens.data(), positions.data(), x, parallel);
  const Model::Layer& layer = model.layers()[0];
  model.kernels().linear({model.dtype(), count, C, 3 * C, x, layer.ln_1, layer.c_attn,
                          layer.c_attn_bias, nullptr, qkv, model.dtype()},
                         parallel);
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(i);
    std::memcpy(table.row(tokens[at], positions[at]), qkv + i * table.row_bytes(),
                static_cast<size_t>(table.row_bytes()));
  }
}

}  // namespace

void forward(const Model& model, const Batch& batch, Cache& cache, FirstLayerTable* table,
             const UseLogits& use, const Parallel& parallel) {
  if (batch.sequences == 0) return;
  if (table != nullptr) fill(*table, model, batch, parallel);
  const Schedule schedule(model, batch, parallel.threads);
  schedule.for_parts(
      batch, parallel, [&](const Batch& part, int64_t first, const Parallel& threads) {
        Rows last(model, schedule, part.sequences, threads);
        schedule.for_blocks(part, [&](const Batch& block, int64_t at) {
          Pass(model, schedule, block, cache, table, threads).run(last, at);
        });
        last.for_logits([&](int64_t row, int64_t count, const float* logits, const Parallel& idle) {
          use(first + row, count, logits, idle);
        });
      });
}

void score(const Model& model, const Batch& batch, Cache& cache, const int64_t* targets,
           float* logprobs, const Parallel& parallel) {
  if (batch.count() == 0) return;
  const int64_t V = model.config().vocab_size;
  const Schedule schedule(model, batch, parallel.threads);
  schedule.for_parts(batch, parallel, [&](const Batch& part, int64_t, const Parallel& threads) {
    schedule.for_blocks(part, [&](const Batch& block, int64_t) {
      Pass pass(model, schedule, block, cache, nullptr, threads);
      pass.run().for_logits(
          [&](int64_t first, int64_t count, const float* logits, const Parallel& idle) {
            run_tasks(idle, count, [&](int64_t i) {
              const int64_t at = block.starts[0] + first + i;
              logprobs[at] = model.kernels().logprob(logits + i * V, V, targets[at]);
            });
          });
    });
  });
}

}  // namespace gptfast
