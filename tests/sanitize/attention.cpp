// Causal attention and its backward: head sizes, numbers of queries and keys, dropout, memory
// layouts of heads.
#include <cmath>

#include "harness.h"

namespace gptfast::sanitize {
namespace {

// How heads lie in memory: separate (B, T, H, D) tensors, thirds of one (B, T, 3, H, D) tensor, or
// (B, H, T, D) tensors with a gap after each row.
enum class Layout { separate, packed, gapped };
constexpr Layout layouts[] = {Layout::separate, Layout::packed, Layout::gapped};
constexpr const char* layout_names[] = {"separate", "packed", "gapped"};
constexpr int64_t gap = 3;

struct Shape {
  DType dtype;
  int64_t B, H, Tq, Tk, D;
  int32_t dropout;
  Layout layout;
};

// Elements of `parts` tensors of T positions; `parts` is 1 unless packed.
int64_t elements(const Shape& s, int64_t T, int64_t parts) {
  if (s.layout != Layout::gapped) return s.B * T * parts * s.H * s.D;
  return std::max<int64_t>(0, s.B * s.H * T * (s.D + gap) - gap);
}

Heads heads(const Shape& s, const Buffer& x, int64_t T, int64_t part, int64_t parts) {
  const int64_t row = s.D + gap;
  if (s.layout == Layout::gapped) return {x.data(), s.H * T * row, T * row, row};
  return {x.at(part * s.H * s.D), T * parts * s.H * s.D, s.D, parts * s.H * s.D};
}

// The values of a result without the gaps, which must not have been written to.
std::vector<float> written(const Shape& s, const Buffer& x) {
  if (s.layout != Layout::gapped) return x.values();
  std::vector<float> values;
  bool untouched = true;
  for (int64_t i = 0; i < x.count(); ++i)
    if (i % (s.D + gap) < s.D)
      values.push_back(x.value(i));
    else
      untouched &= std::isnan(x.value(i));
  expect(untouched, "a write between the rows of a result");
  return values;
}

// q, k and v, or their gradients.
struct Triple {
  int64_t parts;
  Buffer q, k, v;  // packed: all in q

  template <class... Deviation>
  explicit Triple(const Shape& s, Deviation... deviation)
      : parts(s.layout == Layout::packed ? 3 : 1),
        q(elements(s, s.Tq, parts), s.dtype, deviation...),
        k(parts == 3 ? 0 : elements(s, s.Tk, 1), s.dtype, deviation...),
        v(parts == 3 ? 0 : elements(s, s.Tk, 1), s.dtype, deviation...) {}

  Heads part(const Shape& s, int64_t i) const {
    if (parts == 3) return heads(s, q, s.Tq, i, 3);
    return heads(s, i == 0 ? q : i == 1 ? k : v, i == 0 ? s.Tq : s.Tk, 0, 1);
  }
};

std::vector<Result> run(const Shape& s, const Triple& in, const Buffer& dout,
                        const Kernels& kernels, const Parallel& parallel) {
  Buffer out(elements(s, s.Tq, 1), s.dtype), lse(2 * s.B * s.H * s.Tq, DType::f32);
  Buffer without_lse(out.count(), s.dtype);
  Triple grads(s);
  Attention a = {};
  a.dtype = s.dtype;
  a.B = s.B, a.H = s.H, a.Tq = s.Tq, a.Tk = s.Tk, a.D = s.D;
  a.q = in.part(s, 0), a.k = in.part(s, 1), a.v = in.part(s, 2);
  a.scale = 1.0f / std::sqrt(static_cast<float>(s.D));
  a.dropout = {s.dropout, 123, 5};
  a.out = heads(s, without_lse, s.Tq, 0, 1);
  kernels.attention(a, parallel);
  a.out = heads(s, out, s.Tq, 0, 1);
  a.lse = lse.floats();
  kernels.attention(a, parallel);
  expect(same_bits(out, without_lse), "the result depends on whether lse is wanted");

  AttentionBackward g = {};
  g.forward = a;
  g.dout = heads(s, dout, s.Tq, 0, 1);
  g.dq = grads.part(s, 0), g.dk = grads.part(s, 1), g.dv = grads.part(s, 2);
  kernels.attention_backward(g, parallel);
  const double max_scale = std::sqrt(std::max(1.0, static_cast<double>(s.Tq)));
  return {{"out", written(s, out)},
          {"lse", lse.values()},
          {"dq", written(s, grads.q)},
          {"dk", written(s, grads.k), max_scale},
          {"dv", written(s, grads.v), max_scale}};
}

void attention_case(const Shape& s) {
  const Triple in(s, 1.0);
  const Buffer dout(elements(s, s.Tq, 1), s.dtype, 1.0);
  const auto i = [](int64_t x) { return static_cast<long long>(x); };
  const std::string name = format("attention %s B%lld H%lld Tq%lld Tk%lld D%lld dropout %d %s",
                                  sanitize::name(s.dtype), i(s.B), i(s.H), i(s.Tq), i(s.Tk), i(s.D),
                                  s.dropout, layout_names[static_cast<int>(s.layout)]);
  check(name, s.dtype, [&](const Kernels& kernels, const Parallel& parallel) {
    return run(s, in, dout, kernels, parallel);
  });
}

}  // namespace

void attention_cases() {
  constexpr std::pair<int64_t, int64_t> times[] = {
      {1, 1},   {2, 2},   {17, 17},  {33, 33}, {97, 97},  {129, 129}, {200, 200},
      {1, 129}, {5, 140}, {97, 193}, {17, 33}, {130, 40}, {3, 1},     {3, 0},
  };
  for (const DType dtype : dtypes) {
    int64_t turn = 0;  // cycles through the layouts, with and without dropout
    for (const int64_t D : {8, 12, 16, 33, 64, 128, 256})
      for (const auto& [Tq, Tk] : times) {
        if (D > 64 && Tq * Tk > 97 * 97) continue;  // takes too long
        const int repeats = Tq * Tk > 33 * 33 ? 1 : 2;
        for (int repeat = 0; repeat < repeats; ++repeat, ++turn) {
          Layout layout = layouts[turn % 3];
          if (layout == Layout::packed && Tq != Tk) layout = Layout::separate;
          const int64_t B = Tq < 97 ? 2 : 1;
          attention_case({dtype, B, 2, Tq, Tk, D, turn / 3 % 2 ? 20000 : 0, layout});
        }
      }
    for (const Layout layout : layouts) {
      attention_case({dtype, 1, 3, 40, 40, 20, 65536, layout});
      attention_case({dtype, 61, 5, 9, 9, 12, 20000, layout});
    }
    // So many heads that a task has several, as above; with Tq > Tk some rows see no key.
    attention_case({dtype, 61, 5, 7, 3, 12, 0, Layout::separate});
    attention_case({dtype, 61, 5, 3, 7, 12, 0, Layout::gapped});
  }
}

}  // namespace gptfast::sanitize
