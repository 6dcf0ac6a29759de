// Causal attention on separate q, k, v (B, H, T, D), and on the packed projection qkv (B, T, 3 C).
// Outputs lie as (B, T, H, D), so that (B, T, C) is a view of them; gradients as what they belong
// to.
#include <cmath>
#include <tuple>
#include <utility>

#include "common.h"

namespace gptfast {
namespace {

// The memory of a contiguous (B, T, parts, H, D) tensor as heads of part `part`.
Heads heads_within(const Tensor& x, int64_t T, int64_t parts, int64_t part, int64_t H, int64_t D) {
  char* data =
      static_cast<char*>(x.data_ptr()) + part * H * D * static_cast<int64_t>(x.element_size());
  return {data, T * parts * H * D, D, parts * H * D};
}

Attention separate(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                   double p, const OptionalTensor& seed, int64_t stream) {
  const Arguments args(op, "q", q);
  args.require(q.dim() == 4 && k.dim() == 4, "q, k and v must be (B, H, T, D)");
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

// `dense` holds what s points into.
Attention packed(const char* op, const Tensor& qkv, int64_t n_head, double p,
                 const OptionalTensor& seed, int64_t stream, Tensor& dense) {
  const Arguments args(op, "qkv", qkv);
  args.require(qkv.dim() == 3 && n_head > 0 && qkv.size(2) % (3 * n_head) == 0,
               "qkv must be (B, T, 3 C) with C divisible by n_head");
  const int64_t B = qkv.size(0), T = qkv.size(1), H = n_head, D = qkv.size(2) / (3 * n_head);
  dense = args.activation("qkv", qkv, {B, T, 3 * H * D});
  Attention s = {};
  s.dtype = args.dtype();
  s.B = B, s.H = H, s.Tq = T, s.Tk = T, s.D = D;
  s.q = heads_within(dense, T, 3, 0, H, D);
  s.k = heads_within(dense, T, 3, 1, H, D);
  s.v = heads_within(dense, T, 3, 2, H, D);
  s.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(D)));
  s.dropout = args.dropout(p, seed, stream);
  return s;
}

Tensor forward(Attention& s, const Tensor& out) {
  Tensor lse = new_tensor({s.B, s.H, s.Tq}, ScalarType::Float);
  s.out = heads_within(out, s.Tq, 1, 0, s.H, s.D);
  s.lse = static_cast<float*>(lse.data_ptr());
  with_threads([&](const Parallel& parallel) { kernels().attention(s, parallel); });
  return lse;
}

// `dout` as heads, `out` (contiguous) and `lse` must outlive the call.
AttentionGrad backward(const Arguments& args, Attention& s, const Heads& dout, const Tensor& out,
                       const Tensor& lse) {
  s.out = heads_within(out, s.Tq, 1, 0, s.H, s.D);
  s.lse = args.statistics("lse", lse, {s.B, s.H, s.Tq});
  AttentionGrad grad = {};
  grad.dout = dout;
  grad.forward = s;
  return grad;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, double p,
                                     OptionalTensor seed, int64_t stream) {
  Attention s = separate("attention", q, k, v, scale, p, seed, stream);
  Tensor out = new_tensor({s.B, s.Tq, s.H, s.D}, scalar_type(s.dtype));
  Tensor lse = forward(s, out);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, double scale,
                                                      double p, OptionalTensor seed,
                                                      int64_t stream) {
  Attention s = separate("attention_backward", q, k, v, scale, p, seed, stream);
  const Arguments args("attention_backward", "q", q);
  const Tensor dense_out = args.activation("out", out, {s.B, s.Tq, s.H, s.D});
  if (dout.dim() == 4 && dout.stride(3) != 1) dout = torch::stable::contiguous(dout);
  Heads dheads = args.heads("dout", dout, {s.B, s.Tq, s.H, s.D});
  std::swap(dheads.h, dheads.t);  // (B, T, H, D)
  AttentionGrad grad = backward(args, s, dheads, dense_out, lse);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k),
         dv = torch::stable::empty_like(v);
  grad.dq = args.heads("dq", dq, {s.B, s.H, s.Tq, s.D});
  grad.dk = args.heads("dk", dk, {s.B, s.H, s.Tk, s.D});
  grad.dv = args.heads("dv", dv, {s.B, s.H, s.Tk, s.D});
  with_threads([&](const Parallel& parallel) { kernels().attention_grad(grad, parallel); });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_packed(Tensor qkv, int64_t n_head, double p,
                                            OptionalTensor seed, int64_t stream) {
  Tensor dense;
  Attention s = packed("attention_packed", qkv, n_head, p, seed, stream, dense);
  Tensor out = new_tensor({s.B, s.Tq, s.H * s.D}, scalar_type(s.dtype));
  Tensor lse = forward(s, out);
  return {out, lse};
}

Tensor attention_packed_backward(Tensor dout, Tensor qkv, int64_t n_head, Tensor out, Tensor lse,
                                 double p, OptionalTensor seed, int64_t stream) {
  Tensor dense;
  Attention s = packed("attention_packed_backward", qkv, n_head, p, seed, stream, dense);
  const Arguments args("attention_packed_backward", "qkv", qkv);
  const Tensor dense_out = args.activation("out", out, {s.B, s.Tq, s.H * s.D});
  const Tensor dense_dout = args.activation("dout", dout, {s.B, s.Tq, s.H * s.D});
  AttentionGrad grad =
      backward(args, s, heads_within(dense_dout, s.Tq, 1, 0, s.H, s.D), dense_out, lse);
  Tensor dqkv = new_tensor({s.B, s.Tq, 3 * s.H * s.D}, scalar_type(s.dtype));
  grad.dq = heads_within(dqkv, s.Tq, 3, 0, s.H, s.D);
  grad.dk = heads_within(dqkv, s.Tq, 3, 1, s.H, s.D);
  grad.dv = heads_within(dqkv, s.Tq, 3, 2, s.H, s.D);
  with_threads([&](const Parallel& parallel) { kernels().attention_grad(grad, parallel); });
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_packed", TORCH_BOX(&attention_packed));
  m.impl("attention_packed_backward", TORCH_BOX(&attention_packed_backward));
}

}  // namespace gptfast
