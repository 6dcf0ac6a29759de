// The engine's operators: packed weights, generation, scores (csrc/engine).
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <vector>

#include "../engine/generator.h"
#include "common.h"

namespace gptfast {
namespace {

// A packed weight starts with what it was packed for.
constexpr int64_t label_bytes = 64;

struct Label {
  char text[label_bytes] = {};

  Label(DType dtype, Packing packing) {
    std::snprintf(text, sizeof text, "%s, %s for %s", kernels().name,
                  packing == Packing::dense ? "dense" : "int8",
                  dtype == DType::f32 ? "fp32" : "bf16");
  }
};

Packing packing_of(bool int8) {
  if (!int8) return Packing::dense;
  return isa_has_vnni(isa_current()) ? Packing::int8_vnni : Packing::int8;
}

Tensor pack_weight(Tensor weight, ScalarType dtype, bool int8) {
  const Arguments args("pack_weight", "weight", weight);
  args.require(weight.dim() == 2, "weight must be (N, K)");
  args.require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "dtype must be float32 or bfloat16, got ", dtype);
  const DType compute = dtype == ScalarType::Float ? DType::f32 : DType::bf16;
  const Packing packing = packing_of(int8);
  const int64_t N = weight.size(0), K = weight.size(1);
  const Param param = args.param("weight", weight, {N, K});
  const Kernels& table = kernels();
  Tensor packed = new_tensor({label_bytes + table.packed_weight_bytes(compute, packing, N, K)},
                             ScalarType::Byte);
  char* data = static_cast<char*>(packed.data_ptr());
  std::memcpy(data, Label(compute, packing).text, label_bytes);
  with_threads([&](const Parallel& parallel) {
    table.pack_weight(compute, packing, param, N, K, data + label_bytes, parallel);
  });
  return packed;
}

// Takes the parameters one after the other; an empty tensor stands for an absent one.
class Parameters {
 public:
  Parameters(const Arguments& args, const std::vector<Tensor>& params,
             const std::vector<Tensor>& packed, Packing packing)
      : args_(args), params_(params), packed_(packed), packing_(packing) {}

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
    const Label label(args_.dtype(), packing_);
    args_.shape("packed", x,
                {label_bytes + kernels().packed_weight_bytes(args_.dtype(), packing_, N, K)});
    args_.require(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Byte,
                  "packed must be what pack_weight returned");
    const char* data = static_cast<const char*>(x.const_data_ptr());
    args_.require(std::strncmp(data, label.text, label_bytes) == 0, "packed must be made for \"",
                  label.text, "\", got \"", std::string(data, strnlen(data, label_bytes)), "\"");
    return {Param{}, data + label_bytes, packing_};
  }
  bool all_taken() const { return param_ == params_.size() && weight_ == packed_.size(); }

 private:
  const Arguments& args_;
  const std::vector<Tensor>& params_;
  const std::vector<Tensor>& packed_;
  Packing packing_;
  size_t param_ = 0, weight_ = 0;
};

// A model as Python hands it over: gptfast/ops/engine.py says what the lists hold.
struct Model {
  std::vector<Tensor> params, packed;
  int64_t n_layer, n_head;
  bool attention, int8;
  std::string gelu;
};

Decoder decoder(const Arguments& args, const Model& from) {
  args.require(from.params.size() >= 2 && from.params[0].dim() == 2 && from.params[1].dim() == 2,
               "params must start with wte (V, C) and wpe (T, C)");
  const int64_t V = from.params[0].size(0), C = from.params[0].size(1), H = from.n_head;
  const int64_t T = from.params[1].size(0), F = 4 * C, L = from.n_layer;
  args.require(H > 0 && C % H == 0 && C > 0 && V > 0 && T > 0 && L > 0,
               "params must be those of a model with C divisible by n_head");
  Parameters take(args, from.params, from.packed, packing_of(from.int8));
  Decoder model = {};
  model.dtype = args.dtype();
  model.block_size = T, model.vocab_size = V, model.n_head = H, model.n_embd = C;
  model.attention = from.attention;
  model.gelu = gelu_of(from.gelu);
  model.wte = take.next({V, C});
  model.wpe = take.next({T, C});
  for (int64_t i = 0; i < L; ++i) {
    DecoderLayer layer = {};
    if (from.attention) {
      const bool last = i + 1 == L;
      layer.ln_1 = take.next_norm(C);
      layer.c_attn = take.next_weight(last ? C : 3 * C, C);
      layer.c_attn_bias = take.next_bias(last ? C : 3 * C);
      if (last) {
        layer.kv = take.next_weight(2 * C, C);
        layer.kv_bias = take.next_bias(2 * C);
      }
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
  model.lm_head = take.next_weight(V, C);
  args.require(take.all_taken(), "params and packed must be those of a model with ", L, " layers");
  return model;
}

KeyValueCache cache_of(const Arguments& args, const Decoder& model, const Tensor& cache,
                       int64_t capacity) {
  args.require(capacity > 0 && capacity <= model.block_size, "capacity must be in [1, ",
               model.block_size, "], got ", capacity);
  const int64_t columns =
      cache_row_bytes(kernels(), model, capacity) / static_cast<int64_t>(cache.element_size());
  args.require(cache.dim() == 2 && cache.is_contiguous() && cache.is_cpu(),
               "cache must be a contiguous (rows, elements) tensor on the CPU");
  args.shape("cache", cache, {cache.size(0), columns});
  return {cache.data_ptr(), cache.size(0), capacity};
}

// Element type and size of a tensor that C++ reads or writes in place.
template <class T>
T* in_place(const Arguments& args, const char* name, const Tensor& x, ScalarType type,
            int64_t count) {
  args.require(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type && x.numel() == count,
               name, " must be a contiguous ", type, " tensor of ", count,
               " elements on the CPU, got ", x.numel(), " of ", x.scalar_type());
  return static_cast<T*>(x.data_ptr());
}

Texts texts_of(const Arguments& args, const char* name, const Tensor& data, const Tensor& starts) {
  const auto* at = in_place<int64_t>(args, name, starts, ScalarType::Long, starts.numel());
  const auto* bytes = in_place<uint8_t>(args, name, data, ScalarType::Byte, data.numel());
  const int64_t count = starts.numel() - 1;
  args.require(
      count >= 0 && at[0] == 0 && at[count] == data.numel() && std::is_sorted(at, at + count + 1),
      name, " must have starts that rise from 0 to their data's size");
  return {bytes, at, count};
}

constexpr char places_of_its_own[] = "0 < prompt <= length <= limit tokens, in places of its own";

// No two sequences share a place.
void check_places(const Arguments& args, const Sequences& s) {
  std::vector<const Sequence*> by_place(static_cast<size_t>(s.count));
  for (int64_t i = 0; i < s.count; ++i) by_place[static_cast<size_t>(i)] = s.all + i;
  const auto before = [](const Sequence* a, const Sequence* b) { return a->begin < b->begin; };
  if (!std::is_sorted(by_place.begin(), by_place.end(), before))
    std::sort(by_place.begin(), by_place.end(), before);
  for (size_t n = 1; n < by_place.size(); ++n)
    args.require(by_place[n]->begin - by_place[n - 1]->begin >= by_place[n - 1]->limit, "sequence ",
                 by_place[n] - s.all, " must have ", places_of_its_own);
}

// Every sequence has its own places; one that is unfinished has room for a token, which its cache
// row has as well.
void check_sequences(const Arguments& args, const Sequences& s, int64_t places,
                     const Decoder& model, const KeyValueCache& cache) {
  std::vector<bool> taken(static_cast<size_t>(cache.rows));
  for (int64_t i = 0; i < s.count; ++i) {
    const Sequence& each = s.all[i];
    const auto require = [&](bool condition, const char* sentence) {
      args.require(condition, "sequence ", i, " must ", sentence);
    };
    args.require(each.begin >= 0 && each.prompt > 0 && each.prompt <= each.length &&
                     each.length <= each.limit && each.limit <= places - each.begin &&
                     each.beyond >= 0,
                 "sequence ", i, " must have ", places_of_its_own);
    const State state = static_cast<State>(each.state);
    if (state != State::waiting && state != State::running) continue;
    require(each.length < each.limit && cache.rows > 0, "have room for a token");
    const int64_t longest = each.limit - 1 + std::min(each.beyond, model.block_size);
    require(!model.attention || std::min(model.block_size, longest) <= cache.capacity,
            "fit into the cache's capacity");
    const int64_t *first = s.tokens + each.begin, *last = first + each.length;
    const auto* unknown =
        std::find_if(first, last, [&](int64_t t) { return t < 0 || t >= model.vocab_size; });
    if (unknown != last)
      args.require(false, "sequence ", i, " must have tokens in [0, ", model.vocab_size, "), got ",
                   *unknown);
    if (state == State::waiting) continue;
    require(each.row >= 0 && each.row < cache.rows && !taken[static_cast<size_t>(each.row)] &&
                each.cached >= 0 && each.offset >= 0 && each.offset + each.cached < each.length,
            "have a row of the cache of its own and a token that is new");
    taken[static_cast<size_t>(each.row)] = true;
  }
  check_places(args, s);
}

Sequences sequences_of(const Arguments& args, const std::vector<Tensor>& state,
                       const Decoder& model, const KeyValueCache& cache) {
  args.require(state.size() == 5,
               "state must be sequences, tokens, logprobs, alternative, alternative_logprob");
  Sequences s = {};
  s.count = state[0].numel() / sequence_fields;
  s.all = reinterpret_cast<Sequence*>(
      in_place<int64_t>(args, "sequences", state[0], ScalarType::Long, s.count * sequence_fields));
  const int64_t places = state[1].numel();
  s.tokens = in_place<int64_t>(args, "tokens", state[1], ScalarType::Long, places);
  s.logprobs = in_place<float>(args, "logprobs", state[2], ScalarType::Float, places);
  s.alternatives = places > 0 ? state[3].numel() / places : 0;
  s.alternative =
      in_place<int64_t>(args, "alternative", state[3], ScalarType::Long, places * s.alternatives);
  s.alternative_logprob = in_place<float>(args, "alternative_logprob", state[4], ScalarType::Float,
                                          places * s.alternatives);
  args.require(s.alternatives <= model.vocab_size, "alternative has more columns than tokens");
  check_sequences(args, s, places, model, cache);
  return s;
}

std::tuple<int64_t, int64_t> generate(std::vector<Tensor> state, Tensor cache,
                                      std::vector<Tensor> table, std::vector<Tensor> params,
                                      std::vector<Tensor> packed, std::vector<Tensor> stops,
                                      int64_t n_layer, int64_t n_head, bool attention,
                                      std::string gelu, bool int8, int64_t capacity,
                                      double temperature, int64_t top_k, double top_p, double min_p,
                                      double repetition_penalty, int64_t stride, double seconds) {
  const Arguments args("generate", "cache", cache);
  const Decoder model =
      decoder(args, {std::move(params), std::move(packed), n_layer, n_head, attention, int8, gelu});
  const KeyValueCache rows = cache_of(args, model, cache, capacity);
  const Sequences sequences = sequences_of(args, state, model, rows);
  FirstLayerTable first_layer = {};
  args.require(table.empty() || table.size() == 2, "table must be [] or [qkv, known]");
  if (!table.empty()) {
    const int64_t entries = model.block_size * model.vocab_size;
    args.require(n_layer > 1 && attention, "table is for a model with attention in two layers");
    first_layer.qkv = in_place<char>(args, "table", table[0], scalar_type(args.dtype()),
                                     entries * 3 * model.n_embd);
    first_layer.known = in_place<uint8_t>(args, "known", table[1], ScalarType::Byte, entries);
  }
  args.require(stops.size() == 5,
               "stops must be tokens, and strings and pieces as bytes with their starts");
  GeneratorOptions options = {};
  options.sampling = {static_cast<float>(temperature), top_k, static_cast<float>(top_p),
                      static_cast<float>(min_p), static_cast<float>(repetition_penalty)};
  args.require(temperature >= 0 && top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 &&
                   min_p <= 1 && repetition_penalty > 0 && stride >= 0 &&
                   stride <= model.block_size,
               "an option is out of its range");
  options.stride = stride;
  options.stops.tokens =
      in_place<int64_t>(args, "stops", stops[0], ScalarType::Long, stops[0].numel());
  options.stops.token_count = stops[0].numel();
  options.stops.strings = texts_of(args, "stops", stops[1], stops[2]);
  options.stops.pieces = texts_of(args, "pieces", stops[3], stops[4]);
  args.require(options.stops.strings.count == 0 || options.stops.pieces.count == model.vocab_size,
               "pieces must be one per token where there are stop strings");
  options.seconds = seconds;
  Outcome outcome = {};
  with_threads([&](const Parallel& parallel) {
    outcome = generator_run(kernels(), model, rows, first_layer, sequences, options, parallel);
  });
  return {outcome.unfinished, outcome.invalid};
}

Tensor score(Tensor tokens, Tensor targets, Tensor starts, Tensor cache, std::vector<Tensor> params,
             std::vector<Tensor> packed, int64_t n_layer, int64_t n_head, bool attention,
             std::string gelu, bool int8, int64_t capacity) {
  const Arguments args("score", "cache", cache);
  const Decoder model =
      decoder(args, {std::move(params), std::move(packed), n_layer, n_head, attention, int8, gelu});
  const KeyValueCache rows = cache_of(args, model, cache, capacity);
  const int64_t M = tokens.numel(), count = starts.numel() - 1;
  const auto data = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
  const Tensor tokens_ = args.indices("tokens", tokens, {M}, model.vocab_size);
  const Tensor targets_ = args.indices("targets", targets, {M}, model.vocab_size);
  const Tensor starts_ = args.indices("starts", starts, {count + 1}, M + 1);
  args.require(
      count >= 0 && count <= rows.rows && data(starts_)[0] == 0 && data(starts_)[count] == M,
      "starts must rise from 0 to the number of tokens, one step per row of the cache");
  const int64_t most = model.attention ? capacity : model.block_size;
  std::vector<int64_t> row(static_cast<size_t>(count)), cached(static_cast<size_t>(count));
  const std::vector<uint8_t> kept(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = data(starts_)[i + 1] - data(starts_)[i];
    args.require(length > 0 && length <= most, "starts must give each window 1 to ", most,
                 " tokens, got ", length);
    row[static_cast<size_t>(i)] = i;
  }
  Tensor logprobs = new_tensor({M}, ScalarType::Float);
  const DecoderBatch batch = {count,      data(tokens_), data(starts_),
                              row.data(), cached.data(), kept.data()};
  with_threads([&](const Parallel& parallel) {
    decoder_score(kernels(), model, batch, rows, data(targets_),
                  static_cast<float*>(logprobs.data_ptr()), parallel);
  });
  return logprobs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("generate", TORCH_BOX(&generate));
  m.impl("score", TORCH_BOX(&score));
}

}  // namespace gptfast
