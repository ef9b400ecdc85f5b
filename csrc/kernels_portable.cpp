// The kernels for whatever the compiler takes as its baseline: SSE2, NEON, ...
#define CROSSENT_ISA portable
#define CROSSENT_VECTOR_BYTES 16

#include "lanes.h"
#include "standing.h"

namespace crossent {
const Kernels kPortable = {"portable",
                       CROSSENT_ISA::forward_rows<float>,
                       CROSSENT_ISA::forward_rows<double>,
                       CROSSENT_ISA::backward_rows<float>,
                       CROSSENT_ISA::backward_rows<double>,
                       CROSSENT_ISA::standing_rows<float>,
                       CROSSENT_ISA::standing_rows<double>};
}
