// State that one forward pass leaves for the next: keys and values, and the first layer's
// projections.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "model.h"

namespace gptfast {

// Zeroed memory, aligned to 64 bytes. The operating system provides its pages as they are touched.
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

// Keys and values of up to `capacity` tokens in each of `slots` slots, one slot per running
// sequence. In each layer the slots follow one another, in the layout that the kernels define.
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

  // Bytes of one slot over all layers.
  static int64_t slot_bytes(const Model& model, int64_t capacity);

 private:
  const Kernels& kernels_;
  CacheShape shape_;
  int64_t slots_, layers_, layer_bytes_;
  ZeroedMemory memory_;
};

// The first layer's queries, keys and values depend on (token, position) alone, so a sliding window
// needs the same ones again. The table keeps each once it has been computed, in row position * V +
// token of (T V, 3 C).
class FirstLayerTable {
 public:
  explicit FirstLayerTable(const Model& model);

  static int64_t bytes(const Model& model);
  // The entry of a token at a position, (3 C,).
  char* row(int64_t token, int64_t position) const {
    return qkv_.data() + entry(token, position) * row_bytes_;
  }
  int64_t row_bytes() const { return row_bytes_; }
  // Marks the entry as known; returns whether it was known before.
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
