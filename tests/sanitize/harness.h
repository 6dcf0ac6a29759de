// What the cases share: memory with guarded ends, and runs whose results are compared.
//
// A case calls kernels on buffers of its own and returns what they wrote. check() repeats it at
// every instruction set with several contents of the scratch memory, orders of tasks and numbers of
// threads. A sanitizer ends the program at its first finding; every other failure prints a line.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "../../csrc/kernels/isa/isa.h"

namespace gptfast::sanitize {

// Memory between two margins that ASan forbids. g++ does not instrument the masked loads and stores
// of AVX-512, so the margins also hold NaN, which reveals loads, and are compared at the end, which
// reveals stores.
class Guarded {
 public:
  // The address is a multiple of `alignment`, a power of two, but of no larger one up to 64.
  Guarded(size_t size, size_t alignment, int fill);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* data() const { return data_; }

 private:
  size_t size_, total_;
  char *base_, *data_;
};

// A tensor's memory, aligned to its element size and no further.
class Buffer {
 public:
  // A result that is not written yet: all NaN.
  Buffer(int64_t count, DType dtype);
  // An argument: normally distributed values, which must not change.
  Buffer(int64_t count, DType dtype, double deviation);
  ~Buffer();

  char* data() const { return memory_.data(); }
  char* at(int64_t i) const { return data() + i * element_; }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  float value(int64_t i) const;
  std::vector<float> values() const;
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }

  Param param(bool present = true) const { return {present ? data() : nullptr, dtype_}; }
  ParamGrad grad(bool present = true) const { return {present ? data() : nullptr, dtype_}; }

 private:
  int64_t count_;
  DType dtype_;
  int64_t element_;
  Guarded memory_;
  std::vector<char> argument_;  // what an argument holds; empty for a result
};

// int64 arguments: tokens, targets.
class Indices {
 public:
  explicit Indices(const std::vector<int64_t>& values);
  const int64_t* data() const { return reinterpret_cast<const int64_t*>(memory_.data()); }

 private:
  Guarded memory_;
};

// What one kernel wrote, compared between the runs.
struct Result {
  const char* name;
  std::vector<float> values;
  // The size of the terms whose sum an element is. Levels may differ by a fraction of it, which is
  // more than a fraction of a sum that comes out near zero.
  double terms = 1.0;
  bool any_level = true;  // whether levels may be compared
};

using Case = std::function<std::vector<Result>(const Kernels&, const Parallel&)>;

// Runs a case; `dtype`, that of its activations, decides how far levels may differ.
void check(const std::string& name, DType dtype, const Case& run);

// Reports a failure of the running case unless `condition` holds.
void expect(bool condition, const std::string& what);

// printf into a string.
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

const char* name(DType dtype);
int64_t random_below(int64_t limit);
bool same_bits(const Buffer& a, const Buffer& b);

// A gradient that a backward wrote together with all others, and how to request it in another
// buffer.
template <class Grad>
struct Wanted {
  const Buffer& among_all;
  std::function<void(Grad&, const Buffer&)> ask;
};

// Repeats a backward for each of these gradients alone; `none` requests none of them.
template <class Grad>
void expect_same_alone(const Grad& none, void (*backward)(const Grad&, const Parallel&),
                       const Parallel& parallel, std::initializer_list<Wanted<Grad>> gradients) {
  for (const Wanted<Grad>& each : gradients) {
    if (each.among_all.count() == 0) continue;
    Buffer alone(each.among_all.count(), each.among_all.dtype());
    Grad grad = none;
    each.ask(grad, alone);
    backward(grad, parallel);
    expect(same_bits(alone, each.among_all), "a gradient depends on which others are wanted");
  }
}

// Writes the values of `from` to `to`, rounded to its dtype.
void copy_rounded(const Buffer& from, Buffer& to);
double root_mean_square(const Buffer& x);

extern int scratch_fill;  // the byte that scratch memory is filled with

constexpr DType dtypes[] = {DType::f32, DType::bf16};

// The dtypes that parameters may have with activations of `dtype`.
inline std::vector<DType> param_dtypes(DType dtype) {
  return dtype == DType::f32 ? std::vector<DType>{DType::f32}
                             : std::vector<DType>{DType::f32, DType::bf16};
}

void attention_cases();
void linear_cases();
void ffn_cases();
void cross_entropy_cases();
void embedding_cases();
void adamw_cases();
void team_cases();
void forward_cases();
void session_cases();

}  // namespace gptfast::sanitize
