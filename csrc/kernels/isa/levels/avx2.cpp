#define GPTFAST_LEVEL avx2
#define GPTFAST_VECTOR_BYTES 32
#define GPTFAST_BF16_DOT 0
#define GPTFAST_AMX 0
#include "../../kernels.inl"
