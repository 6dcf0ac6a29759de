#include "model.h"

#include <new>
#include <stdexcept>

namespace gptfast {
namespace {

constexpr std::align_val_t alignment{64};

Norm norm_of(Parameters& from, const std::string& name, int64_t C) {
  Norm norm = {};
  norm.weight = from.persistent(name + ".weight", {C});
  norm.bias = from.persistent_bias(name + ".bias", C);
  return norm;
}

// The parameter, which is float32, from element `first` on; a null one stays null.
Param from_element(const Param& bias, int64_t first) {
  if (bias.data == nullptr) return bias;
  return {static_cast<const float*>(bias.data) + first, bias.dtype};
}

}  // namespace

void Model::FreeAligned::operator()(char* data) const { ::operator delete(data, alignment); }

Model::Model(const Kernels& kernels, const ModelConfig& config, DType dtype, Packing packing,
             Parameters& from, const Parallel& parallel)
    : kernels_(kernels), config_(config), dtype_(dtype), packing_(packing) {
  const ModelConfig& c = config;
  if (c.block_size < 1 || c.vocab_size < 1 || c.n_layer < 1 || c.n_head < 1 || c.n_embd < 1 ||
      c.n_embd % c.n_head != 0)
    throw std::invalid_argument(
        "pack: the config must have sizes above 0, and n_embd divisible by n_head");
  wte_ = from.persistent("wte.weight", {c.vocab_size, c.n_embd});
  wpe_ = from.persistent("wpe.weight", {c.block_size, c.n_embd});
  for (int64_t i = 0; i < c.n_layer; ++i) layers_.push_back(pack_layer(i, from, parallel));
  layers_bytes_ = packed_bytes_;
  ln_f_ = norm_of(from, "ln_f", c.n_embd);
  lm_head_ = pack(from.temporary("lm_head.weight", {c.vocab_size, c.n_embd}), 0, c.vocab_size,
                  c.n_embd, parallel);
}

Weight Model::pack(const Param& from, int64_t first, int64_t N, int64_t K,
                   const Parallel& parallel) {
  const int64_t bytes = kernels_.packed_weight_bytes(dtype_, packing_, N, K);
  packed_.emplace_back(static_cast<char*>(::operator new(static_cast<size_t>(bytes), alignment)));
  packed_bytes_ += bytes;
  char* packed = packed_.back().get();
  kernels_.pack_weight(dtype_, packing_, from_element(from, first * K), N, K, packed, parallel);
  return {Param{}, packed, packing_};
}

Model::Layer Model::pack_layer(int64_t index, Parameters& from, const Parallel& parallel) {
  const int64_t C = config_.n_embd, F = 4 * C;
  const std::string h = "h." + std::to_string(index) + ".";
  const auto whole = [&](const std::string& name, int64_t N, int64_t K) {
    return pack(from.temporary(h + name, {N, K}), 0, N, K, parallel);
  };
  Layer layer = {};
  if (config_.attention) {
    layer.ln_1 = norm_of(from, h + "ln_1", C);
    const Param bias = from.persistent_bias(h + "attn.c_attn.bias", 3 * C);
    const Param weight = from.temporary(h + "attn.c_attn.weight", {3 * C, C});
    const bool last = index + 1 == config_.n_layer;
    layer.c_attn = pack(weight, 0, last ? C : 3 * C, C, parallel);
    layer.c_attn_bias = bias;
    if (last) {
      layer.kv = pack(weight, C, 2 * C, C, parallel);
      layer.kv_bias = from_element(bias, C);
    }
    layer.c_proj = whole("attn.c_proj.weight", C, C);
    layer.c_proj_bias = from.persistent_bias(h + "attn.c_proj.bias", C);
  }
  layer.ln_2 = norm_of(from, h + "ln_2", C);
  layer.c_fc = whole("mlp.c_fc.weight", F, C);
  layer.c_fc_bias = from.persistent_bias(h + "mlp.c_fc.bias", F);
  layer.mlp_c_proj = whole("mlp.c_proj.weight", C, F);
  layer.mlp_c_proj_bias = from.persistent_bias(h + "mlp.c_proj.bias", C);
  return layer;
}

void Model::check_tokens(const char* op, const std::vector<int64_t>& tokens) const {
  for (const int64_t token : tokens)
    if (token < 0 || token >= config_.vocab_size)
      throw std::invalid_argument(std::string(op) + ": tokens must be in [0, " +
                                  std::to_string(config_.vocab_size) + "), got " +
                                  std::to_string(token));
}

}  // namespace gptfast
