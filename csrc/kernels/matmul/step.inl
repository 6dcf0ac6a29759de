// The step of a product, on the elements that the operands have: what every microkernel repeats.
#pragma once

#include "../simd/vec.inl"
#include "layout.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Of KU products for each lane, with x_e of a row of A and b_e of a vector of B's columns,
//   acc += sum_e x_e b_e
// repeat() loads the KU elements of A into every lane; read() loads a vector of B, which may be
// narrower in memory than P (weights.inl).
template <class P>
struct Step;

template <>
struct Step<float> {
  using Vector = VF;
  static VF repeat(const float* x) { return splat(*x); }
  static VF read(const float* b) { return load(b); }
  static VF read(const bf16* b) { return load(b, Full{}); }
  static VF read(const int8_t* b) { return widen_bytes(b); }
  static VF add(VF acc, VF x, VF b) { return acc + x * b; }
};

#if GPTFAST_BF16_DOT
template <>
struct Step<bf16> {
  using Vector = __m512bh;
  static Vector repeat(const bf16* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vector read(const bf16* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static Vector read(const int8_t* b) {
    return _mm512_cvtne2ps_pbh((__m512)widen_bytes(b + W), (__m512)widen_bytes(b));
  }
  static VF add(VF acc, Vector x, Vector b) { return (VF)_mm512_dpbf16_ps((__m512)acc, x, b); }
};
#endif

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
