// What the operators share: argument checks whose messages name the operator, the argument, what
// was expected and what was given; kernel arguments made from tensors; threads for the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "../kernels/isa/isa.h"
#include "../kernels/threads/team.h"

namespace gptfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Calls f(parallel) with torch's own threads, so that torch.set_num_threads is obeyed and no second
// OpenMP runtime is loaded.
template <class F>
void with_threads(const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  Team team(threads);
  std::exception_ptr failure;
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t member = first; member < last; ++member) {
      if (member > 0) {
        team.follow(member);
        continue;
      }
      try {
        team.lead(f);
      } catch (...) {
        failure = std::current_exception();  // must not escape from a thread of the pool
      }
    }
  };
  torch::stable::parallel_for(0, threads, 1, run);
  if (failure) std::rethrow_exception(failure);
}

// A part of an error message as text.
inline std::string to_text(const std::string& text) { return text; }
inline std::string to_text(int64_t number) { return std::to_string(number); }
inline std::string to_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }
std::string to_text(Sizes sizes);

// An operator's name and its activations' dtype, against which arguments are checked.
class Arguments {
 public:
  // Takes the dtype of `x`, the activation called `name`: float32 or bfloat16.
  Arguments(const char* op, const char* name, const Tensor& x);

  DType dtype() const { return dtype_; }

  // An activation of this shape, as a contiguous tensor.
  Tensor activation(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const;
  // An activation of any shape with M rows of K columns, as a contiguous tensor.
  Tensor rows(const char* name, const Tensor& x, int64_t M, int64_t K) const;
  // An activation of this shape, never copied: only the last stride must be 1.
  Heads heads(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const;
  // A parameter of this shape, which must be contiguous. An absent one has null data.
  Param param(const char* name, const OptionalTensor& x,
              std::initializer_list<int64_t> shape) const;
  // The data of a contiguous float32 tensor of this shape, such as the forward's mean and rstd.
  float* statistics(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const;
  // An int64 tensor of values in [0, limit), or equal to `allowed`, as a contiguous tensor.
  Tensor indices(const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                 int64_t limit, std::optional<int64_t> allowed = std::nullopt) const;
  // Dropout with probability p, which is rounded to 65536ths; p > 0 needs a seed.
  Dropout dropout(double p, const OptionalTensor& seed, int64_t stream) const;
  // Throws unless `condition` holds. The message is built from its parts (texts, numbers, sizes,
  // dtypes) only on failure, because checks run at every call.
  template <class... Parts>
  void require(bool condition, const Parts&... sentence) const {
    if (!condition) fail((to_text(sentence) + ...));
  }
  void shape(const char* name, const Tensor& x, std::initializer_list<int64_t> expected) const;

 private:
  void like_activations(const char* name, const Tensor& x,
                        std::initializer_list<int64_t> shape) const;
  void on_cpu(const char* name, const Tensor& x) const;
  void of_activations(const char* name, const Tensor& x) const;
  [[noreturn]] void fail(const std::string& sentence) const;

  const char* op_;
  DType dtype_;
};

ScalarType scalar_type(DType dtype);

Tensor as_contiguous(const Tensor& x);

// A new contiguous tensor on the CPU.
Tensor new_tensor(Sizes shape, ScalarType dtype);
Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype);

// A new tensor of x's shape and dtype, and of its strides if they leave no gaps.
Tensor new_like(const Tensor& x);

// Part `part` of a contiguous (B, T, parts, H, D) tensor, as heads.
Heads heads_within(const Tensor& x, int64_t T, int64_t parts, int64_t part, int64_t H, int64_t D);

// The gradients that a backward is asked for: bit i stands for its i-th result. If the operator has
// an activation x, the first three are the gradients of x and of the weight and bias of its norm.
class Wanted {
 public:
  explicit Wanted(int64_t bits) : bits_(bits) {}
  bool any_of(int64_t bits) const { return (bits_ & bits) != 0; }
  // A new tensor of the parameter's shape and dtype for its gradient; an empty one if the parameter
  // is absent or its gradient is not wanted.
  Tensor new_grad(int i, const OptionalTensor& param) const;
  // A new tensor for the gradient of x, also if only the norm's gradients are wanted: they need it.
  Tensor new_dx(const Tensor& x) const;

 private:
  int64_t bits_;
};

// The memory of a gradient; null for an empty tensor.
ParamGrad param_grad(const Tensor& grad);

// The number of rows of x as a matrix: the product of all sizes but the last.
int64_t rows_of(const Tensor& x);

Gelu gelu_of(const std::string& name);

}  // namespace gptfast
