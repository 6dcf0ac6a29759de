// One step of a product, which every microkernel repeats, for each element type of the operands.
#pragma once

#include "../simd/vec.inl"
#include "layout.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// A step adds KU products to every lane of an accumulator. With x_e, e < KU, from a row of A and
// b_e from a vector of columns of B,
//   acc += sum_e x_e b_e
// repeat() broadcasts KU elements of A to every lane. read() loads a vector of B, whose elements
// may be narrower in memory than P (weights.inl).
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
