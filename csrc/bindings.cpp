// gptfast._C: controls of the instruction set and of the threads. The operators register themselves
// with torch when this module is loaded (csrc/ops); they need no binding.

// The compiler meets torch's copy of pybind11 first where the package's lies in a folder of the
// system; before torch 2.13 that copy is an error for those who ask for the stable ABI.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "kernels/isa/isa.h"

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

// One variable limits both libraries: torch knows fewer levels and calls them by other names.
void follow_torch_limit() {
  if (std::getenv("ATEN_CPU_CAPABILITY") == nullptr) return;
  const py::object torch_cpu = py::module_::import("torch.backends.cpu");
  const auto capability = torch_cpu.attr("get_cpu_capability")().cast<std::string>();
  if (capability == "DEFAULT" || capability == "NO AVX") isa_limit(Isa::generic);
  if (capability == "AVX2") isa_limit(Isa::avx2);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Controls of gptfast's compiled kernels; import torch first.";
  follow_torch_limit();
  m.def("isa_levels", &isa_levels,
        "Maps each instruction set, from low to high, to None or the reason why it cannot run.");
  m.def(
      "isa_current", [] { return std::string(isa_name(isa_current())); },
      "Names the instruction set in use; ValueError for a bad GPTFAST_CPU_ISA.");
  m.def(
      "isa_set", [](const std::string& name) { isa_set(isa_from_name(name.c_str())); },
      py::arg("name"), "Uses this instruction set from now on; ValueError when it cannot run.");
  m.def(
      "cache_bytes",
      [](bool bf16, int64_t block_size, int64_t n_head, int64_t head_dim, int64_t capacity) {
        const DType dtype = bf16 ? DType::bf16 : DType::f32;
        return kernels().cache_bytes({dtype, block_size, n_head, head_dim, capacity});
      },
      py::arg("bf16"), py::arg("block_size"), py::arg("n_head"), py::arg("head_dim"),
      py::arg("capacity"),
      "Returns the bytes that the keys and values of one sequence and layer take.");
  m.def(
      "num_threads", [] { return static_cast<int64_t>(torch::stable::get_num_threads()); },
      "Returns how many threads of torch's pool the kernels use.");
}
