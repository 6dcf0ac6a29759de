// Chooses a token from a row of logits: repetition penalty (Keskar et al., "CTRL",
// arXiv:1909.05858), temperature, top-k, top-p (Holtzman et al., arXiv:1904.09751), min-p (Nguyen
// et al., arXiv:2407.01082), and a draw from the tokens that are left.
//
// The filters keep every token that reaches a threshold, so tokens of equal probability are kept or
// dropped together. Thresholds are found without sorting, by bisection over the bit patterns of
// floats, which as integers have the order of the floats.
#pragma once

#include "../kernels.h"
#include "../simd/elements.inl"
#include "../simd/math.inl"
#include "../simd/philox.inl"
#include "../simd/vec.inl"
#include "../threads/scratch.h"
#include "logits.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

inline RowSum sum_of_row(const float* s, int64_t n) {
  RowSum row = {neg_inf, 0.0f, 0.0f, 0.0f, 0};
  add_logits(s, n, row, nullptr);
  return row;
}
float logprob(const float* logits, int64_t V, int64_t token) {
  return sum_of_row(logits, V).logprob(logits[token]);
}

inline int64_t first_index_of(float value, const float* s, int64_t n) {
  int64_t i = 0;
  while (i < n - 1 && s[i] != value) ++i;
  return i;
}

// Maps the bits of floats to integers of the same order, and back: the function is its own inverse.
inline VI ordered(VI bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// The largest t in [lowest, highest] for which reaches(t) holds. It must hold for `lowest` and,
// once it fails, fail for all larger t.
template <class F>
inline int32_t bisect_last(int32_t lowest, int32_t highest, const F& reaches) {
  int64_t low = lowest, high = highest;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (reaches(static_cast<int32_t>(middle)))
      low = middle;
    else
      high = middle - 1;
  }
  return static_cast<int32_t>(low);
}

// A distribution over n tokens, padded to whole vectors: scores z (-inf past the end) and weights
//   p = exp((z - max z) / temperature),
// which no step normalises.
struct Distribution {
  int64_t width;
  float *z, *p;

  Distribution(const float* logits, int64_t n, ScratchFrame& frame)
      : width(round_up(n, W)), z(alloc<float>(frame, width)), p(alloc<float>(frame, width)) {
    __builtin_memcpy(z, logits, static_cast<size_t>(n) * sizeof(float));
    for (int64_t j = n; j < width; ++j) z[j] = neg_inf;
  }

  void penalize(const float* logits, const int64_t* tokens, int64_t count, float penalty) const {
    for (int64_t i = 0; i < count; ++i) {
      const float logit = logits[tokens[i]];
      z[tokens[i]] = logit > 0.0f ? logit / penalty : logit * penalty;
    }
  }

  void compute_weights(float temperature) const {
    const float highest = highest_score(z, width), c = log2e / temperature;
    for (int64_t j = 0; j < width; j += W) {
      // At a temperature near 0, c may be infinite: 0 * c would be NaN.
      const VF below = load(z + j) - highest;
      store(p + j, below == 0.0f ? splat(1.0f) : exp2(below * c));
    }
  }

  void keep_top_k(int64_t k) const {
    const auto key = [&](int64_t j) { return ordered(bits(load(z + j))); };
    const int32_t highest = ordered(bits(splat(highest_score(z, width))))[0];
    const int32_t lowest = ordered(bits(splat(neg_inf)))[0];
    const int32_t threshold = bisect_last(lowest, highest, [&](int32_t t) {
      VI count = {};
      for (int64_t j = 0; j < width; j += W) count -= key(j) >= t;
      int64_t total = 0;
      for (int i = 0; i < W; ++i) total += count[i];
      return total >= k;
    });
    for (int64_t j = 0; j < width; j += W)
      store(p + j, key(j) >= threshold ? load(p + j) : splat(0.0f));
  }

  // The sum of the weights whose bits are at least t.
  float mass_from(int32_t t) const {
    VF total = splat(0.0f);
    for (int64_t j = 0; j < width; j += W) {
      const VF weight = load(p + j);
      total += bits(weight) >= t ? weight : splat(0.0f);
    }
    return sum(total);
  }

  // Sets weights whose bits are below the threshold to 0.
  void keep_from(int32_t threshold) const {
    for (int64_t j = 0; j < width; j += W) {
      const VF weight = load(p + j);
      store(p + j, bits(weight) >= threshold ? weight : splat(0.0f));
    }
  }

  void keep_top_p(float top_p) const {
    const float wanted = top_p * mass_from(0);
    const int32_t highest = bits(splat(1.0f))[0];
    keep_from(bisect_last(0, highest, [&](int32_t t) { return mass_from(t) >= wanted; }));
  }

  void keep_min_p(float min_p) const { keep_from(bits(splat(min_p))[0]); }

  // The first token whose cumulative weight exceeds u times the total weight, u in [0, 1).
  int64_t draw(double u) const {
    double whole = 0.0, reached = 0.0;
    for (int64_t j = 0; j < width; j += W) whole += static_cast<double>(sum(load(p + j)));
    const double target = u * whole;
    for (int64_t j = 0; j < width; j += W) {
      const double all = static_cast<double>(sum(load(p + j)));
      if (reached + all <= target) {
        reached += all;
        continue;
      }
      int64_t last = j;  // last token of weight > 0, drawn if rounding leaves the target unreached
      for (int64_t i = j; i < j + W; ++i) {
        reached += static_cast<double>(p[i]);
        if (p[i] > 0.0f) last = i;
        if (reached > target) break;
      }
      return last;
    }
    return 0;  // never reached, as target < whole
  }
};

// A uniform number in [0, 1) from 53 bits of the Philox block whose counter is (step, sequence, 0,
// 2^32 - 1), a stream that no dropout uses.
inline double uniform(uint64_t seed, uint32_t sequence, uint32_t step) {
  const Draws draws = philox(VU{} + step, sequence, 0, 0xffffffffu, seed);
  const uint64_t high = draws.word[0][0], low = draws.word[1][0];
  return static_cast<double>((high << 21) + (low >> 11)) * 0x1p-53;
}

Sample sample(const Sampling& how, const SampleRow& s) {
  ScratchFrame frame;
  const RowSum row = sum_of_row(s.logits, s.V);
  const Distribution of(s.logits, s.V, frame);
  for (int64_t i = 0; i < s.top_count; ++i) {
    const float logit = highest_score(of.z, s.V);
    s.top_tokens[i] = first_index_of(logit, of.z, s.V);
    s.top_logprobs[i] = row.logprob(logit);
    of.z[s.top_tokens[i]] = neg_inf;
  }
  for (int64_t i = 0; i < s.top_count; ++i) of.z[s.top_tokens[i]] = s.logits[s.top_tokens[i]];
  if (how.repetition_penalty != 1.0f)
    of.penalize(s.logits, s.seen, s.seen_count, how.repetition_penalty);
  int64_t token;
  if (how.temperature == 0.0f) {
    token = first_index_of(highest_score(of.z, s.V), of.z, s.V);
  } else {
    of.compute_weights(how.temperature);
    if (how.top_k > 0 && how.top_k < s.V) of.keep_top_k(how.top_k);
    if (how.top_p < 1.0f) of.keep_top_p(how.top_p);
    if (how.min_p > 0.0f) of.keep_min_p(how.min_p);
    token = of.draw(uniform(s.seed, s.sequence, s.step));
  }
  return {token, row.logprob(s.logits[token])};
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
