// Final norm, output projection and loss, with and without gradients, with ignored rows.
#include <cmath>

#include "harness.h"

namespace gptfast::sanitize {
namespace {

enum class Ignored { none, some, all };
enum class With { neither, norm, norm_and_bias };

struct Shape {
  DType dtype, param;
  int64_t M, K, V;
  Ignored ignored;
  With with;
  Reduction reduction = Reduction::mean;
  bool weighted = false;  // whether the tokens have weights
  float smoothing = 0.0f;
};

constexpr int64_t ignore_index = -100;

struct Inputs {
  Buffer x, ln_w, ln_b, weight, token_weights;
  int64_t counted = 0;
  std::vector<int64_t> drawn;
  Indices targets;

  explicit Inputs(const Shape& s)
      : x(s.M * s.K, s.dtype, 1.0),
        ln_w(s.K, s.param, 1.0),
        ln_b(s.K, s.param, 1.0),
        weight(s.V * s.K, s.param, 1.0 / std::sqrt(static_cast<double>(s.K))),
        token_weights(s.weighted ? s.M : 0, DType::f32, 1.0),
        drawn(draw(s)),
        targets(drawn) {
    for (const int64_t target : drawn) counted += target != ignore_index;
  }

  static std::vector<int64_t> draw(const Shape& s) {
    std::vector<int64_t> targets;
    for (int64_t i = 0; i < s.M; ++i) {
      const bool ignored =
          s.ignored == Ignored::all || (s.ignored == Ignored::some && random_below(4) == 0);
      targets.push_back(ignored ? ignore_index : random_below(s.V));
    }
    return targets;
  }
};

std::vector<Result> run(const Shape& s, const Inputs& in, const Kernels& kernels,
                        const Parallel& parallel) {
  const bool norm = s.with != With::neither, ln_b = s.with == With::norm_and_bias;
  const int64_t losses = s.reduction == Reduction::none ? s.M : 1;
  Buffer loss(losses, DType::f32), loss_alone(losses, DType::f32);
  Buffer dln_w(norm ? s.K : 0, s.param), dln_b(ln_b ? s.K : 0, s.param);
  Buffer dx(s.M * s.K, s.dtype), dweight(s.V * s.K, s.param);
  CrossEntropy a = {};
  a.dtype = s.dtype;
  a.M = s.M, a.K = s.K, a.V = s.V;
  a.x = in.x.data();
  a.norm = {in.ln_w.param(norm), in.ln_b.param(ln_b), nullptr, nullptr};
  a.weight.param = in.weight.param();
  a.targets = in.targets.data();
  a.token_weights = s.weighted ? in.token_weights.floats() : nullptr;
  a.ignore_index = ignore_index;
  a.reduction = s.reduction;
  a.label_smoothing = s.smoothing;
  a.loss = loss_alone.floats();
  kernels.cross_entropy(a, parallel);
  const CrossEntropy none = a;
  a.loss = loss.floats();
  a.dx = dx.data();
  a.dnorm = {dln_w.grad(norm), dln_b.grad(ln_b)};
  a.dweight = dweight.grad();
  kernels.cross_entropy(a, parallel);
  expect(same_bits(loss, loss_alone), "the loss depends on whether gradients are wanted");
  if (s.M < 97)
    expect_same_alone<CrossEntropy>(
        none, kernels.cross_entropy, parallel,
        {{dx, [](CrossEntropy& grad, const Buffer& alone) { grad.dx = alone.data(); }},
         {dweight, [](CrossEntropy& grad, const Buffer& alone) { grad.dweight = alone.grad(); }}});
  for (int64_t i = 0; in.counted == 0 && i < losses; ++i)
    expect(loss.value(i) == 0.0f, "a loss over no target is not 0");
  const double counted = static_cast<double>(std::max<int64_t>(1, in.counted));
  const double each = s.reduction == Reduction::mean ? 1.0 / counted : 1.0;
  const double dn = each / std::sqrt(static_cast<double>(s.K));
  return {{"loss", loss.values(), each * counted},
          {"dx", dx.values(), dn},
          {"dnorm_weight", dln_w.values(), dn * std::sqrt(counted)},
          {"dnorm_bias", dln_b.values(), dn * std::sqrt(counted)},
          {"dweight", dweight.values(), each * std::sqrt(counted / static_cast<double>(s.V))}};
}

void cross_entropy_case(const Shape& s) {
  constexpr const char* ignored[] = {"", ", some ignored", ", all ignored"};
  constexpr const char* with[] = {"", " norm", " norm bias"};
  constexpr const char* reductions[] = {"", " sum", " none"};
  const Inputs in(s);
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name = format(
      "cross entropy %s, parameters %s, M%lld K%lld V%lld%s%s%s%s%s", sanitize::name(s.dtype),
      sanitize::name(s.param), i(s.M), i(s.K), i(s.V), with[static_cast<int>(s.with)],
      ignored[static_cast<int>(s.ignored)], reductions[static_cast<int>(s.reduction)],
      s.weighted ? " weighted" : "", s.smoothing > 0.0f ? " smoothed" : "");
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, in, kernels, parallel);
  });
}

}  // namespace

void cross_entropy_cases() {
  constexpr std::pair<int64_t, int64_t> sizes[] = {
      {1, 1}, {1, 66}, {33, 1}, {33, 5}, {33, 300}, {64, 66}, {7, 1000},
  };
  constexpr With withs[] = {With::neither, With::norm, With::norm_and_bias};
  constexpr std::pair<Reduction, bool> reductions[] = {{Reduction::mean, false},
                                                       {Reduction::sum, true},
                                                       {Reduction::none, true},
                                                       {Reduction::sum, false},
                                                       {Reduction::none, false}};
  for (const DType dtype : dtypes) {
    int turn = 0;
    for (const DType param : param_dtypes(dtype)) {
      for (const int64_t M : {0, 1, 47, 49, 97, 200})
        for (const auto& [K, V] : sizes) {
          const Ignored ignored = M > 1 ? Ignored::some : Ignored::none;
          const auto [reduction, weighted] = reductions[turn % 5];
          const float smoothing = turn % 4 == 1 ? 0.1f : 0.0f;
          cross_entropy_case(
              {dtype, param, M, K, V, ignored, withs[turn++ % 3], reduction, weighted, smoothing});
        }
      cross_entropy_case({dtype, param, 50, 12, 20, Ignored::all, With::norm_and_bias});
      cross_entropy_case({dtype, param, 50, 12, 20, Ignored::none, With::neither});
      // More columns than one block of the vocabulary; in the second case dx is summed in place.
      cross_entropy_case({dtype, param, 50, 5, 2400, Ignored::some, With::norm_and_bias});
      cross_entropy_case({dtype, param, 50, 32, 1539, Ignored::some, With::neither});
      cross_entropy_case(
          {dtype, param, 50, 5, 3100, Ignored::some, With::norm, Reduction::mean, false, 0.1f});
    }
    // Rows so wide that they come in several chunks.
    const int64_t rows = dtype == DType::f32 ? 385 : 769;
    cross_entropy_case({dtype, dtype, rows, 11003, 3, Ignored::some, With::norm});
    // So many rows that they come in parts with a sum each.
    cross_entropy_case({dtype, dtype, 1601, 9, 21, Ignored::some, With::norm});
  }
}

}  // namespace gptfast::sanitize
