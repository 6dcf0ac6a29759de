// Causal attention on q, k, v (B, H, T, D). Outputs have the layout (B, T, H, D), so that (B, T, C)
// is a view of them; each gradient has the layout of its tensor.
#include <tuple>
#include <utility>

#include "common.h"

namespace gptfast {
namespace {

Attention arguments(const Arguments& args, const Tensor& q, const Tensor& k, const Tensor& v,
                    double scale, double p, const OptionalTensor& seed, int64_t stream) {
  args.require(q.dim() == 4 && k.dim() == 4, "q, k and v must be (B, H, T, D)");
  args.require(!(scale < 0.0), "scale must not be negative, got ", std::to_string(scale));
  const int64_t B = q.size(0), H = q.size(1), Tq = q.size(2), D = q.size(3), Tk = k.size(2);
  Attention s = {};
  s.dtype = args.dtype();
  s.B = B, s.H = H, s.Tq = Tq, s.Tk = Tk, s.D = D;
  s.q = args.heads("q", q, {B, H, Tq, D});
  s.k = args.heads("k", k, {B, H, Tk, D});
  s.v = args.heads("v", v, {B, H, Tk, D});
  s.scale = static_cast<float>(scale);
  s.dropout = args.dropout(p, seed, stream);
  return s;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, double p,
                                     OptionalTensor seed, int64_t stream) {
  Attention s = arguments(Arguments("attention", "q", q), q, k, v, scale, p, seed, stream);
  Tensor out = new_tensor({s.B, s.Tq, s.H, s.D}, scalar_type(s.dtype));
  Tensor lse = new_tensor({s.B, s.H, 2, s.Tq}, ScalarType::Float);
  s.out = heads_within(out, s.Tq, 1, 0, s.H, s.D);
  s.lse = static_cast<float*>(lse.data_ptr());
  with_threads([&](const Parallel& parallel) { kernels().attention(s, parallel); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, double scale,
                                                      double p, OptionalTensor seed,
                                                      int64_t stream) {
  const Arguments args("attention_backward", "q", q);
  AttentionBackward grad = {};
  Attention& s = grad.forward;
  s = arguments(args, q, k, v, scale, p, seed, stream);
  const Tensor dense_out = args.activation("out", out, {s.B, s.Tq, s.H, s.D});
  if (dout.dim() == 4 && dout.stride(3) != 1) dout = torch::stable::contiguous(dout);
  s.out = heads_within(dense_out, s.Tq, 1, 0, s.H, s.D);
  s.lse = args.statistics("lse", lse, {s.B, s.H, 2, s.Tq});
  grad.dout = args.heads("dout", dout, {s.B, s.Tq, s.H, s.D});
  std::swap(grad.dout.h, grad.dout.t);  // (B, T, H, D)
  Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  grad.dq = args.heads("dq", dq, {s.B, s.H, s.Tq, s.D});
  grad.dk = args.heads("dk", dk, {s.B, s.H, s.Tk, s.D});
  grad.dv = args.heads("dv", dv, {s.B, s.H, s.Tk, s.D});
  with_threads([&](const Parallel& parallel) { kernels().attention_backward(grad, parallel); });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace gptfast
