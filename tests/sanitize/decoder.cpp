// A pass of the engine: ragged batches, cached and not, windows that slide; each logit has the bits
// that the sequence's whole window gives alone. And scores.
#include <cstring>

#include "model.h"

namespace gptfast::sanitize {
namespace {

struct Window {
  int64_t row, length;  // cache row, tokens in the next step's window
  int64_t first = 0, cached = 0;
  std::vector<int64_t> text;
};

struct Session {
  const ModelShape& s;
  const Kernels& kernels;
  const Parallel& parallel;
  const Decoder& model;
  KeyValueCache cache;
  FirstLayerTable table;

  // Logits after the windows of these sequences, of which `cached` tokens are known.
  std::vector<float> step(const std::vector<Window>& batch) {
    std::vector<int64_t> tokens, starts = {0}, row, cached;
    for (const Window& each : batch) {
      const auto from = each.text.begin() + each.first;
      tokens.insert(tokens.end(), from + each.cached, from + each.length);
      starts.push_back(static_cast<int64_t>(tokens.size()));
      row.push_back(each.row);
      cached.push_back(each.cached);
    }
    const Indices tokens_(tokens), starts_(starts), row_(row), cached_(cached);
    const int64_t sequences = static_cast<int64_t>(batch.size());
    std::vector<uint8_t> kept;  // as the generator says: a full window moves
    for (const Window& each : batch) kept.push_back(each.length < s.T);
    Buffer logits(sequences * s.V, DType::f32);
    const DecoderBatch all = {sequences,   tokens_.data(), starts_.data(),
                              row_.data(), cached_.data(), kept.data()};
    fill_table(kernels, model, all, table, parallel);
    for_parts(model, all, parallel,
              [&](const DecoderBatch& part, int64_t first, const Parallel& threads) {
                const auto use = [&](int64_t row, int64_t count, const float* from) {
                  std::memcpy(logits.floats() + (first + row) * s.V, from,
                              static_cast<size_t>(count * s.V) * sizeof(float));
                };
                decoder_forward(kernels, model, part, cache, table, use, threads);
              });
    return logits.values();
  }

  // The log-probability of each token after the first of one text.
  std::vector<float> score(const std::vector<int64_t>& text) {
    const int64_t count = static_cast<int64_t>(text.size()) - 1;
    const Indices tokens({text.begin(), text.end() - 1}), targets({text.begin() + 1, text.end()});
    const Indices starts({0, count}), row({0}), cached({0});
    const uint8_t kept = 0;
    Buffer logprobs(count, DType::f32);
    decoder_score(kernels, model,
                  {1, tokens.data(), starts.data(), row.data(), cached.data(), &kept}, cache,
                  targets.data(), logprobs.floats(), parallel);
    return logprobs.values();
  }
};

// The next token of each: a window that is full drops its first token and is computed anew.
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

std::vector<Result> run(const ModelShape& s, const Model& parameters, std::vector<Window> batch,
                        int64_t steps, const Kernels& kernels, const Parallel& parallel) {
  std::deque<Guarded> packed;
  const Decoder model = parameters.at(kernels, parallel, packed);
  const int64_t rows = static_cast<int64_t>(batch.size()) + 1, spare_row = 1;
  const Guarded cache(static_cast<size_t>(rows * cache_row_bytes(kernels, model, s.T)), 64, 0);
  const Buffer qkv(s.T * s.V * 3 * s.H * s.D, s.dtype);
  std::vector<uint8_t> known(static_cast<size_t>(s.T * s.V));
  Session session = {s, kernels, parallel, model, {cache.data(), rows, s.T}, {}};
  std::vector<float> all;
  for (int64_t i = 0; i < steps; ++i) {
    const bool tabulated = s.attention && s.L > 1;
    session.table = tabulated ? FirstLayerTable{qkv.data(), known.data()} : FirstLayerTable{};
    const std::vector<float> logits = session.step(batch);
    session.table = {};
    for (size_t n = 0; n < batch.size(); ++n) {
      Window alone = batch[n];
      alone.row = spare_row, alone.cached = 0;
      const std::vector<float> recomputed = session.step({alone});
      const bool same = std::memcmp(recomputed.data(), logits.data() + n * recomputed.size(),
                                    recomputed.size() * sizeof(float)) == 0;
      expect(same, format("logits of sequence %zu at step %lld differ when computed alone", n,
                          static_cast<long long>(i)));
      if (alone.length < 2) continue;
      Window part = alone;
      part.length = alone.length / 2;
      session.step({part});
      alone.cached = part.length;
      expect(session.step({alone}) == recomputed,
             format("logits of sequence %zu differ when its window is passed in parts", n));
    }
    all.insert(all.end(), logits.begin(), logits.end());
    advance(s, batch);
  }
  // The activations are multiplied as fp32 or bf16, in VNNI as 15 bits.
  const double deviation = s.packing == Packing::dense  ? 1.0
                           : s.packing == Packing::int8 ? 4.0
                                                        : 32.0;
  std::vector<int64_t> text = batch[0].text;
  text.resize(static_cast<size_t>(s.T));
  return {{"logits", all, deviation}, {"scores", session.score(text), deviation}};
}

void decoder_case(const ModelShape& s) {
  constexpr int64_t steps = 3;
  const Model model(s);
  std::vector<Window> batch = {{3, s.T / 2 + 1}, {0, 1}, {2, s.T}, {4, s.T - 1}};
  for (Window& each : batch)
    for (int64_t i = 0; i < s.T + steps; ++i) each.text.push_back(random_below(s.V));
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name =
      format("decoder %s L%lld H%lld D%lld T%lld V%lld%s%s %s%s", sanitize::name(s.dtype), i(s.L),
             i(s.H), i(s.D), i(s.T), i(s.V), s.bias ? " bias" : "",
             s.attention ? "" : " without attention", s.gelu == Gelu::erf ? "erf" : "tanh",
             s.packing == Packing::dense  ? ""
             : s.packing == Packing::int8 ? " int8"
                                          : " int8 by VNNI");
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, model, batch, steps, kernels, parallel);
  });
}

}  // namespace

void decoder_cases() {
  for (const DType dtype : dtypes)
    for (const Packing packing : {Packing::dense, Packing::int8, Packing::int8_vnni}) {
      decoder_case({dtype, 2, 2, 17, 20, 11, true, true, Gelu::erf, packing});
      decoder_case({dtype, 2, 3, 8, 150, 66, false, true, Gelu::tanh, packing});
      decoder_case({dtype, 2, 1, 64, 5, 3, true, true, Gelu::erf, packing});
      decoder_case({dtype, 1, 9, 1, 2, 1, false, true, Gelu::erf, packing});
      decoder_case({dtype, 2, 2, 16, 33, 66, true, false, Gelu::tanh, packing});
    }
}

}  // namespace gptfast::sanitize
