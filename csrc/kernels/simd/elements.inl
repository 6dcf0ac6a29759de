// Parameters, gradients and results in memory: fp32 or bf16, while the kernels compute in fp32.
#pragma once

#include "../kernels.h"
#include "../threads/scratch.h"
#include "vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Calls f with the parameter's data as a pointer of its element type.
template <class F>
inline auto with_elements(const Param& param, F&& f) {
  if (param.dtype == DType::f32) return f(static_cast<const float*>(param.data));
  return f(static_cast<const bf16*>(param.data));
}

// A parameter of n elements as fp32, copied to scratch memory if it is bf16; null stays null.
inline const float* floats(const Param& param, int64_t n, ScratchFrame& frame) {
  if (param.data == nullptr) return nullptr;
  if (param.dtype == DType::f32) return static_cast<const float*>(param.data);
  float* copy = alloc<float>(frame, n);
  const bf16* data = static_cast<const bf16*>(param.data);
  for_vectors(n, [&](int64_t j, auto part) { store(copy + j, load(data + j, part), part); });
  return copy;
}

// Writes n values to elements [offset, offset + n) of a gradient.
inline void write_grad(const ParamGrad& grad, int64_t offset, const float* values, int64_t n) {
  const auto write = [&](auto* out) {
    for_vectors(
        n, [&](int64_t j, auto part) { store(out + offset + j, load(values + j, part), part); });
  };
  if (grad.dtype == DType::f32)
    write(static_cast<float*>(grad.data));
  else
    write(static_cast<bf16*>(grad.data));
}

template <class Y>
inline void copy_row(const float* c, int64_t n, Y* y) {
  for_vectors(n, [&](int64_t j, auto part) { store(y + j, load(c + j, part), part); });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
