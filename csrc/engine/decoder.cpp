#include "decoder.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "../kernels/scratch.h"

namespace gptfast {
namespace {

void run_in_this_thread(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

class Pass {
 public:
  Pass(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
       const KeyValueCache& cache, const Parallel& parallel)
      : kernels_(kernels),
        model_(model),
        batch_(batch),
        cache_(cache),
        parallel_(parallel),
        element_(model.dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t)),
        M_(batch.starts[batch.sequences]),
        C_(model.n_embd),
        D_(model.n_embd / model.n_head),
        x_(activation(M_, C_)),
        next_(activation(M_, C_)),
        qkv_(activation(M_, 3 * C_)),
        heads_(activation(M_, C_)) {}

  void run(float* logits) {
    embed();
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      const DecoderLayer& layer = model_.layers[i];
      const bool last = i + 1 == model_.layers.size();
      if (model_.attention) {
        linear(M_, 3 * C_, x_, layer.ln_1, layer.c_attn, layer.c_attn_bias, nullptr, qkv_,
               model_.dtype);
        attend(static_cast<int64_t>(i), last);
        if (last) keep_last_tokens();
        linear(M_, C_, heads_, Norm{}, layer.c_proj, layer.c_proj_bias, x_, next_, model_.dtype);
        std::swap(x_, next_);
      } else if (last) {
        keep_last_tokens();
      }
      feed_forward(layer);
    }
    linear(M_, model_.vocab_size, x_, model_.ln_f, model_.lm_head, Param{}, nullptr, logits,
           DType::f32);
  }

 private:
  char* activation(int64_t rows, int64_t columns) {
    return static_cast<char*>(frame_.bytes(static_cast<size_t>(rows * columns) * element_));
  }
  char* at(char* data, int64_t offset) const {
    return data + offset * static_cast<int64_t>(element_);
  }
  int64_t new_tokens(int64_t sequence) const {
    return batch_.starts[sequence + 1] - batch_.starts[sequence];
  }

  // What follows the last layer's attention is needed for the last token of each sequence alone.
  void keep_last_tokens() {
    for (int64_t i = 0; i < batch_.sequences; ++i)
      std::memcpy(at(next_, i * C_), at(x_, (batch_.starts[i + 1] - 1) * C_),
                  static_cast<size_t>(C_) * element_);
    std::swap(x_, next_);
    M_ = batch_.sequences;
  }

  void embed() {
    int64_t* position =
        static_cast<int64_t*>(frame_.bytes(static_cast<size_t>(M_) * sizeof(int64_t)));
    for (int64_t i = 0; i < batch_.sequences; ++i)
      for (int64_t t = 0; t < new_tokens(i); ++t)
        position[batch_.starts[i] + t] = batch_.cached[i] + t;
    Embedding s = {};
    s.y_dtype = model_.dtype;
    s.M = M_, s.C = C_, s.V = model_.vocab_size;
    s.idx = batch_.tokens;
    s.position = position;
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

  // With a sequence per thread each attends by itself, with fewer the threads share a sequence's
  // heads.
  void attend(int64_t layer, bool last_tokens) {
    struct Context {
      Pass* pass;
      int64_t layer;
      bool last_tokens;
      Parallel inner;
    };
    const bool spread = batch_.sequences >= parallel_.threads;
    Context context = {this, layer, last_tokens,
                       spread ? Parallel{run_in_this_thread, 1} : parallel_};
    const auto sequence = [](void* data, int64_t i) {
      const Context& c = *static_cast<Context*>(data);
      c.pass->attend_sequence(c.layer, i, c.last_tokens, c.inner);
    };
    (spread ? parallel_.run : run_in_this_thread)(batch_.sequences, sequence, &context);
  }

  void attend_sequence(int64_t layer, int64_t i, bool last_token, const Parallel& parallel) {
    const int64_t H = model_.n_head, start = batch_.starts[i], cached = batch_.cached[i];
    const int64_t row_size = H * model_.block_size * D_;
    char* keys =
        at(static_cast<char*>(cache_.data), (layer * 2 * cache_.rows + batch_.row[i]) * row_size);
    char* values = at(keys, cache_.rows * row_size);
    for (int64_t t = 0; t < new_tokens(i); ++t)
      for (int64_t h = 0; h < H; ++h) {
        const int64_t from = (start + t) * 3 * C_ + h * D_,
                      to = (h * model_.block_size + cached + t) * D_;
        std::memcpy(at(keys, to), at(qkv_, from + C_), static_cast<size_t>(D_) * element_);
        std::memcpy(at(values, to), at(qkv_, from + 2 * C_), static_cast<size_t>(D_) * element_);
      }
    Attention s = {};
    s.dtype = model_.dtype;
    // The queries from `first` on; with the last token's alone, sequence i has row i of the result.
    const int64_t first = last_token ? new_tokens(i) - 1 : 0;
    s.B = 1, s.H = H, s.Tq = new_tokens(i) - first, s.Tk = cached + new_tokens(i), s.D = D_;
    s.q = {at(qkv_, (start + first) * 3 * C_), 0, D_, 3 * C_};
    s.k = {keys, 0, model_.block_size * D_, D_};
    s.v = {values, 0, model_.block_size * D_, D_};
    s.out = {at(heads_, (last_token ? i : start) * C_), 0, D_, C_};
    s.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(D_)));
    kernels_.attention(s, parallel);
  }

  const Kernels& kernels_;
  const Decoder& model_;
  const DecoderBatch& batch_;
  const KeyValueCache& cache_;
  const Parallel& parallel_;
  Frame frame_;
  size_t element_;
  int64_t M_, C_, D_;
  char *x_, *next_, *qkv_, *heads_;
};

}  // namespace

void decoder_forward(const Kernels& kernels, const Decoder& model, const DecoderBatch& batch,
                     const KeyValueCache& cache, float* logits, const Parallel& parallel) {
  if (batch.sequences > 0) Pass(kernels, model, batch, cache, parallel).run(logits);
}

}  // namespace gptfast
