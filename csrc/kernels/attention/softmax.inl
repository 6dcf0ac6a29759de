// Parts of the softmax that both attention algorithms share: the exponent of a probability, and
// where each row's maximum m and sum l are stored.
#pragma once

#include "../kernels.h"
#include "../simd/elements.inl"
#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The exponent of 2 in the probability of a score s in a row of maximum m: p = exp2(c (s - m)) / l,
// c = scale log2(e). The difference is computed first, because it is exact near the maximum, and 0
// at it, however large the scores are.
template <class M>
inline VF exponent(VF s, M m, float c) {
  return (s - m) * c;
}

// m and l of a head's queries in lse (B, H, 2, Tq).
struct RowSums {
  float *m, *l;

  RowSums(const Attention& s, int64_t head) : m(s.lse + 2 * head * s.Tq), l(m + s.Tq) {}
  void write(int64_t q0, int64_t rows, const float* highest, const float* sums) const {
    copy_row(highest, rows, m + q0);
    copy_row(sums, rows, l + q0);
  }
};

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
