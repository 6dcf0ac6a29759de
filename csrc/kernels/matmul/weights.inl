// Weights as right-hand sides: packed within a call for that call alone, or in advance for many
// calls, then also in narrower formats.
#pragma once

#include "../kernels.h"
#include "../simd/elements.inl"
#include "../simd/vec.inl"
#include "../threads/parallel.h"
#include "../threads/scratch.h"
#include "layout.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// How the panels of a weight store its elements: as the products read them (dense), in the same
// order but narrower (bf16, int8), or as quads of bytes for vnni.inl.
enum class WeightFormat { dense, bf16, int8, int8_vnni };

// A weight (K, N) in panels. If it has 8-bit integers, column n of the product is multiplied by
// scales[n].
template <class P>
struct PackedWeight {
  WeightFormat format;
  const void* data;
  int64_t panel;  // elements from one panel to the next
  const float* scales = nullptr;

  int64_t element_bytes() const {
    if (format == WeightFormat::dense) return sizeof(P);
    return format == WeightFormat::bf16 ? sizeof(bf16) : sizeof(int8_t);
  }
  Rhs<P> dense() const { return {static_cast<const P*>(data), panel}; }
  PackedWeight columns(int64_t n) const { return from(n / Tile<P>::NR * panel, n); }
  PackedWeight rows(int64_t k) const { return from(k * Tile<P>::NR, 0); }

 private:
  PackedWeight from(int64_t offset, int64_t n) const {
    return {format, static_cast<const char*>(data) + offset * element_bytes(), panel,
            scales ? scales + n : nullptr};
  }
};

constexpr int64_t QUAD = 4;  // rows of B in one 32-bit lane

// Packs one panel of bytes w + 128 from `count` rows of k integers in floats, `ld` apart and padded
// with zeros to a whole vector; `bytes` is scratch memory for one row.
inline void pack_quads(const float* rows, int64_t ld, int64_t k, int64_t count, int8_t* bytes,
                       int8_t* panel) {
  constexpr int NR = 2 * W;
  const int64_t units = divide_up(k, QUAD);
  if (count < NR) __builtin_memset(panel, 0, static_cast<size_t>(units * NR * QUAD));
  for (int64_t n = 0; n < count; ++n) {
    narrow_bytes(rows + n * ld, round_up(k, W), bytes);
    for (int64_t u = 0; u < units; ++u) {
      uint32_t quad;
      __builtin_memcpy(&quad, bytes + u * QUAD, sizeof quad);
      quad ^= 0x80808080u;
      __builtin_memcpy(panel + (u * NR + n) * QUAD, &quad, sizeof quad);
    }
  }
}

// The rows of the unpacked weight from n0 on.
inline Weight rows_from(const Weight& w, int64_t n0, int64_t k) {
  return {
      with_elements(w.param, [&](auto* data) -> Param { return {data + n0 * k, w.param.dtype}; }),
      nullptr, Packing::dense};
}

// Packs the weight (N, K) of a linear layer as the right-hand side W' (K, N).
template <class P>
inline void pack_weight_panels(const Param& w, int64_t n, int64_t k, P* out,
                               const Parallel& parallel) {
  constexpr int NR = Tile<P>::NR;
  run_tasks(parallel, divide_up(n, NR), [&](int64_t panel) {
    with_elements(w, [&](auto* data) {
      const int64_t n0 = panel * NR;
      pack_panel_transposed(data + n0 * k, k, k, min(NR, n - n0),
                            out + panel * panel_elements<P>(k));
    });
  });
}

// An 8-bit weight is stored as its scales followed by its panels: bytes in the order of layout.inl
// for products that widen them, [K / QUAD][NR][QUAD] for those of vnni.inl. The scale of row n of W
// is max_k |W_nk| / 127. int8_panel is the size of one panel.
template <class P>
inline int64_t int8_panel(Packing packing, int64_t k) {
  return packing == Packing::int8_vnni ? round_up(k, QUAD) * Tile<P>::NR : panel_elements<P>(k);
}
template <class P>
inline int64_t int8_weight_size(Packing packing, int64_t n, int64_t k) {
  return padded_n<P>(n) * static_cast<int64_t>(sizeof(float)) +
         int8_panel<P>(packing, k) * divide_up(n, Tile<P>::NR);
}
template <class P>
inline PackedWeight<P> int8_weight(Packing packing, const void* packed, int64_t n, int64_t k) {
  const float* scales = static_cast<const float*>(packed);
  const bool vnni = packing == Packing::int8_vnni;
  return {vnni ? WeightFormat::int8_vnni : WeightFormat::int8, scales + padded_n<P>(n),
          int8_panel<P>(packing, k), scales};
}

// Writes elements [first, first + k) of a weight, divided by their scale and rounded to integers,
// to `units`. Returns the scale, the largest magnitude / 127, or NaN if an element is not finite.
inline float quantize_row(const Param& w, int64_t first, int64_t k, float* units) {
  VF largest = splat(0.0f), nan_if_not_finite = splat(0.0f);
  with_elements(w, [&](auto* data) {
    for_vectors(k, [&](int64_t j, auto part) {
      const VF x = load(data + first + j, part);
      largest = vmax(largest, vmax(x, -x));
      nan_if_not_finite += x - x;
      store(units + j, x, part);
    });
  });
  const float unit = max(largest) / 127.0f + sum(nan_if_not_finite),
              inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
  constexpr float shift = 0x1.8p23f;  // adding it rounds to an integer
  for_vectors(
      k, [&](int64_t j, auto part) { store(units + j, load(units + j, part) * inverse, part); });
  // A separate loop, so that the product is rounded before the addition: the bits are the same with
  // and without fused multiply-add.
  for_vectors(k, [&](int64_t j, auto part) {
    store(units + j, load(units + j, part) + shift - shift, part);
  });
  return unit;
}

// Packs the weight (N, K) as 8-bit integers with scales.
template <class P>
inline void pack_weight_bytes(Packing packing, const Param& w, int64_t n, int64_t k, void* packed,
                              const Parallel& parallel) {
  constexpr int NR = Tile<P>::NR;
  const PackedWeight<P> out = int8_weight<P>(packing, packed, n, k);
  run_tasks(parallel, divide_up(n, NR), [&](int64_t index) {
    const int64_t n0 = index * NR, rows = min(NR, n - n0);
    ScratchFrame frame;
    const int64_t ld = round_up(k, W);
    float* units = alloc<float>(frame, NR * ld);
    float* scales = const_cast<float*>(out.scales + n0);
    for (int64_t i = 0; i < rows; ++i) {
      scales[i] = quantize_row(w, (n0 + i) * k, k, units + i * ld);
      for (int64_t j = k; j < ld; ++j) units[i * ld + j] = 0.0f;
    }
    for (int64_t i = rows; i < NR; ++i) scales[i] = 0.0f;
    int8_t* bytes = static_cast<int8_t*>(const_cast<void*>(out.data)) + index * out.panel;
    if (packing == Packing::int8_vnni)
      return pack_quads(units, ld, k, rows, alloc<int8_t>(frame, ld), bytes);
    P* panel = alloc<P>(frame, out.panel);
    __builtin_memset(panel, 0, static_cast<size_t>(out.panel) * sizeof(P));
    pack_panel_transposed(units, ld, k, rows, panel);
    narrow_bytes(panel, out.panel, bytes);
  });
}

// Whether the panels of a dense weight for activations of type T store elements, of T, that are
// narrower than the products read: bf16 takes half the memory even where it is multiplied as float.
template <class T>
constexpr bool stored_narrower = sizeof(T) < sizeof(typename OperandOf<T>::type);

// Packs the weight (N, K) as W' in elements of T.
template <class T>
inline void pack_weight_dense(const Param& w, int64_t n, int64_t k, T* out,
                              const Parallel& parallel) {
  using P = typename OperandOf<T>::type;
  if constexpr (!stored_narrower<T>) {
    pack_weight_panels(w, n, k, out, parallel);
  } else {
    const int64_t size = panel_elements<P>(k);
    run_tasks(parallel, divide_up(n, Tile<P>::NR), [&](int64_t index) {
      ScratchFrame frame;
      P* panel = alloc<P>(frame, size);
      __builtin_memset(panel, 0, static_cast<size_t>(size) * sizeof(P));
      const int64_t n0 = index * Tile<P>::NR;
      with_elements(w, [&](auto* data) {
        pack_panel_transposed(data + n0 * k, k, k, min(Tile<P>::NR, n - n0), panel);
      });
      for (int64_t i = 0; i < size; i += W) store(out + index * size + i, load(panel + i), Full{});
    });
  }
}

// The weight (N, K) as the right-hand side W' (K, N), for the forward: as pack_weight stored it, or
// packed here into scratch memory.
template <class T, class P = typename OperandOf<T>::type>
inline PackedWeight<P> weight_transposed(const Weight& w, int64_t n, int64_t k, ScratchFrame& frame,
                                         const Parallel& parallel) {
  const int64_t panel = panel_elements<P>(k);
  if (w.packed && w.packing != Packing::dense) return int8_weight<P>(w.packing, w.packed, n, k);
  if (w.packed)
    return {stored_narrower<T> ? WeightFormat::bf16 : WeightFormat::dense, w.packed, panel};
  P* out = alloc<P>(frame, rhs_elements<P>(k, n));
  pack_weight_panels(w.param, n, k, out, parallel);
  return {WeightFormat::dense, out, panel};
}

// The weight (N, K) as the right-hand side W (N, K), for the gradient of the layer's input.
template <class P>
inline Rhs<P> weight_straight(const Weight& w, int64_t n, int64_t k, ScratchFrame& frame,
                              const Parallel& parallel) {
  constexpr int NR = Tile<P>::NR;
  P* out = alloc<P>(frame, rhs_elements<P>(n, k));
  const int64_t panel = panel_elements<P>(n);
  run_tasks(parallel, divide_up(k, NR), [&](int64_t p) {
    with_elements(w.param,
                  [&](auto* data) { pack_rows(data, k, n, k, p * NR, NR, out + p * panel); });
  });
  return {out, panel};
}

template <class T>
inline int64_t packed_weight_size(Packing packing, int64_t n, int64_t k) {
  using P = typename OperandOf<T>::type;
  return packing == Packing::dense ? rhs_elements<P>(k, n) * static_cast<int64_t>(sizeof(T))
                                   : int8_weight_size<P>(packing, n, k);
}
int64_t packed_weight_bytes(DType dtype, Packing packing, int64_t n, int64_t k) {
  return dtype == DType::f32 ? packed_weight_size<float>(packing, n, k)
                             : packed_weight_size<bf16>(packing, n, k);
}

template <class T>
inline void pack_weight_as(Packing packing, const Param& weight, int64_t n, int64_t k, void* packed,
                           const Parallel& parallel) {
  if (packing == Packing::dense)
    return pack_weight_dense(weight, n, k, static_cast<T*>(packed), parallel);
  pack_weight_bytes<typename OperandOf<T>::type>(packing, weight, n, k, packed, parallel);
}
void pack_weight(DType dtype, Packing packing, Param weight, int64_t n, int64_t k, void* packed,
                 const Parallel& parallel) {
  if (dtype == DType::f32) return pack_weight_as<float>(packing, weight, n, k, packed, parallel);
  pack_weight_as<bf16>(packing, weight, n, k, packed, parallel);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
