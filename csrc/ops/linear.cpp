// Linear layers with an optional LayerNorm before and an optional residual after, and their
// backward. Absent results are empty tensors.
#include <tuple>
#include <vector>

#include "common.h"

namespace gptfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear(Tensor x, OptionalTensor ln_w, OptionalTensor ln_b,
                                          Tensor weight, OptionalTensor bias,
                                          OptionalTensor residual) {
  const Arguments args("linear", "x", x);
  args.require(x.dim() >= 1 && weight.dim() == 2 && weight.numel() > 0,
               "x must be (..., K) and weight (N, K), neither N nor K 0");
  const int64_t M = rows_of(x), K = x.size(-1), N = weight.size(0);
  Linear s = {};
  s.dtype = s.y_dtype = args.dtype();
  s.M = M, s.K = K, s.N = N;
  const Tensor dense = args.rows("x", x, M, K);
  s.x = dense.const_data_ptr();
  s.norm.weight = args.param("ln_w", ln_w, {K});
  s.norm.bias = args.param("ln_b", ln_b, {K});
  s.weight.param = args.param("weight", weight, {N, K});
  s.bias = args.param("bias", bias, {N});
  Tensor added;
  if (residual.has_value()) {
    added = args.rows("residual", *residual, M, N);
    s.residual = added.const_data_ptr();
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  Tensor y = new_tensor(shape, scalar_type(s.dtype));
  Tensor mean = new_tensor({ln_w.has_value() ? M : 0}, ScalarType::Float);
  Tensor rstd = new_tensor({ln_w.has_value() ? M : 0}, ScalarType::Float);
  s.norm.mean = static_cast<float*>(mean.data_ptr());
  s.norm.rstd = static_cast<float*>(rstd.data_ptr());
  s.y = y.data_ptr();
  with_threads([&](const Parallel& parallel) { kernels().linear(s, parallel); });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(
    Tensor dy, Tensor x, OptionalTensor ln_w, OptionalTensor ln_b, Tensor mean, Tensor rstd,
    Tensor weight, OptionalTensor bias, int64_t wanted) {
  const Arguments args("linear_backward", "x", x);
  args.require(x.dim() >= 1 && weight.dim() == 2 && weight.numel() > 0,
               "x must be (..., K) and weight (N, K), neither N nor K 0");
  const int64_t M = rows_of(x), K = x.size(-1), N = weight.size(0);
  const Tensor dense_x = args.rows("x", x, M, K);
  const Tensor dense_dy = args.rows("dy", dy, M, N);
  LinearBackward s = {};
  Linear& f = s.forward;
  f.dtype = args.dtype();
  f.M = M, f.K = K, f.N = N;
  f.x = dense_x.const_data_ptr();
  f.norm.weight = args.param("ln_w", ln_w, {K});
  f.norm.bias = args.param("ln_b", ln_b, {K});
  if (ln_w.has_value()) {
    f.norm.mean = args.statistics("mean", mean, {M});
    f.norm.rstd = args.statistics("rstd", rstd, {M});
  }
  f.weight.param = args.param("weight", weight, {N, K});
  f.bias = args.param("bias", bias, {N});
  s.dy = dense_dy.const_data_ptr();
  const Wanted want(wanted);
  Tensor dx = want.new_dx(x);
  Tensor dln_w = want.new_grad(1, ln_w), dln_b = want.new_grad(2, ln_b);
  Tensor dweight = want.new_grad(3, weight), dbias = want.new_grad(4, bias);
  s.dx = dx.data_ptr();
  s.dnorm = {param_grad(dln_w), param_grad(dln_b)};
  s.dweight = param_grad(dweight);
  s.dbias = param_grad(dbias);
  with_threads([&](const Parallel& parallel) { kernels().linear_backward(s, parallel); });
  return {dx, dln_w, dln_b, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace gptfast
