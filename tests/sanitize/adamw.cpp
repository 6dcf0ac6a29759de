// The optimiser's step over parameters of sizes near those of vectors and chunks.
#include <algorithm>
#include <memory>

#include "harness.h"

namespace gptfast::sanitize {
namespace {

// A parameter with its gradient and optimiser state, before the step.
struct Parameter {
  explicit Parameter(int64_t n)
      : weight(n, DType::f32, 1.0),
        grad(n, DType::f32, 1.0),
        mean(n, DType::f32, 1.0),
        average(n, DType::f32, 1.0) {
    for (int64_t i = 0; i < n; ++i)
      squares.push_back(1e-3f * static_cast<float>(1 + random_below(2000)));
  }

  Buffer weight, grad, mean, average;
  std::vector<float> squares;
};

std::vector<Result> run(const std::vector<const Parameter*>& parameters, float clip, bool averaged,
                        const Kernels& kernels, const Parallel& parallel) {
  std::vector<Result> results;
  std::vector<std::unique_ptr<Buffer>> moved;
  std::vector<AdamWParam> arguments;
  const auto moving = [&](const std::vector<float>& values) {
    moved.push_back(std::make_unique<Buffer>(static_cast<int64_t>(values.size()), DType::f32));
    std::copy(values.begin(), values.end(), moved.back()->floats());
    return moved.back()->floats();
  };
  for (const Parameter* p : parameters)
    arguments.push_back({moving(p->weight.values()), p->grad.floats(), moving(p->mean.values()),
                         moving(p->squares), averaged ? moving(p->average.values()) : nullptr,
                         p->grad.count(), 0.99f, 2e-3f, 1.3f, 0.2f});
  Buffer norm(1, DType::f32);
  kernels.adamw({arguments.data(), static_cast<int64_t>(arguments.size()), 0.9f, 0.99f, 1e-8f, clip,
                 norm.floats()},
                parallel);
  results.push_back({"norm", norm.values()});
  for (const auto& buffer : moved) results.push_back({"moved", buffer->values()});
  return results;
}

}  // namespace

void adamw_cases() {
  std::vector<std::unique_ptr<Parameter>> all;
  for (const int64_t n : {1, 15, 16, 33, 1000, 16384, 16385, 40000})
    all.push_back(std::make_unique<Parameter>(n));
  for (size_t first = 0; first < all.size(); ++first)
    for (const float clip : {0.1f, 1e9f}) {
      std::vector<const Parameter*> parameters;
      for (size_t i = first; i < all.size(); i += 2) parameters.push_back(all[i].get());
      const bool averaged = (first % 2 == 0) == (clip < 1.0f);
      check(format("adamw of %zu parameters, the first of %lld, clip %g%s", parameters.size(),
                   static_cast<long long>(parameters[0]->grad.count()), static_cast<double>(clip),
                   averaged ? ", averages" : ""),
            DType::f32, [&](const Kernels& kernels, const Parallel& parallel) {
              return run(parameters, clip, averaged, kernels, parallel);
            });
    }
}

}  // namespace gptfast::sanitize
