// Vectors of W floats by the compiler's vector extensions, so that one source serves every
// instruction-set level: loads and stores of fp32, bf16 and bytes, with tails of fewer than W
// elements; permutations of lanes; and reductions in a fixed order.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Macros that isa/levels/<level>.cpp defines. The defaults, those of the generic level, are for
// editors that parse a file alone.
//
//   GPTFAST_LEVEL          the level's name, as in kernels_<level>()
//   GPTFAST_VECTOR_BYTES   16, 32 or 64
//   GPTFAST_BF16_DOT       1 if products of bf16 use bf16 instructions
//   GPTFAST_AMX            1 if those are AMX tile instructions
#ifndef GPTFAST_LEVEL
#define GPTFAST_LEVEL generic
#define GPTFAST_VECTOR_BYTES 16
#define GPTFAST_BF16_DOT 0
#define GPTFAST_AMX 0
#endif

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int W = GPTFAST_VECTOR_BYTES / 4;

typedef float VF __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

// How many elements a load or store accesses: Full, all W; Tail{n}, the first n < W, where a load
// fills the other lanes with zeros.
struct Full {};
struct Tail {
  int count;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline VF splat(float x) { return x - VF{}; }  // exact for -0 too, so it compiles to a broadcast
inline VI bits(VF x) { return (VI)x; }
#if GPTFAST_VECTOR_BYTES == 64  // one instruction each; the result is b if a or b is a NaN
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

// Unsigned integers of 16 bits to 32 bits and back; those of shorten() must fit 16 bits.
// Intrinsics, because compilers turn a conversion between vectors of different lengths into up to
// five shuffles.
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

// bf16 to fp32.
inline VF widen(VH h) { return (VF)(extend(h) << 16); }

// fp32 to bf16, rounded to nearest, ties to even; a NaN stays a NaN. The processor's instructions
// for this conversion and for products of bf16 treat denormal numbers as zero.
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

// narrow_both: x followed by y, as 2 W numbers of 16 bits. interleave: the same numbers with x at
// the even positions and y at the odd ones.
#if GPTFAST_BF16_DOT
inline VU narrow_both(VF x, VF y) { return (VU)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }
inline VU narrow_both(VH x, VH y) {
  return (VU)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)x), (__m256i)y, 1);
}
inline VU interleave(VU both) {
  VU place;  // lane l: the source positions of the numbers 2 l and 2 l + 1
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

// Calls f(i, Full) for the whole vectors of [0, n) and f(i, Tail) for the rest.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Tail{static_cast<int>(n - i)});
}

// AllLanes is Lanes<0, 1, ..., W - 1>, like std::make_integer_sequence of the standard library,
// whose templates no kernel uses (kernels.inl).
template <int... L>
struct Lanes {};
template <int N, int... L>
struct CountLanes : CountLanes<N - 1, N - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
  using type = Lanes<L...>;
};
using AllLanes = typename CountLanes<W>::type;

// Lane l of the result is lane (l + S) mod W of x.
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

// Swaps lane l + S of a with lane l of b, for each l whose bit S is 0.
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

// Combines the upper half of the lanes with the lower half until one lane is left, so that the
// reduction order depends on W alone.
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
struct Max {
  VF operator()(VF a, VF b) const { return vmax(a, b); }
};
inline float sum(VF x) { return reduce(x, Add{}); }
inline float max(VF x) { return reduce(x, Max{}); }

// Lane i of the result is reduce(x[i]) for i < n <= W, with the same bits, in fewer operations: two
// half-reduced vectors share one. Overwrites x.
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

// x, with `other` in the lanes past the end of a Tail.
inline VF mask(VF x, Full, float = 0.0f) { return x; }
inline VF mask(VF x, Tail t, float other = 0.0f) { return lanes() < t.count ? x : splat(other); }

// Loads W elements of a row, of which only the first `count` exist; the other lanes are zero.
template <class S>
inline VF load_count(const S* p, int64_t count) {
  if (count >= W) return load(p, Full{});
  return count > 0 ? load(p, Tail{static_cast<int>(count)}) : splat(0.0f);
}
// The same without widening bf16.
inline VF load_raw(const float* p, int64_t count) { return load_count(p, count); }
inline VH load_raw(const bf16* p, int64_t count) {
  VH x = {};
  if (count >= W)
    __builtin_memcpy(&x, p, sizeof x);
  else if (count > 0)
    __builtin_memcpy(&x, p, static_cast<size_t>(count) * sizeof *p);
  return x;
}

// In each block of 2 S x 2 S elements, swaps the two off-diagonal blocks of S x S.
template <int S>
inline void transpose_stage(VF (&r)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(r[i], r[i + S], AllLanes{});
}

// Transposes r: r[i][l] <-> r[l][i], by exchanging blocks of 1, 2, 4, ... lanes.
inline void transpose(VF (&r)[W]) {
  transpose_stage<1>(r);
  transpose_stage<2>(r);
  if constexpr (W > 4) transpose_stage<4 % W>(r);
  if constexpr (W > 8) transpose_stage<8 % W>(r);
}

typedef int8_t Bytes __attribute__((vector_size(W)));

// W 8-bit integers as floats.
inline VF widen_bytes(const int8_t* from) {
#if GPTFAST_VECTOR_BYTES == 64
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (VF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
#elif GPTFAST_VECTOR_BYTES == 32
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (VF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
#else
  Bytes x;
  __builtin_memcpy(&x, from, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, VI), VF);
#endif
}

// Converts floats that are 8-bit integers to bytes. Reads and writes whole vectors: `count` rounded
// up to a multiple of W.
template <class P>
inline void narrow_bytes(const P* from, int64_t count, int8_t* to) {
  for (int64_t i = 0; i < count; i += W) {
    const VI whole = __builtin_convertvector(load(from + i, Full{}), VI);
    const Bytes x = __builtin_convertvector(whole, Bytes);
    __builtin_memcpy(to + i, &x, sizeof x);
  }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
