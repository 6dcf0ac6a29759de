// Linear layers and their backward, with and without each optional part, and packed weights.
#include <cmath>

#include "harness.h"

namespace gptfast::sanitize {
namespace {

struct Shape {
  DType dtype, param;
  int64_t M, K, N;
  bool norm, bias, residual;
  int32_t dropout = 0;
};

struct Inputs {
  Buffer x, ln_w, ln_b, weight, bias, residual, dy;

  explicit Inputs(const Shape& s)
      : x(s.M * s.K, s.dtype, 1.0),
        ln_w(s.K, s.param, 1.0),
        ln_b(s.K, s.param, 1.0),
        weight(s.N * s.K, s.param, 1.0 / std::sqrt(static_cast<double>(s.K))),
        bias(s.N, s.param, 1.0),
        residual(s.M * s.N, s.dtype, 1.0),
        dy(s.M * s.N, s.dtype, 1.0) {}
};

// Compares the forward from a packed weight, which has the activations' dtype, with that from the
// weight rounded to it. A result of another dtype must have no NaN.
void run_packed(const Linear& from_weight, const Buffer& weight, const Buffer& packed,
                DType y_dtype, const Kernels& kernels, const Parallel& parallel) {
  Linear a = from_weight;
  Buffer rounded(weight.count(), a.dtype), y(a.M * a.N, a.dtype);
  copy_rounded(weight, rounded);
  a.weight.param = rounded.param();
  a.y = y.data();
  kernels.linear(a, parallel);
  Buffer again(a.M * a.N, y_dtype);
  a.y = again.data(), a.y_dtype = y_dtype;
  a.weight = {Param{}, packed.data(), Packing::dense};
  a.norm.mean = a.norm.rstd = nullptr;
  kernels.linear(a, parallel);
  if (y_dtype == from_weight.dtype)
    expect(same_bits(again, y), "a packed weight gives another result");
  else
    for (const float each : again.values()) expect(!std::isnan(each), "NaN in a float32 result");
}

std::vector<Result> run(const Shape& s, const Inputs& in, const Kernels& kernels,
                        const Parallel& parallel) {
  const bool ln_b = s.norm && s.bias;
  Buffer y(s.M * s.N, s.dtype), mean(s.norm ? s.M : 0, DType::f32);
  Buffer rstd(mean.count(), DType::f32), dx(s.M * s.K, s.dtype), dweight(s.N * s.K, s.param);
  Buffer dbias(s.bias ? s.N : 0, s.param), dln_w(s.norm ? s.K : 0, s.param);
  Buffer dln_b(ln_b ? s.K : 0, s.param);
  Linear a = {};
  a.dtype = a.y_dtype = s.dtype;
  a.M = s.M, a.K = s.K, a.N = s.N;
  a.x = in.x.data();
  if (s.norm) a.norm = {in.ln_w.param(), in.ln_b.param(ln_b), mean.floats(), rstd.floats()};
  a.weight.param = in.weight.param();
  a.bias = in.bias.param(s.bias);
  a.dropout = {s.dropout, 123, 5};
  a.residual = s.residual ? in.residual.data() : nullptr;
  a.y = y.data();
  kernels.linear(a, parallel);

  Buffer packed(kernels.packed_weight_bytes(s.dtype, Packing::dense, s.N, s.K) / 2, DType::bf16);
  kernels.pack_weight(s.dtype, Packing::dense, in.weight.param(), s.N, s.K, packed.data(),
                      parallel);
  for (const DType y_dtype : param_dtypes(s.dtype))
    run_packed(a, in.weight, packed, y_dtype, kernels, parallel);

  LinearBackward none = {};
  none.forward = a;
  none.dy = in.dy.data();
  const bool add = s.residual && (s.norm || s.bias);
  none.add = add ? in.x.data() : nullptr;
  LinearBackward g = none;
  g.dx = dx.data();
  g.dnorm = {dln_w.grad(s.norm), dln_b.grad(ln_b)};
  g.dweight = dweight.grad();
  g.dbias = dbias.grad(s.bias);
  kernels.linear_backward(g, parallel);
  if (s.M < 97)
    expect_same_alone<LinearBackward>(
        none, kernels.linear_backward, parallel,
        {{dx, [](LinearBackward& grad, const Buffer& alone) { grad.dx = alone.data(); }},
         {dweight, [](LinearBackward& grad, const Buffer& alone) { grad.dweight = alone.grad(); }},
         {dbias, [](LinearBackward& grad, const Buffer& alone) { grad.dbias = alone.grad(); }}});
  const double M = static_cast<double>(s.M);
  const double dn = std::sqrt(static_cast<double>(s.N) / static_cast<double>(s.K));
  return {{"y", y.values()},
          {"mean", mean.values()},
          {"rstd", rstd.values()},
          {"dx", dx.values(), (s.norm ? dn * root_mean_square(rstd) : dn) + (add ? 1 : 0)},
          {"dweight", dweight.values(), std::sqrt(M)},
          {"dbias", dbias.values(), std::sqrt(M)},
          {"dnorm_weight", dln_w.values(), dn * std::sqrt(M)},
          {"dnorm_bias", dln_b.values(), dn * std::sqrt(M)}};
}

void linear_case(const Shape& s) {
  const Inputs in(s);
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name = format("linear %s, parameters %s, M%lld K%lld N%lld%s%s%s dropout %d",
                                  sanitize::name(s.dtype), sanitize::name(s.param), i(s.M), i(s.K),
                                  i(s.N), s.norm ? " norm" : "", s.bias ? " bias" : "",
                                  s.residual ? " residual" : "", s.dropout);
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, in, kernels, parallel);
  });
}

}  // namespace

void linear_cases() {
  constexpr std::pair<int64_t, int64_t> sizes[] = {
      {1, 1},  {5, 3},   {16, 16},  {31, 17},  {32, 1},   {33, 65},
      {7, 97}, {64, 64}, {193, 33}, {257, 15}, {19, 530},
  };
  for (const DType dtype : dtypes) {
    const std::vector<DType> params = param_dtypes(dtype);
    size_t turn = 0;
    for (const int64_t M : {0, 1, 47, 49, 97, 200})
      for (const auto& [K, N] : sizes) {
        linear_case({dtype, params[turn++ % params.size()], M, K, N, true, true, false});
        linear_case({dtype, params[turn++ % params.size()], M, K, N, true, false, true});
        linear_case({dtype, params[turn++ % params.size()], M, K, N, false, N % 2 == 0, true});
        linear_case(
            {dtype, params[turn++ % params.size()], M, K, N, false, N % 2 == 1, true, 20000});
      }
    // A weight so wide that the rows come in several chunks for its gradient.
    linear_case({dtype, dtype, dtype == DType::f32 ? 385 : 769, 11003, 3, true, true, false});
    // So many rows that they come in parts with a sum each.
    linear_case({dtype, params.back(), 1601, 33, 17, true, true, false});
  }
}

}  // namespace gptfast::sanitize
