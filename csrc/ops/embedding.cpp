// Token plus position embedding with dropout, and its backward.
#include <tuple>

#include "common.h"

namespace gptfast {
namespace {

// `dense` owns the memory that the result's idx points to.
Embedding arguments(const Arguments& args, const Tensor& idx, const Tensor& wte, const Tensor& wpe,
                    double p, const OptionalTensor& seed, int64_t stream, Tensor& dense) {
  args.require(idx.dim() == 2 && wte.dim() == 2 && wpe.dim() == 2,
               "idx must be (B, T), wte (V, C) and wpe (block_size, C)");
  const int64_t B = idx.size(0), T = idx.size(1), V = wte.size(0), C = wte.size(1);
  args.require(T <= wpe.size(0), "idx must have at most block_size = ", wpe.size(0),
               " positions, got ", T);
  dense = args.indices("idx", idx, {B, T}, V);
  Embedding s = {};
  s.M = B * T, s.T = T, s.C = C, s.V = V;
  s.idx = static_cast<const int64_t*>(dense.const_data_ptr());
  s.wte = args.param("wte", wte, {V, C});
  s.wpe = args.param("wpe", wpe, {wpe.size(0), C});
  s.dropout = args.dropout(p, seed, stream);
  return s;
}

Tensor embedding(Tensor idx, Tensor wte, Tensor wpe, double p, OptionalTensor seed, int64_t stream,
                 ScalarType dtype) {
  const Arguments args("embedding", "wte", wte);
  args.require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "dtype must be float32 or bfloat16, got ", dtype);
  Tensor dense;
  Embedding s = arguments(args, idx, wte, wpe, p, seed, stream, dense);
  Tensor y = new_tensor({idx.size(0), idx.size(1), s.C}, dtype);
  s.y_dtype = dtype == ScalarType::Float ? DType::f32 : DType::bf16;
  s.y = y.data_ptr();
  with_threads([&](const Parallel& parallel) { kernels().embedding(s, parallel); });
  return y;
}

std::tuple<Tensor, Tensor> embedding_backward(Tensor dy, Tensor idx, Tensor wte, Tensor wpe,
                                              int64_t padding_idx, double p, OptionalTensor seed,
                                              int64_t stream, int64_t wanted) {
  const Arguments args("embedding_backward", "wte", wte),
      activations("embedding_backward", "dy", dy);
  Tensor dense;
  EmbeddingBackward s = {};
  s.forward = arguments(args, idx, wte, wpe, p, seed, stream, dense);
  s.forward.y_dtype = activations.dtype();
  const Tensor dense_dy = activations.activation("dy", dy, {idx.size(0), idx.size(1), s.forward.C});
  const Wanted want(wanted);
  Tensor dwte = want.new_grad(0, wte), dwpe = want.new_grad(1, wpe);
  s.dy = dense_dy.const_data_ptr();
  s.padding_idx = padding_idx;
  s.block_size = wpe.size(0);
  s.dwte = param_grad(dwte);
  s.dwpe = param_grad(dwpe);
  with_threads([&](const Parallel& parallel) { kernels().embedding_backward(s, parallel); });
  return {dwte, dwpe};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
}

}  // namespace gptfast
