// The backward of attention.inl, probabilities recomputed from lse (FlashAttention-2, algorithm 2).
// With f the dropout factors and delta_i = sum_j p_ij dP_ij f_ij = sum_d dO_id O_id:
//   p = exp(scale s - lse), dV = (p f)' dO, dP = dO V', dS = scale p (dP f - delta), dQ = dS K, dK
//   = dS' Q
//
// A query whose keys are all in one block has delta as the first sum, which rounds as dP does, so
// that less is left of the difference's error; the others have it as the second.
//
// One task owns some key blocks of one head: it writes their dK and dV, and adds to a dQ of its
// own. Where a head has several tasks, their dQ are added in order at the end.

template <class T>
struct AttentionGradTask {
  using P = typename OperandOf<T>::type;
  static constexpr int MR = Tile<P>::MR, KPAD = Tile<P>::KPAD;

  const AttentionGrad& grad;
  const Attention& s;
  int64_t head;
  Head<T> q, k, v, out, dout, dq, dk, dv;
  int64_t ld;
  Frame frame;
  float* dq_total;  // (Tq, ld)
  float *delta, *p, *ds, *dk_total, *dv_total;
  P *keys_copy, *values_copy, *key_rows_copy, *q_copy, *dout_copy, *q_panels, *dout_panels, *p_copy,
      *ds_copy;
  Upcoming upcoming;

  explicit AttentionGradTask(const AttentionGrad& grad)
      : grad(grad),
        s(grad.forward),
        ld(padded_n<P>(s.D)),
        delta(take<float>(frame, s.Tq)),
        p(take<float>(frame, QUERIES * SCORES)),
        ds(take<float>(frame, QUERIES * SCORES)),
        dk_total(take<float>(frame, KEYS * ld)),
        dv_total(take<float>(frame, KEYS * ld)),
        keys_copy(take<P>(frame, rhs_elements<P>(s.D, KEYS))),
        values_copy(take<P>(frame, rhs_elements<P>(s.D, KEYS))),
        key_rows_copy(take<P>(frame, rhs_elements<P>(KEYS, s.D))),
        q_copy(take<P>(frame, QUERIES * row_stride<P>(padded_k<P>(s.D)))),
        dout_copy(take<P>(frame, QUERIES * row_stride<P>(padded_k<P>(s.D)))),
        q_panels(take<P>(frame, rhs_elements<P>(QUERIES, s.D))),
        dout_panels(take<P>(frame, rhs_elements<P>(QUERIES, s.D))),
        p_copy(take<P>(frame, lhs_transposed_elements<P>(QUERIES, KEYS))),
        ds_copy(take<P>(
            frame, max(lhs_transposed_elements<P>(QUERIES, KEYS), QUERIES * row_stride<P>(KEYS)))) {
  }

  // `dq_total` (Tq, ld) receives the head's dQ.
  void start_head(int64_t index, float* dq_sums) {
    const int64_t b = index / s.H, h = index % s.H;
    head = index;
    q = {s.q, b, h}, k = {s.k, b, h}, v = {s.v, b, h}, out = {s.out, b, h};
    dout = {grad.dout, b, h}, dq = {grad.dq, b, h}, dk = {grad.dk, b, h}, dv = {grad.dv, b, h};
    dq_total = dq_sums;
    __builtin_memset(dq_total, 0, static_cast<size_t>(s.Tq * ld) * sizeof(float));
    for (int64_t i = 0; i < s.Tq; ++i) {
      if (in_one_block(i)) continue;
      VF total = splat(0.0f);
      for_vectors(s.D, [&](int64_t j, auto part) {
        total += load(dout.at(i) + j, part) * load(out.at(i) + j, part);
      });
      delta[i] = sum(total);
    }
  }

  void expect_next(int64_t index) {
    upcoming.clear();
    expect_head<T>({s.k, s.v, grad.dk, grad.dv}, s, index, s.Tk, upcoming);
    expect_head<T>({s.q, grad.dout, s.out, grad.dq}, s, index, s.Tq, upcoming);
  }

  bool in_one_block(int64_t query) const { return visible_keys(s, query) <= KEYS; }

  void key_block(int64_t k0, int64_t keys) {
    const Rhs<P> keys_t = pack_transposed(k.at(k0), k.row, s.D, keys, keys_copy);
    const Rhs<P> values_t = pack_transposed(v.at(k0), v.row, s.D, keys, values_copy);
    const Rhs<P> key_rows = pack_straight(k.at(k0), k.row, keys, s.D, key_rows_copy);
    __builtin_memset(dk_total, 0, static_cast<size_t>(keys * ld) * sizeof(float));
    __builtin_memset(dv_total, 0, static_cast<size_t>(keys * ld) * sizeof(float));
    const int64_t first_query = max(0, k0 - (s.Tk - s.Tq));
    for (int64_t q0 = first_query / QUERIES * QUERIES; q0 < s.Tq; q0 += QUERIES)
      query_block(q0, min(QUERIES, s.Tq - q0), k0, keys, keys_t, values_t, key_rows);
    for (int64_t j = 0; j < keys; ++j) {
      copy_row(dk_total + j * ld, s.D, dk.out(k0 + j));
      copy_row(dv_total + j * ld, s.D, dv.out(k0 + j));
    }
  }

  void query_block(int64_t q0, int64_t rows, int64_t k0, int64_t keys, Rhs<P> keys_t,
                   Rhs<P> values_t, Rhs<P> key_rows) {
    const Lhs<P> queries = lhs_rows(q.at(q0), q.row, rows, s.D, q_copy);
    const Lhs<P> douts = lhs_rows(dout.at(q0), dout.row, rows, s.D, dout_copy);
    const int64_t width = round_up(keys, W);
    for (int64_t r0 = 0; r0 < rows; r0 += MR) {
      const int64_t tile = min(MR, rows - r0),
                    count = min(keys, visible_keys(s, q0 + r0 + tile - 1) - k0);
      if (count > 0) {
        gemm(tile, count, s.D, at_row(queries, r0), keys_t, p + r0 * SCORES, SCORES, false,
             no_epilogue, &upcoming);
        gemm(tile, count, s.D, at_row(douts, r0), values_t, ds + r0 * SCORES, SCORES, false,
             no_epilogue, &upcoming);
      }
    }
    for (int64_t r0 = 0; r0 < rows; r0 += DROPOUT_ROWS)
      probability_rows(q0, r0, min(DROPOUT_ROWS, rows - r0), k0, keys, width);

    const Lhs<P> p_t = lhs_transposed(p, SCORES, rows, keys, p_copy);
    add_key_grads(p_t, pack_straight(dout.at(q0), dout.row, rows, s.D, dout_panels), dv_total, q0,
                  rows, k0, keys);
    const Lhs<P> ds_t = lhs_transposed(ds, SCORES, rows, keys, ds_copy);
    add_key_grads(ds_t, pack_straight(q.at(q0), q.row, rows, s.D, q_panels), dk_total, q0, rows, k0,
                  keys);
    for (int64_t r0 = 0; r0 < rows; r0 += MR) {
      const int64_t tile = min(MR, rows - r0),
                    count = min(keys, visible_keys(s, q0 + r0 + tile - 1) - k0);
      if (count <= 0) continue;
      const Lhs<P> ds_rows = lhs_rows(ds + r0 * SCORES, SCORES, tile, count, ds_copy);
      gemm(tile, s.D, count, ds_rows, key_rows, dq_total + (q0 + r0) * ld, ld, true, no_epilogue,
           &upcoming);
    }
  }

  static Lhs<P> at_row(Lhs<P> a, int64_t row) { return {a.data + row * a.row, a.row, a.step}; }

  // p: s -> p f, ds: dP -> dS, for up to 8 rows; both zero where the mask hides the key.
  void probability_rows(int64_t q0, int64_t r0, int64_t rows, int64_t k0, int64_t keys,
                        int64_t width) {
    struct Row {
      int64_t seen;  // keys
      float lse;     // log2
      bool summed;   // delta is the sum over this block, and known at its end
      VF delta;
    } of_row[DROPOUT_ROWS];
    alignas(64) float prob[DROPOUT_ROWS][KEYS];  // of rows whose delta is still to be known
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query = q0 + r0 + row;
      const bool summed = in_one_block(query);
      of_row[row] = {min(keys, visible_keys(s, query) - k0), s.lse[head * s.Tq + query] * log2e,
                     summed, splat(summed ? 0.0f : delta[query])};
    }
    Keep keep;
    const auto step = [&](Row& at, int64_t row, int64_t j, auto part) {
      float* p_at = p + (r0 + row) * SCORES + j;
      float* ds_at = ds + (r0 + row) * SCORES + j;
      const VF of = only(exp2(load(p_at) * (s.scale * log2e) - at.lse), part);
      VF kept = of, dp = only(load(ds_at), part);
      if (s.dropout.threshold > 0) {
        dp *= keep.factor[row];
        kept *= keep.factor[row];
      }
      store(p_at, kept);
      if (!at.summed) return store(ds_at, of * (dp - at.delta) * s.scale);
      at.delta += of * dp;
      store(prob[row] + j, of);
      store(ds_at, dp);
    };
    for (int64_t j = 0; j < width; j += W) {
      if (s.dropout.threshold > 0) keep = dropout_factors(s.dropout, head, q0 + r0, k0 + j);
      for (int64_t row = 0; row < rows; ++row) {
        Row& at = of_row[row];
        if (at.seen >= j + W)
          step(at, row, j, Full{});
        else
          step(at, row, j, Tail{static_cast<int>(max(0, at.seen - j))});
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      if (!of_row[row].summed) continue;
      const float d = sum(of_row[row].delta);
      float* ds_row = ds + (r0 + row) * SCORES;
      for (int64_t j = 0; j < of_row[row].seen; j += W)
        store(ds_row + j, load(prob[row] + j) * (load(ds_row + j) - d) * s.scale);
    }
  }

  // total (keys, D) += A' B, each tile of keys over the queries that see it.
  void add_key_grads(Lhs<P> a, Rhs<P> b, float* total, int64_t q0, int64_t rows, int64_t k0,
                     int64_t keys) {
    for (int64_t j0 = 0; j0 < keys; j0 += MR) {
      const int64_t tile = min(MR, keys - j0);
      const int64_t seen_from = max(0, k0 + j0 - (s.Tk - s.Tq) - q0) / KPAD * KPAD;
      if (seen_from >= rows) break;
      const Lhs<P> from = {a.data + j0 * a.row + seen_from / Tile<P>::KU * a.step, a.row, a.step};
      gemm(tile, s.D, rows - seen_from, from, b.rows(seen_from), total + j0 * ld, ld, true,
           no_epilogue, &upcoming);
    }
  }

  void write_dq() {
    for (int64_t i = 0; i < s.Tq; ++i) copy_row(dq_total + i * ld, s.D, dq.out(i));
  }
};

template <class T>
void attention_grad_typed(const AttentionGrad& grad, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const Attention& s = grad.forward;
  const int64_t blocks = divide_up(s.Tk, KEYS);
  const HeadTasks split(s, blocks, parallel);
  const int64_t parts = split.parts, ld = padded_n<P>(s.D), dq_size = s.Tq * ld;
  Frame frame;
  float* partial = parts > 1 ? take<float>(frame, split.tasks * dq_size) : nullptr;
  run_tasks(parallel, split.tasks, [&](int64_t task) {
    AttentionGradTask<T> backward(grad);
    float* dq_total = partial ? partial + task * dq_size : take<float>(backward.frame, dq_size);
    const int64_t part = task % parts;
    for (int64_t head = split.first_head(task); head < split.last_head(task); ++head) {
      backward.start_head(head, dq_total);
      if (head + 1 < split.last_head(task)) backward.expect_next(head + 1);
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
        backward.key_block(block * KEYS, min(KEYS, s.Tk - block * KEYS));
      if (parts == 1) backward.write_dq();
    }
  });
  if (parts == 1) return;
  run_tasks(parallel, s.B * s.H, [&](int64_t head) {
    float* total = partial + head * parts * dq_size;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t j = 0; j < dq_size; j += W)
        store(total + j, load(total + j) + load(total + part * dq_size + j));
    const Head<T> dq(grad.dq, head / s.H, head % s.H);
    for (int64_t i = 0; i < s.Tq; ++i) copy_row(total + i * ld, s.D, dq.out(i));
  });
}

void attention_grad(const AttentionGrad& s, const Parallel& parallel) {
  if (s.forward.dtype == DType::f32) return attention_grad_typed<float>(s, parallel);
  attention_grad_typed<bf16>(s, parallel);
}
