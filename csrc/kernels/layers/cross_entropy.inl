// LayerNorm (optional), linear layer and cross-entropy without the (M, V) logits in memory. Rows
// are processed in chunks, whose logits are kept, and the vocabulary in blocks, so that no packed
// copy of the whole weight is made. For each chunk, a first pass over the blocks sums each row's
// exponentials, and a second one turns the logits into
//   d loss / d logits = (softmax - (1 - e) onehot - e / V) share,
// share = w / sum of all w for a mean, else w, and e the label smoothing, of the loss
//   ln sum_j exp(s_j) - (1 - e) s_target - e mean_j s_j,
// and multiplies them by the rows of the weight and by those of the activations. Each product is
// computed once; so are the exponentials if the whole vocabulary is one block.
#pragma once

#include "../kernels.h"
#include "../matmul/gemm.inl"
#include "../matmul/layout.inl"
#include "../matmul/tasks.inl"
#include "../matmul/weight_grad.inl"
#include "../matmul/weights.inl"
#include "../simd/elements.inl"
#include "../simd/math.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "../threads/scratch.h"
#include "logits.inl"
#include "rows.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Columns of the logits per block: a multiple of KC, of every NR and of WeightGrad's groups, so
// that sums over the vocabulary are the same with and without blocks.
constexpr int64_t VOCAB_BLOCK = 1536;
static_assert(VOCAB_BLOCK % Tile<float>::KC == 0 && VOCAB_BLOCK % Tile<bf16>::KC == 0 &&
              VOCAB_BLOCK % WeightGrad<float>::GROUP == 0 &&
              VOCAB_BLOCK % WeightGrad<bf16>::GROUP == 0);
constexpr int64_t max_logits = int64_t{40} << 20;  // floats per chunk: 768 rows at V = 50,257

// One call of cross_entropy.
template <class T>
class CrossEntropyPass {
  using P = typename OperandOf<T>::type;

 public:
  CrossEntropyPass(const CrossEntropy& s, const Parallel& parallel)
      : s_(s),
        parallel_(parallel),
        norm_(s.norm, s.K, frame_),
        with_dx_(s.dx != nullptr),
        with_dweight_(s.dweight.data != nullptr),
        with_grad_(with_dx_ || with_dweight_),
        parts_(s.M, s.V * s.K, min(s.V, VOCAB_BLOCK) + s.K, parallel),
        k_ld_(padded_n<P>(s.K)),
        x_stride_(row_stride<P>(padded_k<P>(s.K))),
        logits_ld_(padded_n<P>(with_grad_ ? s.V : min(s.V, VOCAB_BLOCK))),
        losses_(alloc<float>(frame_, s.M)),
        sums_(s.dweight, with_dweight_ ? s.V : 0, s.K, single_block() ? parts_.count() : 1, frame_),
        dln_w_(parts_.blocks(), with_norm_grad(s) ? s.K : 0, frame_),
        dln_b_(parts_.blocks(), with_norm_grad(s) ? s.K : 0, frame_) {
    norm_.mean = alloc<float>(frame_, s.M);
    norm_.rstd = alloc<float>(frame_, s.M);
    if (s.reduction != Reduction::mean) return;
    double total = 0.0;
    for (int64_t i = 0; i < s.M; ++i) total += weight_of(i);
    share_ = total == 0.0 ? 0.0 : 1.0 / total;
  }

  void run() {
    if (single_block())
      whole_vocabulary();
    else
      vocabulary_in_blocks();
    finish();
  }

 private:
  // A block of rows: its logits, which become their gradients in place, and its sums.
  struct Rows {
    int64_t m0, count;
    float *logits, *dn;  // dN is summed in dx itself if dx_in_place()
    P* x_copy;
    Lhs<P> x;
    RowSum* sums;

    Rows(const CrossEntropyPass& pass, int64_t block, ScratchFrame& frame)
        : m0(block * ROWS),
          count(min(ROWS, pass.s_.M - m0)),
          logits(alloc<float>(frame, count * pass.logits_ld_)),
          dn(pass.dx_in_place() ? static_cast<float*>(pass.s_.dx) + m0 * pass.k_ld_
                                : alloc<float>(frame, pass.with_dx_ ? count * pass.k_ld_ : 0)),
          x_copy(alloc<P>(frame, count * pass.x_stride_)),
          sums(alloc<RowSum>(frame, count)) {}
  };

  bool single_block() const { return s_.V <= VOCAB_BLOCK; }
  float* logits(const Rows& at, int64_t v0) const { return at.logits + (with_grad_ ? v0 : 0); }
  bool dx_in_place() const {
    return with_dx_ && sizeof(T) == sizeof(float) && !norm_.weight && k_ld_ == s_.K;
  }
  // True also if there are no rows and therefore dx is null: the gradients of the norm are then
  // zeros.
  static bool with_norm_grad(const CrossEntropy& s) {
    return s.norm.weight.data && (s.dx || s.dnorm.weight.data || s.dnorm.bias.data);
  }
  int64_t columns(int64_t v0) const { return min(VOCAB_BLOCK, s_.V - v0); }
  Weight weight_rows(int64_t v0) const { return rows_from(s_.weight, v0, s_.K); }
  bool ignored(int64_t m) const { return s_.targets[m] == s_.ignore_index; }
  float weight_of(int64_t m) const {
    return ignored(m) ? 0.0f : s_.token_weights ? s_.token_weights[m] : 1.0f;
  }

  // The whole vocabulary is one block: each row block goes through all steps while it is in the
  // cache.
  void whole_vocabulary() {
    ScratchFrame frame;
    const Rhs<P> w = weight_transposed<T>(s_.weight, s_.V, s_.K, frame, parallel_).dense();
    const Rhs<P> w_rows =
        with_dx_ ? weight_straight<P>(s_.weight, s_.V, s_.K, frame, parallel_) : Rhs<P>{};
    parts_.for_each([&](const RowPart& part) {
      ScratchFrame part_frame;
      const WeightGrad<P> dweight(sums_, part.index, with_dweight_ ? part.chunk : 0, part_frame);
      const auto produce = [&](int64_t block, int64_t slot) {
        ScratchFrame block_frame;
        Rows rows(*this, block, block_frame);
        start(rows, slot, dweight);
        sum_rows(rows, 0, w);
        finish_losses(rows);
        if (!with_grad_) return;
        grad_rows(rows, 0, w_rows, slot, dweight);
        finish_dx(rows);
      };
      part.for_chunks(produce, [&](int64_t rows, bool add) {
        if (with_dweight_) dweight.accumulate(rows, add, 0, s_.V, part.parallel);
      });
    });
  }

  // Row blocks per chunk. Each chunk reads and writes the whole gradient of the weight, so a chunk
  // is as large as the outer cache can hold its operands; but its logits are at most max_logits,
  // unless that is less than KC rows.
  int64_t blocks_in_chunk() const {
    const int64_t cached = blocks_per_chunk<P>(s_.M, VOCAB_BLOCK + s_.K, parallel_);
    if (!with_grad_) return cached;
    constexpr int64_t min_blocks = Tile<P>::KC / ROWS;
    const int64_t fitting = max_logits / (ROWS * padded_n<P>(s_.V));
    return min(cached, max(min_blocks, fitting / min_blocks * min_blocks));
  }

  void vocabulary_in_blocks() {
    ScratchFrame frame;
    const int64_t chunk = blocks_in_chunk();
    const WeightGrad<P> dweight(sums_, 0, with_dweight_ ? chunk : 0, frame, VOCAB_BLOCK);
    for (int64_t first = 0; first < parts_.blocks(); first += chunk)
      vocabulary_in_blocks(dweight, first, min(chunk, parts_.blocks() - first));
  }

  void vocabulary_in_blocks(const WeightGrad<P>& dweight, int64_t first, int64_t slots) {
    ScratchFrame chunk_frame;
    Rows* chunk = alloc<Rows>(chunk_frame, slots);
    for (int64_t slot = 0; slot < slots; ++slot)
      chunk[slot] = Rows(*this, first + slot, chunk_frame);
    const auto for_slots = [&](const auto& f) {
      run_tasks(parallel_, slots, [&](int64_t slot) { f(chunk[slot], slot); });
    };
    for_slots([&](Rows& rows, int64_t slot) { start(rows, slot, dweight); });
    for (int64_t v0 = 0; v0 < s_.V; v0 += VOCAB_BLOCK) {
      ScratchFrame frame;
      const Rhs<P> w =
          weight_transposed<T>(weight_rows(v0), columns(v0), s_.K, frame, parallel_).dense();
      for_slots([&](Rows& rows, int64_t) { sum_rows(rows, v0, w); });
    }
    for_slots([&](Rows& rows, int64_t) { finish_losses(rows); });
    if (!with_grad_) return;
    const int64_t rows_in_all = min(s_.M, (first + slots) * ROWS) - first * ROWS;
    for (int64_t v0 = 0; v0 < s_.V; v0 += VOCAB_BLOCK) {
      ScratchFrame frame;
      const Rhs<P> w =
          with_dx_ ? weight_straight<P>(weight_rows(v0), columns(v0), s_.K, frame, parallel_)
                   : Rhs<P>{};
      for_slots([&](Rows& rows, int64_t slot) { grad_rows(rows, v0, w, slot, dweight); });
      if (with_dweight_) dweight.accumulate(rows_in_all, first > 0, v0, columns(v0), parallel_);
    }
    for_slots([&](Rows& rows, int64_t) { finish_dx(rows); });
  }

  // Normalises the rows, clears their sums, and packs them for dW.
  void start(Rows& at, int64_t slot, const WeightGrad<P>& dweight) const {
    at.x = norm_rows(static_cast<const T*>(s_.x), at.m0, at.count, s_.K, norm_, true, at.x_copy);
    for (int64_t i = 0; i < at.count; ++i) at.sums[i] = {neg_inf, 0.0f, 0.0f, 0.0f, 0};
    if (with_dweight_) dweight.set_x(slot, at.x.data, at.x.row, at.count, 0, s_.K);
  }

  // Computes the logits of the columns from v0 on and adds them to the sums of their rows.
  void sum_rows(const Rows& at, int64_t v0, Rhs<P> w) const {
    const int64_t n = columns(v0);
    float* scores = logits(at, v0);
    gemm(at.count, n, s_.K, at.x, w, scores, logits_ld_, false);
    for (int64_t i = 0; i < at.count; ++i) {
      RowSum& row = at.sums[i];
      float* s = scores + i * logits_ld_;
      const int64_t target = s_.targets[at.m0 + i] - v0;
      if (!ignored(at.m0 + i) && target >= 0 && target < n) row.target = s[target];
      float* exponentials = single_block() && with_grad_ ? s : nullptr;
      if (s_.label_smoothing == 0.0f)
        add_logits(s, n, row, exponentials);
      else
        add_logits<true>(s, n, row, exponentials);
    }
  }

  void finish_losses(const Rows& at) const {
    for (int64_t i = 0; i < at.count; ++i) {
      const RowSum& row = at.sums[i];
      const int64_t m = at.m0 + i;
      losses_[m] = ignored(m) ? 0.0f : loss_of(row) * weight_of(m);
    }
  }

  float loss_of(const RowSum& row) const {
    const float e = s_.label_smoothing;
    if (e == 0.0f) return -row.logprob(row.target);
    const float target = row.target - row.m, mean = row.below / static_cast<float>(s_.V);
    return __builtin_logf(row.l) - ((1.0f - e) * target + e * mean);
  }

  // dN += dS W for the columns from v0 on; packs dS for dW = dS' N.
  void grad_rows(const Rows& at, int64_t v0, Rhs<P> w, int64_t slot,
                 const WeightGrad<P>& dweight) const {
    const int64_t n = columns(v0);
    float* ds = logits(at, v0);
    for (int64_t i = 0; i < at.count; ++i)
      grad_row(at.m0 + i, at.sums[i], v0, n, ds + i * logits_ld_);
    if (with_dx_) {
      ScratchFrame frame;
      P* copy = alloc<P>(frame, at.count * row_stride<P>(padded_k<P>(n)));
      gemm(at.count, s_.K, n, lhs_rows(ds, logits_ld_, at.count, n, copy), w, at.dn, k_ld_, v0 > 0);
    }
    if (with_dweight_) dweight.set_dy(slot, ds, logits_ld_, at.count, 0, n);
  }

  // Turns ds from logits (or from exp(s - m), if the whole vocabulary is one block) into gradients.
  void grad_row(int64_t m, const RowSum& row, int64_t v0, int64_t n, float* ds) const {
    const float share = static_cast<float>(share_ * static_cast<double>(weight_of(m)));
    const float each = share / row.l, e = s_.label_smoothing;
    const float of_all = e == 0.0f ? 0.0f : share * (e / static_cast<float>(s_.V));
    const bool counts = share != 0.0f;
    for_vectors(n, [&](int64_t j, auto part) {
      VF p = splat(0.0f);
      if (counts)
        p = (single_block() ? load(ds + j, part) : exp(load(ds + j, part) - row.m)) * each - of_all;
      store(ds + j, p, part);
    });
    const int64_t target = s_.targets[m] - v0;
    if (counts && target >= 0 && target < n) ds[target] -= share * (1.0f - e);
  }

  void finish_dx(const Rows& at) const {
    if (!with_dx_ || dx_in_place()) return;
    const int64_t block = at.m0 / ROWS;
    for (int64_t i = 0; i < at.count; ++i) {
      const int64_t m = at.m0 + i;
      const float* dn = at.dn + i * k_ld_;
      const T* x = static_cast<const T*>(s_.x) + m * s_.K;
      T* dx = static_cast<T*>(s_.dx) + m * s_.K;
      if (norm_.weight)
        norm_backward_row(dn, x, static_cast<const T*>(nullptr), s_.K,
                          {norm_.mean[m], norm_.rstd[m]}, norm_, dln_w_.block(block),
                          dln_b_.block(block), nullptr, dx);
      else
        copy_row(dn, s_.K, dx);
    }
  }

  void finish() const {
    double total_loss = 0.0;
    for (int64_t i = 0; i < s_.M; ++i) total_loss += losses_[i];
    if (s_.reduction == Reduction::none)
      for (int64_t i = 0; i < s_.M; ++i) s_.loss[i] = losses_[i];
    else
      *s_.loss = static_cast<float>(total_loss * share_);
    dln_w_.finish(s_.dnorm.weight);
    dln_b_.finish(s_.dnorm.bias);
    if (with_dweight_) sums_.finish(s_.M == 0, parallel_);
  }

  const CrossEntropy& s_;
  const Parallel& parallel_;
  ScratchFrame frame_;
  RowNorm norm_;
  bool with_dx_, with_dweight_, with_grad_;
  RowParts<P> parts_;
  int64_t k_ld_, x_stride_, logits_ld_;
  double share_ = 1.0;  // of a row of weight 1 in the loss; float has none for tiny weights
  float* losses_;
  WeightSums<P> sums_;
  ColumnSums dln_w_, dln_b_;
};

void cross_entropy(const CrossEntropy& s, const Parallel& parallel) {
  if (s.dtype == DType::f32) return CrossEntropyPass<float>(s, parallel).run();
  CrossEntropyPass<bf16>(s, parallel).run();
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
