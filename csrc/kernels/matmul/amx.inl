// The bf16 product on AMX tiles (Intel SDM, TDPBF16PS). One step adds the products of two tiles of
// A (16 rows x 32 elements) and two of B (16 pairs x 16 columns) to a 2 x 2 block of 16 x 16 fp32
// tiles of C. Tile registers 0-3 hold C, 4-5 A and 6-7 B.
#pragma once

#include "../simd/vec.inl"
#include "epilogue.inl"
#include "layout.inl"
#include "prefetch.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The operand of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

#if GPTFAST_AMX_EMULATED
// Emulates the tiles in memory, to test the code around them on a processor without AMX.
thread_local TileConfig emulated_config;
thread_local float emulated_tile[8][16][16];

inline void tile_configure(const TileConfig& config) { emulated_config = config; }
inline void tile_release() { emulated_config = {}; }
template <int T>
inline void tile_zero() {
  __builtin_memset(emulated_tile[T], 0, sizeof emulated_tile[T]);
}
template <int T>
inline void tile_load(const void* p, int64_t stride_bytes) {
  tile_zero<T>();
  for (int i = 0; i < emulated_config.rows[T]; ++i)
    __builtin_memcpy(emulated_tile[T][i], static_cast<const char*>(p) + i * stride_bytes,
                     emulated_config.column_bytes[T]);
}
template <int T>
inline void tile_store(void* p, int64_t stride_bytes) {
  for (int i = 0; i < emulated_config.rows[T]; ++i)
    __builtin_memcpy(static_cast<char*>(p) + i * stride_bytes, emulated_tile[T][i],
                     emulated_config.column_bytes[T]);
}
// One of the two bf16 numbers in 32 bits, as fp32; half 0 is the lower one.
inline float bf16_of(float pair, int half) {
  uint32_t u;
  __builtin_memcpy(&u, &pair, sizeof u);
  u = half ? u & 0xffff0000u : u << 16;
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}
template <int C, int A, int B>
inline void tile_dot() {
  for (int i = 0; i < emulated_config.rows[C]; ++i)
    for (int u = 0; u < emulated_config.column_bytes[A] / 4; ++u)
      for (int j = 0; j < emulated_config.column_bytes[C] / 4; ++j)
        for (int half = 0; half < 2; ++half)
          emulated_tile[C][i][j] +=
              bf16_of(emulated_tile[A][i][u], half) * bf16_of(emulated_tile[B][u][j], half);
}
#else
// Inline assembly instead of intrinsics: those of g++ 12 require literal tile numbers and declare
// that only 8 bytes of the configuration are read, so that g++ may drop the stores to its rest.
inline void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void tile_release() { asm volatile("tilerelease" : : : "memory"); }
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#endif

// The configuration for a block of C with 16 rows in its upper tiles and `lower` (0 to 16) in its
// lower ones, or with `upper` < 16 rows and no lower tiles (lower <= 0).
inline TileConfig tile_config(int64_t upper, int64_t lower) {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    const bool is_b = t >= 6, is_lower = t == 2 || t == 3 || t == 5;
    config.column_bytes[t] = 64;
    config.rows[t] = static_cast<uint8_t>(is_b ? 16 : is_lower ? max(lower, 1) : upper);
  }
  return config;
}

// One block of C = or += A B: LOWER and RIGHT say whether it has lower and right tiles.
template <bool LOWER, bool RIGHT>
inline void tile_block(int64_t k, Lhs<bf16> a, const bf16* b, float* c, int64_t ldc, bool add) {
  constexpr int64_t b_stride = Tile<bf16>::NR * 2 * sizeof(bf16), right = W * 2;
  const int64_t a_stride = a.row * sizeof(bf16), c_stride = ldc * sizeof(float);
  float* const c_lower = c + 16 * ldc;
  if (add) {
    tile_load<0>(c, c_stride);
    if (RIGHT) tile_load<1>(c + W, c_stride);
    if (LOWER) tile_load<2>(c_lower, c_stride);
    if (LOWER && RIGHT) tile_load<3>(c_lower + W, c_stride);
  } else {
    tile_zero<0>();
    if (RIGHT) tile_zero<1>();
    if (LOWER) tile_zero<2>();
    if (LOWER && RIGHT) tile_zero<3>();
  }
  for (int64_t k0 = 0; k0 < k; k0 += 32, b += 32 * Tile<bf16>::NR) {
    tile_load<4>(a.data + k0, a_stride);
    tile_load<6>(b, b_stride);
    tile_dot<0, 4, 6>();
    if (RIGHT) tile_load<7>(b + right, b_stride);
    if (RIGHT) tile_dot<1, 4, 7>();
    if (LOWER) tile_load<5>(a.data + 16 * a.row + k0, a_stride);
    if (LOWER) tile_dot<2, 5, 6>();
    if (LOWER && RIGHT) tile_dot<3, 5, 7>();
  }
  tile_store<0>(c, c_stride);
  if (RIGHT) tile_store<1>(c + W, c_stride);
  if (LOWER) tile_store<2>(c_lower, c_stride);
  if (LOWER && RIGHT) tile_store<3>(c_lower + W, c_stride);
}

// Computes rows [m0, m0 + rows), rows <= 32, of C in every panel.
template <class Done>
inline void tile_rows(int64_t m0, int64_t rows, int64_t n, int64_t k, Lhs<bf16> a, Rhs<bf16> b,
                      float* c, int64_t ldc, bool add, const Done& done) {
  for (int64_t n0 = 0; n0 < n; n0 += Tile<bf16>::NR) {
    const int64_t columns = min(Tile<bf16>::NR, n - n0);
    const bool right = columns > W;
    const auto block = rows > 16 ? (right ? tile_block<true, true> : tile_block<true, false>)
                                 : (right ? tile_block<false, true> : tile_block<false, false>);
    fetch_for(done, m0, rows, n0, columns);
    block(k, a.rows(m0), b.columns(n0).data, c + m0 * ldc + n0, ldc, add);
    done(m0, rows, n0, columns);
  }
}

// gemm() of gemm.inl on tiles. Its loops do not prefetch for later ones, so it ignores the
// PrefetchQueue.
template <class Done = NoEpilogue>
inline void gemm(int64_t m, int64_t n, int64_t k, const Lhs<bf16>& a, Rhs<bf16> b, float* c,
                 int64_t ldc, bool add, const Done& done = {}, PrefetchQueue* = nullptr) {
  constexpr int MR = Tile<bf16>::MR;
  const int64_t full = m / MR * MR, rest = m - full, padded = padded_k<bf16>(k);
  if (full > 0) {
    tile_configure(tile_config(16, 16));
    for (int64_t m0 = 0; m0 < full; m0 += MR) tile_rows(m0, MR, n, padded, a, b, c, ldc, add, done);
  }
  if (rest > 0) {
    tile_configure(tile_config(min(rest, 16), rest - 16));
    tile_rows(full, rest, n, padded, a, b, c, ldc, add, done);
  }
  tile_release();
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
