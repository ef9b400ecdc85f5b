// Memory for results, in large pages where it is large; that of a large gradient is taken again.
#pragma once

#include <vector>

#include "tensors.h"

// Fresh memory where `like` is; in large pages from 4 MiB on: for small ones, the system clears
// page after page.
Tensor fresh(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);

// Memory for a gradient, laid out as `like`. From 4 MiB on it is ours: freed, its pages go back to
// the system lazily, and the next gradient of that size finds them warm if nobody wanted them in
// the meantime.
Tensor gradient_like(const Tensor& like);

// Asks for large pages under memory that has not been touched.
void advise_huge_pages(const Tensor& t);

// Gives the pages of freed gradients back at once; returns how many bytes these were.
int64_t empty_cache();
