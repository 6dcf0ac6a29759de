// LayerNorm (optional), linear layer and cross-entropy; one call computes the loss and its
// gradients.
#include <tuple>

#include "common.h"

namespace gptfast {
namespace {

Reduction reduction_of(const Arguments& args, const std::string& name) {
  args.require(name == "mean" || name == "sum" || name == "none",
               "reduction must be 'mean', 'sum' or 'none', got '", name, "'");
  return name == "mean" ? Reduction::mean : name == "sum" ? Reduction::sum : Reduction::none;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    Tensor x, OptionalTensor ln_w, OptionalTensor ln_b, Tensor weight, Tensor targets,
    OptionalTensor token_weights, int64_t ignore_index, std::string reduction,
    double label_smoothing, int64_t wanted) {
  const Arguments args("linear_cross_entropy", "x", x);
  args.require(x.dim() >= 1 && weight.dim() == 2 && weight.numel() > 0,
               "x must be (..., K) and weight (V, K), neither V nor K 0");
  const int64_t M = rows_of(x), K = x.size(-1), V = weight.size(0);
  const Tensor dense_x = args.rows("x", x, M, K);
  const Tensor dense_targets = args.indices(
      "targets", torch::stable::reshape(targets, {targets.numel()}), {M}, V, ignore_index);
  args.require(ln_w.has_value() || !ln_b.has_value(), "ln_b needs ln_w");
  CrossEntropy s = {};
  s.dtype = args.dtype();
  s.M = M, s.K = K, s.V = V;
  s.x = dense_x.const_data_ptr();
  s.norm.weight = args.param("ln_w", ln_w, {K});
  s.norm.bias = args.param("ln_b", ln_b, {K});
  s.weight.param = args.param("weight", weight, {V, K});
  s.targets = static_cast<const int64_t*>(dense_targets.const_data_ptr());
  s.ignore_index = ignore_index;
  Tensor weights;
  if (token_weights.has_value()) {
    weights = as_contiguous(torch::stable::reshape(*token_weights, {token_weights->numel()}));
    s.token_weights = args.statistics("token_weights", weights, {M});
  }
  s.reduction = reduction_of(args, reduction);
  args.require(label_smoothing >= 0.0 && label_smoothing < 1.0,
               "label_smoothing must be in [0, 1), got ", std::to_string(label_smoothing));
  s.label_smoothing = static_cast<float>(label_smoothing);
  Tensor loss = s.reduction == Reduction::none ? new_tensor(targets.sizes(), ScalarType::Float)
                                               : new_tensor({}, ScalarType::Float);
  s.loss = static_cast<float*>(loss.data_ptr());
  const Wanted want(wanted);
  Tensor dx = want.new_dx(x);
  Tensor dln_w = want.new_grad(1, ln_w), dln_b = want.new_grad(2, ln_b);
  Tensor dweight = want.new_grad(3, weight);
  s.dx = dx.data_ptr();
  s.dnorm = {param_grad(dln_w), param_grad(dln_b)};
  s.dweight = param_grad(dweight);
  with_threads([&](const Parallel& parallel) { kernels().cross_entropy(s, parallel); });
  return {loss, dx, dln_w, dln_b, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

}  // namespace gptfast
