// LayerNorm (optional), linear layer and cross-entropy without the (M, V) logits. Rows come in
// chunks, whose logits are kept; the vocabulary comes in blocks, so that no copy of the whole
// weight is made. For a chunk, one pass over the blocks sums up each row's exponentials, a second
// one turns the logits into
//   d loss / d logits = (softmax - onehot) / counted
// and multiplies them by the weight's and by the activations' rows. A block's logits, probabilities
// and products are each computed once.

// Columns of the logits in work at a time: a multiple of KC, of every NR and of WeightGrad's
// groups, so that sums over the vocabulary are the same with and without blocks.
constexpr int64_t VOCAB = 1152;
constexpr int64_t most_logits = int64_t{32} << 20;  // of a chunk

// The running maximum m and l = sum_j exp(s_j - m) of a row of logits, its target's logit, and,
// once all logits are in, lse = m + ln l.
struct RowSum {
  float m, l, target, lse;
};

// `exponentials`, unless null, receives exp(s_j - m).
inline void add_logits(const float* s, int64_t n, RowSum& row, float* exponentials) {
  const float highest = highest_score(s, n), top = row.m > highest ? row.m : highest;
  VF total = splat(0.0f);
  for_vectors(n, [&](int64_t j, auto part) {
    const VF e = exp(load(s + j, part) - top);
    if (exponentials) store(exponentials + j, e, part);
    total += only(e, part);
  });
  row.l = row.l * (row.m == no_score ? 0.0f : exp(splat(row.m - top))[0]) + sum(total);
  row.m = top;
}

template <class T>
class CrossEntropyPass {
  using P = typename OperandOf<T>::type;

 public:
  CrossEntropyPass(const CrossEntropy& s, const Parallel& parallel)
      : s_(s),
        parallel_(parallel),
        norm_(s.norm, s.K, frame_),
        with_grad_(s.dx != nullptr),
        blocks_(divide_up(s.M, ROWS)),
        chunk_(blocks_in_chunk()),
        k_ld_(padded_n<P>(s.K)),
        x_stride_(row_stride<P>(padded_k<P>(s.K))),
        logits_ld_(padded_n<P>(with_grad_ ? s.V : min(s.V, VOCAB))),
        losses_(take<float>(frame_, s.M)),
        logits_(take<float>(frame_, chunk_ * ROWS * logits_ld_)),
        dn_(dx_in_place() ? nullptr : take<float>(frame_, with_grad_ ? chunk_ * ROWS * k_ld_ : 0)),
        x_copy_(take<P>(frame_, chunk_ * ROWS * x_stride_)),
        x_(take<Lhs<P>>(frame_, chunk_)),
        sums_(take<RowSum>(frame_, chunk_ * ROWS)),
        dweight_sum_(s.dweight, with_grad_ ? s.V : 0, s.K, 1, frame_),
        dweight_(dweight_sum_, 0, with_grad_ ? chunk_ : 0, frame_, VOCAB),
        dnorm_weight_(blocks_, with_grad_ && norm_.weight ? s.K : 0, frame_),
        dnorm_bias_(blocks_, with_grad_ && norm_.weight ? s.K : 0, frame_) {
    norm_.mean = take<float>(frame_, s.M);
    norm_.rstd = take<float>(frame_, s.M);
    int64_t counted = 0;
    for (int64_t i = 0; i < s.M; ++i) counted += s.targets[i] != s.ignore_index;
    share_ = counted ? 1.0f / static_cast<float>(counted) : 0.0f;
  }

  void run() {
    for (int64_t first = 0; first < blocks_; first += chunk_) {
      const int64_t slots = min(chunk_, blocks_ - first);
      if (whole())
        whole_vocabulary(first, slots);
      else
        vocabulary_in_blocks(first, slots);
    }
    finish();
  }

 private:
  // As many row blocks as the outer cache holds the operands of the weight's gradient for, and
  // no more logits than most_logits allows: each chunk reads and writes the whole gradient.
  int64_t blocks_in_chunk() const {
    const int64_t cached = blocks_per_chunk<P>(s_.M, min(s_.V, VOCAB) + s_.K, parallel_);
    if (!with_grad_) return cached;
    const int64_t fitting = most_logits / (ROWS * padded_n<P>(s_.V));
    return min(cached, round_up(max(fitting, parallel_.threads), Tile<P>::KC / ROWS));
  }

  bool whole() const { return s_.V <= VOCAB; }
  int64_t rows_of(int64_t block) const { return min(ROWS, s_.M - block * ROWS); }
  float* logits(int64_t slot, int64_t v0) const {
    return logits_ + slot * ROWS * logits_ld_ + (with_grad_ ? v0 : 0);
  }
  // Where the sums of dN are made: dx itself where it is that.
  float* dn(int64_t first, int64_t slot) const {
    return dn_ ? dn_ + slot * ROWS * k_ld_
               : static_cast<float*>(s_.dx) + (first + slot) * ROWS * k_ld_;
  }
  bool dx_in_place() const { return sizeof(T) == sizeof(float) && !norm_.weight && k_ld_ == s_.K; }
  int64_t columns(int64_t v0) const { return min(VOCAB, s_.V - v0); }
  Weight weight_rows(int64_t v0) const { return rows_from(s_.weight, v0, s_.K); }
  bool ignored(int64_t m) const { return s_.targets[m] == s_.ignore_index; }

  void start(int64_t first, int64_t slot) {
    const int64_t m0 = (first + slot) * ROWS, rows = rows_of(first + slot);
    x_[slot] = norm_rows(static_cast<const T*>(s_.x), m0, rows, s_.K, norm_, true,
                         x_copy_ + slot * ROWS * x_stride_);
    for (int64_t i = 0; i < rows; ++i) sums_[slot * ROWS + i] = {no_score, 0.0f, 0.0f, 0.0f};
    if (with_grad_) dweight_.set_x(slot, x_[slot].data, x_[slot].row, rows, 0, s_.K);
  }

  // A row block has everything done to it while it is in the cache.
  void whole_vocabulary(int64_t first, int64_t slots) {
    Frame frame;
    const Rhs<P> w = weight_transposed<T>(s_.weight, s_.V, s_.K, frame, parallel_).dense;
    const Rhs<P> w_rows =
        with_grad_ ? weight_straight<P>(s_.weight, s_.V, s_.K, frame, parallel_) : Rhs<P>{};
    run_tasks(parallel_, slots, [&](int64_t slot) {
      start(first, slot);
      sum_rows(first, slot, 0, w);
      finish_losses(first, slot);
      if (!with_grad_) return;
      grad_rows(first, slot, 0, w_rows);
      finish_dx(first, slot);
    });
    if (with_grad_) accumulate(first, slots, 0);
  }

  void vocabulary_in_blocks(int64_t first, int64_t slots) {
    run_tasks(parallel_, slots, [&](int64_t slot) { start(first, slot); });
    for (int64_t v0 = 0; v0 < s_.V; v0 += VOCAB) {
      Frame frame;
      const Rhs<P> w =
          weight_transposed<T>(weight_rows(v0), columns(v0), s_.K, frame, parallel_).dense;
      run_tasks(parallel_, slots, [&](int64_t slot) { sum_rows(first, slot, v0, w); });
    }
    run_tasks(parallel_, slots, [&](int64_t slot) { finish_losses(first, slot); });
    if (!with_grad_) return;
    for (int64_t v0 = 0; v0 < s_.V; v0 += VOCAB) {
      Frame frame;
      const Rhs<P> w = weight_straight<P>(weight_rows(v0), columns(v0), s_.K, frame, parallel_);
      run_tasks(parallel_, slots, [&](int64_t slot) { grad_rows(first, slot, v0, w); });
      accumulate(first, slots, v0);
    }
    run_tasks(parallel_, slots, [&](int64_t slot) { finish_dx(first, slot); });
  }

  void sum_rows(int64_t first, int64_t slot, int64_t v0, Rhs<P> w) {
    const int64_t m0 = (first + slot) * ROWS, rows = rows_of(first + slot), n = columns(v0);
    float* block = logits(slot, v0);
    gemm(rows, n, s_.K, x_[slot], w, block, logits_ld_, false);
    for (int64_t i = 0; i < rows; ++i) {
      RowSum& row = sums_[slot * ROWS + i];
      float* s = block + i * logits_ld_;
      const int64_t target = s_.targets[m0 + i] - v0;
      if (!ignored(m0 + i) && target >= 0 && target < n) row.target = s[target];
      add_logits(s, n, row, whole() && with_grad_ ? s : nullptr);
    }
  }

  void finish_losses(int64_t first, int64_t slot) {
    const int64_t m0 = (first + slot) * ROWS;
    for (int64_t i = 0; i < rows_of(first + slot); ++i) {
      RowSum& row = sums_[slot * ROWS + i];
      row.lse = row.m + __builtin_logf(row.l);
      losses_[m0 + i] = ignored(m0 + i) ? 0.0f : row.lse - row.target;
    }
  }

  // dN += dS W for the columns from v0 on; dS is left for dW = dS' N.
  void grad_rows(int64_t first, int64_t slot, int64_t v0, Rhs<P> w) {
    const int64_t rows = rows_of(first + slot), n = columns(v0);
    float* ds = logits(slot, v0);
    for (int64_t i = 0; i < rows; ++i)
      grad_row((first + slot) * ROWS + i, sums_[slot * ROWS + i], v0, n, ds + i * logits_ld_);
    Frame frame;
    P* copy = take<P>(frame, rows * row_stride<P>(padded_k<P>(n)));
    gemm(rows, s_.K, n, lhs_rows(ds, logits_ld_, rows, n, copy), w, dn(first, slot), k_ld_, v0 > 0);
    dweight_.set_dy(slot, ds, logits_ld_, rows, 0, n);
  }

  void accumulate(int64_t first, int64_t slots, int64_t v0) {
    const int64_t rows = min(s_.M, (first + slots) * ROWS) - first * ROWS;
    dweight_.accumulate(rows, first > 0, v0, columns(v0), parallel_);
  }

  // ds: logits, or exp(s - m) where the whole vocabulary is one block, to their gradients.
  void grad_row(int64_t m, const RowSum& row, int64_t v0, int64_t n, float* ds) const {
    const bool counts = !ignored(m);
    const float each = whole() ? share_ / row.l : share_;
    for_vectors(n, [&](int64_t j, auto part) {
      VF p = splat(0.0f);
      if (counts) p = (whole() ? load(ds + j, part) : exp(load(ds + j, part) - row.lse)) * each;
      store(ds + j, p, part);
    });
    const int64_t target = s_.targets[m] - v0;
    if (counts && target >= 0 && target < n) ds[target] -= share_;
  }

  void finish_dx(int64_t first, int64_t slot) {
    if (dx_in_place()) return;
    const int64_t block = first + slot;
    for (int64_t i = 0; i < rows_of(block); ++i) {
      const int64_t m = block * ROWS + i;
      const float* dn = this->dn(first, slot) + i * k_ld_;
      const T* x = static_cast<const T*>(s_.x) + m * s_.K;
      T* dx = static_cast<T*>(s_.dx) + m * s_.K;
      if (norm_.weight)
        norm_grad_row(dn, x, static_cast<const T*>(nullptr), s_.K, {norm_.mean[m], norm_.rstd[m]},
                      norm_, dnorm_weight_.block(block), dnorm_bias_.block(block), nullptr, dx);
      else
        copy_row(dn, s_.K, dx);
    }
  }

  void finish() {
    double total_loss = 0.0;
    for (int64_t i = 0; i < s_.M; ++i) total_loss += losses_[i];
    *s_.loss = static_cast<float>(total_loss * static_cast<double>(share_));
    if (!with_grad_) return;
    dnorm_weight_.finish(s_.dnorm.weight);
    dnorm_bias_.finish(s_.dnorm.bias);
    dweight_sum_.finish(s_.M == 0, parallel_);
  }

  const CrossEntropy& s_;
  const Parallel& parallel_;
  Frame frame_;
  RowNorm norm_;
  bool with_grad_;
  int64_t blocks_, chunk_, k_ld_, x_stride_, logits_ld_;
  float share_;  // of one row in the mean
  float *losses_, *logits_, *dn_;
  P* x_copy_;
  Lhs<P>* x_;
  RowSum* sums_;
  WeightSums<P> dweight_sum_;
  WeightGrad<P> dweight_;
  ColumnSums dnorm_weight_, dnorm_bias_;
};

void cross_entropy(const CrossEntropy& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return CrossEntropyPass<float>(s, parallel).run();
  CrossEntropyPass<bf16>(s, parallel).run();
}
