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
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline VF splat(float x) { return x - VF{}; }  // exact for -0 too, so it is a plain broadcast
inline VI bits(VF x) { return (VI)x; }
inline VF vmax(VF a, VF b) { return a > b ? a : b; }
inline VF vmin(VF a, VF b) { return a < b ? a : b; }

inline VF load(const float* p, Full) {
  VF x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, VF x, Full) { __builtin_memcpy(p, &x, sizeof x); }

inline VF widen(VH h) { return (VF)(__builtin_convertvector(h, VU) << 16); }

// Round to nearest, ties to even; a NaN stays one.
inline VH narrow(VF x) {
  const VU u = (VU)x;
  const VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VU quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, VH);
}

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
inline void for_vectors(int64_t n, F&& f) {
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

// Lanes are combined in pairs, half onto half: the order is fixed by W alone.
template <int S = W / 2, class F>
inline float reduce(VF x, const F& combine) {
  if constexpr (S == 0) {
    return x[0];
  } else {
    return reduce<S / 2>(combine(x, rotate<S>(x, AllLanes{})), combine);
  }
}
inline float sum(VF x) {
  return reduce(x, [](VF a, VF b) { return a + b; });
}
inline float max(VF x) {
  return reduce(x, [](VF a, VF b) { return vmax(a, b); });
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

// 2^x, relative error below 3e-7 on [-126, 128); 0 below that range, -inf included; NaN of NaN.
// n = round(x), 2^x = 2^n 2^f with |f| <= 1/2 and 2^f by its minimax polynomial of degree 6.
inline VF exp2(VF x) {
  constexpr float shift = 0x1.8p23f;  // adding it leaves round(x) in the low bits of the sum
  const VF clamped = vmin(splat(128.0f), vmax(splat(-127.0f), x));  // in this order a NaN stays one
  const VF sum = clamped + shift;
  const VF f = clamped - (sum - shift);
  VF p = splat(1.535336145e-04f);
  p = p * f + 1.339887457e-03f;
  p = p * f + 9.618437361e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.0f;
  const VF scaled = (VF)(bits(p) + (bits(sum) << 23));
  return x < splat(-126.0f) ? splat(0.0f) : scaled;
}

constexpr float log2e = 1.44269504088896f;

inline VF exp(VF x) { return exp2(x * log2e); }

// The normal distribution's density and cumulative probability at x:
// cdf(-z) = exp(-z^2/2) Q(t), t = 1 / (1 + z/4), with Q fitted to erfcx(z/sqrt 2)/2 to 3e-8
// (relative).
struct Normal {
  VF pdf, cdf;
};
inline Normal normal(VF x) {
  const VF z = (VF)(bits(x) & 0x7fffffff);
  const VF t = 1.0f / (1.0f + 0.25f * z);
  const VF gauss = exp2(x * x * (-0.5f * log2e));
  VF q = splat(-0.09534565f);
  q = q * t + 0.35868258f;
  q = q * t + -0.29893606f;
  q = q * t + 0.31248903f;
  q = q * t + 0.00786672f;
  q = q * t + 0.11697091f;
  q = q * t + 0.09827245f;
  const VF lower = gauss * q * t;
  return {gauss * 0.3989422804f, x < splat(0.0f) ? lower : 1.0f - lower};
}

inline VF tanh(VF x) { return 1.0f - 2.0f / (exp2(x * (2.0f * log2e)) + 1.0f); }
