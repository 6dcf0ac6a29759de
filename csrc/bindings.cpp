// gptfast._C: control of the instruction set and the threads, and the engine for generation. The
// operators register themselves with torch when this module is loaded (csrc/ops).

// If the package pybind11 lies in a system folder, the compiler finds torch's copy of it first.
// Before torch 2.13 that copy raises an error if the stable ABI is requested.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "ops/common.h"

namespace {

namespace py = pybind11;
using namespace gptfast;

py::dict isa_levels() {
  py::dict levels;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    const char* reason = isa_unavailable_reason(isa);
    levels[isa_name(isa)] = reason == nullptr ? py::object(py::none()) : py::str(reason);
  }
  return levels;
}

// ATEN_CPU_CAPABILITY limits torch and gptfast alike: torch knows fewer levels and has other names
// for them.
void follow_torch_limit() {
  if (std::getenv("ATEN_CPU_CAPABILITY") == nullptr) return;
  const py::object torch_cpu = py::module_::import("torch.backends.cpu");
  const auto capability = torch_cpu.attr("get_cpu_capability")().cast<std::string>();
  if (capability == "DEFAULT" || capability == "NO AVX") isa_limit(Isa::generic);
  if (capability == "AVX2") isa_limit(Isa::avx2);
}

// Calls f(parallel) on torch's threads with the GIL released, so that other Python threads run.
template <class F>
void without_gil(const F& f) {
  const py::gil_scoped_release released;
  with_threads(f);
}

// Parameters that a Python function returns by name: objects with the buffer protocol, or None for
// a parameter that the model does not have.
class PythonParameters : public Parameters {
 public:
  // With `copy`, kept parameters are copied; otherwise their memory is shared.
  PythonParameters(py::function find, bool copy) : find_(std::move(find)), copy_(copy) {}

  Param persistent(const std::string& name, std::initializer_list<int64_t> shape) override {
    const py::gil_scoped_acquire held;
    return keep(find(name), name, shape);
  }
  Param persistent_bias(const std::string& name, int64_t n) override {
    const py::gil_scoped_acquire held;
    const py::object found = find(name);
    return found.is_none() ? Param{} : keep(found, name, {n});
  }
  Param temporary(const std::string& name, std::initializer_list<int64_t> shape) override {
    const py::gil_scoped_acquire held;
    last_ = std::make_unique<py::buffer_info>(buffer(find(name), name, shape));
    return {last_->ptr, DType::f32};
  }

  // Memory that the model made from these parameters reads for as long as it lives.
  struct Memory {
    std::vector<py::buffer_info> shared;
    std::vector<std::vector<float>> copied;
  };
  Memory take_memory() { return std::move(memory_); }

 private:
  py::object find(const std::string& name) {
    last_.reset();
    return find_(name);
  }
  Param keep(const py::object& found, const std::string& name,
             std::initializer_list<int64_t> shape) {
    py::buffer_info info = buffer(found, name, shape);
    const auto* data = static_cast<const float*>(info.ptr);
    if (copy_) {
      memory_.copied.emplace_back(data, data + info.size);
      data = memory_.copied.back().data();
    } else {
      memory_.shared.push_back(std::move(info));
    }
    return {data, DType::f32};
  }
  static py::buffer_info buffer(const py::object& found, const std::string& name,
                                std::initializer_list<int64_t> shape) {
    const auto refuse = [&](const std::string& got) {
      throw py::value_error("pack: " + name + " must be contiguous float32 of shape " +
                            to_text(Sizes(shape.begin(), shape.size())) + ", got " + got);
    };
    if (!py::isinstance<py::buffer>(found)) refuse(found.is_none() ? "none" : "no buffer");
    py::buffer_info info = py::reinterpret_borrow<py::buffer>(found).request();
    const bool dense = PyBuffer_IsContiguous(info.view(), 'C') != 0;
    if (!info.item_type_is_equivalent_to<float>() || !dense ||
        !std::equal(info.shape.begin(), info.shape.end(), shape.begin(), shape.end()))
      refuse("\"" + info.format + "\" of shape " +
             to_text(Sizes(info.shape.data(), info.shape.size())) + (dense ? "" : ", not dense"));
    return info;
  }

  py::function find_;
  bool copy_;
  Memory memory_;
  std::unique_ptr<py::buffer_info> last_;
};

// A model, and the memory of the parameters that it reads in place.
struct BoundModel {
  PythonParameters::Memory memory;
  std::shared_ptr<const Model> model;

  BoundModel(const ModelConfig& config, DType dtype, Packing packing, PythonParameters from)
      : model(make(config, dtype, packing, from)) {
    memory = from.take_memory();
  }

  // Throws if another instruction set has been chosen since the weights were packed.
  void check_level(const char* op) const {
    if (&model->kernels() == &kernels()) return;
    throw std::runtime_error(std::string(op) + ": the model was packed for " +
                             model->kernels().name + ", and " + kernels().name +
                             " computes now; pack it again");
  }

 private:
  static std::shared_ptr<const Model> make(const ModelConfig& config, DType dtype, Packing packing,
                                           PythonParameters& from) {
    std::shared_ptr<const Model> made;
    without_gil([&](const Parallel& parallel) {
      made = std::make_shared<const Model>(kernels(), config, dtype, packing, from, parallel);
    });
    return made;
  }
};

BoundModel new_model(int64_t block_size, int64_t vocab_size, int64_t n_layer, int64_t n_head,
                     int64_t n_embd, bool attention, const std::string& gelu, bool bf16, bool int8,
                     py::function find, bool copy) {
  const ModelConfig config = {block_size, vocab_size, n_layer,      n_head,
                              n_embd,     attention,  gelu_of(gelu)};
  const Packing packing = !int8                         ? Packing::dense
                          : isa_has_vnni(isa_current()) ? Packing::int8_vnni
                                                        : Packing::int8;
  return {config, bf16 ? DType::bf16 : DType::f32, packing,
          PythonParameters(std::move(find), copy)};
}

// Log-probabilities of the tokens after the first of each window.
std::vector<std::vector<float>> score_windows(const BoundModel& bound,
                                              const std::vector<std::vector<int64_t>>& windows) {
  bound.check_level("score");
  const Model& model = *bound.model;
  const ModelConfig& c = model.config();
  std::vector<int64_t> tokens, targets, starts = {0}, slot;
  int64_t longest = 1;
  for (const std::vector<int64_t>& window : windows) {
    const auto length = static_cast<int64_t>(window.size()) - 1;
    if (length < 1 || length > c.block_size)
      throw py::value_error("score: a window must have 2 to " + std::to_string(c.block_size + 1) +
                            " tokens, got " + std::to_string(length + 1));
    model.check_tokens("score", window);
    tokens.insert(tokens.end(), window.begin(), window.end() - 1);
    targets.insert(targets.end(), window.begin() + 1, window.end());
    starts.push_back(static_cast<int64_t>(tokens.size()));
    slot.push_back(static_cast<int64_t>(slot.size()));
    longest = std::max(longest, length);
  }
  const auto count = static_cast<int64_t>(windows.size());
  const std::vector<int64_t> cached(windows.size());
  const std::vector<uint8_t> kept(windows.size());
  std::vector<float> logprobs(tokens.size());
  without_gil([&](const Parallel& parallel) {
    Cache cache(model, count, c.attention ? longest : 1);
    const Batch batch = {count,       tokens.data(), starts.data(),
                         slot.data(), cached.data(), kept.data()};
    score(model, batch, cache, targets.data(), logprobs.data(), parallel);
  });
  std::vector<std::vector<float>> results;
  for (size_t i = 0; i < windows.size(); ++i)
    results.emplace_back(logprobs.begin() + starts[i], logprobs.begin() + starts[i + 1]);
  return results;
}

const char* name_of(State state) {
  constexpr const char* names[] = {"waiting", "running", "length", "stop",
                                   "end",     "window",  "invalid"};
  return names[static_cast<int>(state)];
}

// A tuple for each sequence that has changed: its index, its state, its new tokens with their
// log-probabilities, and the most probable tokens in their places.
py::list updates(Session& session) {
  const int64_t k = session.options().top_logprobs;
  py::list all;
  session.updates([&](int64_t i, const Sequence& s, int64_t first) {
    py::list tokens, logprobs, top_logprobs;
    for (int64_t n = first; n < s.generated(); ++n) {
      tokens.append(s.tokens[static_cast<size_t>(s.prompt + n)]);
      logprobs.append(s.logprobs[static_cast<size_t>(n)]);
      if (k == 0) continue;
      py::list row;
      for (auto j = static_cast<size_t>(n * k); j < static_cast<size_t>((n + 1) * k); ++j)
        row.append(py::make_tuple(s.top_tokens[j], s.top_logprobs[j]));
      top_logprobs.append(row);
    }
    all.append(py::make_tuple(i, name_of(s.state), tokens, logprobs, top_logprobs));
  });
  return all;
}

// A session, and the Python object of its model, whose parameters it keeps alive.
struct BoundSession {
  BoundSession(py::object model, std::vector<std::vector<int64_t>> prompts,
               const std::vector<int64_t>& seeds, const std::vector<int64_t>& sequence_ids,
               const SessionOptions& options)
      : owner(std::move(model)) {
    const BoundModel& bound = owner.cast<const BoundModel&>();
    bound.check_level("generate");
    if (seeds.size() != prompts.size() || sequence_ids.size() != prompts.size())
      throw py::value_error("generate: seeds and sequence_ids must be one per prompt");
    std::vector<Prompt> texts;
    for (size_t i = 0; i < prompts.size(); ++i)
      texts.push_back({std::move(prompts[i]), seeds[i], sequence_ids[i]});
    session = std::make_unique<Session>(bound.model, std::move(texts), options);
  }

  py::object owner;
  std::unique_ptr<Session> session;
};

void bind_kernels(py::module_& m) {
  m.def("isa_levels", &isa_levels,
        "Maps each instruction set, from lowest to highest, to None or to why it cannot run.");
  m.def(
      "isa_current", [] { return std::string(isa_name(isa_current())); },
      "Returns the instruction set in use; raises ValueError for a bad GPTFAST_CPU_ISA.");
  m.def(
      "isa_set", [](const std::string& name) { isa_set(isa_from_name(name.c_str())); },
      py::arg("name"),
      "Uses this instruction set from now on; raises ValueError if it cannot run.");
  m.def(
      "num_threads", [] { return static_cast<int64_t>(torch::stable::get_num_threads()); },
      "Returns how many threads of torch's pool the kernels use.");
}

void bind_engine(py::module_& m) {
  py::class_<BoundModel>(m, "Model", "A GPT's weights, packed for one instruction set.")
      .def(py::init(&new_model), py::arg("block_size"), py::arg("vocab_size"), py::arg("n_layer"),
           py::arg("n_head"), py::arg("n_embd"), py::arg("attention"), py::arg("gelu"),
           py::arg("bf16"), py::arg("int8"), py::arg("find"), py::arg("copy"),
           "find(name) returns a parameter of GPT's state dict as a float32 buffer, or None for an "
           "absent bias; with copy=False, the model shares the memory of vectors and embeddings.")
      .def(
          "cache_bytes",
          [](const BoundModel& bound, int64_t capacity) {
            return Cache::slot_bytes(*bound.model, capacity);
          },
          py::arg("capacity"), "Returns the bytes of the keys and values of `capacity` tokens.")
      .def(
          "first_layer_table_bytes",
          [](const BoundModel& bound) { return FirstLayerTable::bytes(*bound.model); },
          "Returns the bytes of the first layer's projections of all tokens at all positions.")
      .def_property_readonly(
          "packed_bytes", [](const BoundModel& bound) { return bound.model->packed_bytes(); },
          "Bytes of the packed weights.")
      .def("score", &score_windows, py::arg("windows"),
           "Returns the log-probabilities of the tokens after the first of each window; a window "
           "has up to block_size + 1 tokens.");

  py::class_<SessionOptions>(m, "SessionOptions", "See csrc/engine/session.h.")
      .def(py::init<>())
      .def_property(
          "sampling", nullptr,
          [](SessionOptions& options, std::tuple<float, int64_t, float, float, float> values) {
            const auto [temperature, top_k, top_p, min_p, repetition_penalty] = values;
            options.sampling = {temperature, top_k, top_p, min_p, repetition_penalty};
          },
          "(temperature, top_k, top_p, min_p, repetition_penalty); the last four have no effect "
          "at 0, 1, 0 and 1.")
      .def_readwrite("max_new_tokens", &SessionOptions::max_new_tokens)
      .def_readwrite("stride", &SessionOptions::stride)
      .def_readwrite("top_logprobs", &SessionOptions::top_logprobs)
      .def_readwrite("stop_tokens", &SessionOptions::stop_tokens)
      .def_readwrite("end_token", &SessionOptions::end_token)
      .def_readwrite("stop_strings", &SessionOptions::stop_strings)
      .def_readwrite("pieces", &SessionOptions::pieces)
      .def_readwrite("slots", &SessionOptions::slots)
      .def_readwrite("capacity", &SessionOptions::capacity)
      .def_readwrite("first_layer_table", &SessionOptions::first_layer_table);

  py::class_<BoundSession>(m, "Session", "Generates the continuations of prompts.")
      .def(py::init<py::object, std::vector<std::vector<int64_t>>, const std::vector<int64_t>&,
                    const std::vector<int64_t>&, const SessionOptions&>(),
           py::arg("model"), py::arg("prompts"), py::arg("seeds"), py::arg("sequence_ids"),
           py::arg("options"))
      .def(
          "run",
          [](BoundSession& bound, double seconds) {
            bool more = false;
            without_gil(
                [&](const Parallel& parallel) { more = bound.session->run(seconds, parallel); });
            return more;
          },
          py::arg("seconds"),
          "Generates for this long, at least one forward pass; returns whether there is more to "
          "do.")
      .def(
          "updates", [](BoundSession& bound) { return updates(*bound.session); },
          "Returns (sequence, state, tokens, logprobs, top_logprobs) for each sequence that has "
          "changed since the last call; the first call returns all.")
      .def_property_readonly(
          "invalid", [](const BoundSession& bound) { return bound.session->invalid(); },
          "The first sequence whose logits were not finite; -1 if there is none.")
      .def_property_readonly(
          "bytes", [](const BoundSession& bound) { return bound.session->bytes(); },
          "Bytes of the cache and of the first layer's table.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptfast's compiled kernels and engine; import torch first.";
  follow_torch_limit();
  bind_kernels(m);
  bind_engine(m);
}
