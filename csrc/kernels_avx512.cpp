// The kernels for AVX-512. Standard headers come first: only ours are compiled for it.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
// The compiler reads the file before it minds the pragma: its own macros do not tell.
#define CROSSENT_FMA
#define CROSSENT_F16C
#define CROSSENT_ISA avx512
#define CROSSENT_VECTOR_BYTES 64
#include "isa.h"

const crossent::Kernels crossent::kAvx512 = crossent::CROSSENT_ISA::kernels_called("avx512");

#endif
