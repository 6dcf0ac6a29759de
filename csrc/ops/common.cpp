#include "common.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace gptfast {
namespace {

bool is_floating(const Tensor& x, DType& dtype) {
  if (x.scalar_type() == ScalarType::Float)
    dtype = DType::f32;
  else if (x.scalar_type() == ScalarType::BFloat16)
    dtype = DType::bf16;
  else
    return false;
  return true;
}

}  // namespace

Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

std::string to_text(Sizes sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

Arguments::Arguments(const char* op, const char* name, const Tensor& x)
    : op_(op), dtype_(DType::f32) {
  require(is_floating(x, dtype_), name, " must be float32 or bfloat16, got ", x.scalar_type());
}

void Arguments::fail(const std::string& sentence) const {
  // STD_TORCH_CHECK would put the source file and line before the sentence.
  throw std::runtime_error("gptfast::" + std::string(op_) + ": " + sentence);
}

void Arguments::shape(const char* name, const Tensor& x,
                      std::initializer_list<int64_t> expected) const {
  const auto sizes = x.sizes();
  const bool same = sizes.size() == expected.size() &&
                    std::equal(expected.begin(), expected.end(), sizes.begin());
  require(same, name, " must have shape ", Sizes(expected.begin(), expected.size()), ", got ",
          sizes);
}

void Arguments::on_cpu(const char* name, const Tensor& x) const {
  require(x.is_cpu(), name, " must be on the CPU, as the other arguments are");
}

void Arguments::like_activations(const char* name, const Tensor& x,
                                 std::initializer_list<int64_t> expected) const {
  on_cpu(name, x);
  shape(name, x, expected);
  of_activations(name, x);
}

void Arguments::of_activations(const char* name, const Tensor& x) const {
  require(x.scalar_type() == scalar_type(dtype_), name, " must be ", scalar_type(dtype_),
          " like the other activations, got ", x.scalar_type());
}

Tensor Arguments::activation(const char* name, const Tensor& x,
                             std::initializer_list<int64_t> expected) const {
  like_activations(name, x, expected);
  return as_contiguous(x);
}

Heads Arguments::heads(const char* name, const Tensor& x,
                       std::initializer_list<int64_t> expected) const {
  like_activations(name, x, expected);
  require(x.stride(3) == 1 || x.size(3) == 1 || x.numel() == 0, name,
          " must have stride 1 in its last dimension, got ", x.stride(3));
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Param Arguments::param(const char* name, const OptionalTensor& x,
                       std::initializer_list<int64_t> expected) const {
  if (!x.has_value()) return {nullptr, DType::f32};
  on_cpu(name, *x);
  shape(name, *x, expected);
  DType dtype = DType::f32;
  require(is_floating(*x, dtype) && (dtype == DType::f32 || dtype == dtype_), name,
          " must be float32 or of the activations' dtype, got ", x->scalar_type());
  require(x->is_contiguous(), name, " must be contiguous");
  return {x->const_data_ptr(), dtype};
}

float* Arguments::statistics(const char* name, const Tensor& x,
                             std::initializer_list<int64_t> expected) const {
  on_cpu(name, x);
  shape(name, x, expected);
  require(x.scalar_type() == ScalarType::Float && x.is_contiguous(), name,
          " must be a contiguous float32 tensor");
  return static_cast<float*>(x.data_ptr());
}

Tensor Arguments::indices(const char* name, const Tensor& x,
                          std::initializer_list<int64_t> expected, int64_t limit,
                          std::optional<int64_t> allowed) const {
  on_cpu(name, x);
  shape(name, x, expected);
  require(x.scalar_type() == ScalarType::Long, name, " must be int64, got ", x.scalar_type());
  const Tensor dense = as_contiguous(x);
  const int64_t* data = static_cast<const int64_t*>(dense.const_data_ptr());
  const int64_t* end = data + dense.numel();
  const int64_t* wrong = std::find_if(data, end, [&](int64_t index) {
    return (index < 0 || index >= limit) && !(allowed && index == *allowed);
  });
  if (wrong != end) require(false, name, " must be in [0, ", limit, "), got ", *wrong);
  return dense;
}

Dropout Arguments::dropout(double p, const OptionalTensor& seed, int64_t stream) const {
  require(p >= 0.0 && p <= 1.0, "dropout_p must be in [0, 1], got ", std::to_string(p));
  const auto threshold = static_cast<int32_t>(p * 65536.0 + 0.5);
  if (threshold == 0) return {};
  require(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 &&
              seed->is_cpu(),
          "dropout_p > 0 needs a seed, an int64 tensor of one element");
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {threshold, key, static_cast<uint32_t>(stream)};
}

ScalarType scalar_type(DType dtype) {
  return dtype == DType::f32 ? ScalarType::Float : ScalarType::BFloat16;
}

// Calls the allocator's own function: the operator aten::empty, which is found by its name, takes
// three times as long, and a backward makes seven tensors.
Tensor new_tensor(Sizes shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape[i]))
    strides[i] = stride;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  // This macro has the same name in every version from torch 2.10 on.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), type,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return new_tensor(Sizes(shape.begin(), shape.size()), dtype);
}

Tensor new_like(const Tensor& x) {
  return x.is_contiguous() ? new_tensor(x.sizes(), x.scalar_type()) : torch::stable::empty_like(x);
}

Heads heads_within(const Tensor& x, int64_t T, int64_t parts, int64_t part, int64_t H, int64_t D) {
  char* data =
      static_cast<char*>(x.data_ptr()) + part * H * D * static_cast<int64_t>(x.element_size());
  return {data, T * parts * H * D, D, parts * H * D};
}

Tensor Wanted::new_grad(int i, const OptionalTensor& param) const {
  if (!param.has_value() || !any_of(int64_t{1} << i)) return new_tensor({0}, ScalarType::Float);
  return new_tensor(param->sizes(), param->scalar_type());
}

Tensor Wanted::new_dx(const Tensor& x) const {
  return any_of(0b111) ? new_tensor(x.sizes(), x.scalar_type()) : new_tensor({0}, x.scalar_type());
}

ParamGrad param_grad(const Tensor& grad) {
  if (grad.numel() == 0) return {nullptr, DType::f32};
  return {grad.data_ptr(), grad.scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16};
}

Tensor Arguments::rows(const char* name, const Tensor& x, int64_t M, int64_t K) const {
  require(x.dim() >= 1 && rows_of(x) == M && x.size(-1) == K, name, " must have ", M, " rows of ",
          K, " columns, got shape ", x.sizes());
  on_cpu(name, x);
  of_activations(name, x);
  return as_contiguous(x);
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

Gelu gelu_of(const std::string& name) {
  STD_TORCH_CHECK(name == "erf" || name == "tanh", "gptfast: gelu must be 'erf' or 'tanh', got '",
                  name, "'");
  return name == "erf" ? Gelu::erf : Gelu::tanh;
}

}  // namespace gptfast
