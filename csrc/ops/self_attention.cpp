// The attention block x + dropout(attention(layer_norm(x) Wqkv' + bqkv) Wo' + bo), and its
// backward, as a sequence of the linear and attention kernels.
#include <cmath>
#include <tuple>

#include "common.h"

namespace gptfast {
namespace {

struct BlockTensors {
  const Tensor &x, &w_qkv, &w_proj;
  const OptionalTensor &ln_w, &ln_b, &b_qkv, &b_proj;
};

// The arguments of the three kernels, in the order of their calls.
struct Steps {
  Linear qkv;
  Attention attention;
  Linear proj;
};

// Probabilities and streams of the two dropouts, of the output and of the attention weights.
struct Dropouts {
  double proj_p;
  int64_t proj_stream;
  double p;
  const OptionalTensor& seed;
  int64_t stream;
};

// The arguments that the forward and the backward share; `dense` owns the memory that x points to.
Steps arguments(const Arguments& args, const BlockTensors& t, int64_t n_head, const Dropouts& drop,
                Tensor& dense) {
  args.require(t.x.dim() == 3 && n_head > 0 && t.x.size(2) > 0 && t.x.size(2) % n_head == 0,
               "x must be (B, T, C) with C divisible by n_head");
  const int64_t B = t.x.size(0), T = t.x.size(1), C = t.x.size(2);
  dense = args.activation("x", t.x, {B, T, C});
  Steps s = {};
  Linear &qkv = s.qkv, &proj = s.proj;
  qkv.dtype = qkv.y_dtype = proj.dtype = proj.y_dtype = s.attention.dtype = args.dtype();
  qkv.M = proj.M = B * T;
  qkv.K = proj.K = proj.N = C;
  qkv.N = 3 * C;
  qkv.x = dense.const_data_ptr();
  qkv.norm.weight = args.param("ln_w", t.ln_w, {C});
  qkv.norm.bias = args.param("ln_b", t.ln_b, {C});
  qkv.weight.param = args.param("w_qkv", t.w_qkv, {3 * C, C});
  qkv.bias = args.param("b_qkv", t.b_qkv, {3 * C});
  proj.weight.param = args.param("w_proj", t.w_proj, {C, C});
  proj.bias = args.param("b_proj", t.b_proj, {C});
  s.attention.B = B, s.attention.H = n_head, s.attention.Tq = s.attention.Tk = T,
  s.attention.D = C / n_head;
  s.attention.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.attention.D)));
  s.attention.dropout = args.dropout(drop.p, drop.seed, drop.stream);
  proj.dropout = args.dropout(drop.proj_p, drop.seed, drop.proj_stream);
  return s;
}

// Queries, keys and values of a contiguous (B, T, 3 C) tensor, as heads.
void unpack(const Tensor& qkv, const Attention& a, Heads& q, Heads& k, Heads& v) {
  q = heads_within(qkv, a.Tq, 3, 0, a.H, a.D);
  k = heads_within(qkv, a.Tq, 3, 1, a.H, a.D);
  v = heads_within(qkv, a.Tq, 3, 2, a.H, a.D);
}

// Connects attention to its neighbours: it reads the projection qkv (B, T, 3 C), and the output
// projection reads `out` (B, T, C); both are contiguous.
void connect_steps(Steps& s, const Tensor& qkv, const Tensor& out) {
  Attention& a = s.attention;
  unpack(qkv, a, a.q, a.k, a.v);
  a.out = heads_within(out, a.Tq, 1, 0, a.H, a.D);
  s.proj.x = out.const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> self_attention(
    Tensor x, Tensor ln_w, OptionalTensor ln_b, Tensor w_qkv, OptionalTensor b_qkv, Tensor w_proj,
    OptionalTensor b_proj, int64_t n_head, double proj_p, int64_t proj_stream, double p,
    OptionalTensor seed, int64_t stream, bool keep) {
  Tensor dense;
  const OptionalTensor weight = ln_w;
  Steps s = arguments(Arguments("self_attention", "x", x),
                      {x, w_qkv, w_proj, weight, ln_b, b_qkv, b_proj}, n_head,
                      {proj_p, proj_stream, p, seed, stream}, dense);
  const int64_t B = s.attention.B, T = s.attention.Tq, C = s.proj.N;
  const ScalarType dtype = scalar_type(s.proj.dtype);
  Tensor y = new_tensor(x.sizes(), dtype);
  Tensor qkv = new_tensor({B, T, 3 * C}, dtype), out = new_tensor({B, T, C}, dtype);
  connect_steps(s, qkv, out);
  s.qkv.y = qkv.data_ptr();
  s.proj.residual = s.qkv.x;
  s.proj.y = y.data_ptr();
  const int64_t kept = keep ? B : 0;
  Tensor mean = new_tensor({kept * T}, ScalarType::Float);
  Tensor rstd = new_tensor({kept * T}, ScalarType::Float);
  Tensor lse = new_tensor({kept, n_head, 2, T}, ScalarType::Float);
  if (keep) {
    s.qkv.norm.mean = static_cast<float*>(mean.data_ptr());
    s.qkv.norm.rstd = static_cast<float*>(rstd.data_ptr());
    s.attention.lse = static_cast<float*>(lse.data_ptr());
  }
  with_threads([&](const Parallel& parallel) {
    kernels().linear(s.qkv, parallel);
    kernels().attention(s.attention, parallel);
    kernels().linear(s.proj, parallel);
  });
  if (!keep) qkv = new_tensor({0, T, 3 * C}, dtype), out = new_tensor({0, T, C}, dtype);
  return {y, mean, rstd, qkv, out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> self_attention_backward(
    Tensor dy, Tensor x, Tensor ln_w, OptionalTensor ln_b, Tensor w_qkv, OptionalTensor b_qkv,
    Tensor w_proj, OptionalTensor b_proj, Tensor mean, Tensor rstd, Tensor qkv, Tensor out,
    Tensor lse, int64_t n_head, double proj_p, int64_t proj_stream, double p, OptionalTensor seed,
    int64_t stream, int64_t wanted) {
  const Arguments args("self_attention_backward", "x", x);
  Tensor dense;
  const OptionalTensor weight = ln_w;
  Steps s = arguments(args, {x, w_qkv, w_proj, weight, ln_b, b_qkv, b_proj}, n_head,
                      {proj_p, proj_stream, p, seed, stream}, dense);
  const int64_t B = s.attention.B, T = s.attention.Tq, C = s.proj.N, H = n_head, D = s.attention.D;
  const Tensor dense_dy = args.activation("dy", dy, {B, T, C});
  const Tensor dense_qkv = args.activation("qkv", qkv, {B, T, 3 * C});
  const Tensor dense_out = args.activation("out", out, {B, T, C});
  connect_steps(s, dense_qkv, dense_out);
  s.qkv.norm.mean = args.statistics("mean", mean, {B * T});
  s.qkv.norm.rstd = args.statistics("rstd", rstd, {B * T});
  s.attention.lse = args.statistics("lse", lse, {B, H, 2, T});

  const ScalarType dtype = scalar_type(s.proj.dtype);
  const Wanted want(wanted);
  const bool with_dx = want.any_of(0b111), with_dout = want.any_of(0b11111);
  Tensor dqkv = new_tensor({with_dout ? B : 0, T, 3 * C}, dtype);
  // Holds the gradient of `out` until dx itself is written.
  Tensor dx = new_tensor({with_dout ? B : 0, T, C}, dtype);
  Tensor dln_w = want.new_grad(1, weight), dln_b = want.new_grad(2, ln_b);
  Tensor dw_qkv = want.new_grad(3, w_qkv), db_qkv = want.new_grad(4, b_qkv);
  Tensor dw_proj = want.new_grad(5, w_proj), db_proj = want.new_grad(6, b_proj);
  LinearBackward of_proj = {}, of_qkv = {};
  AttentionBackward of_attention = {};
  of_proj.forward = s.proj;
  of_proj.dy = dense_dy.const_data_ptr();
  of_proj.dx = dx.data_ptr();
  of_proj.dweight = param_grad(dw_proj), of_proj.dbias = param_grad(db_proj);
  of_attention.forward = s.attention;
  of_attention.dout = heads_within(dx, T, 1, 0, H, D);
  unpack(dqkv, s.attention, of_attention.dq, of_attention.dk, of_attention.dv);
  of_qkv.forward = s.qkv;
  of_qkv.dy = dqkv.const_data_ptr();
  of_qkv.add = of_proj.dy;  // the gradient through the residual
  of_qkv.dx = with_dx ? dx.data_ptr() : nullptr;
  of_qkv.dnorm = {param_grad(dln_w), param_grad(dln_b)};
  of_qkv.dweight = param_grad(dw_qkv), of_qkv.dbias = param_grad(db_qkv);
  with_threads([&](const Parallel& parallel) {
    kernels().linear_backward(of_proj, parallel);
    if (!with_dout) return;
    kernels().attention_backward(of_attention, parallel);
    kernels().linear_backward(of_qkv, parallel);
  });
  if (!with_dx) dx = new_tensor({0}, dtype);
  return {dx, dln_w, dln_b, dw_qkv, db_qkv, dw_proj, db_proj};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("self_attention", TORCH_BOX(&self_attention));
  m.impl("self_attention_backward", TORCH_BOX(&self_attention_backward));
}

}  // namespace gptfast
