// The feed-forward block of a pre-norm transformer. Hidden activations are computed in blocks of
// rows and columns that stay in the cache:
//   n = norm(x), u = n W1' + b1, y = x + dropout(gelu(u) W2' + b2)
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
#include "../simd/math.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "../threads/scratch.h"
#include "rows.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Hidden columns per block; a multiple of every NR and of WeightGrad's groups.
constexpr int64_t HIDDEN_BLOCK = 576;

static_assert(HIDDEN_BLOCK % WeightGrad<float>::GROUP == 0 &&
              HIDDEN_BLOCK % WeightGrad<bf16>::GROUP == 0);

// GELU and its derivative.
struct GeluValue {
  VF value, slope;
};

// erf: u Phi(u). tanh: u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) (Hendrycks and Gimpel,
// arXiv:1606.08415). erf is computed to the precision that P needs.
template <class P>
inline GeluValue gelu(VF u, Gelu kind) {
  if (kind == Gelu::erf) {
    const Normal at = normal(u, P{});
    return {u * at.cdf, at.slope};
  }
  constexpr float scale = 0.7978845608f, cubic = 0.044715f;
  const VF t = tanh(scale * (u + cubic * u * u * u));
  const VF inner = scale * (1.0f + 3.0f * cubic * u * u);
  return {0.5f * u * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * u * (1.0f - t * t) * inner};
}

// h = gelu(u scales + b1) for a tile of u. `hidden`, unless null, receives the values before GELU
// for the backward. Pointers are at the tile's first element.
template <class T, class P>
inline void activate(int64_t rows, int64_t n, float* u, int64_t ldu, const float* scales,
                     const float* b1, Gelu kind, T* hidden, int64_t ld_hidden, P* h, int64_t ldh) {
  apply_scales(scales, rows, n, u, ldu);
  for_vectors(n, [&](int64_t j, auto part) {
    const VF bias = b1 ? load(b1 + j, part) : splat(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      VF value = load(u + i * ldu + j, part);
      if (b1) value += bias;
      if (hidden) store(hidden + i * ld_hidden + j, value, part);
      store(h + i * ldh + j, gelu<P>(value, kind).value, part);
    }
  });
}

// The parameters as the forward reads them: vectors in fp32, weights packed.
template <class T>
struct FfnOperands {
  using P = typename OperandOf<T>::type;

  RowNorm norm;
  const float *b1, *b2;
  PackedWeight<P> w1, w2;

  FfnOperands(const Ffn& s, ScratchFrame& frame, const Parallel& parallel)
      : norm(s.norm, s.C, frame),
        b1(floats(s.b1, s.F, frame)),
        b2(floats(s.b2, s.C, frame)),
        w1(weight_transposed<T>(s.w1, s.F, s.C, frame, parallel)),
        w2(weight_transposed<T>(s.w2, s.C, s.F, frame, parallel)) {}
};

// y = x + dropout(c scales + b2) for rows [m0, m0 + rows) and columns [c0, c0 + n).
template <class T>
inline void finish_ffn(const Ffn& s, const FfnOperands<T>& with, int64_t m0, int64_t rows,
                       int64_t c0, int64_t n, float* c, int64_t ld) {
  apply_scales(with.w2.scales ? with.w2.scales + c0 : nullptr, rows, n, c, ld);
  finish_dropped(s.dropout, m0, rows, c0, n, with.b2, static_cast<const T*>(s.x), s.C, c, ld,
                 static_cast<T*>(s.y));
}

// A task computes whole rows of y, the hidden activations in blocks of HIDDEN_BLOCK columns.
template <class T>
void ffn_by_rows(const Ffn& s, const FfnOperands<T>& with, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const int64_t M = s.M, C = s.C, F = s.F, ld = padded_n<P>(C),
                h_stride = row_stride<P>(HIDDEN_BLOCK);
  run_tasks(parallel, divide_up(M, ROWS), [&](int64_t block) {
    const int64_t m0 = block * ROWS, rows = min(ROWS, M - m0);
    ScratchFrame frame;
    P* copy = alloc<P>(frame, rows * row_stride<P>(padded_k<P>(C)));
    const Lhs<P> a = norm_rows(static_cast<const T*>(s.x), m0, rows, C, with.norm, true, copy);
    float* u = alloc<float>(frame, rows * HIDDEN_BLOCK);
    P* h = alloc<P>(frame, rows * h_stride);
    float* c = alloc<float>(frame, rows * ld);
    for (int64_t f0 = 0; f0 < F; f0 += HIDDEN_BLOCK) {
      const int64_t f = min(HIDDEN_BLOCK, F - f0), padded = padded_k<P>(f);
      const PackedWeight<P> w1 = with.w1.columns(f0);
      T* hidden = s.hidden ? static_cast<T*>(s.hidden) + m0 * F + f0 : nullptr;
      const auto fetch = [&](int64_t i, int64_t tile, int64_t j, int64_t columns) {
        if (hidden) fetch_block<true>(hidden + i * F + j, F, tile, columns);
      };
      const auto finish = [&](int64_t i, int64_t tile, int64_t j, int64_t columns) {
        activate(tile, columns, u + i * HIDDEN_BLOCK + j, HIDDEN_BLOCK,
                 w1.scales ? w1.scales + j : nullptr, with.b1 ? with.b1 + f0 + j : nullptr, s.gelu,
                 hidden ? hidden + i * F + j : nullptr, F, h + i * h_stride + j, h_stride);
      };
      gemm(rows, f, C, a, w1, u, HIDDEN_BLOCK, false, Fetching{fetch, finish});
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = f; j < padded; ++j) h[i * h_stride + j] = P{};
      gemm(rows, C, f, Lhs<P>{h, h_stride, Tile<P>::KU}, with.w2.rows(f0), c, ld, f0 > 0);
    }
    finish_ffn(s, with, m0, rows, 0, C, c, ld);
  });
}

// For few rows: the threads share the columns of both products. The sums and their order are those
// of ffn_by_rows.
template <class T>
void ffn_by_columns(const Ffn& s, const FfnOperands<T>& with, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const int64_t M = s.M, C = s.C, F = s.F, padded = padded_k<P>(F),
                h_stride = row_stride<P>(padded);
  ScratchFrame frame;
  P* h = alloc<P>(frame, M * h_stride);
  for_blocks(M, F, C * with.w1.element_bytes(), Tile<P>::NR, parallel,
             [&](int64_t m0, int64_t rows, int64_t f0, int64_t n, int64_t ld) {
               ScratchFrame task_frame;
               P* copy = alloc<P>(task_frame, rows * row_stride<P>(padded_k<P>(C)));
               const Lhs<P> a =
                   norm_rows(static_cast<const T*>(s.x), m0, rows, C, with.norm, f0 == 0, copy);
               float* u = alloc<float>(task_frame, rows * ld);
               const PackedWeight<P> w1 = with.w1.columns(f0);
               gemm(rows, n, C, a, w1, u, ld, false,
                    [&](int64_t i, int64_t tile, int64_t j, int64_t columns) {
                      activate(
                          tile, columns, u + i * ld + j, ld, w1.scales ? w1.scales + j : nullptr,
                          with.b1 ? with.b1 + f0 + j : nullptr, s.gelu, static_cast<T*>(nullptr), F,
                          h + (m0 + i) * h_stride + f0 + j, h_stride);
                    });
               if (f0 + n == F)
                 for (int64_t i = 0; i < rows; ++i)
                   for (int64_t j = F; j < padded; ++j) h[(m0 + i) * h_stride + j] = P{};
             });
  for_blocks(M, C, F * with.w2.element_bytes(), Tile<P>::NR, parallel,
             [&](int64_t m0, int64_t rows, int64_t c0, int64_t n, int64_t ld) {
               ScratchFrame task_frame;
               float* c = alloc<float>(task_frame, rows * ld);
               for (int64_t f0 = 0; f0 < F; f0 += HIDDEN_BLOCK)
                 gemm(rows, n, min(HIDDEN_BLOCK, F - f0),
                      Lhs<P>{h + m0 * h_stride + f0, h_stride, Tile<P>::KU},
                      with.w2.columns(c0).rows(f0), c, ld, f0 > 0);
               finish_ffn(s, with, m0, rows, c0, n, c, ld);
             });
}

template <class T>
void ffn_typed(const Ffn& s, const Parallel& parallel) {
  ScratchFrame frame;
  const FfnOperands<T> with(s, frame, parallel);
  const bool few = divide_up(s.M, ROWS) < 4 * parallel.threads;
  if (few && !s.hidden && s.dropout.threshold == 0) return ffn_by_columns(s, with, parallel);
  ffn_by_rows(s, with, parallel);
}

// With g = dy * dropout:  dh = g W2, du = dh gelu'(u), dn = du W1, dx = dy + norm'(dn);
// dW2 = g' h, dW1 = du' n, db2 and db1 the column sums of g and du.
template <class T>
void ffn_backward_typed(const FfnBackward& s, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const Ffn& f = s.forward;
  const int64_t M = f.M, C = f.C, F = f.F, ld = padded_n<P>(C),
                u_stride = row_stride<P>(HIDDEN_BLOCK);
  const T* x = static_cast<const T*>(f.x);
  const T* dy = static_cast<const T*>(s.dy);
  const T* hidden = static_cast<const T*>(f.hidden);
  T* dx = static_cast<T*>(s.dx);
  const bool with_dx = dx != nullptr, with_dw1 = s.dw1.data != nullptr,
             with_dw2 = s.dw2.data != nullptr, with_du = with_dx || with_dw1 || s.db1.data;
  ScratchFrame frame;
  const RowNorm norm(f.norm, C, frame);
  const Rhs<P> w1 = with_dx ? weight_straight<P>(f.w1, F, C, frame, parallel) : Rhs<P>{};
  const Rhs<P> w2 = with_du ? weight_straight<P>(f.w2, C, F, frame, parallel) : Rhs<P>{};
  const RowParts<P> parts(M, 2 * F * C, 2 * (F + C), parallel);
  const WeightSums<P> sums1(s.dw1, with_dw1 ? F : 0, C, parts.count(), frame),
      sums2(s.dw2, with_dw2 ? C : 0, F, parts.count(), frame);
  const int64_t blocks = parts.blocks();
  const ColumnSums db1(blocks, F, frame), db2(blocks, C, frame), dln_w(blocks, C, frame),
      dln_b(blocks, C, frame);

  parts.for_each([&](const RowPart& part) {
    ScratchFrame part_frame;
    const WeightGrad<P> dw1(sums1, part.index, with_dw1 ? part.chunk : 0, part_frame),
        dw2(sums2, part.index, with_dw2 ? part.chunk : 0, part_frame);
    const auto produce = [&](int64_t block, int64_t slot) {
      const int64_t m0 = block * ROWS, rows = min(ROWS, M - m0);
      ScratchFrame task_frame;
      float* g = alloc<float>(task_frame, rows * ld);
      float* dn = alloc<float>(task_frame, rows * ld);
      float* normalized = alloc<float>(task_frame, rows * ld);
      float* dh = alloc<float>(task_frame, rows * HIDDEN_BLOCK);
      P* h = alloc<P>(task_frame, rows * u_stride);
      P* du = alloc<P>(task_frame, rows * u_stride);
      P* g_copy = alloc<P>(task_frame, rows * row_stride<P>(padded_k<P>(C)));

      dropped_rows(f.dropout, dy, m0, rows, C, g, ld);
      const Lhs<P> g_rows = lhs_rows(g, ld, rows, C, g_copy);
      for (int64_t f0 = 0; f0 < F; f0 += HIDDEN_BLOCK) {
        const int64_t columns = min(HIDDEN_BLOCK, F - f0);
        const int64_t padded = padded_k<P>(columns);
        const T* u = hidden + m0 * F + f0;
        const auto fetch = [&](int64_t i, int64_t tile, int64_t j, int64_t n) {
          fetch_block<false>(u + i * F + j, F, tile, n);
        };
        const auto derive = [&](int64_t i0, int64_t tile, int64_t j0, int64_t n) {
          for_vectors(n, [&](int64_t jj, auto part) {
            const int64_t j = j0 + jj;
            float* sum_at = db1.block(block) + f0 + j;
            VF total = load(sum_at, part);
            for (int64_t i = i0; i < i0 + tile; ++i) {
              const GeluValue at = gelu<P>(load(u + i * F + j, part), f.gelu);
              const VF d = load(dh + i * HIDDEN_BLOCK + j, part) * at.slope;
              store(h + i * u_stride + j, at.value, part);
              store(du + i * u_stride + j, d, part);
              total += d;
            }
            store(sum_at, total, part);
          });
        };
        if (with_du) {
          gemm(rows, columns, C, g_rows, w2.columns(f0), dh, HIDDEN_BLOCK, false,
               Fetching{fetch, derive});
        } else if (with_dw2) {  // only h is needed
          __builtin_memset(dh, 0, static_cast<size_t>(rows * HIDDEN_BLOCK) * sizeof(float));
          derive(0, rows, 0, columns);
        }
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = columns; j < padded; ++j) du[i * u_stride + j] = P{};
        if (with_dw2) dw2.set_x(slot, h, u_stride, rows, f0, columns);
        if (with_dw1) dw1.set_dy(slot, du, u_stride, rows, f0, columns);
        if (with_dx)
          gemm(rows, C, columns, Lhs<P>{du, u_stride, Tile<P>::KU}, w1.rows(f0), dn, ld, f0 > 0);
      }
      if (with_dw2) dw2.set_dy(slot, g, ld, rows, 0, C);
      db2.add_rows(block, g, ld, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t m = m0 + i;
        const Moments row = {norm.mean[m], norm.rstd[m]};
        if (with_dx)
          norm_backward_row(dn + i * ld, x + m * C, dy + m * C, C, row, norm, dln_w.block(block),
                            dln_b.block(block), normalized + i * ld, dx + m * C);
        else if (with_dw1)
          normalize(x + m * C, C, row, norm, normalized + i * ld);
      }
      if (with_dw1) dw1.set_x(slot, normalized, ld, rows, 0, C);
    };
    part.for_chunks(produce, [&](int64_t rows, bool add) {
      if (with_dw1) dw1.accumulate(rows, add, 0, F, part.parallel);
      if (with_dw2) dw2.accumulate(rows, add, 0, C, part.parallel);
    });
  });
  if (with_dw1) sums1.finish(M == 0, parallel);
  if (with_dw2) sums2.finish(M == 0, parallel);
  db1.finish(s.db1);
  db2.finish(s.db2);
  dln_w.finish(s.dnorm.weight);
  dln_b.finish(s.dnorm.bias);
}

void ffn(const Ffn& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return ffn_typed<float>(s, parallel);
  ffn_typed<bf16>(s, parallel);
}

void ffn_backward(const FfnBackward& s, const Parallel& parallel) {
  if (s.forward.dtype == DType::f32) return ffn_backward_typed<float>(s, parallel);
  ffn_backward_typed<bf16>(s, parallel);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
