// The kernels for whatever the compiler takes as its baseline: SSE2, NEON, ...
#define CROSSENT_ISA portable
#define CROSSENT_TABLE kPortable
#define CROSSENT_VECTOR_BYTES 16
#include "kernel_table.h"
