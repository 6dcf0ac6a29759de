// Steps of the layers that work row by row: LayerNorm and its backward, column sums, left-hand
// sides made of rows, and what is done to rows of a result: bias, dropout, residual.
#pragma once

#include "../kernels.h"
#include "../matmul/layout.inl"
#include "../simd/elements.inl"
#include "../simd/math.inl"
#include "../simd/philox.inl"
#include "../simd/vec.inl"
#include "../threads/scratch.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// A norm with its parameters as fp32 vectors; `weight` is null if there is no norm.
struct RowNorm {
  const float* weight;
  const float* bias;
  float* mean;
  float* rstd;

  RowNorm(const Norm& norm, int64_t n, ScratchFrame& frame)
      : weight(floats(norm.weight, n, frame)),
        bias(floats(norm.bias, n, frame)),
        mean(norm.mean),
        rstd(norm.rstd) {}
};

// Mean and reciprocal standard deviation of one row.
struct Moments {
  float mean, rstd;
};

// Mean and rstd of `rows` rows of n columns, at most W rows, one per lane. Two passes: the mean
// first, then the mean of the squared differences from it. The mean is x_0 + mean_j (x_j - x_0), so
// that its rounding error is small beside the row's deviation, however large its numbers are.
template <class T>
inline void moments(const T* x, int64_t rows, int64_t n, VF& mean, VF& rstd) {
  VF of_row[W];
  float first[W] = {};
  for (int64_t i = rows; i < W; ++i) of_row[i] = splat(0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    VF total = splat(0.0f);
    first[i] = load(x + i * n, Tail{1})[0];
    for_vectors(n, [&](int64_t j, auto part) {
      total += mask(load(x + i * n + j, part) - first[i], part);
    });
    of_row[i] = total;
  }
  mean = reduce_each(of_row, rows, Add{}) / static_cast<float>(n) + load(first);
  float mean_of[W];
  store(mean_of, mean);
  for (int64_t i = 0; i < rows; ++i) {
    VF squares = splat(0.0f);
    for_vectors(n, [&](int64_t j, auto part) {
      const VF d = mask(load(x + i * n + j, part) - mean_of[i], part);
      squares += d * d;
    });
    of_row[i] = squares;
  }
  rstd = 1.0f / vsqrt(reduce_each(of_row, rows, Add{}) / static_cast<float>(n) + layer_norm_eps);
}

// xhat * weight + bias, rounded identically in the forward and in the backward, which recomputes
// it.
template <class Part>
inline VF scale_and_shift(VF xhat, VF weight, const RowNorm& norm, int64_t j, Part part) {
  VF y = xhat * weight;
  if (norm.bias) y += load(norm.bias + j, part);
  return y;
}

// out = (x - mean) * rstd * weight + bias
template <class T, class P>
inline void normalize(const T* x, int64_t n, Moments row, const RowNorm& norm, P* out) {
  for_vectors(n, [&](int64_t j, auto part) {
    const VF xhat = (load(x + j, part) - row.mean) * row.rstd;
    store(out + j, scale_and_shift(xhat, load(norm.weight + j, part), norm, j, part), part);
  });
}

// Rows [m0, m0 + rows) of norm(x), or of x itself if there is no norm, as a left-hand side; `out`
// has memory for a copy, as for lhs_rows. With `keep_moments`, stores mean and rstd for the
// backward.
template <class P, class T>
inline Lhs<P> norm_rows(const T* x, int64_t m0, int64_t rows, int64_t n, const RowNorm& norm,
                        bool keep_moments, P* out) {
  const int64_t padded = padded_k<P>(n), stride = row_stride<P>(padded);
  if (!norm.weight) return lhs_rows(x + m0 * n, n, rows, n, out);
  for_vectors(rows, [&](int64_t i0, auto part) {
    const int64_t count = min(W, rows - i0);
    VF mean, rstd;
    moments(x + (m0 + i0) * n, count, n, mean, rstd);
    float mean_of[W], rstd_of[W];
    store(mean_of, mean), store(rstd_of, rstd);
    for (int64_t i = 0; i < count; ++i) {
      P* row = out + (i0 + i) * stride;
      normalize(x + (m0 + i0 + i) * n, n, {mean_of[i], rstd_of[i]}, norm, row);
      for (int64_t j = n; j < padded; ++j) row[j] = P{};
    }
    if (!keep_moments || !norm.mean) return;
    store(norm.mean + m0 + i0, mean, part);
    store(norm.rstd + m0 + i0, rstd, part);
  });
  return {out, stride, Tile<P>::KU};
}

// The LayerNorm backward of one row, given dn, the gradient of its output:
//   g = dn * weight, xhat = (x - mean) * rstd,
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + add,
//   dweight += dn * xhat, dbias += dn
// `normalized`, unless null, receives the row's forward output, for the weight's gradient.
template <class T>
inline void norm_backward_row(const float* dn, const T* x, const T* add, int64_t n, Moments row,
                              const RowNorm& norm, float* dweight, float* dbias, float* normalized,
                              T* dx) {
  VF sum_g = splat(0.0f), sum_gx = splat(0.0f);
  for_vectors(n, [&](int64_t j, auto part) {
    const VF d = load(dn + j, part), weight = load(norm.weight + j, part);
    const VF xhat = (load(x + j, part) - row.mean) * row.rstd;
    const VF g = d * weight;
    sum_g += g;
    sum_gx += g * xhat;
    store(dweight + j, load(dweight + j, part) + d * xhat, part);
    store(dbias + j, load(dbias + j, part) + d, part);
    if (normalized) store(normalized + j, scale_and_shift(xhat, weight, norm, j, part), part);
  });
  const float mean_g = sum(sum_g) / static_cast<float>(n),
              mean_gx = sum(sum_gx) / static_cast<float>(n);
  for_vectors(n, [&](int64_t j, auto part) {
    const VF xhat = (load(x + j, part) - row.mean) * row.rstd;
    VF d = (load(dn + j, part) * load(norm.weight + j, part) - mean_g - xhat * mean_gx) * row.rstd;
    if (add) d += load(add + j, part);
    store(dx + j, d, part);
  });
}

// Column sums over all rows: one partial sum per block of rows, added in the order of the blocks,
// so that the bits do not depend on which thread computed which block.
struct ColumnSums {
  int64_t blocks, n;
  float* partial;

  ColumnSums(int64_t blocks, int64_t n, ScratchFrame& frame)
      : blocks(max(1, blocks)), n(n), partial(alloc<float>(frame, this->blocks * n)) {
    __builtin_memset(partial, 0, static_cast<size_t>(this->blocks * n) * sizeof(float));
  }

  float* block(int64_t index) const { return partial + index * n; }

  template <class T>
  void add_rows(int64_t index, const T* x, int64_t ld, int64_t rows) const {
    float* total = block(index);
    for (int64_t i = 0; i < rows; ++i)
      for_vectors(n, [&](int64_t j, auto part) {
        store(total + j, load(total + j, part) + load(x + i * ld + j, part), part);
      });
  }

  void finish(const ParamGrad& grad) const {
    if (grad.data == nullptr) return;
    for (int64_t b = 1; b < blocks; ++b)
      for_vectors(n, [&](int64_t j, auto part) {
        store(partial + j, load(partial + j, part) + load(partial + b * n + j, part), part);
      });
    write_grad(grad, 0, partial, n);
  }
};

// y = c + bias + residual for one row of n columns; bias and residual may be null.
template <class T, class Y>
inline void finish_row(const float* c, const float* bias, const T* residual, int64_t n, Y* y) {
  for_vectors(n, [&](int64_t j, auto part) {
    VF value = load(c + j, part);
    if (bias) value += load(bias + j, part);
    if (residual) value += load(residual + j, part);
    store(y + j, value, part);
  });
}

// y = dropout(c + bias) + residual for rows [m0, m0 + rows) and columns [n0, n0 + n) of matrices
// with N columns; m0 is a multiple of 8. c and its stride ld are those of the block, and c is
// overwritten.
template <class T, class Y>
inline void finish_dropped(const Dropout& dropout, int64_t m0, int64_t rows, int64_t n0, int64_t n,
                           const float* bias, const T* residual, int64_t N, float* c, int64_t ld,
                           Y* y) {
  if (bias)
    for (int64_t i = 0; i < rows; ++i)
      finish_row(c + i * ld, bias + n0, static_cast<const T*>(nullptr), n, c + i * ld);
  apply_dropout(dropout, 0, m0, n0, rows, n, c, ld);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (m0 + i) * N + n0;
    finish_row(c + i * ld, nullptr, residual ? residual + at : nullptr, n, y + at);
  }
}

// g = dropout(dy), the gradient of the dropout's input, for rows [m0, m0 + rows) of dy (M, n); m0
// is a multiple of 8. Each row of g has memory for whole vectors.
template <class T>
inline void dropped_rows(const Dropout& dropout, const T* dy, int64_t m0, int64_t rows, int64_t n,
                         float* g, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    for_vectors(n, [&](int64_t j, auto part) {
      store(g + i * ld + j, load(dy + (m0 + i) * n + j, part), part);
    });
  apply_dropout(dropout, 0, m0, 0, rows, n, g, ld);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
