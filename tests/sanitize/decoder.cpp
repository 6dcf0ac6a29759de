// The engine: ragged batches, cached and not, windows that slide; each logit has the bits that the
// sequence's whole window gives alone.
#include "../../csrc/engine/decoder.h"

#include <cmath>
#include <cstring>
#include <deque>

#include "harness.h"

namespace gptfast::sanitize {
namespace {

struct Shape {
  DType dtype;
  int64_t L, H, D, T, V;
  bool bias, attention;
  Gelu gelu;
};

// Parameters of a model; packed weights are made per level.
class Model {
 public:
  explicit Model(const Shape& s) : s_(s), C_(s.H * s.D) {
    wte_ = vector(s.V * C_);
    wpe_ = vector(s.T * C_);
    for (int64_t i = 0; i < s.L; ++i)
      layers_.push_back({vector(C_), vector(C_), matrix(3 * C_, C_), vector(3 * C_), matrix(C_, C_),
                         vector(C_), vector(C_), vector(C_), matrix(4 * C_, C_), vector(4 * C_),
                         matrix(C_, 4 * C_), vector(C_)});
    ln_f_ = vector(C_);
    head_ = matrix(s.V, C_);
  }

  Decoder at(const Kernels& kernels, const Parallel& parallel, std::deque<Buffer>& packed) const {
    const auto weight = [&](const Buffer* w, int64_t N) {
      const int64_t K = w->count() / N;
      packed.emplace_back(kernels.packed_weight_bytes(s_.dtype, N, K) / 2, DType::bf16);
      kernels.pack_weight(s_.dtype, w->param(), N, K, packed.back().data(), parallel);
      return Weight{Param{}, packed.back().data()};
    };
    const auto norm = [&](const Buffer* w, const Buffer* b) {
      return Norm{w->param(), b->param(s_.bias), nullptr, nullptr};
    };
    Decoder m = {};
    m.dtype = s_.dtype;
    m.block_size = s_.T, m.vocab_size = s_.V, m.n_head = s_.H, m.n_embd = C_;
    m.attention = s_.attention;
    m.gelu = s_.gelu;
    m.wte = wte_->param(), m.wpe = wpe_->param();
    for (const std::vector<const Buffer*>& p : layers_) {
      DecoderLayer layer = {};
      if (s_.attention) {
        layer.ln_1 = norm(p[0], p[1]);
        layer.c_attn = weight(p[2], 3 * C_), layer.c_attn_bias = p[3]->param(s_.bias);
        layer.c_proj = weight(p[4], C_), layer.c_proj_bias = p[5]->param(s_.bias);
      }
      layer.ln_2 = norm(p[6], p[7]);
      layer.c_fc = weight(p[8], 4 * C_), layer.c_fc_bias = p[9]->param(s_.bias);
      layer.mlp_c_proj = weight(p[10], C_), layer.mlp_c_proj_bias = p[11]->param(s_.bias);
      m.layers.push_back(layer);
    }
    m.ln_f.weight = ln_f_->param();
    m.lm_head = weight(head_, s_.V);
    return m;
  }

 private:
  const Buffer* vector(int64_t n) { return &memory_.emplace_back(n, DType::f32, 1.0); }
  const Buffer* matrix(int64_t N, int64_t K) {
    const double deviation = 1.0 / std::sqrt(static_cast<double>(K));
    return &memory_.emplace_back(N * K, DType::f32, deviation);
  }

  Shape s_;
  int64_t C_;
  std::deque<Buffer> memory_;
  const Buffer *wte_, *wpe_, *ln_f_, *head_;
  std::vector<std::vector<const Buffer*>> layers_;
};

struct Sequence {
  int64_t row, length;  // cache row, tokens in the next step's window
  int64_t first = 0, cached = 0;
  std::vector<int64_t> text;
};

struct Session {
  const Shape& s;
  const Kernels& kernels;
  const Parallel& parallel;
  const Decoder& model;
  Buffer cache;
  int64_t rows;

  // Logits after the windows of these sequences, of which `cached` tokens are known.
  std::vector<float> step(const std::vector<Sequence>& batch) {
    std::vector<int64_t> tokens, starts = {0}, row, cached;
    for (const Sequence& each : batch) {
      const auto from = each.text.begin() + each.first;
      tokens.insert(tokens.end(), from + each.cached, from + each.length);
      starts.push_back(static_cast<int64_t>(tokens.size()));
      row.push_back(each.row);
      cached.push_back(each.cached);
    }
    const Indices tokens_(tokens), starts_(starts), row_(row), cached_(cached);
    const int64_t sequences = static_cast<int64_t>(batch.size());
    Buffer logits(sequences * s.V, DType::f32);
    decoder_forward(kernels, model,
                    {sequences, tokens_.data(), starts_.data(), row_.data(), cached_.data()},
                    {cache.data(), rows}, logits.floats(), parallel);
    return logits.values();
  }
};

// The next token of each: a window that is full drops its first token and is computed anew.
void advance(const Shape& s, std::vector<Sequence>& batch) {
  for (Sequence& each : batch) {
    each.cached = each.length;
    if (each.length < s.T) {
      ++each.length;
    } else {
      ++each.first;
      each.cached = 0;
    }
  }
}

std::vector<Result> run(const Shape& s, const Model& parameters, std::vector<Sequence> batch,
                        int64_t steps, const Kernels& kernels, const Parallel& parallel) {
  std::deque<Buffer> packed;
  const Decoder model = parameters.at(kernels, parallel, packed);
  const int64_t rows = static_cast<int64_t>(batch.size()) + 1, spare_row = 1;
  const int64_t values = s.L * 2 * rows * s.H * s.T * s.D;
  Session session = {s, kernels, parallel, model, Buffer(values, s.dtype), rows};
  std::vector<float> all;
  for (int64_t i = 0; i < steps; ++i) {
    const std::vector<float> logits = session.step(batch);
    for (size_t n = 0; n < batch.size(); ++n) {
      Sequence alone = batch[n];
      alone.row = spare_row, alone.cached = 0;
      const std::vector<float> recomputed = session.step({alone});
      const bool same = std::memcmp(recomputed.data(), logits.data() + n * recomputed.size(),
                                    recomputed.size() * sizeof(float)) == 0;
      expect(same, format("logits of sequence %zu at step %lld differ when computed alone", n,
                          static_cast<long long>(i)));
    }
    all.insert(all.end(), logits.begin(), logits.end());
    advance(s, batch);
  }
  return {{"logits", all}};
}

void decoder_case(const Shape& s) {
  constexpr int64_t steps = 3;
  const Model model(s);
  std::vector<Sequence> batch = {{3, s.T / 2 + 1}, {0, 1}, {2, s.T}, {4, s.T - 1}};
  for (Sequence& each : batch)
    for (int64_t i = 0; i < s.T + steps; ++i) each.text.push_back(random_below(s.V));
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name =
      format("decoder %s L%lld H%lld D%lld T%lld V%lld%s%s %s", sanitize::name(s.dtype), i(s.L),
             i(s.H), i(s.D), i(s.T), i(s.V), s.bias ? " bias" : "",
             s.attention ? "" : " without attention", s.gelu == Gelu::erf ? "erf" : "tanh");
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, model, batch, steps, kernels, parallel);
  });
}

}  // namespace

void decoder_cases() {
  for (const DType dtype : dtypes) {
    decoder_case({dtype, 2, 2, 17, 20, 11, true, true, Gelu::erf});
    decoder_case({dtype, 1, 3, 8, 150, 66, false, true, Gelu::tanh});
    decoder_case({dtype, 2, 1, 64, 5, 3, true, true, Gelu::erf});
    decoder_case({dtype, 1, 9, 1, 2, 1, false, true, Gelu::erf});
    decoder_case({dtype, 2, 2, 16, 33, 66, true, false, Gelu::tanh});
  }
}

}  // namespace gptfast::sanitize
