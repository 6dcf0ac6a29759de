// Prefetching: the loop of a microkernel brings memory into the cache that a later one reads.
#pragma once

#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// What a microkernel prefetches for a later one, because large weights come from the outer cache or
// from memory: one cache line in each step of its loop over the units of K.
struct Prefetch {
  const char* data;  // the address for unit 0
  int64_t step;      // bytes from the address for one unit to that for the next

  void fetch(int64_t unit) const { __builtin_prefetch(data + unit * step, 0, 2); }
};

// The matrices that the next task reads. In a product that is given a queue, each microkernel
// prefetches lines of these matrices instead of the product's next panel, until the queue is empty.
class PrefetchQueue {
 public:
  void clear() { count = at = row = line = 0, bytes = 0; }

  // Adds `rows` rows of `length` elements each. The matrix is left out if the queue is full or all
  // matrices together exceed max_bytes, a part of the L2 cache.
  template <class T>
  void add(const T* data, int64_t ld, int64_t rows, int64_t length) {
    constexpr int64_t element = sizeof(T), max_bytes = 512 << 10;
    bytes += rows * length * element;
    if (count == MAX_MATRICES || bytes > max_bytes) return;
    if (ld == length)
      matrices[count++] = {reinterpret_cast<const char*>(data), 64,
                           divide_up(rows * length * element, 64), 1};
    else
      matrices[count++] = {reinterpret_cast<const char*>(data), ld * element, rows,
                           divide_up(length * element, 64)};
  }

  // The lines for a microkernel with a loop over `units` units: one per unit, at the same place of
  // consecutive rows. `otherwise` if the queue is empty.
  Prefetch next(int64_t units, const Prefetch& otherwise) {
    if (at == count) return otherwise;
    const Matrix& from = matrices[at];
    const Prefetch found = {from.data + row * from.step + line * 64, from.step};
    row += units;
    if (row >= from.rows) row = 0, ++line;
    if (line == from.lines) line = 0, ++at;
    return found;
  }

 private:
  struct Matrix {
    const char* data;
    int64_t step, rows, lines;  // step: bytes from row to row; lines: of 64 bytes, in each row
  };
  static constexpr int MAX_MATRICES = 8;
  Matrix matrices[MAX_MATRICES];
  int count = 0, at = 0;
  int64_t row = 0, line = 0, bytes = 0;
};

// Prefetches a block (rows, n) of a matrix, for reading or, with WRITE, for writing.
template <bool WRITE, class T>
inline void fetch_block(const T* p, int64_t ld, int64_t rows, int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += line) __builtin_prefetch(p + i * ld + j, WRITE);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
