// Linear layers and their backward. The forward applies LayerNorm while it reads the left-hand
// side, and bias, dropout and residual while it writes the result.
#pragma once

#include "../kernels.h"
#include "../matmul/epilogue.inl"
#include "../matmul/gemm.inl"
#include "../matmul/layout.inl"
#include "../matmul/packed.inl"
#include "../matmul/prefetch.inl"
#include "../matmul/tasks.inl"
#include "../matmul/weight_grad.inl"
#include "../matmul/weights.inl"
#include "../simd/elements.inl"
#include "../simd/vec.inl"
#include "../threads/scratch.h"
#include "rows.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

template <class T, class Y>
void linear_typed(const Linear& s, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const T* x = static_cast<const T*>(s.x);
  const T* residual = static_cast<const T*>(s.residual);
  Y* y = static_cast<Y*>(s.y);
  ScratchFrame frame;
  const RowNorm norm(s.norm, s.K, frame);
  const float* bias = floats(s.bias, s.N, frame);
  const PackedWeight<P> w = weight_transposed<T>(s.weight, s.N, s.K, frame, parallel);

  for_blocks(s.M, s.N, s.K * w.element_bytes(), Tile<P>::NR, parallel,
             [&](int64_t m0, int64_t rows, int64_t n0, int64_t n, int64_t ld) {
               ScratchFrame task_frame;
               P* copy = alloc<P>(task_frame, rows * row_stride<P>(padded_k<P>(s.K)));
               const Lhs<P> a = norm_rows(x, m0, rows, s.K, norm, n0 == 0, copy);
               float* c = alloc<float>(task_frame, rows * ld);
               const PackedWeight<P> columns = w.columns(n0);
               const int64_t at = m0 * s.N + n0;
               const auto fetch = [&](int64_t i, int64_t tile, int64_t j, int64_t width) {
                 fetch_block<true>(y + at + i * s.N + j, s.N, tile, width);
                 if (residual) fetch_block<false>(residual + at + i * s.N + j, s.N, tile, width);
               };
               const auto finish = [&](int64_t i0, int64_t tile, int64_t j, int64_t width) {
                 apply_scales(columns.scales ? columns.scales + j : nullptr, tile, width,
                              c + i0 * ld + j, ld);
                 for (int64_t i = i0; i < i0 + tile; ++i) {
                   const int64_t row = at + i * s.N + j;
                   finish_row(c + i * ld + j, bias ? bias + n0 + j : nullptr,
                              residual ? residual + row : nullptr, width, y + row);
                 }
               };
               if (s.dropout.threshold == 0)
                 return gemm(rows, n, s.K, a, columns, c, ld, false, Fetching{fetch, finish});
               gemm(rows, n, s.K, a, columns, c, ld, false);
               apply_scales(columns.scales, rows, n, c, ld);
               finish_dropped(s.dropout, m0, rows, n0, n, bias, residual, s.N, c, ld, y);
             });
}

template <class T>
void linear_backward_typed(const LinearBackward& s, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const Linear& f = s.forward;
  const int64_t M = f.M, N = f.N, K = f.K, ld = padded_n<P>(K), ldg = padded_n<P>(N);
  const T* x = static_cast<const T*>(f.x);
  const T* dy = static_cast<const T*>(s.dy);
  const T* add = static_cast<const T*>(s.add);
  T* dx = static_cast<T*>(s.dx);
  const bool with_dx = dx != nullptr, with_dweight = s.dweight.data != nullptr;
  ScratchFrame frame;
  const RowNorm norm(f.norm, K, frame);
  const Rhs<P> w = with_dx ? weight_straight<P>(f.weight, N, K, frame, parallel) : Rhs<P>{};
  const RowParts<P> parts(M, N * K, N + K, parallel);
  const WeightSums<P> sums(s.dweight, with_dweight ? N : 0, K, parts.count(), frame);
  const int64_t blocks = parts.blocks();
  const ColumnSums dbias(blocks, s.dbias.data ? N : 0, frame);
  const ColumnSums dln_w(blocks, norm.weight ? K : 0, frame),
      dln_b(blocks, norm.weight ? K : 0, frame);

  parts.for_each([&](const RowPart& part) {
    ScratchFrame part_frame;
    const WeightGrad<P> dweight(sums, part.index, with_dweight ? part.chunk : 0, part_frame);
    const auto produce = [&](int64_t block, int64_t slot) {
      const int64_t m0 = block * ROWS, rows = min(ROWS, M - m0);
      ScratchFrame task_frame;
      P* copy = alloc<P>(task_frame, rows * row_stride<P>(padded_k<P>(N)));
      float* dn = alloc<float>(task_frame, rows * ld);
      // G = dropout(dY), dN = G W
      const auto take = [&](const auto* g, int64_t stride) {
        if (with_dx) gemm(rows, K, N, lhs_rows(g, stride, rows, N, copy), w, dn, ld, false);
        if (with_dweight) dweight.set_dy(slot, g, stride, rows, 0, N);
        if (s.dbias.data) dbias.add_rows(block, g, stride, rows);
      };
      if (f.dropout.threshold > 0) {
        float* g = alloc<float>(task_frame, rows * ldg);
        dropped_rows(f.dropout, dy, m0, rows, N, g, ldg);
        take(g, ldg);
      } else {
        take(dy + m0 * N, N);
      }
      const auto added = [&](int64_t m) { return add ? add + m * K : nullptr; };
      if (!norm.weight) {
        for (int64_t i = 0; i < (with_dx ? rows : 0); ++i)
          finish_row(dn + i * ld, nullptr, added(m0 + i), K, dx + (m0 + i) * K);
        if (with_dweight) dweight.set_x(slot, x + m0 * K, K, rows, 0, K);
        return;
      }
      float* normalized = alloc<float>(task_frame, rows * ld);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t m = m0 + i;
        const Moments row = {norm.mean[m], norm.rstd[m]};
        if (with_dx)
          norm_backward_row(dn + i * ld, x + m * K, added(m), K, row, norm, dln_w.block(block),
                            dln_b.block(block), normalized + i * ld, dx + m * K);
        else if (with_dweight)
          normalize(x + m * K, K, row, norm, normalized + i * ld);
      }
      if (with_dweight) dweight.set_x(slot, normalized, ld, rows, 0, K);
    };
    part.for_chunks(produce, [&](int64_t rows, bool more) {
      if (with_dweight) dweight.accumulate(rows, more, 0, N, part.parallel);
    });
  });
  if (with_dweight) sums.finish(M == 0, parallel);
  dbias.finish(s.dbias);
  dln_w.finish(s.dnorm.weight);
  dln_b.finish(s.dnorm.bias);
}

void linear(const Linear& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return linear_typed<float, float>(s, parallel);
  if (s.y_dtype == DType::f32) return linear_typed<bf16, float>(s, parallel);
  linear_typed<bf16, bf16>(s, parallel);
}

void linear_backward(const LinearBackward& s, const Parallel& parallel) {
  if (s.forward.dtype == DType::f32) return linear_backward_typed<float>(s, parallel);
  linear_backward_typed<bf16>(s, parallel);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
