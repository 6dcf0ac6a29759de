// A model of random parameters for the engine's cases.
#pragma once

#include <cmath>
#include <deque>

#include "../../csrc/engine/decoder.h"
#include "harness.h"

namespace gptfast::sanitize {

struct ModelShape {
  DType dtype;
  int64_t L, H, D, T, V;
  bool bias, attention;
  Gelu gelu;
  Packing packing;
};

// Parameters of a model; packed weights are made per level.
class Model {
 public:
  explicit Model(const ModelShape& s) : s_(s), C_(s.H * s.D) {
    wte_ = vector(s.V * C_);
    wpe_ = vector(s.T * C_);
    for (int64_t i = 0; i < s.L; ++i)
      layers_.push_back({vector(C_), vector(C_), matrix(3 * C_, C_), vector(3 * C_), matrix(C_, C_),
                         vector(C_), vector(C_), vector(C_), matrix(4 * C_, C_), vector(4 * C_),
                         matrix(C_, 4 * C_), vector(C_)});
    ln_f_ = vector(C_);
    head_ = matrix(s.V, C_);
  }

  Decoder at(const Kernels& kernels, const Parallel& parallel, std::deque<Guarded>& packed) const {
    const bool vnni = isa_has_vnni(isa_from_name(kernels.name));
    const Packing packing = s_.packing == Packing::int8_vnni && !vnni ? Packing::int8 : s_.packing;
    const auto rows = [&](const Buffer* w, int64_t first, int64_t N) {
      const int64_t K = C_ * 4 * C_ == w->count() && N == C_ ? 4 * C_ : C_;
      const Param from = {w->at(first * K), w->dtype()};
      packed.emplace_back(kernels.packed_weight_bytes(s_.dtype, packing, N, K), 64, 0xff);
      kernels.pack_weight(s_.dtype, packing, from, N, K, packed.back().data(), parallel);
      return Weight{Param{}, packed.back().data(), packing};
    };
    const auto weight = [&](const Buffer* w, int64_t N) { return rows(w, 0, N); };
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
        const bool last = &p == &layers_.back();
        const int64_t first_rows = last ? C_ : 3 * C_;
        layer.c_attn = weight(p[2], first_rows), layer.c_attn_bias = p[3]->param(s_.bias);
        if (last) {
          layer.kv = rows(p[2], C_, 2 * C_);
          layer.kv_bias = {s_.bias ? p[3]->at(C_) : nullptr, DType::f32};
        }
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

  ModelShape s_;
  int64_t C_;
  std::deque<Buffer> memory_;
  const Buffer *wte_, *wpe_, *ln_f_, *head_;
  std::vector<std::vector<const Buffer*>> layers_;
};

}  // namespace gptfast::sanitize
