// The softmax of a row of logits, for losses and log-probabilities: its running maximum and sum,
// over as many parts as the row arrives in.
#pragma once

#include "../simd/math.inl"
#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The largest of n scores; neg_inf if there are none.
inline float highest_score(const float* s, int64_t n) {
  VF highest = splat(neg_inf);
  for_vectors(n, [&](int64_t j, auto part) {
    highest = vmax(highest, mask(load(s + j, part), part, neg_inf));
  });
  return max(highest);
}

// The running maximum m and the sum l = sum_j exp(s_j - m) of a row of logits, and its target's
// logit. m and l are kept apart: m + ln l would be rounded to the precision of m. `below`, of the
// n logits so far, is sum_j (s_j - m), where that is asked for.
struct RowSum {
  float m, l, target, below;
  int64_t n;

  // The log-probability of a token whose logit is `logit`.
  float logprob(float logit) const { return (logit - m) - __builtin_logf(l); }
};

// Adds n more logits of the row, to `below` as well if BELOW. `exponentials`, unless null, receives
// exp(s_j - m).
template <bool BELOW = false>
inline void add_logits(const float* s, int64_t n, RowSum& row, float* exponentials) {
  const float highest = highest_score(s, n), top = row.m > highest ? row.m : highest;
  const float shift = top == neg_inf ? 0.0f : top;  // -inf - (-inf) would be NaN
  VF total = splat(0.0f), below = splat(0.0f);
  for_vectors(n, [&](int64_t j, auto part) {
    const VF from_top = load(s + j, part) - shift;
    const VF e = exp(from_top);
    if (exponentials) store(exponentials + j, e, part);
    total += mask(e, part);
    if constexpr (BELOW) below += mask(from_top, part);
  });
  if constexpr (BELOW) {
    if (row.n > 0) row.below += static_cast<float>(row.n) * (row.m - shift);
    row.below += sum(below);
    row.n += n;
  }
  row.l = row.l * (row.m == neg_inf ? 0.0f : exp(splat(row.m - top))[0]) + sum(total);
  row.m = top;
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
