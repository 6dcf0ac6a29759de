// Incremental decoding of a whole GPT (csrc/engine), and the packing of its weights.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../engine/decoder.h"
#include "common.h"

namespace gptfast {
namespace {

// A packed weight starts with the name of the instruction set whose layout it has.
constexpr int64_t level_bytes = 64;

Tensor pack_weight(Tensor weight, ScalarType dtype) {
  const Arguments args("pack_weight", "weight", weight);
  args.require(weight.dim() == 2, "weight must be (N, K)");
  args.require(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
      std::string("dtype must be float32 or bfloat16, got ") + torch::headeronly::toString(dtype));
  const DType compute = dtype == ScalarType::Float ? DType::f32 : DType::bf16;
  const int64_t N = weight.size(0), K = weight.size(1);
  const Param param = args.param("weight", weight, {N, K});
  const Kernels& table = kernels();
  Tensor packed =
      new_tensor({level_bytes + table.packed_weight_bytes(compute, N, K)}, ScalarType::Byte);
  char* data = static_cast<char*>(packed.data_ptr());
  std::strncpy(data, table.name, level_bytes);
  table.pack_weight(compute, param, N, K, data + level_bytes, torch_threads());
  return packed;
}

// Takes the parameters one after the other; an empty tensor stands for an absent one.
class Parameters {
 public:
  Parameters(const Arguments& args, const std::vector<Tensor>& params,
             const std::vector<Tensor>& packed)
      : args_(args), params_(params), packed_(packed) {}

  Param next(std::initializer_list<int64_t> shape) {
    args_.require(param_ < params_.size(), "params has too few tensors");
    return args_.param("params", params_[param_++], shape);
  }
  Param next_bias(int64_t n) {
    if (param_ < params_.size() && params_[param_].numel() == 0) {
      ++param_;
      return Param{};
    }
    return next({n});
  }
  Norm next_norm(int64_t C) {
    Norm norm = {};
    norm.weight = next({C});
    norm.bias = next_bias(C);
    return norm;
  }
  Weight next_weight(int64_t N, int64_t K) {
    args_.require(weight_ < packed_.size(), "packed has too few tensors");
    const Tensor& x = packed_[weight_++];
    const Kernels& table = kernels();
    args_.shape("packed", x, {level_bytes + table.packed_weight_bytes(args_.dtype(), N, K)});
    args_.require(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Byte,
                  "packed must be what pack_weight returned");
    const char* data = static_cast<const char*>(x.const_data_ptr());
    args_.require(std::strncmp(data, table.name, level_bytes) == 0,
                  "packed must be made at the instruction set in use, " + std::string(table.name) +
                      ", got " + std::string(data));
    return {Param{}, data + level_bytes};
  }
  bool all_taken() const { return param_ == params_.size() && weight_ == packed_.size(); }

 private:
  const Arguments& args_;
  const std::vector<Tensor>& params_;
  const std::vector<Tensor>& packed_;
  size_t param_ = 0, weight_ = 0;
};

Decoder decoder(const Arguments& args, const std::vector<Tensor>& params,
                const std::vector<Tensor>& packed, const Tensor& cache, int64_t vocab_size,
                bool attention, const std::string& gelu) {
  const int64_t L = cache.size(0), H = cache.size(3), T = cache.size(4), C = H * cache.size(5),
                F = 4 * C;
  Parameters take(args, params, packed);
  Decoder model = {};
  model.dtype = args.dtype();
  model.block_size = T, model.vocab_size = vocab_size, model.n_head = H, model.n_embd = C;
  model.attention = attention;
  model.gelu = gelu_of(gelu);
  model.wte = take.next({vocab_size, C});
  model.wpe = take.next({T, C});
  for (int64_t i = 0; i < L; ++i) {
    DecoderLayer layer = {};
    if (attention) {
      layer.ln_1 = take.next_norm(C);
      layer.c_attn = take.next_weight(3 * C, C);
      layer.c_attn_bias = take.next_bias(3 * C);
      layer.c_proj = take.next_weight(C, C);
      layer.c_proj_bias = take.next_bias(C);
    }
    layer.ln_2 = take.next_norm(C);
    layer.c_fc = take.next_weight(F, C);
    layer.c_fc_bias = take.next_bias(F);
    layer.mlp_c_proj = take.next_weight(C, F);
    layer.mlp_c_proj_bias = take.next_bias(C);
    model.layers.push_back(layer);
  }
  model.ln_f = take.next_norm(C);
  model.lm_head = take.next_weight(vocab_size, C);
  args.require(take.all_taken(),
               "params and packed must be those of a model with " + std::to_string(L) + " layers");
  return model;
}

Tensor decoder_forward_op(Tensor tokens, Tensor starts, Tensor row, Tensor cached,
                          std::vector<Tensor> params, std::vector<Tensor> packed, Tensor cache,
                          int64_t vocab_size, bool attention, std::string gelu) {
  const Arguments args("decoder_forward", "cache", cache);
  args.require(cache.dim() == 6 && cache.size(1) == 2 && cache.is_contiguous() && cache.numel() > 0,
               "cache must be a contiguous (L, 2, rows, H, block_size, D) tensor");
  const int64_t sequences = row.numel(), rows = cache.size(2), block_size = cache.size(4);
  const Tensor tokens_ = args.indices("tokens", tokens, {tokens.numel()}, vocab_size);
  const Tensor starts_ = args.indices("starts", starts, {sequences + 1}, tokens.numel() + 1);
  const Tensor row_ = args.indices("row", row, {sequences}, rows);
  const Tensor cached_ = args.indices("cached", cached, {sequences}, block_size);
  const auto data = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
  const DecoderBatch batch = {sequences, data(tokens_), data(starts_), data(row_), data(cached_)};
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t count = batch.starts[i + 1] - batch.starts[i];
    args.require(batch.starts[0] == 0 && count > 0 && batch.cached[i] + count <= block_size,
                 "starts must give every sequence at least one token and at most block_size = " +
                     std::to_string(block_size) + " with the cached ones, got " +
                     std::to_string(count) + " and " + std::to_string(batch.cached[i]) + " cached");
  }
  std::vector<int64_t> used(batch.row, batch.row + sequences);
  std::sort(used.begin(), used.end());
  args.require(std::adjacent_find(used.begin(), used.end()) == used.end(),
               "row must not name a cache row twice");
  const Decoder model = decoder(args, params, packed, cache, vocab_size, attention, gelu);
  Tensor logits = new_tensor({sequences, vocab_size}, ScalarType::Float);
  decoder_forward(kernels(), model, batch, {cache.data_ptr(), rows},
                  static_cast<float*>(logits.data_ptr()), torch_threads());
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("decoder_forward", TORCH_BOX(&decoder_forward_op));
}

}  // namespace gptfast
