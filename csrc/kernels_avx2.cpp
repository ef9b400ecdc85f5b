// The kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
#define CROSSENT_ISA avx2
#define CROSSENT_TABLE kAvx2
#define CROSSENT_VECTOR_BYTES 32
#include "kernel_table.h"
#endif
