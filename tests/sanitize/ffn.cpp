// The feed-forward block and its backward: both GELUs, dropout, less and more than one block of
// hidden columns.
#include <cmath>

#include "harness.h"

namespace gptfast::sanitize {
namespace {

struct Shape {
  DType dtype, param;
  int64_t M, C, F;
  bool bias;
  int32_t dropout;
  Gelu gelu;
};

struct Inputs {
  Buffer x, ln_w, ln_b, w1, b1, w2, b2, dy;

  explicit Inputs(const Shape& s)
      : x(s.M * s.C, s.dtype, 1.0),
        ln_w(s.C, s.param, 1.0),
        ln_b(s.C, s.param, 1.0),
        w1(s.F * s.C, s.param, 1.0 / std::sqrt(static_cast<double>(s.C))),
        b1(s.F, s.param, 1.0),
        w2(s.C * s.F, s.param, 1.0 / std::sqrt(static_cast<double>(s.F))),
        b2(s.C, s.param, 1.0),
        dy(s.M * s.C, s.dtype, 1.0) {}
};

Ffn forward(const Shape& s, const Inputs& in) {
  Ffn a = {};
  a.dtype = s.dtype;
  a.M = s.M, a.C = s.C, a.F = s.F;
  a.x = in.x.data();
  a.norm = {in.ln_w.param(), in.ln_b.param(s.bias), nullptr, nullptr};
  a.w1.param = in.w1.param(), a.b1 = in.b1.param(s.bias);
  a.w2.param = in.w2.param(), a.b2 = in.b2.param(s.bias);
  a.gelu = s.gelu;
  a.dropout = {s.dropout, 9, 3};
  return a;
}

// As in generation: weights are packed, and nothing is kept for a backward. Weights rounded to the
// dtype of the packed ones must give the same bits.
void run_packed(Ffn a, const Inputs& in, const Kernels& kernels, const Parallel& parallel) {
  Buffer again(a.M * a.C, a.dtype), y(a.M * a.C, a.dtype);
  Buffer rounded1(a.F * a.C, a.dtype), rounded2(a.C * a.F, a.dtype);
  a.norm.mean = a.norm.rstd = nullptr;
  a.hidden = nullptr;
  Buffer w1(kernels.packed_weight_bytes(a.dtype, Packing::dense, a.F, a.C) / 2, DType::bf16);
  Buffer w2(kernels.packed_weight_bytes(a.dtype, Packing::dense, a.C, a.F) / 2, DType::bf16);
  kernels.pack_weight(a.dtype, Packing::dense, a.w1.param, a.F, a.C, w1.data(), parallel);
  kernels.pack_weight(a.dtype, Packing::dense, a.w2.param, a.C, a.F, w2.data(), parallel);
  a.w1 = {Param{}, w1.data(), Packing::dense}, a.w2 = {Param{}, w2.data(), Packing::dense};
  a.y = again.data();
  kernels.ffn(a, parallel);
  copy_rounded(in.w1, rounded1), copy_rounded(in.w2, rounded2);
  a.w1 = {rounded1.param()}, a.w2 = {rounded2.param()};
  a.y = y.data();
  kernels.ffn(a, parallel);
  expect(same_bits(again, y), "packed weights give another result");
}

std::vector<Result> run(const Shape& s, const Inputs& in, const Kernels& kernels,
                        const Parallel& parallel) {
  Buffer y(s.M * s.C, s.dtype), hidden(s.M * s.F, s.dtype), mean(s.M, DType::f32);
  Buffer rstd(s.M, DType::f32), dx(s.M * s.C, s.dtype), dln_w(s.C, s.param);
  Buffer dw1(s.F * s.C, s.param), dw2(s.C * s.F, s.param), dln_b(s.bias ? s.C : 0, s.param);
  Buffer db1(s.bias ? s.F : 0, s.param), db2(s.bias ? s.C : 0, s.param);
  Ffn a = forward(s, in);
  a.norm.mean = mean.floats(), a.norm.rstd = rstd.floats();
  a.hidden = hidden.data();
  a.y = y.data();
  kernels.ffn(a, parallel);
  run_packed(a, in, kernels, parallel);

  FfnBackward none = {};
  none.forward = a;
  none.dy = in.dy.data();
  FfnBackward g = none;
  g.dx = dx.data();
  g.dnorm = {dln_w.grad(), dln_b.grad(s.bias)};
  g.dw1 = dw1.grad(), g.db1 = db1.grad(s.bias);
  g.dw2 = dw2.grad(), g.db2 = db2.grad(s.bias);
  kernels.ffn_backward(g, parallel);
  if (s.M < 97)
    expect_same_alone<FfnBackward>(
        none, kernels.ffn_backward, parallel,
        {{dx, [](FfnBackward& grad, const Buffer& alone) { grad.dx = alone.data(); }},
         {dw1, [](FfnBackward& grad, const Buffer& alone) { grad.dw1 = alone.grad(); }},
         {db1, [](FfnBackward& grad, const Buffer& alone) { grad.db1 = alone.grad(); }},
         {dw2, [](FfnBackward& grad, const Buffer& alone) { grad.dw2 = alone.grad(); }},
         {db2, [](FfnBackward& grad, const Buffer& alone) { grad.db2 = alone.grad(); }}});
  const double rows = std::sqrt(static_cast<double>(s.M));
  const double du = std::sqrt(static_cast<double>(s.C) / static_cast<double>(s.F));
  return {{"y", y.values()},
          {"hidden", hidden.values()},
          {"mean", mean.values()},
          {"rstd", rstd.values()},
          {"dx", dx.values(), std::max(1.0, root_mean_square(rstd))},
          {"dnorm_weight", dln_w.values(), rows},
          {"dnorm_bias", dln_b.values(), rows},
          {"dw1", dw1.values(), rows * du},
          {"db1", db1.values(), rows * du},
          {"dw2", dw2.values(), rows},
          {"db2", db2.values(), rows}};
}

void ffn_case(const Shape& s) {
  const Inputs in(s);
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name =
      format("ffn %s, parameters %s, M%lld C%lld F%lld%s dropout %d %s", sanitize::name(s.dtype),
             sanitize::name(s.param), i(s.M), i(s.C), i(s.F), s.bias ? " bias" : "", s.dropout,
             s.gelu == Gelu::erf ? "erf" : "tanh");
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, in, kernels, parallel);
  });
}

}  // namespace

void ffn_cases() {
  constexpr std::pair<int64_t, int64_t> sizes[] = {
      {1, 1}, {1, 600}, {9, 37}, {16, 64}, {33, 132}, {50, 513}, {65, 1}, {70, 520},
  };
  constexpr int32_t dropouts[] = {0, 10000, 65536};
  for (const DType dtype : dtypes) {
    const std::vector<DType> params = param_dtypes(dtype);
    size_t turn = 0;
    for (const int64_t M : {0, 1, 47, 49, 97, 200})
      for (const auto& [C, F] : sizes)
        for (const Gelu gelu : {Gelu::erf, Gelu::tanh}) {
          if (M > 49 && C * F > 20000 && gelu == Gelu::tanh) continue;  // takes too long
          const size_t mix = turn / 2 + turn;  // combines the choices below in all pairs
          ffn_case({dtype, params[mix % params.size()], M, C, F, turn % 3 != 0, dropouts[mix % 3],
                    gelu});
          ++turn;
        }
    // Weights so wide that the rows come in several chunks for their gradients.
    if (dtype == DType::f32) ffn_case({dtype, dtype, 385, 3, 5501, true, 10000, Gelu::erf});
    // So many rows that they come in parts with a sum each.
    ffn_case({dtype, params.back(), 1601, 9, 37, true, 10000, Gelu::erf});
  }
}

}  // namespace gptfast::sanitize
