// The optimiser's step over all parameters: clipping, AdamW and the weights' running means.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace gptfast {
namespace {

// The data of x, which must be a contiguous float32 tensor of as many elements as `like`.
float* values(const Arguments& args, const char* name, const Tensor& x, const Tensor& like) {
  args.require(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float &&
                   x.numel() == like.numel(),
               name, " must be contiguous float32 tensors of the weights' sizes on the CPU, got ",
               x.scalar_type(), " ", x.sizes(), " for a weight of ", like.sizes());
  return static_cast<float*>(x.data_ptr());
}

// A parameter's step count, which torch keeps as a tensor.
float* count(const Arguments& args, const Tensor& step) {
  args.require(step.is_cpu() && step.numel() == 1 && step.scalar_type() == ScalarType::Float,
               "steps must be float32 tensors of one element on the CPU, got ", step.scalar_type(),
               " ", step.sizes());
  return static_cast<float*>(step.data_ptr());
}

Tensor adamw(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> means,
             std::vector<Tensor> squares, std::vector<Tensor> steps, std::vector<Tensor> averages,
             std::vector<double> weight_decay, double lr, double beta1, double beta2, double eps,
             double clip, double ema) {
  Tensor norm = new_tensor({}, ScalarType::Float);
  const Arguments args("adamw_", "norm", norm);
  args.require(grads.size() == weights.size() && means.size() == weights.size() &&
                   squares.size() == weights.size() && steps.size() == weights.size() &&
                   weight_decay.size() == weights.size(),
               "grads, means, squares, steps and weight_decay must be as many as weights");
  args.require(averages.empty() || averages.size() == weights.size(),
               "averages must be as many as weights, or none");
  std::vector<AdamWParam> params;
  std::vector<float*> counts;
  for (size_t i = 0; i < weights.size(); ++i) {
    counts.push_back(count(args, steps[i]));
    float* const average =
        averages.empty() ? nullptr : values(args, "averages", averages[i], weights[i]);
    params.push_back(
        {values(args, "weights", weights[i], weights[i]),
         values(args, "grads", grads[i], weights[i]), values(args, "means", means[i], weights[i]),
         values(args, "squares", squares[i], weights[i]), average, weights[i].numel(), 0, 0, 0, 0});
  }
  // Tensors are changed only now that all arguments have been checked.
  for (size_t i = 0; i < weights.size(); ++i) {
    const double t = *counts[i] += 1.0f;
    params[i].decay = static_cast<float>(1.0 - lr * weight_decay[i]);
    params[i].rate = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
    params[i].inv_sqrt_correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
    params[i].pull = static_cast<float>(std::max(1.0 - ema, 9.0 / (10.0 + t)));
  }
  AdamW s = {};
  s.params = params.data();
  s.count = static_cast<int64_t>(params.size());
  s.beta1 = static_cast<float>(beta1), s.beta2 = static_cast<float>(beta2);
  s.eps = static_cast<float>(eps);
  s.clip = static_cast<float>(clip);
  s.norm = static_cast<float*>(norm.data_ptr());
  with_threads([&](const Parallel& parallel) { kernels().adamw(s, parallel); });
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw)); }

}  // namespace gptfast
