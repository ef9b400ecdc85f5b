// The kernels for AVX2 and FMA. Standard headers come first: only ours are compiled for it.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#pragma GCC target("arch=haswell")
// The compiler reads the file before it minds the pragma: its own macros do not tell.
#define CROSSENT_FMA
#define CROSSENT_F16C
#define CROSSENT_ISA avx2
#define CROSSENT_VECTOR_BYTES 32
#include "isa.h"

const crossent::Kernels crossent::kAvx2 = crossent::CROSSENT_ISA::kernels_called("avx2");

#endif
