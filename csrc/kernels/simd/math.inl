// Functions of vectors: square root, exponential, logarithm, tanh and the normal distribution.
#pragma once

#include "vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

inline VF vsqrt(VF x) {
#if GPTFAST_VECTOR_BYTES == 64
  return (VF)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// c[0] + c[1] x + ... by Horner's rule.
template <int N>
inline VF polynomial(VF x, const float (&c)[N]) {
  VF sum = splat(c[N - 1]);
#pragma GCC unroll 8
  for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// 2^x for x >= -200, or x >= -127 with vectors narrower than 64 bytes. With n = round(x) and
// f = x - n, 2^x = 2^n 2^f, |f| <= 1/2, and the polynomial c approximates 2^f. Below -126 the
// result is 0 or a denormal number. NaN gives NaN.
constexpr float lowest_power = GPTFAST_VECTOR_BYTES == 64 ? -200.0f : -127.0f;
template <int N>
[[gnu::always_inline]] inline VF exp2_by(VF x, const float (&c)[N]) {
#if GPTFAST_VECTOR_BYTES == 64
  const VF n = (VF)_mm512_roundscale_ps((__m512)x, 0);
  return (VF)_mm512_scalef_ps((__m512)polynomial(x - n, c), (__m512)n);
#else
  constexpr float shift = 0x1.8p23f;  // adding it leaves round(x) in the low bits of the sum
  const VF sum = x + shift;
  const VF p = polynomial(x - (sum - shift), c);
  // A sum of bits may turn a NaN into a number, x 0 cannot.
  return x >= splat(-126.0f) ? (VF)(bits(p) + (bits(sum) << 23)) : x * 0.0f + 0.0f;
#endif
}

// Minimax polynomials for 2^f, constrained to be 1 at 0: relative errors of 1e-7 and 1.1e-4.
constexpr float power[] = {
    1.0f, 6.931469803e-01f, 2.402224154e-01f, 5.550734186e-02f, 9.671510198e-03f, 1.326472149e-03f};
constexpr float power_for_bf16[] = {1.0f, 6.932829260e-01f, 2.422109604e-01f, 5.500893295e-02f};

// 2^x with a relative error below 3e-7 on [-126, 128); -inf gives 0, NaN gives NaN.
[[gnu::always_inline]] inline VF exp2(VF x) {
  // This order of the operands propagates a NaN.
  return exp2_by(vmin(splat(128.0f), vmax(splat(lowest_power), x)), power);
}

// 2^x for x <= 0: a probability, to the precision of the type in which a matrix product reads it. x
// may be a product: it passes through vmax before anything is subtracted from it, so no compiler
// can contract it into a fused multiply-add in some places only.
[[gnu::always_inline]] inline VF probability(VF x, float) {
  return exp2_by(vmax(splat(lowest_power), x), power);
}
[[gnu::always_inline]] inline VF probability(VF x, bf16) {
  return exp2_by(vmax(splat(lowest_power), x), power_for_bf16);
}

constexpr double log2e_exactly = 1.4426950408889634;
constexpr float log2e = static_cast<float>(log2e_exactly);

inline VF exp(VF x) { return exp2(x * log2e); }

// ln x for normal x > 0, with an error below 1e-8 before rounding; NaN and infinity give NaN.
// x = 2^e (1 + f) with 1 + f in [sqrt 1/2, sqrt 2), and ln(1 + f) = f - f^2 / 2 + f^3 p(f).
inline VF log(VF x) {
  constexpr int32_t sqrt_half = 0x3f3504f3;
  const VI e = (bits(x) - sqrt_half) >> 23;
  const VF f = (VF)(bits(x) - (e << 23)) - 1.0f;
  const VF p =
      polynomial(f, {3.333331645e-01f, -2.500080764e-01f, 2.000228614e-01f, -1.662459522e-01f,
                     1.418121606e-01f, -1.312841028e-01f, 1.288139224e-01f, -7.860173285e-02f});
  const VF fraction = f + (f * f * f * p - 0.5f * f * f);
  return fraction + __builtin_convertvector(e, VF) * 0.693147181f + (x - x);
}

// The cumulative distribution function of the normal distribution at x, and the derivative of
// x cdf(x).
struct Normal {
  VF cdf, slope;
};

// Both are 1/2 + x N(x^2) / D(x^2) with a common D, fitted to 2e-8 on |x| <= 5.5. Outside, both
// keep their values at +-5.5, within 1e-6 of 0 and 1.
inline Normal normal(VF x, float) {
  const VF c = vmin(splat(5.5f), vmax(splat(-5.5f), x)), w = c * c;  // propagates a NaN
  const VF scaled =
      c / polynomial(w, {1.0f, 2.774222195e-01f, 3.583860025e-02f, 2.803301206e-03f,
                         1.432866702e-04f, 4.674381216e-06f, 6.559169208e-08f, 1.237950159e-10f});
  const VF cdf =
      polynomial(w, {3.989422619e-01f, 4.418522492e-02f, 5.824971478e-03f, 3.150921839e-04f,
                     1.423905996e-05f, 3.178570864e-07f, 2.124977083e-09f});
  const VF slope =
      polynomial(w, {7.978844643e-01f, -4.461009800e-02f, 1.465183217e-02f, -1.915491448e-04f,
                     3.231070878e-05f, -8.110234262e-08f, 7.149956183e-09f, -2.772863189e-11f});
  return {0.5f + scaled * cdf, 0.5f + scaled * slope};
}

// For results that are rounded to bf16 next, whose spacing at 1 is 8e-3: both are 1/2 + x P(x^2),
// within 5e-5 and 1.6e-4 on |x| <= 4.3, at whose ends both are within 2e-5 of 0 and 1.
inline Normal normal(VF x, bf16) {
  const VF c = vmin(splat(4.3f), vmax(splat(-4.3f), x)), w = c * c;
  const VF cdf =
      polynomial(w, {3.987365441e-01f, -6.589466838e-02f, 9.463874062e-03f, -9.857478224e-04f,
                     7.082360223e-05f, -3.277585846e-06f, 8.689619930e-08f, -9.951918674e-10f});
  const VF slope = polynomial(w, {7.971646694e-01f, -2.634423964e-01f, 5.720014672e-02f,
                                  -8.210243867e-03f, 8.002500235e-04f, -5.220612589e-05f,
                                  2.168756598e-06f, -5.158572867e-08f, 5.326278033e-10f});
  return {0.5f + c * cdf, 0.5f + c * slope};
}

inline VF tanh(VF x) { return 1.0f - 2.0f / (exp2(x * (2.0f * log2e)) + 1.0f); }

// The maximum of an empty set of scores.
constexpr float neg_inf = -__builtin_inff();

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
