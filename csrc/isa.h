// Everything that is compiled once for each instruction set, and the table of it. Torch-free.
#pragma once

#include "lanes.h"
#include "standing.h"

namespace crossent::CROSSENT_ISA {

constexpr Kernels kernels_called(const char* name) {
  return {name,
          forward_rows<float>,
          forward_rows<double>,
          backward_rows<float>,
          backward_rows<double>,
          standing_rows<float>,
          standing_rows<double>};
}

}  // namespace crossent::CROSSENT_ISA
