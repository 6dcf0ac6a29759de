// A model with random parameters for the engine's cases.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <string>

#include "../../csrc/engine/model.h"
#include "harness.h"

namespace gptfast::sanitize {

struct ModelShape {
  DType dtype;
  int64_t L, H, D, T, V;
  bool bias, attention;
  Gelu gelu;
  Packing packing;
};

// The parameters of a model by name, each drawn when it is first requested.
class RandomParameters : public Parameters {
 public:
  explicit RandomParameters(const ModelShape& shape) : shape_(shape) {}

  Param persistent(const std::string& name, std::initializer_list<int64_t> shape) override {
    int64_t count = 1, columns = 1;
    for (const int64_t n : shape) count *= columns = n;
    // Vectors and embeddings have deviation 1; weights are scaled so that products keep the size of
    // their rows.
    const bool weight = shape.size() == 2 && name.find("wte") && name.find("wpe");
    const double deviation = weight ? 1.0 / std::sqrt(static_cast<double>(columns)) : 1.0;
    return memory_.try_emplace(name, count, DType::f32, deviation).first->second.param();
  }
  Param persistent_bias(const std::string& name, int64_t n) override {
    const bool present = shape_.bias && name != "ln_f.bias";
    return present ? persistent(name, {n}) : Param{};
  }
  Param temporary(const std::string& name, std::initializer_list<int64_t> shape) override {
    return persistent(name, shape);
  }

  // The model packed for a level, by VNNI only where the level has it.
  std::shared_ptr<const Model> at(const Kernels& kernels, const Parallel& parallel) {
    const ModelShape& s = shape_;
    const ModelConfig config = {s.T, s.V, s.L, s.H, s.H * s.D, s.attention, s.gelu};
    const bool vnni = isa_has_vnni(isa_from_name(kernels.name));
    const Packing packing = s.packing == Packing::int8_vnni && !vnni ? Packing::int8 : s.packing;
    return std::make_shared<const Model>(kernels, config, s.dtype, packing, *this, parallel);
  }

 private:
  ModelShape shape_;
  std::map<std::string, Buffer> memory_;
};

}  // namespace gptfast::sanitize
