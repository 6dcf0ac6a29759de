#include "cache.h"

#include <new>
#include <stdexcept>
#include <string>

namespace gptfast {
namespace {

constexpr uintptr_t alignment = 64;

CacheShape shape_of(const Model& model, int64_t capacity) {
  const ModelConfig& c = model.config();
  return {model.dtype(), c.block_size, c.n_head, c.head_dim(), capacity};
}

CacheShape checked_shape(const Model& model, int64_t capacity) {
  const int64_t max_capacity = model.config().block_size;
  if (capacity < 1 || capacity > max_capacity)
    throw std::invalid_argument("the cache's capacity must be in [1, " +
                                std::to_string(max_capacity) + "], got " +
                                std::to_string(capacity));
  return shape_of(model, capacity);
}

}  // namespace

ZeroedMemory::ZeroedMemory(int64_t bytes)
    : bytes_(bytes), block_(std::calloc(static_cast<size_t>(bytes) + alignment, 1)) {
  if (block_ == nullptr) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(block_.get());
  data_ = static_cast<char*>(block_.get()) + (alignment - address % alignment) % alignment;
}

Cache::Cache(const Model& model, int64_t slots, int64_t capacity)
    : kernels_(model.kernels()),
      shape_(checked_shape(model, capacity)),
      slots_(slots),
      layers_(model.config().n_layer),
      layer_bytes_(slots * kernels_.cache_bytes(shape_)),
      memory_(layers_ * layer_bytes_) {}

void Cache::copy(int64_t from, int64_t to, int64_t count, const Parallel& parallel) {
  run_tasks(parallel, layers_,
            [&](int64_t i) { kernels_.copy_cached(shape_, layer(i), from, to, count); });
}

int64_t Cache::slot_bytes(const Model& model, int64_t capacity) {
  return model.config().n_layer * model.kernels().cache_bytes(shape_of(model, capacity));
}

FirstLayerTable::FirstLayerTable(const Model& model)
    : vocab_size_(model.config().vocab_size),
      row_bytes_(3 * model.config().n_embd * model.element_bytes()),
      qkv_(model.config().block_size * vocab_size_ * row_bytes_),
      known_(static_cast<size_t>(model.config().block_size * vocab_size_)) {}

int64_t FirstLayerTable::bytes(const Model& model) {
  const ModelConfig& c = model.config();
  return c.block_size * c.vocab_size * (3 * c.n_embd * model.element_bytes() + 1);
}

}  // namespace gptfast
