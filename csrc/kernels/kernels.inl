// The table of all kernels for one instruction-set level. Each isa/levels/<level>.cpp sets the
// macros that simd/vec.inl lists, includes this file, and is compiled with that level's flags.
//
// Every kernel is in an anonymous namespace within its level's namespace, and no template of the
// standard library is used: the linker could merge a shared function's copies from two levels, and
// the lower level would then execute instructions of the higher one.
#pragma once

#include "attention/attention.inl"
#include "attention/cache.inl"
#include "attention/cached.inl"
#include "kernels.h"
#include "layers/adamw.inl"
#include "layers/cross_entropy.inl"
#include "layers/embedding.inl"
#include "layers/ffn.inl"
#include "layers/linear.inl"
#include "layers/sampling.inl"
#include "matmul/vnni.inl"
#include "matmul/weights.inl"

#define GPTFAST_STRING_(x) #x
#define GPTFAST_STRING(x) GPTFAST_STRING_(x)
#define GPTFAST_JOIN_(a, b) a##b
#define GPTFAST_JOIN(a, b) GPTFAST_JOIN_(a, b)

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr Kernels table = {
    GPTFAST_STRING(GPTFAST_LEVEL),
    attention,
    attention_backward,
    linear,
    linear_backward,
    ffn,
    ffn_backward,
    cross_entropy,
    embedding,
    embedding_backward,
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
}  // namespace gptfast::GPTFAST_LEVEL

namespace gptfast {

const Kernels* GPTFAST_JOIN(kernels_, GPTFAST_LEVEL)() { return &GPTFAST_LEVEL::table; }

}  // namespace gptfast
