// Forward passes of the engine: ragged batches, with and without cached tokens, and windows that
// slide. Each logit must have the same bits as when the sequence's whole window is computed alone.
// Also scores.
#include <cstring>

#include "../../csrc/engine/forward.h"
#include "model.h"

namespace gptfast::sanitize {
namespace {

struct Window {
  int64_t slot, length;  // slot of the cache; tokens in the next step's window
  int64_t first = 0, cached = 0;
  std::vector<int64_t> text;
};

struct Passes {
  const Model& model;
  const Parallel& parallel;
  Cache cache;

  // Logits after the windows of these sequences, whose first `cached` tokens are in the cache.
  std::vector<float> step(const std::vector<Window>& batch, FirstLayerTable* table) {
    const int64_t V = model.config().vocab_size;
    std::vector<int64_t> tokens, starts = {0}, slot, cached;
    std::vector<uint8_t> kept;  // as the session decides: not if the window is full
    for (const Window& each : batch) {
      const auto from = each.text.begin() + each.first;
      tokens.insert(tokens.end(), from + each.cached, from + each.length);
      starts.push_back(static_cast<int64_t>(tokens.size()));
      slot.push_back(each.slot);
      cached.push_back(each.cached);
      kept.push_back(each.length < model.config().block_size);
    }
    const Indices tokens_(tokens), starts_(starts), slot_(slot), cached_(cached);
    const int64_t sequences = static_cast<int64_t>(batch.size());
    Buffer logits(sequences * V, DType::f32);
    const auto use = [&](int64_t first, int64_t count, const float* from, const Parallel&) {
      std::memcpy(logits.floats() + first * V, from,
                  static_cast<size_t>(count * V) * sizeof(float));
    };
    forward(model,
            {sequences, tokens_.data(), starts_.data(), slot_.data(), cached_.data(), kept.data()},
            cache, table, use, parallel);
    return logits.values();
  }

  // The log-probability of each token after the first of one text.
  std::vector<float> score(const std::vector<int64_t>& text) {
    const int64_t count = static_cast<int64_t>(text.size()) - 1;
    const Indices tokens({text.begin(), text.end() - 1}), targets({text.begin() + 1, text.end()});
    const Indices starts({0, count}), slot({0}), cached({0});
    const uint8_t kept = 0;
    Buffer logprobs(count, DType::f32);
    gptfast::score(model, {1, tokens.data(), starts.data(), slot.data(), cached.data(), &kept},
                   cache, targets.data(), logprobs.floats(), parallel);
    return logprobs.values();
  }
};

// Prepares the step of the next token: a full window drops its first token and is recomputed.
void advance(const ModelShape& s, std::vector<Window>& batch) {
  for (Window& each : batch) {
    each.cached = each.length;
    if (each.length < s.T) {
      ++each.length;
    } else {
      ++each.first;
      each.cached = 0;
    }
  }
}

std::vector<Result> run(const ModelShape& s, RandomParameters& parameters,
                        std::vector<Window> batch, int64_t steps, const Kernels& kernels,
                        const Parallel& parallel) {
  const auto model = parameters.at(kernels, parallel);
  const int64_t slots = static_cast<int64_t>(batch.size()) + 1, spare_slot = 1;
  FirstLayerTable table(*model);
  Passes passes = {*model, parallel, Cache(*model, slots, s.T)};
  std::vector<float> all;
  for (int64_t i = 0; i < steps; ++i) {
    const bool tabulated = s.attention && s.L > 1;
    const std::vector<float> logits = passes.step(batch, tabulated ? &table : nullptr);
    for (size_t n = 0; n < batch.size(); ++n) {
      Window alone = batch[n];
      alone.slot = spare_slot, alone.cached = 0;
      const std::vector<float> recomputed = passes.step({alone}, nullptr);
      const bool same = std::memcmp(recomputed.data(), logits.data() + n * recomputed.size(),
                                    recomputed.size() * sizeof(float)) == 0;
      expect(same, format("logits of sequence %zu at step %lld differ when computed alone", n,
                          static_cast<long long>(i)));
      if (alone.length < 2) continue;
      Window part = alone;
      part.length = alone.length / 2;
      passes.step({part}, nullptr);
      alone.cached = part.length;
      expect(passes.step({alone}, nullptr) == recomputed,
             format("logits of sequence %zu differ when its window is passed in parts", n));
    }
    all.insert(all.end(), logits.begin(), logits.end());
    advance(s, batch);
  }
  // Activations are multiplied as fp32 or bf16, and by VNNI as 15 bits.
  const double deviation = s.packing == Packing::dense  ? 1.0
                           : s.packing == Packing::int8 ? 4.0
                                                        : 32.0;
  std::vector<int64_t> text = batch[0].text;
  text.resize(static_cast<size_t>(s.T));
  return {{"logits", all, deviation}, {"scores", passes.score(text), deviation}};
}

void forward_case(const ModelShape& s) {
  constexpr int64_t steps = 3;
  RandomParameters parameters(s);
  std::vector<Window> batch = {{3, s.T / 2 + 1}, {0, 1}, {2, s.T}, {4, s.T - 1}};
  for (Window& each : batch)
    for (int64_t i = 0; i < s.T + steps; ++i) each.text.push_back(random_below(s.V));
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name =
      format("forward %s L%lld H%lld D%lld T%lld V%lld%s%s %s%s", sanitize::name(s.dtype), i(s.L),
             i(s.H), i(s.D), i(s.T), i(s.V), s.bias ? " bias" : "",
             s.attention ? "" : " without attention", s.gelu == Gelu::erf ? "erf" : "tanh",
             s.packing == Packing::dense  ? ""
             : s.packing == Packing::int8 ? " int8"
                                          : " int8 by VNNI");
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, parameters, batch, steps, kernels, parallel);
  });
}

}  // namespace

void forward_cases() {
  for (const DType dtype : dtypes)
    for (const Packing packing : {Packing::dense, Packing::int8, Packing::int8_vnni}) {
      forward_case({dtype, 2, 2, 17, 20, 11, true, true, Gelu::erf, packing});
      forward_case({dtype, 2, 3, 8, 150, 66, false, true, Gelu::tanh, packing});
      forward_case({dtype, 2, 1, 64, 5, 3, true, true, Gelu::erf, packing});
      forward_case({dtype, 1, 9, 1, 2, 1, false, true, Gelu::erf, packing});
      forward_case({dtype, 2, 2, 16, 33, 66, true, false, Gelu::tanh, packing});
    }
}

}  // namespace gptfast::sanitize
