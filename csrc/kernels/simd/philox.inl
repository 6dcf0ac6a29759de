// Random numbers by Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), for dropout masks and sampling.
//
// Element (i, j) of the mask of matrix n takes 16 bits of the Philox block with counter
// (j, i / 8, n, stream) and key = seed: half i % 2 of word (i % 8) / 2. The element is dropped if
// these bits are below the threshold, round(65536 p), and otherwise multiplied by
// 1 / (1 - threshold / 65536). Thus one block serves 8 rows of a column; W columns are computed at
// a time.
#pragma once

#include "../kernels.h"
#include "vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int DROPOUT_ROWS = 8;  // rows of one column that a Philox block serves

// The high and low words of the 64-bit products a * m.
inline void multiply_wide(VU a, uint32_t m, VU& high, VU& low) {
#if GPTFAST_VECTOR_BYTES == 64
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(m);
  const __m512i even = _mm512_mul_epu32(x, y);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  high = (VU)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (VU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif GPTFAST_VECTOR_BYTES == 32
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(m);
  const __m256i even = _mm256_mul_epu32(x, y);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  high = (VU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (VU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// W Philox blocks: lane l of word[i] is word i of block l.
struct Draws {
  VU word[4];
};

// The blocks with counters (c0[l], c1, c2, c3) and the key `seed`.
inline Draws philox(VU c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  VU x0 = c0, x1 = VU{} + c1, x2 = VU{} + c2, x3 = VU{} + c3;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    VU high0, low0, high1, low1;
    multiply_wide(x0, 0xD2511F53u, high0, low0);
    multiply_wide(x2, 0xCD9E8D57u, high1, low1);
    x0 = high1 ^ x1 ^ k0;
    x2 = high0 ^ x3 ^ k1;
    x1 = low1;
    x3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

struct DropoutFactors {
  VF row[DROPOUT_ROWS];  // 0 or 1 / (1 - p)
};

// The factors of rows i .. i+7 (i a multiple of 8) and columns j .. j+W-1 of matrix n.
inline DropoutFactors dropout_factors(const Dropout& d, int64_t n, int64_t i, int64_t j) {
  const float scale =
      d.threshold < 65536 ? 65536.0f / static_cast<float>(65536 - d.threshold) : 0.0f;
  const Draws draws =
      philox((VU)lanes() + static_cast<uint32_t>(j), static_cast<uint32_t>(i / DROPOUT_ROWS),
             static_cast<uint32_t>(n), d.stream, d.seed);
  DropoutFactors factors;
#pragma GCC unroll 8
  for (int row = 0; row < DROPOUT_ROWS; ++row) {
    const VU word = draws.word[row / 2];
    const VI draw = (VI)(row % 2 ? word >> 16 : word & 0xffffu);
    factors.row[row] = draw < d.threshold ? splat(0.0f) : splat(scale);
  }
  return factors;
}

// Multiplies x (rows, n) by the factors of rows i0 .. and columns j0 .. of matrix `matrix`. i0 is a
// multiple of 8, and each row of x is writable up to a whole vector.
inline void apply_dropout(const Dropout& d, int64_t matrix, int64_t i0, int64_t j0, int64_t rows,
                          int64_t n, float* x, int64_t ld) {
  if (d.threshold == 0) return;
  for (int64_t i = 0; i < rows; i += DROPOUT_ROWS)
    for (int64_t j = 0; j < n; j += W) {
      const DropoutFactors factors = dropout_factors(d, matrix, i0 + i, j0 + j);
      const int64_t count = min(DROPOUT_ROWS, rows - i);
      for (int64_t row = 0; row < count; ++row) {
        float* p = x + (i + row) * ld + j;
        store(p, load(p) * factors.row[row]);
      }
    }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
