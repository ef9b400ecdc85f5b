// The kernels for AVX-512.
#if defined(__x86_64__)
#define CROSSENT_ISA avx512
#define CROSSENT_TABLE kAvx512
#define CROSSENT_VECTOR_BYTES 64
#include "kernel_table.h"
#endif
