// What passes leave for later ones: keys and values, and the first layer's projections.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "model.h"

namespace gptfast {

// Zeroed memory, aligned to 64 bytes, of which the operating system gives what is touched.
class ZeroedMemory {
 public:
  explicit ZeroedMemory(int64_t bytes);  // throws std::bad_alloc
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };

  int64_t bytes_;
  std::unique_ptr<void, Free> block_;
  char* data_;
};

// Keys and values of up to `capacity` tokens in each of `slots`, one for a sequence; per layer, all
// slots one after the other as the kernels lay them out.
class Cache {
 public:
  // Throws std::invalid_argument for a capacity that is not in [1, block_size].
  Cache(const Model& model, int64_t slots, int64_t capacity);

  int64_t slots() const { return slots_; }
  int64_t capacity() const { return shape_.capacity; }
  int64_t bytes() const { return memory_.bytes(); }
  const CacheShape& shape() const { return shape_; }
  char* layer(int64_t index) const { return memory_.data() + index * layer_bytes_; }

  // Copies the keys and values of the first `count` tokens from one slot to another.
  void copy(int64_t from, int64_t to, int64_t count, const Parallel& parallel);

  // Of one slot, all layers.
  static int64_t slot_bytes(const Model& model, int64_t capacity);

 private:
  const Kernels& kernels_;
  CacheShape shape_;
  int64_t slots_, layers_, layer_bytes_;
  ZeroedMemory memory_;
};

// What the first layer's projection gives depends on (token, position) alone, so a window that
// slides meets the same values again: row position * V + token of (T V, 3 C), once it is known.
class FirstLayerTable {
 public:
  explicit FirstLayerTable(const Model& model);

  static int64_t bytes(const Model& model);
  // (3 C,)
  char* row(int64_t token, int64_t position) const {
    return qkv_.data() + entry(token, position) * row_bytes_;
  }
  int64_t row_bytes() const { return row_bytes_; }
  // Whether the entry is known; it counts as known from now on.
  bool mark_known(int64_t token, int64_t position) {
    uint8_t& known = known_[static_cast<size_t>(entry(token, position))];
    const bool before = known != 0;
    known = 1;
    return before;
  }

 private:
  int64_t entry(int64_t token, int64_t position) const { return position * vocab_size_ + token; }

  int64_t vocab_size_, row_bytes_;
  ZeroedMemory qkv_;
  std::vector<uint8_t> known_;
};

}  // namespace gptfast
