// What the loops of a product bring into the cache for later ones.
#pragma once

#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// What a microkernel brings into the cache for a later one, step by step of its own loop: large
// weights come from the outer cache or from memory.
struct Prefetch {
  const char* data;
  int64_t step;  // bytes

  void fetch(int64_t unit) const { __builtin_prefetch(data + unit * step, 0, 2); }
};

// Matrices of the next task: a product that is given them has each microkernel fetch lines of them,
// one per step, where it would fetch the product's next panel.
class PrefetchQueue {
 public:
  void clear() { count = at = row = line = 0, bytes = 0; }

  // Rows of `length` elements; matrices beyond a part of the L2 cache are left out.
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

  // For a microkernel of so many steps.
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
    int64_t step, rows, lines;  // bytes from row to row; lines of 64 bytes in each
  };
  static constexpr int MAX_MATRICES = 8;
  Matrix matrices[MAX_MATRICES];
  int count = 0, at = 0;
  int64_t row = 0, line = 0, bytes = 0;
};

// Brings a block of a matrix into the cache, to be read or, with WRITE, to be written.
template <bool WRITE, class T>
inline void fetch_block(const T* p, int64_t ld, int64_t rows, int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += line) __builtin_prefetch(p + i * ld + j, WRITE);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
