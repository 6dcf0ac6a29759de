// Clipping by the gradients' norm and the step of AdamW (Loshchilov and Hutter, arXiv:1711.05101),
// over all parameters in two passes: one computes the norm, the other does the rest.
//
//   g *= min(1, clip / (|g| + 1e-6)),  m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2
//   w' = decay w - rate m' / (sqrt(v') inv_sqrt_correction + eps),
//   decay = 1 - lr * weight decay, rate = lr / (1 - b1^t), inv_sqrt_correction = 1 / sqrt(1 - b2^t)
//   average' = average + pull (w' - average),  pull = 1 - min(ema, (1 + t) / (10 + t))
#pragma once

#include "../kernels.h"
#include "../simd/elements.inl"
#include "../simd/math.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "../threads/scratch.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Elements per task. The number is fixed, so that the norm is summed in one order for any number of
// threads.
constexpr int64_t ADAMW_CHUNK = 1 << 14;

// Elements [first, first + count) of one parameter: the work of a task.
struct AdamWChunk {
  const AdamWParam* param;
  int64_t first, count;
};

// The sum of squares of n elements.
inline double squares(const float* g, int64_t n) {
  VF total = splat(0.0f);
  for_vectors(n, [&](int64_t j, auto part) {
    const VF value = load(g + j, part);
    total += value * value;
  });
  return sum(total);
}

template <bool AVERAGED>
inline void adamw_chunk(const AdamW& s, const AdamWChunk& chunk, float factor) {
  const AdamWParam& p = *chunk.param;
  for_vectors(chunk.count, [&](int64_t jj, auto part) {
    const int64_t j = chunk.first + jj;
    const VF g = load(p.grad + j, part) * factor;
    const VF m = load(p.mean + j, part), v = load(p.square + j, part);
    const VF mean = m + (g - m) * (1.0f - s.beta1), square = v * s.beta2 + g * g * (1.0f - s.beta2);
    const VF w = load(p.weight + j, part) * p.decay;
    store(p.mean + j, mean, part);
    store(p.square + j, square, part);
    const VF moved = w - p.rate * mean / (vsqrt(square) * p.inv_sqrt_correction + s.eps);
    store(p.weight + j, moved, part);
    if constexpr (AVERAGED) {
      const VF average = load(p.average + j, part);
      store(p.average + j, average + (moved - average) * p.pull, part);
    }
  });
}

void adamw(const AdamW& s, const Parallel& parallel) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < s.count; ++i) chunks += divide_up(s.params[i].n, ADAMW_CHUNK);
  ScratchFrame frame;
  AdamWChunk* chunk = alloc<AdamWChunk>(frame, chunks);
  double* partial = alloc<double>(frame, chunks);
  int64_t next = 0;
  for (int64_t i = 0; i < s.count; ++i)
    for (int64_t at = 0; at < s.params[i].n; at += ADAMW_CHUNK)
      chunk[next++] = {s.params + i, at, min(ADAMW_CHUNK, s.params[i].n - at)};
  run_tasks(parallel, chunks, [&](int64_t task) {
    partial[task] = squares(chunk[task].param->grad + chunk[task].first, chunk[task].count);
  });
  double total = 0.0;
  for (int64_t i = 0; i < chunks; ++i) total += partial[i];
  *s.norm = static_cast<float>(__builtin_sqrt(total));
  const float factor = s.clip / (*s.norm + 1e-6f);  // a NaN stays and shows in the weights
  // Without a limit it is 1, also if the norm overflows.
  const float used = factor > 1.0f || s.clip == __builtin_inff() ? 1.0f : factor;
  run_tasks(parallel, chunks, [&](int64_t task) {
    if (chunk[task].param->average != nullptr)
      adamw_chunk<true>(s, chunk[task], used);
    else
      adamw_chunk<false>(s, chunk[task], used);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
