// The loss and its gradient in one pass: a row is read from memory once. Torch-free.
#pragma once

#include "tile_kernels.h"

namespace crossent::CROSSENT_ISA {

template <class T>
void pass_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  if (side_by_side(p, kBackwardLanes))
    for (int64_t r = begin; r < end; r += kLanes<T>) {
      const int count = int(end - r < kLanes<T> ? end - r : kLanes<T>);
      forward_tile(p, r, count), backward_tile(p, r, count);
    }
  else
    for (int64_t r = begin; r < end; ++r) forward_row(p, r), backward_row(p, r);
}

}  // namespace crossent::CROSSENT_ISA
