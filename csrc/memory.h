// Memory for results, in large pages where it is large; that of a large gradient is taken again.
#pragma once

#include <vector>

#include "tensors.h"

// Fresh memory of a CPU; in large pages from 4 MiB on: for small ones, the system clears page after
// page.
Tensor fresh(const std::vector<int64_t>& shape, ScalarType dtype);

// The same for what does not stay: from 4 MiB on it is ours. Freed, its pages go back to the system
// lazily, and what is next of that size finds them warm if nobody wanted them in the meantime.
// torch cannot resize it.
Tensor passing(const std::vector<int64_t>& shape, ScalarType dtype);

// The same for a gradient, laid out as `like`.
Tensor gradient_like(const Tensor& like);

// Gives the pages of what has been freed back at once; returns how many bytes these were.
int64_t empty_cache();
