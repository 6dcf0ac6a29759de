// Vectors of W floats in the compiler's vector extensions, so that one source serves every
// instruction set: loads and stores of fp32 and bf16 with a counted tail, reductions in a fixed
// order, exp2 and the normal distribution.

constexpr int W = GPTFAST_VECTOR_BYTES / 4;

typedef float VF __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

// How many elements a load or store touches: Full reads W, Tail{n} the first n < W (the others are
// zero).
struct Full {};
struct Tail {
  int count;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline VF splat(float x) { return x - VF{}; }  // exact for -0 too, so it is a plain broadcast
inline VI bits(VF x) { return (VI)x; }
#if GPTFAST_VECTOR_BYTES == 64  // one instruction each; of the second operand if one is a NaN
inline VF vmax(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VF vmin(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline VF vmax(VF a, VF b) { return a > b ? a : b; }
inline VF vmin(VF a, VF b) { return a < b ? a : b; }
#endif

inline VF load(const float* p, Full) {
  VF x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, VF x, Full) { __builtin_memcpy(p, &x, sizeof x); }

// 16 bits to 32 and back, of numbers that fit. Compilers make up to five shuffles of a conversion
// between vectors of different length.
inline VU extend(VH h) {
#if GPTFAST_VECTOR_BYTES == 64
  return (VU)_mm512_cvtepu16_epi32((__m256i)h);
#elif GPTFAST_VECTOR_BYTES == 32
  return (VU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VU);
#endif
}
inline VH shorten(VU x) {
#if GPTFAST_VECTOR_BYTES == 64
  return (VH)_mm512_cvtepi32_epi16((__m512i)x);
#elif GPTFAST_VECTOR_BYTES == 32
  return (VH)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x),
                              _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, VH);
#endif
}

inline VF widen(VH h) { return (VF)(extend(h) << 16); }

// Round to nearest, ties to even; a NaN stays one. The processor's own conversion, and its products
// of bf16, take denormal numbers for zero.
inline VH narrow(VF x) {
#if GPTFAST_BF16_DOT
  return (VH)_mm512_cvtneps_pbh((__m512)x);
#else
  const VU u = (VU)x;
  const VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VU quiet = (u >> 16) | 0x40u;
  return shorten(x == x ? rounded : quiet);
#endif
}

// x and then y as 2 W numbers of 16 bits; and those with x in the even places, y in the odd ones.
#if GPTFAST_BF16_DOT
inline VU narrow_both(VF x, VF y) { return (VU)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }
inline VU narrow_both(VH x, VH y) {
  return (VU)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)x), (__m256i)y, 1);
}
inline VU interleave(VU both) {
  VU place;  // of the numbers 2 l and 2 l + 1
  for (int l = 0; l < W; ++l) place[l] = static_cast<uint32_t>(l | (W + l) << 16);
  return (VU)_mm512_permutexvar_epi16((__m512i)place, (__m512i)both);
}
#endif

inline VF load(const bf16* p, Full) {
  VH h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}
inline void store(bf16* p, VF x, Full) {
  const VH h = narrow(x);
  __builtin_memcpy(p, &h, sizeof h);
}

#if GPTFAST_VECTOR_BYTES == 64
inline VF load(const float* p, Tail t) { return (VF)_mm512_maskz_loadu_ps((1u << t.count) - 1, p); }
inline void store(float* p, VF x, Tail t) {
  _mm512_mask_storeu_ps(p, (1u << t.count) - 1, (__m512)x);
}
inline VF load(const bf16* p, Tail t) {
  return widen((VH)_mm256_maskz_loadu_epi16((1u << t.count) - 1, p));
}
inline void store(bf16* p, VF x, Tail t) {
  _mm256_mask_storeu_epi16(p, (1u << t.count) - 1, (__m256i)narrow(x));
}
#else
template <class T>
inline VF load(const T* p, Tail t) {
  T buffer[W] = {};
  for (int i = 0; i < t.count; ++i) buffer[i] = p[i];
  return load(buffer, Full{});
}
template <class T>
inline void store(T* p, VF x, Tail t) {
  T buffer[W];
  store(buffer, x, Full{});
  for (int i = 0; i < t.count; ++i) p[i] = buffer[i];
}
#endif

inline VF load(const float* p) { return load(p, Full{}); }
inline void store(float* p, VF x) { store(p, x, Full{}); }

// Calls f(i, Full) for whole vectors and f(i, Tail) for the rest of [0, n).
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Tail{static_cast<int>(n - i)});
}

template <int... L>
struct Lanes {};
template <int N, int... L>
struct CountLanes : CountLanes<N - 1, N - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
  using type = Lanes<L...>;
};
using AllLanes = typename CountLanes<W>::type;

// Lane l of the result is lane l + S of x, around the end.
template <int S, int... L>
inline VF rotate(VF x, Lanes<L...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, x, ((L + S) % W)...);
#else  // g++ before 12
  return __builtin_shuffle(x, VI{((L + S) % W)...});
#endif
}

// Lane l of the result is lane l ^ S of x.
template <int S, int... L>
inline VF swap_lanes(VF x, Lanes<L...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, x, (L ^ S)...);
#else  // g++ before 12
  return __builtin_shuffle(x, VI{(L ^ S)...});
#endif
}

// Blocks of S lanes change places: those of `a` that have bit S in their number, and those of b
// that do not.
template <int S, int... L>
inline void exchange(VF& a, VF& b, Lanes<L...>) {
#if __has_builtin(__builtin_shufflevector)
  const VF x = __builtin_shufflevector(a, b, ((L & S) ? W + L - S : L)...);
  const VF y = __builtin_shufflevector(a, b, ((L & S) ? W + L : L + S)...);
#else  // g++ before 12
  const VF x = __builtin_shuffle(a, b, VI{((L & S) ? W + L - S : L)...});
  const VF y = __builtin_shuffle(a, b, VI{((L & S) ? W + L : L + S)...});
#endif
  a = x;
  b = y;
}

// Lanes are combined in pairs, half onto half: the order is fixed by W alone.
template <int S = W / 2, class F>
inline float reduce(VF x, const F& combine) {
  if constexpr (S == 0) {
    return x[0];
  } else {
    return reduce<S / 2>(combine(x, rotate<S>(x, AllLanes{})), combine);
  }
}
struct Add {
  VF operator()(VF a, VF b) const { return a + b; }
};
struct Higher {
  VF operator()(VF a, VF b) const { return vmax(a, b); }
};
inline float sum(VF x) { return reduce(x, Add{}); }
inline float max(VF x) { return reduce(x, Higher{}); }

// Lane i of the result is reduce(x[i]) for i < n <= W, with the same bits: two vectors that are
// half reduced share one.
template <int S = W / 2, class F>
[[gnu::always_inline]] inline VF reduce_each(VF (&x)[W], int64_t n, const F& combine) {
  if (S == W / 2 && n == 1) return splat(reduce(x[0], combine));
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i) {
    exchange<S>(x[i], x[i + S], AllLanes{});
    x[i] = combine(x[i], x[i + S]);
  }
  if constexpr (S == 1)
    return x[0];
  else
    return reduce_each<S / 2>(x, n, combine);
}

// Lane numbers 0, 1, ..., W-1.
inline VI lanes() {
  VI x;
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

// x with `other` in the lanes that a load of this part leaves out.
inline VF only(VF x, Full, float = 0.0f) { return x; }
inline VF only(VF x, Tail t, float other = 0.0f) { return lanes() < t.count ? x : splat(other); }

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

// 2^x of x from -200 on, or with narrower vectors -127: n = round(x), 2^x = 2^n 2^f with |f| <= 1/2
// and 2^f by the polynomial c; 0, or a denormal number, below -126; NaN of NaN.
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
  return x < splat(-126.0f) ? splat(0.0f) : (VF)(bits(p) + (bits(sum) << 23));
#endif
}

// Minimax polynomials of 2^f among those that are 1 at 0: relative errors of 1e-7 and 1.1e-4.
constexpr float power[] = {
    1.0f, 6.931469803e-01f, 2.402224154e-01f, 5.550734186e-02f, 9.671510198e-03f, 1.326472149e-03f};
constexpr float power_for_bf16[] = {1.0f, 6.932829260e-01f, 2.422109604e-01f, 5.500893295e-02f};

// 2^x, relative error below 3e-7 on [-126, 128); 0 of -inf; NaN of NaN.
[[gnu::always_inline]] inline VF exp2(VF x) {
  // In this order a NaN stays one.
  return exp2_by(vmin(splat(128.0f), vmax(splat(lowest_power), x)), power);
}

// 2^x of x <= 0, as a probability that products read as this type. x may be a product: as it goes
// into a maximum, no compiler can join it to a sum, here and not there.
[[gnu::always_inline]] inline VF probability(VF x, float) {
  return exp2_by(vmax(splat(lowest_power), x), power);
}
[[gnu::always_inline]] inline VF probability(VF x, bf16) {
  return exp2_by(vmax(splat(lowest_power), x), power_for_bf16);
}

constexpr double log2e_exactly = 1.4426950408889634;
constexpr float log2e = static_cast<float>(log2e_exactly);

inline VF exp(VF x) { return exp2(x * log2e); }

// ln x of normal x > 0, error below 1e-8 before rounding; NaN of NaN and of infinity.
// x = 2^e (1 + f) with 1 + f in [sqrt 1/2, sqrt 2), ln(1 + f) = f - f^2 / 2 + f^3 p(f).
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

// The normal distribution's cumulative probability at x, and the derivative of x cdf(x).
struct Normal {
  VF cdf, slope;
};

// As 1/2 + x N(x^2) / D(x^2) each, with one D, fitted to 2e-8 on |x| <= 5.5. Beyond, both keep
// their values at the end, within 1e-6 of 0 and 1.
inline Normal normal(VF x, float) {
  const VF c = vmin(splat(5.5f), vmax(splat(-5.5f), x)), w = c * c;  // a NaN stays one
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

// For what is rounded to bf16 next, whose spacing at 1 is 8e-3: 1/2 + x P(x^2) each, within 5e-5
// and 1.6e-4 on |x| <= 4.3, where both come to within 2e-5 of 0 and 1.
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
