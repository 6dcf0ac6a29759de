// All kernels for one instruction set. Each isa_<level>.cpp sets the macros below, includes this
// file once, and is compiled with that level's flags:
//
//   GPTFAST_LEVEL          the level's name, as in kernels_<level>()
//   GPTFAST_VECTOR_BYTES   16, 32 or 64
//   GPTFAST_BF16_DOT       1 where bf16 is multiplied as bf16
//   GPTFAST_AMX            1 where that is done on AMX tiles
//
// Everything is in an anonymous namespace and nothing is a template of the standard library: a
// function that the linker could merge with another level's would carry that level's instructions
// into it.

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Whether there are products of 8-bit weights in whole numbers, for the processors of this level
// that have them; tiles do without.
#if GPTFAST_VECTOR_BYTES >= 32 && !GPTFAST_AMX && __has_include(<avxvnniintrin.h>)
#define GPTFAST_VNNI 1
#else
#define GPTFAST_VNNI 0
#endif

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace gptfast {
namespace {

#include "vec.inl"
#include "random.inl"
#include "pack.inl"
#include "gemm.inl"
#if GPTFAST_AMX
#include "amx.inl"
#endif
#include "rows.inl"
#include "gemm_masked.inl"
#include "gemm_vnni.inl"
#include "gemm_bytes.inl"
#include "gemm_in_place.inl"
#include "weights.inl"
#include "weight_grad.inl"
#include "linear.inl"
#include "ffn.inl"
#include "heads.inl"
#include "attention_few.inl"
#include "attention.inl"
#include "cached_heads.inl"
#include "attention_cached.inl"
#include "attention_grad.inl"
#include "cross_entropy.inl"
#include "embedding.inl"
#include "adamw.inl"
#include "sampling.inl"

#define GPTFAST_STRING_(x) #x
#define GPTFAST_STRING(x) GPTFAST_STRING_(x)
#define GPTFAST_JOIN_(a, b) a##b
#define GPTFAST_JOIN(a, b) GPTFAST_JOIN_(a, b)

constexpr Kernels table = {
    GPTFAST_STRING(GPTFAST_LEVEL),
    attention,
    attention_grad,
    linear,
    linear_grad,
    ffn,
    ffn_grad,
    cross_entropy,
    embedding,
    embedding_grad,
    adamw,
    attention_cached,
    cache_bytes,
    copy_cached,
    sample,
    logprob,
    packed_weight_bytes,
    pack_weight,
    GPTFAST_VNNI,
};

}  // namespace

const Kernels* GPTFAST_JOIN(kernels_, GPTFAST_LEVEL)() { return &table; }

}  // namespace gptfast
