// LayerNorm (optional), linear layer and mean cross-entropy, gradients included.
#include <tuple>

#include "common.h"

namespace gptfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor weight, Tensor targets,
    int64_t ignore_index, bool with_grad) {
  const Arguments args("linear_cross_entropy", "x", x);
  args.require(x.dim() >= 1 && weight.dim() == 2 && weight.numel() > 0,
               "x must be (..., K) and weight (V, K), neither V nor K 0");
  const int64_t M = rows_of(x), K = x.size(-1), V = weight.size(0);
  const Tensor dense_x = args.rows("x", x, M, K);
  const Tensor dense_targets = args.indices(
      "targets", torch::stable::reshape(targets, {targets.numel()}), {M}, V, ignore_index);
  CrossEntropy s = {};
  s.dtype = args.dtype();
  s.M = M, s.K = K, s.V = V;
  s.x = dense_x.const_data_ptr();
  s.norm.weight = args.param("norm_weight", norm_weight, {K});
  s.norm.bias = args.param("norm_bias", norm_bias, {K});
  s.weight.param = args.param("weight", weight, {V, K});
  s.targets = static_cast<const int64_t*>(dense_targets.const_data_ptr());
  s.ignore_index = ignore_index;
  Tensor loss = new_tensor({}, ScalarType::Float);
  s.loss = static_cast<float*>(loss.data_ptr());
  Tensor dx = with_grad ? new_tensor(x.sizes(), x.scalar_type()) : new_tensor({0}, x.scalar_type());
  const auto grad_of = [with_grad](const OptionalTensor& param) {
    return new_grad(with_grad ? param : std::nullopt);
  };
  Tensor dnorm_weight = grad_of(norm_weight), dnorm_bias = grad_of(norm_bias);
  Tensor dweight = grad_of(weight);
  if (with_grad) {
    s.dx = dx.data_ptr();
    s.dnorm = {param_grad(dnorm_weight), param_grad(dnorm_bias)};
    s.dweight = param_grad(dweight);
  }
  with_threads([&](const Parallel& parallel) { kernels().cross_entropy(s, parallel); });
  return {loss, dx, dnorm_weight, dnorm_bias, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

}  // namespace gptfast
