// Linear layer and cross-entropy without the (M, V) logits: a block of rows has its logits, their
// log-sum-exp, and, where gradients are wanted, softmax - onehot and both products with it, before
// the next block starts.

// Of one row of logits: loss = lse - logits[target] with lse = max + ln sum exp(logits - max).
inline float row_loss(const float* logits, int64_t V, int64_t target, float& lse) {
  VF highest = splat(no_score), total = splat(0.0f);
  for_vectors(V, [&](int64_t j, auto part) {
    highest = vmax(highest, only(load(logits + j, part), part, no_score));
  });
  const float top = max(highest);
  for_vectors(
      V, [&](int64_t j, auto part) { total += only(exp(load(logits + j, part) - top), part); });
  lse = top + __builtin_logf(sum(total));
  return lse - logits[target];
}

template <class T>
void cross_entropy_typed(const CrossEntropy& s, const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  const int64_t M = s.M, K = s.K, V = s.V, v_ld = padded_n<P>(V), k_ld = padded_n<P>(K);
  const T* x = static_cast<const T*>(s.x);
  T* dx = static_cast<T*>(s.dx);
  const bool with_grad = s.dx != nullptr;
  int64_t counted = 0;
  for (int64_t i = 0; i < M; ++i) counted += s.targets[i] != s.ignore_index;
  const float weight = counted ? 1.0f / static_cast<float>(counted) : 0.0f;

  Frame frame;
  float* losses = take<float>(frame, M);
  const Rhs<P> w = weight_transposed<P>(s.weight, V, K, frame, parallel);
  const Rhs<P> w_rows = with_grad ? weight_straight<P>(s.weight, V, K, frame, parallel) : Rhs<P>{};
  const int64_t blocks = divide_up(M, ROWS),
                chunk = with_grad ? blocks_per_chunk(M, V + K, parallel) : blocks;
  WeightGrad<P> dweight(with_grad ? V : 0, K, with_grad ? chunk : 0, frame);

  for (int64_t first = 0; first < blocks; first += chunk) {
    const int64_t last = min(blocks, first + chunk);
    run_tasks(parallel, last - first, [&](int64_t slot) {
      const int64_t m0 = (first + slot) * ROWS, rows = min(ROWS, M - m0);
      Frame task_frame;
      P* copy = take<P>(task_frame, rows * row_stride<P>(padded_k<P>(max(K, V))));
      float* logits = take<float>(task_frame, rows * v_ld);
      gemm(rows, V, K, lhs_rows(x + m0 * K, K, rows, K, copy), w, logits, v_ld, false);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t target = s.targets[m0 + i];
        const bool ignored = target == s.ignore_index;
        float* row = logits + i * v_ld;
        float lse;
        const float loss = row_loss(row, V, ignored ? 0 : target, lse);
        losses[m0 + i] = ignored ? 0.0f : loss;
        if (!with_grad) continue;
        // d loss / d logits = (softmax - onehot) / counted
        for_vectors(V, [&](int64_t j, auto part) {
          const VF p = ignored ? splat(0.0f) : exp(load(row + j, part) - lse) * weight;
          store(row + j, p, part);
        });
        if (!ignored) row[target] -= weight;
      }
      if (!with_grad) return;
      float* d = take<float>(task_frame, rows * k_ld);
      gemm(rows, K, V, lhs_rows(logits, v_ld, rows, V, copy), w_rows, d, k_ld, false);
      for (int64_t i = 0; i < rows; ++i) copy_row(d + i * k_ld, K, dx + (m0 + i) * K);
      dweight.set_dy(slot, logits, v_ld, rows);
      dweight.set_x(slot, x + m0 * K, K, rows, 0, K);
    });
    if (with_grad) dweight.accumulate(min(M, last * ROWS) - first * ROWS, parallel);
  }
  if (with_grad) dweight.finish(s.dweight, parallel);
  double total = 0.0;
  for (int64_t i = 0; i < M; ++i) total += losses[i];
  *s.loss = static_cast<float>(total * (counted ? 1.0 / static_cast<double>(counted) : 0.0));
}

void cross_entropy(const CrossEntropy& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return cross_entropy_typed<float>(s, parallel);
  cross_entropy_typed<bf16>(s, parallel);
}
