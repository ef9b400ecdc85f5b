// The kernels for whatever the compiler takes as its baseline: SSE2, NEON, ...
#define CROSSENT_ISA portable
#define CROSSENT_VECTOR_BYTES 16

#include "isa.h"

const crossent::Kernels crossent::kPortable = crossent::CROSSENT_ISA::kernels_called("portable");
