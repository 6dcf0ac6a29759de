// A GPT's weights, packed for the kernels of one instruction set and checked once. Does not use
// torch.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "../kernels/threads/parallel.h"

namespace gptfast {

struct ModelConfig {
  int64_t block_size, vocab_size, n_layer, n_head, n_embd;
  bool attention;
  Gelu gelu;

  int64_t head_dim() const { return n_embd / n_head; }
};

// The source of a model's parameters, in float32, by their names in GPT's state dict.
class Parameters {
 public:
  virtual ~Parameters() = default;
  // Returns memory that stays valid for as long as the model lives.
  virtual Param persistent(const std::string& name, std::initializer_list<int64_t> shape) = 0;
  // As `persistent`; the data is null if the model has no parameter of this name.
  virtual Param persistent_bias(const std::string& name, int64_t n) = 0;
  // Returns memory that stays valid until the next parameter is asked for.
  virtual Param temporary(const std::string& name, std::initializer_list<int64_t> shape) = 0;
};

class Model {
 public:
  struct Layer {
    Norm ln_1;
    Weight c_attn;  // in the last layer: the rows of q alone
    Param c_attn_bias;
    Weight kv;  // in the last layer alone: the rows of k and v
    Param kv_bias;
    Weight c_proj;
    Param c_proj_bias;
    Norm ln_2;
    Weight c_fc;
    Param c_fc_bias;
    Weight mlp_c_proj;
    Param mlp_c_proj_bias;
  };

  // Packs the weights for activations of `dtype`. Throws std::invalid_argument for an invalid
  // config; exceptions of `from` pass through.
  Model(const Kernels& kernels, const ModelConfig& config, DType dtype, Packing packing,
        Parameters& from, const Parallel& parallel);

  const Kernels& kernels() const { return kernels_; }
  const ModelConfig& config() const { return config_; }
  DType dtype() const { return dtype_; }
  int64_t element_bytes() const { return dtype_ == DType::f32 ? sizeof(float) : sizeof(uint16_t); }
  int64_t packed_bytes() const { return packed_bytes_; }
  // Bytes of the packed weights of all layers, 12 C^2 elements in each.
  int64_t layers_bytes() const { return layers_bytes_; }

  const Param& wte() const { return wte_; }
  const Param& wpe() const { return wpe_; }
  const std::vector<Layer>& layers() const { return layers_; }
  const Norm& ln_f() const { return ln_f_; }
  const Weight& lm_head() const { return lm_head_; }

  // Throws std::invalid_argument unless all tokens are in the vocabulary.
  void check_tokens(const char* op, const std::vector<int64_t>& tokens) const;

 private:
  struct FreeAligned {
    void operator()(char* data) const;
  };

  // Packs rows [first, first + N) of a weight with K columns.
  Weight pack(const Param& from, int64_t first, int64_t N, int64_t K, const Parallel& parallel);
  Layer pack_layer(int64_t index, Parameters& from, const Parallel& parallel);

  const Kernels& kernels_;
  const ModelConfig config_;
  const DType dtype_;
  const Packing packing_;
  std::vector<std::unique_ptr<char, FreeAligned>> packed_;
  int64_t packed_bytes_ = 0, layers_bytes_ = 0;
  Param wte_, wpe_;
  std::vector<Layer> layers_;
  Norm ln_f_;
  Weight lm_head_;
};

}  // namespace gptfast
