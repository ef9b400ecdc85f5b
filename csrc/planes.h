// Classes in planes (images: N, C, H, W), a few rows of all planes at a time. Torch-free.
//
// Planes lie as far apart as an image is large, often a multiple of the size of the cache's ways:
// then the rows of a tile fall into the same few lines of it, and what has been fetched ahead is
// thrown out before it is read. So some rows of each plane are copied next to each other first.
#pragma once

#include "row_kernels.h"

namespace crossent::CROSSENT_ISA {

constexpr int kPlanesBytes = 24 << 10;  // half of the first cache
constexpr int kFarApart = 4096;         // bytes between planes that fall into the same lines

template <class T>
CROSSENT_INLINE bool in_far_planes(const Tensor2& t, int64_t classes) {
  const int64_t apart = t.class_stride * item_size(t.dtype);
  const int64_t tile = classes * item_size(t.dtype) * kLanes<T>;
  return t.class_stride > 1 && apart % kFarApart == 0 && tile <= kPlanesBytes;
}

// Some rows of all classes, next to each other; they stand for those of a tensor.
struct Planes {
  alignas(64) char data[kPlanesBytes];
  Tensor2 tensor;

  CROSSENT_INLINE Planes(const Tensor2& like, int64_t row, int count) : tensor(like) {
    tensor.class_stride = count;
    tensor.rows.rank = 1, tensor.rows.stride[0] = 1;
    tensor.data = data - row * item_size(like.dtype);
  }
  // Between here and the memory of `t`, whose rows from `row` on are next to each other.
  CROSSENT_INLINE void read(const Tensor2& t, int64_t row, int count, int64_t classes) {
    const int64_t bytes = int64_t(count) * item_size(t.dtype);
    for (int64_t c = 0; c < classes; ++c) std::memcpy(data + c * bytes, t.at(row, c), bytes);
  }
  CROSSENT_INLINE void write(const Tensor2& t, int64_t row, int count, int64_t classes) const {
    const int64_t bytes = int64_t(count) * item_size(t.dtype);
    for (int64_t c = 0; c < classes; ++c) std::memcpy(t.at(row, c), data + c * bytes, bytes);
  }
};

// Runs f on the rows of a problem, a few rows of all planes at a time where that is better; with
// `differentiate`, f writes gradients.
template <class T, class F>
CROSSENT_INLINE void by_planes(const Problem<T>& p, int64_t begin, int64_t end, bool differentiate,
                               F f) {
  if (!in_far_planes<T>(p.logits, p.classes)) return f(p, begin, end);
  const int64_t most = kPlanesBytes / (p.classes * item_size(p.logits.dtype));
  const int rows = int(most / kLanes<T> * kLanes<T>);
  for (int64_t r = begin; r < end;) {
    int64_t step, out_step = 1;
    const int left = int(end - r < rows ? end - r : rows);
    int count = p.logits.rows.run(r, left, &step);
    if (differentiate) count = p.gradient.rows.run(r, count, &out_step);
    if (step != 1 || out_step != 1) {
      f(p, r, r + count);
    } else {
      Planes logits(p.logits, r, count), gradient(p.gradient, r, count);
      logits.read(p.logits, r, count, p.classes);
      Problem<T> part = p;
      part.logits = logits.tensor;
      if (differentiate) part.gradient = gradient.tensor;
      f(part, r, r + count);
      if (differentiate) gradient.write(p.gradient, r, count, p.classes);
    }
    r += count;
  }
}

}  // namespace crossent::CROSSENT_ISA
