// What the fused blocks do row by row: LayerNorm and its backward, GELU, column sums, and the
// operands made of rows.

template <class T>
inline T* take(Frame& frame, int64_t count) {
  return static_cast<T*>(frame.bytes(static_cast<size_t>(count) * sizeof(T)));
}

// How many of `tasks` equal tasks are worth the time that a thread takes to join in. `work` is the
// bytes that all multiplications read of one operand: by few rows, a product takes as long as
// reading its weight.
inline int64_t tasks_worth_a_thread(int64_t tasks, int64_t work, const Parallel& parallel) {
  return max(1, min(tasks, divide_up(tasks * parallel.worth, max(1, work))));
}

// Calls f with a pointer of the parameter's own element type.
template <class F>
inline auto with_elements(const Param& param, F&& f) {
  if (param.dtype == DType::f32) return f(static_cast<const float*>(param.data));
  return f(static_cast<const bf16*>(param.data));
}

// A parameter vector as fp32; null stays null.
inline const float* floats(const Param& param, int64_t n, Frame& frame) {
  if (param.data == nullptr) return nullptr;
  if (param.dtype == DType::f32) return static_cast<const float*>(param.data);
  float* copy = take<float>(frame, n);
  const bf16* data = static_cast<const bf16*>(param.data);
  for_vectors(n, [&](int64_t j, auto part) { store(copy + j, load(data + j, part), part); });
  return copy;
}

inline void write_grad(const ParamGrad& grad, int64_t offset, const float* values, int64_t n) {
  const auto write = [&](auto* out) {
    for_vectors(
        n, [&](int64_t j, auto part) { store(out + offset + j, load(values + j, part), part); });
  };
  if (grad.dtype == DType::f32)
    write(static_cast<float*>(grad.data));
  else
    write(static_cast<bf16*>(grad.data));
}

// A norm with its parameters as fp32 vectors; `weight` is null when there is none.
struct RowNorm {
  const float* weight;
  const float* bias;
  float* mean;
  float* rstd;

  RowNorm(const Norm& norm, int64_t n, Frame& frame)
      : weight(floats(norm.weight, n, frame)),
        bias(floats(norm.bias, n, frame)),
        mean(norm.mean),
        rstd(norm.rstd) {}
};

struct Moments {
  float mean, rstd;
};

// Those of `rows` rows of n columns, at most W of them, a row per lane. Two passes: the mean first,
// then the mean square of what is left.
template <class T>
inline void moments(const T* x, int64_t rows, int64_t n, VF& mean, VF& rstd) {
  VF of_row[W];
  for (int64_t i = rows; i < W; ++i) of_row[i] = splat(0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    VF total = splat(0.0f);
    for_vectors(n, [&](int64_t j, auto part) { total += load(x + i * n + j, part); });
    of_row[i] = total;
  }
  mean = reduce_each(of_row, rows, Add{}) / static_cast<float>(n);
  float mean_of[W];
  store(mean_of, mean);
  for (int64_t i = 0; i < rows; ++i) {
    VF squares = splat(0.0f);
    for_vectors(n, [&](int64_t j, auto part) {
      const VF d = only(load(x + i * n + j, part) - mean_of[i], part);
      squares += d * d;
    });
    of_row[i] = squares;
  }
  rstd = 1.0f / vsqrt(reduce_each(of_row, rows, Add{}) / static_cast<float>(n) + layer_norm_eps);
}

// xhat * weight + bias, rounded alike in the forward and where the backward repeats it.
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

// Rows m0 .. of norm(x) (or of x itself) as a left-hand side, through `out` as for lhs_rows.
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
//   g = dn * weight, xhat = (x - mean) * rstd,  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) +
//   add
// dweight += dn * xhat, dbias += dn; `normalized`, unless null, receives the row's forward output,
// for the weight's gradient.
template <class T>
inline void norm_grad_row(const float* dn, const T* x, const T* add, int64_t n, Moments row,
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

constexpr float no_score = -__builtin_inff();

// The largest of n scores; no_score of none.
inline float highest_score(const float* s, int64_t n) {
  VF highest = splat(no_score);
  for_vectors(n, [&](int64_t j, auto part) {
    highest = vmax(highest, only(load(s + j, part), part, no_score));
  });
  return max(highest);
}

struct GeluValue {
  VF value, slope;
};

// erf: u Phi(u). tanh: u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) (Hendrycks and Gimpel,
// arXiv:1606.08415). To the precision of P.
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

// Sums over rows, one partial sum per block of rows, added up in the blocks' order: the bits do not
// depend on which thread took which block.
struct ColumnSums {
  int64_t blocks, n;
  float* partial;

  ColumnSums(int64_t blocks, int64_t n, Frame& frame)
      : blocks(max(1, blocks)), n(n), partial(take<float>(frame, this->blocks * n)) {
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
