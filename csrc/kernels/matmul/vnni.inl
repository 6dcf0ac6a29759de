// Products with 8-bit weights in integer arithmetic, by the dot product of four bytes (VNNI). A row
// of activations is rounded to 16-bit integers, KC columns at a time: x_k = unit q_k, where unit is
// a power of two that is finer than the spacing of bf16 at the larger x_k. q has two signed digits
// of 8 bits:
//
//   q = 256 high + low,   sum_k q_k w_k = 256 sum_k high_k w_k + sum_k low_k w_k
//
// The instruction multiplies unsigned by signed bytes, so the weights are stored as w + 128:
//
//   sum_k high_k w_k = sum_k high_k (w_k + 128) - 128 sum_k high_k
//
// All of these sums are exact in 32 bits (and in fp32: 128 * 128 KC < 2^24), so a row has the same
// bits in any batch and at every level.
#pragma once

#include "../simd/elements.inl"
#include "../simd/vec.inl"
#include "../threads/scratch.h"
#include "layout.inl"
#include "prefetch.inl"
#include "weights.inl"

// Whether this level has kernels for these products, which run on those of its processors that have
// VNNI; the AMX level has none.
#if GPTFAST_VECTOR_BYTES >= 32 && !GPTFAST_AMX && __has_include(<avxvnniintrin.h>)
#define GPTFAST_VNNI 1
#else
#define GPTFAST_VNNI 0
#endif

namespace gptfast::GPTFAST_LEVEL {
namespace {

#if GPTFAST_VNNI

// The sizes of these products.
struct Fixed16 {
  static constexpr int64_t KC = 576;
  static constexpr int MR = W == 16 ? 6 : 3;  // two accumulators per vector of C
};

// KC columns of a row of A as 16-bit integers. Their digits are stored separately: for each unit of
// four columns, 4 high digits and then 4 low digits.
struct FixedRow {
  float unit;         // NaN if an x is not finite
  int32_t high, low;  // the sums of the high and of the low digits, times -128
};

// Bytes from the digits of one row of k columns to those of the next.
inline int64_t digits_stride(int64_t k) { return row_stride<int8_t>(round_up(2 * k, 4 * W)); }

// dot: acc + sum_e b_e a_e in each lane, over its four unsigned bytes of b and signed bytes of a.
// digits_of: the digits of 2 W 16-bit integers q as [high x 4][low x 4] for each unit of four. The
// caller passes r = q + 128: the upper byte of r is `high`, and the lower byte is `low` with its
// top bit flipped.
#if GPTFAST_VECTOR_BYTES == 64
#define GPTFAST_VNNI_TARGET __attribute__((target("avx512vnni")))
GPTFAST_VNNI_TARGET inline VI dot(VI acc, VI b, VI a) {
  return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, (__m512i)a);
}
inline VI digits_of(VI first, VI second) {
  const __m512i r = _mm512_packs_epi32((__m512i)first, (__m512i)second);  // per 128-bit lane
  const __m512i pairs = _mm512_xor_si512(r, _mm512_set1_epi16(0x80));
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
  const __m512i units = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return (VI)_mm512_permutexvar_epi64(units, _mm512_shuffle_epi8(pairs, order));
}
#else
#define GPTFAST_VNNI_TARGET __attribute__((target("avxvnni")))
GPTFAST_VNNI_TARGET inline VI dot(VI acc, VI b, VI a) {
  return (VI)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)b, (__m256i)a);
}
inline VI digits_of(VI first, VI second) {
  const __m256i r = _mm256_packs_epi32((__m256i)first, (__m256i)second);
  const __m256i pairs = _mm256_xor_si256(r, _mm256_set1_epi16(0x80));
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
  return (VI)_mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs, order), 0xd8);
}
#endif

// Reductions of integers by those of vec.inl, which permute floats.
inline int32_t largest(VI x) {
  const float found =
      reduce((VF)x, [](VF a, VF b) { return (VF)(bits(a) > bits(b) ? bits(a) : bits(b)); });
  return bits(splat(found))[0];
}
inline int32_t sum(VI x) {
  const float found = reduce((VF)x, [](VF a, VF b) { return (VF)(bits(a) + bits(b)); });
  return bits(splat(found))[0];
}

// Rounds k elements of a row to 16-bit integers and writes their digits.
template <class T>
GPTFAST_VNNI_TARGET inline FixedRow round_to_fixed(const T* x, int64_t k, int8_t* digits) {
  VI magnitude = {};  // bits of |x|: they have the order of |x|; infinity and NaN are the largest
  for_vectors(k, [&](int64_t j, auto part) {
    const VI value = bits(load(x + j, part)) & 0x7fffffff;
    magnitude = value > magnitude ? value : magnitude;
  });
  constexpr int32_t infinity = 0x7f800000;
  const int32_t top = largest(magnitude);
  // The biased exponent of the largest |x|, or the next one if two digits could not hold its q
  // otherwise, because of the carry from the low digit: |q| < 127.5 * 256. It is at least 15, so
  // that unit and its inverse are normal numbers.
  const int32_t exponent = static_cast<int32_t>(max((top + 0x00020000) >> 23, 15));
  const VF unit = (VF)(VI{} + (top < infinity ? (exponent - 14) << 23 : infinity + 1));
  const VF inverse = (VF)(VI{} + ((268 - exponent) << 23));
  constexpr float shift = 0x1.8p23f;  // adding it leaves round(x / unit) in the low bits of the sum
  const VI ones = VI{} + 0x01010101, even = (lanes() & 1) - 1;
  VI sums = {};
  for (int64_t j = 0; j < k; j += 2 * W, digits += 4 * W) {
    const VF first = load_count(x + j, k - j), second = load_count(x + j + W, k - j - W);
    const VI zero = bits(splat(shift)) - 128;
    const VI both =
        digits_of(bits(first * inverse + shift) - zero, bits(second * inverse + shift) - zero);
    __builtin_memcpy(digits, &both, sizeof both);
    sums = dot(sums, ones, both);
  }
  return {unit[0], -128 * sum(sums & even), -128 * sum(sums & ~even)};
}

// Broadcasts four bytes to every lane.
GPTFAST_VNNI_TARGET inline VI repeat_quad(const int8_t* from) {
  int32_t quad;
  __builtin_memcpy(&quad, from, sizeof quad);
  return quad - VI{};
}

// M rows of A times NV vectors of each of PANELS panels of B, `panel` bytes apart; M or PANELS
// is 1. `row` is the stride of the digits `a`.
template <int M, int PANELS, int NV>
GPTFAST_VNNI_TARGET inline void vnni_kernel(int64_t units, const int8_t* a, int64_t row,
                                            const FixedRow* fixed, const int8_t* b, int64_t panel,
                                            float* c, int64_t ldc, bool add,
                                            const Prefetch& prefetch) {
  constexpr int NR = 2 * W, VECTORS = PANELS * NV;
  VI high[M][VECTORS], low[M][VECTORS];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
      high[i][v] = fixed[i].high - VI{}, low[i][v] = fixed[i].low - VI{};
  const int8_t* base[(M + 2) / 3];
#pragma GCC unroll 2
  for (int i = 0; i < (M + 2) / 3; ++i) base[i] = a + 3 * i * row;
  for (int64_t u = 0; u < units; ++u, b += NR * QUAD) {
    prefetch.fetch(u);
    VI column[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
      __builtin_memcpy(&column[v], b + v / NV * panel + v % NV * W * QUAD, sizeof column[v]);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const int8_t* digits = base[i / 3] + i % 3 * row;
      const VI h = repeat_quad(digits), l = repeat_quad(digits + QUAD);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        high[i][v] = dot(high[i][v], column[v], h);
        low[i][v] = dot(low[i][v], column[v], l);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < (M + 2) / 3; ++i) base[i] += 2 * QUAD;
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* p = c + i * ldc + v / NV * NR + v % NV * W;
      // Both products are exact, by powers of two, so that the sum has the same bits with and
      // without fused multiply-add.
      const VF total =
          __builtin_convertvector(high[i][v], VF) * 256.0f + __builtin_convertvector(low[i][v], VF);
      store(p, add ? load(p) + total * fixed[i].unit : total * fixed[i].unit);
    }
}

using VnniKernel = void (*)(int64_t, const int8_t*, int64_t, const FixedRow*, const int8_t*,
                            int64_t, float*, int64_t, bool, const Prefetch&);

// The table of microkernels for one panel: rows[m] computes m >= 1 rows of NV vectors.
template <int NV, int M = Fixed16::MR>
struct VnniKernels : VnniKernels<NV, M - 1> {
  constexpr VnniKernels() { this->rows[M] = vnni_kernel<M, 1, NV>; }
};
template <int NV>
struct VnniKernels<NV, 0> {
  VnniKernel rows[Fixed16::MR + 1] = {};
};

struct VnniKernelChoice {
  VnniKernel kernel;
  int64_t columns;  // columns that the kernel computes
};
inline VnniKernelChoice vnni_kernel_of(int64_t rows, int64_t n) {
  constexpr int64_t NR = 2 * W;
  static constexpr VnniKernels<1> one_vector;
  static constexpr VnniKernels<2> two_vectors;
  return {n <= W ? one_vector.rows[rows] : two_vectors.rows[rows], min(n, NR)};
}
// A single row needs several panels at once, because each step of a sum waits for the one before.
inline VnniKernelChoice vnni_kernel_of_row(int64_t n) {
  constexpr int64_t NR = 2 * W;
  constexpr int max_panels = W == 16 ? 4 : 2;
  if (n >= max_panels * NR) return {vnni_kernel<1, max_panels, 2>, max_panels * NR};
  if (n >= 2 * NR) return {vnni_kernel<1, 2, 2>, 2 * NR};
  return vnni_kernel_of(1, n);
}

// gemm() with rows of A in place, `row` elements apart, and b (K, N) in panels `panel` bytes apart.
template <class T, class Done>
inline void gemm_vnni(int64_t m, int64_t n, int64_t k, const T* a, int64_t row, const int8_t* b,
                      int64_t panel, float* c, int64_t ldc, bool add, const Done& done) {
  constexpr int64_t MR = Fixed16::MR, NR = 2 * W, KC = Fixed16::KC;
  ScratchFrame frame;
  const int64_t stride = digits_stride(min(k, KC)), part = NR * QUAD / divide_up(m, MR);
  int8_t* digits = alloc<int8_t>(frame, m * stride);
  FixedRow* fixed = alloc<FixedRow>(frame, m);
  for (int64_t k0 = 0; k0 < k; k0 += KC, b += KC * NR) {
    const int64_t depth = min(KC, k - k0), units = divide_up(depth, QUAD);
    for (int64_t i = 0; i < m; ++i)
      fixed[i] = round_to_fixed(a + i * row + k0, depth, digits + i * stride);
    for (int64_t n0 = 0; n0 < n;) {
      const int8_t* at = b + n0 / NR * panel;
      Prefetch prefetch = {reinterpret_cast<const char*>(n0 + NR < n ? at + panel : at), part};
      int64_t columns = 0;
      for (int64_t m0 = 0; m0 < m; m0 += MR, prefetch.data += units * part) {
        const int64_t rows = min(MR, m - m0);
        const VnniKernelChoice chosen =
            m == 1 ? vnni_kernel_of_row(n - n0) : vnni_kernel_of(rows, n - n0);
        chosen.kernel(units, digits + m0 * stride, stride, fixed + m0, at, panel, c + m0 * ldc + n0,
                      ldc, add || k0 > 0, prefetch);
        columns = chosen.columns;
        if (k0 + KC >= k) done(m0, rows, n0, columns);
      }
      n0 += columns;
    }
  }
}

#endif

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
