// dW (N, K) = dY' X summed over all rows, for the backward of a linear layer.
//
// Rows come in blocks of ROWS; a chunk of blocks has its operands packed by the tasks that produce
// dY and X, then the tasks of accumulate() each add the whole chunk to a block of dW. A chunk is
// a multiple of KC, so every element of dW is summed over the rows in one order, whatever the
// number of threads.

// Row blocks per chunk: one per thread at least, and otherwise as many as the outer cache holds the
// operands of, rounded up to whole KC.
template <class P>
inline int64_t blocks_per_chunk(int64_t rows, int64_t floats_per_row, const Parallel& parallel) {
  constexpr int64_t cache_floats = int64_t{2} << 20;
  const int64_t fitting = cache_floats / (ROWS * floats_per_row);
  return min(divide_up(rows, ROWS), round_up(max(fitting, parallel.threads), Tile<P>::KC / ROWS));
}

static_assert(Tile<float>::KC % ROWS == 0 && Tile<bf16>::KC % ROWS == 0 &&
              ROWS % DROPOUT_ROWS == 0);

constexpr int64_t no_limit = INT64_MAX;

template <class P>
class WeightGrad {
 public:
  static constexpr int64_t GROUP = lhs_by_rows<P> ? 64 : 48;

  // `most_rows` of the weight at a time are in work; all of them where it is left out.
  WeightGrad(const ParamGrad& grad, int64_t n, int64_t k, int64_t chunk_blocks, Frame& frame,
             int64_t most_rows = no_limit)
      : grad_(grad),
        n_(n),
        k_(k),
        ld_(padded_n<P>(k)),
        chunk_rows_(chunk_blocks * ROWS),
        total_(in_place() ? static_cast<float*>(grad.data) : take<float>(frame, n * ld_)),
        lhs_(take<P>(frame, chunk_rows_ * round_up(min(n, most_rows), GROUP))),
        rhs_(take<P>(frame, rhs_elements<P>(chunk_rows_, k))) {}

  // Columns [first, first + n) of dY of one block of the chunk, (rows, n); `first` is a multiple of
  // GROUP.
  template <class S>
  void set_dy(int64_t block, const S* dy, int64_t ld, int64_t rows, int64_t first,
              int64_t n) const {
    for (int64_t n0 = 0; n0 < n; n0 += GROUP) {
      P* group = lhs_ + (first + n0) * chunk_rows_;
      if constexpr (!lhs_by_rows<P>) {
        pack_rows(dy, ld, rows, n, n0, GROUP, group + block * ROWS * GROUP);
      } else {
        P pairs[ROWS * GROUP];
        pack_rows(dy, ld, rows, n, n0, GROUP, pairs);
        transpose_pairs(pairs, padded_k<P>(rows) / 2, GROUP, group + block * ROWS, chunk_rows_);
      }
    }
  }

  // Columns k0 .. k0 + columns of X of that block; k0 is a multiple of NR.
  template <class S>
  void set_x(int64_t block, const S* x, int64_t ld, int64_t rows, int64_t k0,
             int64_t columns) const {
    constexpr int NR = Tile<P>::NR;
    const Rhs<P> to = chunk_x().rows(block * ROWS).columns(k0);
    for (int64_t n0 = 0; n0 < columns; n0 += NR)
      pack_rows(x, ld, rows, columns, n0, NR, const_cast<P*>(to.columns(n0).data));
  }

  // Rows [first, first + n) of dW = or += dY' X over the first `rows` rows of the chunk.
  void accumulate(int64_t rows, bool add, int64_t first, int64_t n, const Parallel& parallel) {
    constexpr int KU = Tile<P>::KU, k_per_task = 2 * Tile<P>::NR;
    const int64_t k_tasks = divide_up(k_, k_per_task);
    run_tasks(parallel, divide_up(n, GROUP) * k_tasks, [&](int64_t task) {
      const int64_t n0 = task / k_tasks * GROUP, k0 = task % k_tasks * k_per_task;
      const P* group = lhs_ + n0 * chunk_rows_;
      const Lhs<P> dy =
          lhs_by_rows<P> ? Lhs<P>{group, chunk_rows_, KU} : Lhs<P>{group, KU, GROUP * KU};
      gemm(min(GROUP, n - n0), min(k_per_task, k_ - k0), rows, dy, chunk_x().columns(k0),
           total_ + (first + n0) * ld_ + k0, ld_, add);
    });
    started_ = true;
  }
  void accumulate(int64_t rows, const Parallel& parallel) {
    accumulate(rows, started_, 0, n_, parallel);
  }

  void finish(const Parallel& parallel) const {
    if (!started_) __builtin_memset(total_, 0, static_cast<size_t>(n_ * ld_) * sizeof(float));
    if (in_place()) return;
    const int64_t per_task = divide_up(n_, 4 * parallel.threads);
    run_tasks(parallel, divide_up(n_, per_task), [&](int64_t task) {
      for (int64_t i = task * per_task; i < min(n_, (task + 1) * per_task); ++i)
        write_grad(grad_, i * k_, total_ + i * ld_, k_);
    });
  }

 private:
  // Columns of dY lie in groups, [N / GROUP][chunk rows / KU][GROUP][KU] (or [N][chunk rows], by
  // rows), so that a task reads its group from one end to the other.
  static_assert(GROUP % Tile<P>::MR == 0 && GROUP % W == 0);

  // Whether the sums can be made where the caller wants them.
  bool in_place() const { return grad_.dtype == DType::f32 && ld_ == k_; }
  Rhs<P> chunk_x() const { return {rhs_, panel_elements<P>(chunk_rows_)}; }

  ParamGrad grad_;
  int64_t n_, k_, ld_, chunk_rows_;
  float* total_;
  P *lhs_, *rhs_;
  bool started_ = false;
};
