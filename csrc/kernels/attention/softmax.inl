// The softmax of a query's scores: the powers that it sums up, and where a row's maximum m and sum
// l lie.
#pragma once

#include "../kernels.h"
#include "../simd/elements.inl"
#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Of a score s and the maximum m of its row, the power of 2 that its probability is before it is
// divided by the sum of them all: p = exp2(c (s - m)) / l, c = scale log2(e). The difference comes
// first: it is exact near the maximum, and 0 at it, however large the scores are.
template <class M>
inline VF exponent(VF s, M m, float c) {
  return (s - m) * c;
}

// Where m and l of a head's queries lie.
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
