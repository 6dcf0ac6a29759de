// The two layouts of a head's keys and values in a layer's cache. Heads are numbered over all
// slots: head h of a slot has the index slot * H + h.
#pragma once

#include "../kernels.h"
#include "../matmul/layout.inl"
#include "../simd/vec.inl"
#include "heads.inl"
#include "small.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Keys (capacity, D) and then values (capacity, D), unpacked: for models whose context is so short
// that small.inl computes their attention.
template <class T>
struct PlainHead {
  using Input = T;
  using Element = T;
  static constexpr bool packed = false;

  int64_t D;
  T *keys, *values;

  PlainHead(const CacheShape& s, void* cache, int64_t index)
      : D(s.D),
        keys(static_cast<T*>(cache) + index * elements(s.capacity, D)),
        values(keys + s.capacity * D) {}

  static int64_t elements(int64_t capacity, int64_t D) { return 2 * capacity * D; }

  // Writes tokens [from, from + count); k and v hold these tokens alone.
  void append(const Head<T>& k, const Head<T>& v, int64_t from, int64_t count) const {
    for (int64_t t = 0; t < count; ++t) {
      copy(k.at(t), 1, keys + (from + t) * D);
      copy(v.at(t), 1, values + (from + t) * D);
    }
  }

  void copy_from(const PlainHead& other, int64_t count) const {
    copy(other.keys, count, keys);
    copy(other.values, count, values);
  }

 private:
  void copy(const T* from, int64_t tokens, T* to) const {
    __builtin_memcpy(to, from, static_cast<size_t>(tokens * D) * sizeof(T));
  }
};

// Packed as in blocked.inl: K' (D, capacity), then V (capacity, D). Rows of V past the last token
// that the products read as padding are zeros.
template <class T>
struct PackedHead {
  using Input = T;
  using P = typename OperandOf<T>::type;
  using Element = P;
  static constexpr bool packed = true;
  static constexpr int NR = Tile<P>::NR, KU = Tile<P>::KU, KPAD = Tile<P>::KPAD;

  int64_t D, capacity;
  P *keys, *values;

  PackedHead(const CacheShape& s, void* cache, int64_t index)
      : D(s.D),
        capacity(s.capacity),
        keys(static_cast<P*>(cache) + index * elements(capacity, D)),
        values(keys + rhs_elements<P>(D, capacity)) {}

  static int64_t elements(int64_t capacity, int64_t D) {
    return rhs_elements<P>(D, capacity) + rhs_elements<P>(capacity, D);
  }

  Rhs<P> packed_keys() const { return {keys, panel_elements<P>(D)}; }
  Rhs<P> packed_values() const { return {values, panel_elements<P>(capacity)}; }

  void append(const Head<T>& k, const Head<T>& v, int64_t from, int64_t count) const {
    if (from == 0) {
      pack_transposed(k.data, k.row, D, count, keys);
      for (int64_t n0 = 0; n0 < D; n0 += NR)
        pack_rows(v.data, v.row, count, D, n0, NR, values + n0 / NR * packed_values().panel);
      return;
    }
    for (int64_t t = 0; t < count; ++t) append_token(k.at(t), v.at(t), from + t);
  }

  void copy_from(const PackedHead& other, int64_t count) const {
    const int64_t panels = divide_up(count, NR) * packed_keys().panel;
    __builtin_memcpy(keys, other.keys, static_cast<size_t>(panels) * sizeof(P));
    for (int64_t n0 = 0; n0 < D; n0 += NR) {
      const int64_t at = n0 / NR * packed_values().panel;
      __builtin_memcpy(values + at, other.values + at,
                       static_cast<size_t>(padded_k<P>(count) * NR) * sizeof(P));
    }
  }

 private:
  // Writes one token: a column of K', KU elements at a time, and a row of V, which shares its units
  // with a neighbouring row where KU is 2.
  void append_token(const T* k, const T* v, int64_t t) const {
    P* column = keys + t / NR * packed_keys().panel + t % NR * KU;
    const int64_t whole = D / KU * KU;
    for (int64_t d = 0; d < whole; d += KU, column += NR * KU) copy_unit(k + d, column);
    for (int64_t d = whole; d < padded_k<P>(D); d += KU, column += NR * KU) {
      T last[KU] = {};
      if (d < D) last[0] = k[d];
      copy_unit(last, column);
    }
    P* row = values + t / KU * NR * KU;
    for (int64_t n0 = 0; n0 < D; n0 += NR, row += packed_values().panel) {
      if (KPAD > KU && t % KPAD == 0) __builtin_memset(row, 0, KPAD * NR * sizeof(P));
      for (int64_t j = 0; j < NR; j += W)
        put_row(load_count(v + n0 + j, D - n0 - j), t, row + j * KU);
    }
  }

  static void copy_unit(const P* from, P* to) { __builtin_memcpy(to, from, KU * sizeof(P)); }
  static void put_row(VF x, int64_t, float* to) { store(to, x); }
#if GPTFAST_BF16_DOT
  // Writes the upper halves of x's lanes as row t of a pair of rows; the first row of a pair clears
  // the second.
  static void put_row(VF x, int64_t t, bf16* to) {
    VU pair;
    __builtin_memcpy(&pair, to, sizeof pair);
    pair = t % KU == 0 ? (VU)x >> 16 : (pair & 0xffff) | (VU)x;
    __builtin_memcpy(to, &pair, sizeof pair);
  }
#else
  static void copy_unit(const bf16* from, float* to) {
    const uint32_t wide = static_cast<uint32_t>(from->bits) << 16;
    __builtin_memcpy(to, &wide, sizeof wide);
  }
#endif
};

// Calls f with the layout of a cache's heads. The model's context alone decides, so that results
// have the same bits for any capacity.
template <class H>
struct HeadType {
  using type = H;
};
template <class F>
auto with_head_type(const CacheShape& s, const F& f) {
  const auto of = [&](auto element) {
    using T = decltype(element);
    if (s.context <= max_small_keys<T>) return f(HeadType<PlainHead<T>>{});
    return f(HeadType<PackedHead<T>>{});
  };
  return s.dtype == DType::f32 ? of(float{}) : of(bf16{});
}

int64_t cache_bytes(const CacheShape& s) {
  return with_head_type(s, [&](auto of) {
    using Cached = typename decltype(of)::type;
    return s.H * Cached::elements(s.capacity, s.D) *
           static_cast<int64_t>(sizeof(typename Cached::Element));
  });
}

void copy_cached(const CacheShape& s, void* cache, int64_t from, int64_t to, int64_t count) {
  with_head_type(s, [&](auto of) {
    using Cached = typename decltype(of)::type;
    for (int64_t h = 0; h < s.H; ++h)
      Cached(s, cache, to * s.H + h).copy_from(Cached(s, cache, from * s.H + h), count);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
