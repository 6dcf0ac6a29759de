// dW (N, K) = dY' X summed over all rows, for the backward of a linear layer.
//
// Rows come in blocks of ROWS; a chunk of blocks has its operands packed by the tasks that produce
// dY and X, then the tasks of accumulate() each add the whole chunk to some rows of dW. Every
// element of dW is one chain over the rows in order, whatever the number of threads.

// Row blocks per chunk: one per thread at least, and otherwise as many as the outer cache holds the
// operands of.
inline int64_t blocks_per_chunk(int64_t rows, int64_t floats_per_row, const Parallel& parallel) {
  constexpr int64_t cache_floats = int64_t{4} << 20;
  const int64_t fitting = cache_floats / (ROWS * floats_per_row);
  return min(divide_up(rows, ROWS), max(fitting, parallel.threads));
}

template <class P>
class WeightGrad {
 public:
  WeightGrad(int64_t n, int64_t k, int64_t chunk_blocks, Frame& frame)
      : n_(n),
        k_(k),
        ld_(padded_n<P>(k)),
        total_(take<float>(frame, n * ld_)),
        lhs_elements_(lhs_transposed_elements<P>(ROWS, n)),
        rhs_elements_(rhs_elements<P>(ROWS, k)),
        lhs_(take<Lhs<P>>(frame, chunk_blocks)),
        lhs_copy_(take<P>(frame, chunk_blocks * lhs_elements_)),
        rhs_(take<P>(frame, chunk_blocks * rhs_elements_)) {}

  // dY of one block of the chunk, (rows, N).
  template <class S>
  void set_dy(int64_t block, const S* dy, int64_t ld, int64_t rows) const {
    lhs_[block] = lhs_transposed(dy, ld, rows, n_, lhs_copy_ + block * lhs_elements_);
  }

  // Columns k0 .. k0 + columns of X of that block; k0 is a multiple of NR.
  template <class S>
  void set_x(int64_t block, const S* x, int64_t ld, int64_t rows, int64_t k0,
             int64_t columns) const {
    const int64_t panel = panel_elements<P>(rows);
    pack_straight(x, ld, rows, columns, rhs_ + block * rhs_elements_ + k0 / Tile<P>::NR * panel);
  }

  void accumulate(int64_t m0, int64_t m1, const Parallel& parallel) {
    const int64_t per_task = round_up(divide_up(n_, 4 * parallel.threads), Tile<P>::MR);
    run_tasks(parallel, divide_up(n_, per_task), [&](int64_t task) {
      const int64_t n0 = task * per_task, count = min(per_task, n_ - n0);
      for (int64_t m = m0, block = 0; m < m1; m += ROWS, ++block) {
        const int64_t rows = min(ROWS, m1 - m);
        const Lhs<P> dy = {lhs_[block].data + n0 * lhs_[block].row, lhs_[block].row,
                           lhs_[block].step};
        const Rhs<P> x = {rhs_ + block * rhs_elements_, panel_elements<P>(rows)};
        gemm(count, k_, rows, dy, x, total_ + n0 * ld_, ld_, started_ || block > 0);
      }
    });
    started_ = true;
  }

  void finish(const ParamGrad& grad, const Parallel& parallel) const {
    if (!started_) __builtin_memset(total_, 0, static_cast<size_t>(n_ * ld_) * sizeof(float));
    const int64_t per_task = divide_up(n_, 4 * parallel.threads);
    run_tasks(parallel, divide_up(n_, per_task), [&](int64_t task) {
      for (int64_t i = task * per_task; i < min(n_, (task + 1) * per_task); ++i)
        write_grad(grad, i * k_, total_ + i * ld_, k_);
    });
  }

 private:
  int64_t n_, k_, ld_;
  float* total_;
  int64_t lhs_elements_, rhs_elements_;
  Lhs<P>* lhs_;
  P *lhs_copy_, *rhs_;
  bool started_ = false;
};
