// The feed-forward block x + dropout(gelu(layer_norm(x) W1' + b1) W2' + b2), and its backward.
#include <tuple>

#include "common.h"

namespace gptfast {
namespace {

struct FfnTensors {
  const Tensor &x, &w1, &w2;
  const OptionalTensor &ln_w, &ln_b, &b1, &b2;
};

// `dense` owns the memory that the result's x points to.
Ffn arguments(const Arguments& args, const FfnTensors& t, const std::string& gelu, double p,
              const OptionalTensor& seed, int64_t stream, Tensor& dense) {
  args.require(t.x.dim() >= 1 && t.w1.dim() == 2 && t.w1.numel() > 0,
               "x must be (..., C) and w1 (F, C), neither C nor F 0");
  Ffn s = {};
  s.dtype = args.dtype();
  s.M = rows_of(t.x), s.C = t.x.size(-1), s.F = t.w1.size(0);
  dense = args.rows("x", t.x, s.M, s.C);
  s.x = dense.const_data_ptr();
  s.norm.weight = args.param("ln_w", t.ln_w, {s.C});
  s.norm.bias = args.param("ln_b", t.ln_b, {s.C});
  s.w1.param = args.param("w1", t.w1, {s.F, s.C});
  s.b1 = args.param("b1", t.b1, {s.F});
  s.w2.param = args.param("w2", t.w2, {s.C, s.F});
  s.b2 = args.param("b2", t.b2, {s.C});
  s.gelu = gelu_of(gelu);
  s.dropout = args.dropout(p, seed, stream);
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ffn(Tensor x, Tensor ln_w, OptionalTensor ln_b,
                                               Tensor w1, OptionalTensor b1, Tensor w2,
                                               OptionalTensor b2, std::string gelu, double p,
                                               OptionalTensor seed, int64_t stream, bool keep) {
  Tensor dense;
  const OptionalTensor weight = ln_w;
  Ffn s = arguments(Arguments("ffn", "x", x), {x, w1, w2, weight, ln_b, b1, b2}, gelu, p, seed,
                    stream, dense);
  const int64_t kept = keep ? s.M : 0;
  Tensor y = new_tensor(x.sizes(), scalar_type(s.dtype));
  Tensor mean = new_tensor({kept}, ScalarType::Float), rstd = new_tensor({kept}, ScalarType::Float);
  Tensor hidden = new_tensor({kept, s.F}, scalar_type(s.dtype));
  if (keep) {
    s.norm.mean = static_cast<float*>(mean.data_ptr());
    s.norm.rstd = static_cast<float*>(rstd.data_ptr());
    s.hidden = hidden.data_ptr();
  }
  s.y = y.data_ptr();
  with_threads([&](const Parallel& parallel) { kernels().ffn(s, parallel); });
  return {y, mean, rstd, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    Tensor dy, Tensor x, Tensor ln_w, OptionalTensor ln_b, Tensor w1, OptionalTensor b1, Tensor w2,
    OptionalTensor b2, Tensor mean, Tensor rstd, Tensor hidden, std::string gelu, double p,
    OptionalTensor seed, int64_t stream, int64_t wanted) {
  const Arguments args("ffn_backward", "x", x);
  Tensor dense;
  const OptionalTensor weight = ln_w;
  FfnBackward s = {};
  Ffn& f = s.forward;
  f = arguments(args, {x, w1, w2, weight, ln_b, b1, b2}, gelu, p, seed, stream, dense);
  f.norm.mean = args.statistics("mean", mean, {f.M});
  f.norm.rstd = args.statistics("rstd", rstd, {f.M});
  const Tensor dense_hidden = args.activation("hidden", hidden, {f.M, f.F});
  const Tensor dense_dy = args.rows("dy", dy, f.M, f.C);
  f.hidden = dense_hidden.data_ptr();
  s.dy = dense_dy.const_data_ptr();
  const Wanted want(wanted);
  Tensor dx = want.new_dx(x);
  Tensor dln_w = want.new_grad(1, weight), dln_b = want.new_grad(2, ln_b);
  Tensor dw1 = want.new_grad(3, w1), db1 = want.new_grad(4, b1);
  Tensor dw2 = want.new_grad(5, w2), db2 = want.new_grad(6, b2);
  s.dx = dx.data_ptr();
  s.dnorm = {param_grad(dln_w), param_grad(dln_b)};
  s.dw1 = param_grad(dw1), s.db1 = param_grad(db1);
  s.dw2 = param_grad(dw2), s.db2 = param_grad(db2);
  with_threads([&](const Parallel& parallel) { kernels().ffn_backward(s, parallel); });
  return {dx, dln_w, dln_b, dw1, db1, dw2, db2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("ffn", TORCH_BOX(&ffn));
  m.impl("ffn_backward", TORCH_BOX(&ffn_backward));
}

}  // namespace gptfast
