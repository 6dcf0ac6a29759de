#define GPTFAST_LEVEL avx512_bf16
#define GPTFAST_VECTOR_BYTES 64
#define GPTFAST_BF16_DOT 1
#define GPTFAST_AMX 0
#include "../../kernels.inl"
