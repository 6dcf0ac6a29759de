// Attention and its backward. Each call chooses its algorithm once, by the number of keys Tk:
// small.inl reads few keys in place, blocked.inl packs many.
#pragma once

#include "../kernels.h"
#include "../simd/vec.inl"
#include "blocked.inl"
#include "blocked_backward.inl"
#include "small.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

template <class T>
void attention_typed(const Attention& s, const Parallel& parallel) {
  if (s.Tk <= max_small_keys<T>) return small_attention<T>(s, parallel);
  blocked_attention<T>(s, parallel);
}

void attention(const Attention& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return attention_typed<float>(s, parallel);
  attention_typed<bf16>(s, parallel);
}

template <class T>
void attention_backward_typed(const AttentionBackward& grad, const Parallel& parallel) {
  if (grad.forward.Tk <= max_small_keys<T>) return small_attention_backward<T>(grad, parallel);
  blocked_attention_backward<T>(grad, parallel);
}

void attention_backward(const AttentionBackward& s, const Parallel& parallel) {
  if (s.forward.dtype == DType::f32) return attention_backward_typed<float>(s, parallel);
  attention_backward_typed<bf16>(s, parallel);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
