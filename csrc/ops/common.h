// What every operator needs: argument checks that name op, argument, expected and got; kernel
// arguments made of tensors; threads to run them on.
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

// Calls f(parallel) with torch's own threads: torch.set_num_threads is obeyed, and no second OpenMP
// runtime is loaded.
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
        failure = std::current_exception();  // it must not leave a thread of the pool
      }
    }
  };
  torch::stable::parallel_for(0, threads, 1, run);
  if (failure) std::rethrow_exception(failure);
}

inline std::string in_words(const std::string& text) { return text; }
inline std::string in_words(int64_t number) { return std::to_string(number); }
inline std::string in_words(ScalarType dtype) { return torch::headeronly::toString(dtype); }
std::string in_words(Sizes sizes);

// An operator's name and its activations' dtype, against which the arguments are checked.
class Arguments {
 public:
  // Takes the dtype of `x`, the activation called `name`: float32 or bfloat16.
  Arguments(const char* op, const char* name, const Tensor& x);

  DType dtype() const { return dtype_; }

  // An activation of this shape, as a contiguous tensor.
  Tensor activation(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const;
  // An activation of any shape with M rows of K columns, as a contiguous tensor.
  Tensor rows(const char* name, const Tensor& x, int64_t M, int64_t K) const;
  // An activation with no copy made: only the last stride has to be 1.
  Heads heads(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const;
  // A parameter of this shape; its data must be contiguous. An absent one has null data.
  Param param(const char* name, const OptionalTensor& x,
              std::initializer_list<int64_t> shape) const;
  // A float32 tensor that the forward made.
  float* statistics(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const;
  // int64 values in [0, limit), or `allowed`; contiguous.
  Tensor indices(const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                 int64_t limit, std::optional<int64_t> allowed = std::nullopt) const;
  Dropout dropout(double p, const OptionalTensor& seed, int64_t stream) const;
  // The sentence is made of its parts (texts, numbers, sizes, dtypes) where it is needed alone:
  // checks run at every call.
  template <class... Parts>
  void require(bool condition, const Parts&... sentence) const {
    if (!condition) fail((in_words(sentence) + ...));
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

// A new tensor of x's shape and dtype, and of its strides where they leave no gaps.
Tensor new_like(const Tensor& x);

// The memory of a contiguous (B, T, parts, H, D) tensor as heads of part `part`.
Heads heads_within(const Tensor& x, int64_t T, int64_t parts, int64_t part, int64_t H, int64_t D);

// The gradients that a backward is asked for: bit i stands for its i-th result, of which the first
// three are those of the activation x and of the norm before.
class Wanted {
 public:
  explicit Wanted(int64_t bits) : bits_(bits) {}
  bool any_of(int64_t bits) const { return (bits_ & bits) != 0; }
  // A new gradient of the parameter's shape and dtype; an empty tensor for one that is absent or
  // not wanted.
  Tensor new_grad(int i, const OptionalTensor& param) const;
  // One of x's, also where it is on the way to those of the norm alone.
  Tensor new_dx(const Tensor& x) const;

 private:
  int64_t bits_;
};
// Null for an empty tensor.
ParamGrad param_grad(const Tensor& grad);

// The product of all sizes but the last.
int64_t rows_of(const Tensor& x);

Gelu gelu_of(const std::string& name);

}  // namespace gptfast
