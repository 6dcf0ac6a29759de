// Token and position embedding and its backward, and the forward at given positions.
#include "harness.h"

namespace gptfast::sanitize {
namespace {

struct Shape {
  DType dtype, param;
  int64_t B, T, C, V;
  int32_t dropout;
  int64_t padding_idx;
};

constexpr int64_t spare_positions = 2;  // rows of wpe past T

std::vector<int64_t> draw(int64_t count, int64_t limit) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(random_below(limit));
  return values;
}

std::vector<Result> run(const Shape& s, const Buffer& wte, const Buffer& wpe, const Buffer& dy,
                        const Indices& idx, const Indices& position, const Kernels& kernels,
                        const Parallel& parallel) {
  Buffer y(s.B * s.T * s.C, s.dtype), placed(y.count(), s.dtype);
  Buffer dwte(wte.count(), s.param), dwpe(wpe.count(), s.param);
  Embedding a = {};
  a.y_dtype = s.dtype;
  a.M = s.B * s.T, a.T = s.T, a.C = s.C, a.V = s.V;
  a.idx = idx.data();
  a.wte = wte.param(), a.wpe = wpe.param();
  a.dropout = {s.dropout, 3, 0};
  a.y = placed.data();
  a.position = position.data();
  kernels.embedding(a, parallel);
  a.y = y.data();
  a.position = nullptr;
  kernels.embedding(a, parallel);

  EmbeddingBackward g = {};
  g.forward = a;
  g.dy = dy.data();
  g.padding_idx = s.padding_idx;
  g.block_size = s.T + spare_positions;
  g.dwte = dwte.grad(), g.dwpe = dwpe.grad();
  kernels.embedding_backward(g, parallel);
  return {{"y", y.values()},
          {"y at given positions", placed.values()},
          {"dwte", dwte.values()},
          {"dwpe", dwpe.values()}};
}

void embedding_case(const Shape& s) {
  const Buffer wte(s.V * s.C, s.param, 1.0), wpe((s.T + spare_positions) * s.C, s.param, 1.0);
  const Buffer dy(s.B * s.T * s.C, s.dtype, 1.0);
  const Indices idx(draw(s.B * s.T, s.V)), position(draw(s.B * s.T, s.T + spare_positions));
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name =
      format("embedding %s, parameters %s, B%lld T%lld C%lld V%lld dropout %d padding %lld",
             sanitize::name(s.dtype), sanitize::name(s.param), i(s.B), i(s.T), i(s.C), i(s.V),
             s.dropout, i(s.padding_idx));
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, wte, wpe, dy, idx, position, kernels, parallel);
  });
}

}  // namespace

void embedding_cases() {
  for (const DType dtype : dtypes)
    for (const DType param : dtypes)
      for (const int64_t B : {0, 1, 3})
        for (const int64_t T : {1, 9, 50})
          for (const int64_t C : {1, 15, 16, 37, 64})
            for (const int32_t dropout : {0, 9000, 65536})
              embedding_case({dtype, param, B, T, C, 7, dropout, dropout ? 0 : -1});
}

}  // namespace gptfast::sanitize
