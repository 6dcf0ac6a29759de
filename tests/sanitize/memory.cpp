// Guarded memory, the tensors in it, and the kernels' scratch memory made of it.
#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>

#include "../../csrc/kernels/threads/scratch.h"
#include "harness.h"

namespace gptfast {
namespace sanitize {
namespace {

constexpr size_t margin = 256, line = 64;
constexpr int nan_byte = 0xff;  // NaN in float32 and in bfloat16

std::mt19937_64 generator(1);

size_t element_size(DType dtype) { return dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t); }

uint16_t narrow(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float widen(uint16_t h) {
  const uint32_t u = uint32_t{h} << 16;
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

}  // namespace

int scratch_fill = nan_byte;

Guarded::Guarded(size_t size, size_t alignment, int fill)
    : size_(size), total_(margin + alignment % line + size + margin) {
  void* base = nullptr;
  if (posix_memalign(&base, line, total_) != 0) throw std::bad_alloc();
  base_ = static_cast<char*>(base);
  data_ = base_ + margin + alignment % line;
  std::memset(base_, nan_byte, total_);
  std::memset(data_, fill, size);
  ASAN_POISON_MEMORY_REGION(base_, static_cast<size_t>(data_ - base_));
  ASAN_POISON_MEMORY_REGION(data_ + size, margin);
}

Guarded::~Guarded() {
  ASAN_UNPOISON_MEMORY_REGION(base_, total_);
  bool intact = true;
  for (const char* p = base_; p < data_; ++p) intact &= static_cast<uint8_t>(*p) == nan_byte;
  for (const char* p = data_ + size_; p < base_ + total_; ++p)
    intact &= static_cast<uint8_t>(*p) == nan_byte;
  expect(intact, "a write outside of a buffer of " + std::to_string(size_) + " bytes");
  std::free(base_);
}

Buffer::Buffer(int64_t count, DType dtype)
    : count_(count),
      dtype_(dtype),
      element_(static_cast<int64_t>(element_size(dtype))),
      memory_(static_cast<size_t>(count * element_), element_size(dtype), nan_byte) {}

Buffer::Buffer(int64_t count, DType dtype, double deviation) : Buffer(count, dtype) {
  std::normal_distribution<double> draw(0.0, deviation);
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(draw(generator));
    const uint16_t half = narrow(x);
    if (dtype == DType::f32)
      std::memcpy(at(i), &x, sizeof x);
    else
      std::memcpy(at(i), &half, sizeof half);
  }
  argument_.assign(data(), at(count));
}

Buffer::~Buffer() {
  expect(argument_.empty() || std::memcmp(data(), argument_.data(), argument_.size()) == 0,
         "an argument was written to");
}

float Buffer::value(int64_t i) const {
  float x;
  uint16_t half;
  if (dtype_ == DType::f32) {
    std::memcpy(&x, at(i), sizeof x);
    return x;
  }
  std::memcpy(&half, at(i), sizeof half);
  return widen(half);
}

std::vector<float> Buffer::values() const {
  std::vector<float> all(static_cast<size_t>(count_));
  for (int64_t i = 0; i < count_; ++i) all[static_cast<size_t>(i)] = value(i);
  return all;
}

Indices::Indices(const std::vector<int64_t>& values)
    : memory_(values.size() * sizeof(int64_t), sizeof(int64_t), 0) {
  for (size_t i = 0; i < values.size(); ++i)
    std::memcpy(memory_.data() + i * sizeof(int64_t), &values[i], sizeof(int64_t));
}

int64_t random_below(int64_t limit) {
  return std::uniform_int_distribution<int64_t>(0, limit - 1)(generator);
}

bool same_bits(const Buffer& a, const Buffer& b) {
  return a.count() == b.count() && a.dtype() == b.dtype() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.at(a.count()) - a.data())) == 0;
}

double root_mean_square(const Buffer& x) {
  double squares = 0.0;
  for (const float each : x.values()) squares += static_cast<double>(each) * each;
  return x.count() ? std::sqrt(squares / static_cast<double>(x.count())) : 0.0;
}

}  // namespace sanitize

// Replaces csrc/kernels/threads/scratch.cpp: each allocation has margins of its own, and is filled
// with scratch_fill, on which no result may depend.
namespace {
thread_local std::vector<std::unique_ptr<sanitize::Guarded>> pieces;
}

ScratchFrame::ScratchFrame() : block_(pieces.size()), used_(0) {}
ScratchFrame::~ScratchFrame() {
  while (pieces.size() > block_) pieces.pop_back();
}
void* ScratchFrame::bytes(size_t size) {
  pieces.push_back(std::make_unique<sanitize::Guarded>(size, 64, sanitize::scratch_fill));
  return pieces.back()->data();
}

}  // namespace gptfast
