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
#include "lanes.h"
#include "standing.h"

namespace crossent {
const Kernels kAvx512 = {"avx512",
                       CROSSENT_ISA::forward_rows<float>,
                       CROSSENT_ISA::forward_rows<double>,
                       CROSSENT_ISA::backward_rows<float>,
                       CROSSENT_ISA::backward_rows<double>,
                       CROSSENT_ISA::standing_rows<float>,
                       CROSSENT_ISA::standing_rows<double>};
}

#endif
