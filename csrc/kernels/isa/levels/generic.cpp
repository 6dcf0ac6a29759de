#define GPTFAST_LEVEL generic
#define GPTFAST_VECTOR_BYTES 16
#define GPTFAST_BF16_DOT 0
#define GPTFAST_AMX 0
#include "../../kernels.inl"
