// Linear layers with LayerNorm applied while the operand is read, and bias and residual while the
// result is written.

// Calls f(m0, rows, n0, columns, most_columns) for the blocks of a result (M, N), in parallel. Its
// columns are products with `column_bytes` of a weight each. The fp32 block (rows, columns) stays
// in the L2 cache, wide enough for the rows' norm, which every block of theirs computes, to be
// little of the work; where there are few rows, tasks that follow one another read the same part of
// the weight.
template <class F>
inline void for_blocks(int64_t M, int64_t N, int64_t column_bytes, int nr, const Parallel& parallel,
                       const F& f) {
  const int64_t block = M <= 2 * ROWS ? max(1, M) : ROWS, row_blocks = divide_up(M, block);
  const int64_t most = min(1024, round_up((64 << 10) / block, nr));
  const bool few = row_blocks < 2 * parallel.threads;
  const int64_t wanted = row_blocks == 1 ? parallel.threads : 2 * parallel.threads;
  const int64_t shared = few ? divide_up(wanted, max(1, row_blocks)) : 1;
  const int64_t worth = tasks_worth_a_thread(N, block * N * column_bytes, parallel);
  const int64_t parts = min(shared * divide_up(N, shared * most), divide_up(N, worth));
  const int64_t columns = round_up(divide_up(N, max(parts, divide_up(N, most))), nr);
  const int64_t column_blocks = divide_up(N, columns), tasks = row_blocks * column_blocks;
  const int64_t group = worth < N ? 1 : max(1, tasks);  // little work is one task
  run_tasks(parallel, divide_up(tasks, group), [&](int64_t first) {
    for (int64_t task = first * group; task < min(tasks, (first + 1) * group); ++task) {
      const int64_t m0 = (few ? task % row_blocks : task / column_blocks) * block;
      const int64_t n0 = (few ? task / row_blocks : task % column_blocks) * columns;
      f(m0, min(block, M - m0), n0, min(columns, N - n0), columns);
    }
  });
}

// y = residual + c + bias for one row; columns [0, n).
template <class T, class Y>
inline void finish_row(const float* c, const float* bias, const T* residual, int64_t n, Y* y) {
  for_vectors(n, [&](int64_t j, auto part) {
    VF value = load(c + j, part);
    if (bias) value += load(bias + j, part);
    if (residual) value += load(residual + j, part);
    store(y + j, value, part);
  });
}

template <class Y>
inline void copy_row(const float* c, int64_t n, Y* y) {
  for_vectors(n, [&](int64_t j, auto part) { store(y + j, load(c + j, part), part); });
}

template <class T, class Y>
void linear_typed(const Linear& s, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const T* x = static_cast<const T*>(s.x);
  const T* residual = static_cast<const T*>(s.residual);
  Y* y = static_cast<Y*>(s.y);
  Frame frame;
  const RowNorm norm(s.norm, s.K, frame);
  const float* bias = floats(s.bias, s.N, frame);
  const PackedWeight<P> w = weight_transposed<T>(s.weight, s.N, s.K, frame, parallel);

  for_blocks(s.M, s.N, s.K * w.element_bytes(), Tile<P>::NR, parallel,
             [&](int64_t m0, int64_t rows, int64_t n0, int64_t n, int64_t ld) {
               Frame task_frame;
               P* copy = take<P>(task_frame, rows * row_stride<P>(padded_k<P>(s.K)));
               const Lhs<P> a = norm_rows(x, m0, rows, s.K, norm, n0 == 0, copy);
               float* c = take<float>(task_frame, rows * ld);
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
               gemm(rows, n, s.K, a, columns, c, ld, false, Fetching{fetch, finish});
             });
}

template <class T>
void linear_grad_typed(const LinearGrad& s, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const Linear& f = s.forward;
  const int64_t M = f.M, N = f.N, K = f.K, ld = padded_n<P>(K);
  const T* x = static_cast<const T*>(f.x);
  const T* dy = static_cast<const T*>(s.dy);
  const T* add = static_cast<const T*>(s.add);
  T* dx = static_cast<T*>(s.dx);
  const bool with_dx = dx != nullptr, with_dweight = s.dweight.data != nullptr;
  Frame frame;
  const RowNorm norm(f.norm, K, frame);
  const Rhs<P> w = with_dx ? weight_straight<P>(f.weight, N, K, frame, parallel) : Rhs<P>{};
  const RowParts<P> parts(M, N * K, N + K, parallel);
  const WeightSums<P> sums(s.dweight, with_dweight ? N : 0, K, parts.count(), frame);
  const int64_t blocks = parts.blocks();
  const ColumnSums dbias(blocks, s.dbias.data ? N : 0, frame);
  const ColumnSums dnorm_weight(blocks, norm.weight ? K : 0, frame),
      dnorm_bias(blocks, norm.weight ? K : 0, frame);

  parts.for_each([&](const RowPart& part) {
    Frame part_frame;
    const WeightGrad<P> dweight(sums, part.index, with_dweight ? part.chunk : 0, part_frame);
    const auto produce = [&](int64_t block, int64_t slot) {
      const int64_t m0 = block * ROWS, rows = min(ROWS, M - m0);
      Frame task_frame;
      P* copy = take<P>(task_frame, rows * row_stride<P>(padded_k<P>(N)));
      float* dn = take<float>(task_frame, rows * ld);
      // dN = dY W
      if (with_dx) gemm(rows, K, N, lhs_rows(dy + m0 * N, N, rows, N, copy), w, dn, ld, false);
      if (with_dweight) dweight.set_dy(slot, dy + m0 * N, N, rows, 0, N);
      if (s.dbias.data) dbias.add_rows(block, dy + m0 * N, N, rows);
      const auto added = [&](int64_t m) { return add ? add + m * K : nullptr; };
      if (!norm.weight) {
        for (int64_t i = 0; i < (with_dx ? rows : 0); ++i)
          finish_row(dn + i * ld, nullptr, added(m0 + i), K, dx + (m0 + i) * K);
        if (with_dweight) dweight.set_x(slot, x + m0 * K, K, rows, 0, K);
        return;
      }
      float* normalized = take<float>(task_frame, rows * ld);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t m = m0 + i;
        const Moments row = {norm.mean[m], norm.rstd[m]};
        if (with_dx)
          norm_grad_row(dn + i * ld, x + m * K, added(m), K, row, norm, dnorm_weight.block(block),
                        dnorm_bias.block(block), normalized + i * ld, dx + m * K);
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
  dnorm_weight.finish(s.dnorm.weight);
  dnorm_bias.finish(s.dnorm.bias);
}

void linear(const Linear& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return linear_typed<float, float>(s, parallel);
  if (s.y_dtype == DType::f32) return linear_typed<bf16, float>(s, parallel);
  linear_typed<bf16, bf16>(s, parallel);
}

void linear_grad(const LinearGrad& s, const Parallel& parallel) {
  if (s.forward.dtype == DType::f32) return linear_grad_typed<float>(s, parallel);
  linear_grad_typed<bf16>(s, parallel);
}

template <class T>
inline int64_t packed_weight_size(Packing packing, int64_t n, int64_t k) {
  using P = typename OperandOf<T>::type;
  return packing == Packing::dense ? rhs_elements<P>(k, n) * static_cast<int64_t>(sizeof(T))
                                   : byte_weight_size<P>(packing, n, k);
}
int64_t packed_weight_bytes(DType dtype, Packing packing, int64_t n, int64_t k) {
  return dtype == DType::f32 ? packed_weight_size<float>(packing, n, k)
                             : packed_weight_size<bf16>(packing, n, k);
}

template <class T>
inline void pack_weight_as(Packing packing, const Param& weight, int64_t n, int64_t k, void* packed,
                           const Parallel& parallel) {
  if (packing == Packing::dense)
    return pack_weight_dense(weight, n, k, static_cast<T*>(packed), parallel);
  pack_weight_bytes<typename OperandOf<T>::type>(packing, weight, n, k, packed, parallel);
}
void pack_weight(DType dtype, Packing packing, Param weight, int64_t n, int64_t k, void* packed,
                 const Parallel& parallel) {
  if (dtype == DType::f32) return pack_weight_as<float>(packing, weight, n, k, packed, parallel);
  pack_weight_as<bf16>(packing, weight, n, k, packed, parallel);
}
