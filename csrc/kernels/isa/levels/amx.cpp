#define GPTFAST_LEVEL amx
#define GPTFAST_VECTOR_BYTES 64
#define GPTFAST_BF16_DOT 1
#define GPTFAST_AMX 1
#include "../../kernels.inl"
