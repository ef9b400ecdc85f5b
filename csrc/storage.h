// Numbers as they are stored: blocks of logits in, blocks of gradients out. Torch-free.
#pragma once

#include "float16.h"
#include "problem.h"
#include "vec.h"

namespace crossent::CROSSENT_ISA {

// Runs of float16, eight at a time where the machine converts them.
#ifdef CROSSENT_F16C
typedef short Halves __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(32)));
#endif
CROSSENT_INLINE void from_float16_run(const uint16_t* p, int n, float* out) {
  int i = 0;
#ifdef CROSSENT_F16C
  for (; i + 8 <= n; i += 8) {
    Halves h;
    std::memcpy(&h, p + i, sizeof h);
    const Floats f = __builtin_ia32_vcvtph2ps256(h);
    std::memcpy(out + i, &f, sizeof f);
  }
#endif
  for (; i < n; ++i) out[i] = from_float16(p[i]);
}
CROSSENT_INLINE void to_float16_run(const float* in, int n, uint16_t* p) {
  int i = 0;
#ifdef CROSSENT_F16C
  for (; i + 8 <= n; i += 8) {
    Floats f;
    std::memcpy(&f, in + i, sizeof f);
    const Halves h = __builtin_ia32_vcvtps2ph256(f, 0);  // nearest, ties to even
    std::memcpy(p + i, &h, sizeof h);
  }
#endif
  for (; i < n; ++i) p[i] = to_float16(in[i]);
}

// A run of classes: n elements of a stored dtype, `stride` elements apart, into `out`.
// Returns where they are: `out`, or the source itself where that is as good.
template <class T>
CROSSENT_INLINE const T* read(const void* source, Dtype dtype, int64_t stride, int n, T* out) {
  const auto each = [&](auto* p, auto convert) CROSSENT_INLINE_LAMBDA {
    if (stride == 1)
      for (int i = 0; i < n; ++i) out[i] = T(convert(p[i]));
    else
      for (int i = 0; i < n; ++i) out[i] = T(convert(p[i * stride]));
  };
  const auto same = [](auto x) CROSSENT_INLINE_LAMBDA { return x; };
  switch (dtype) {
    case Dtype::kFloat32:
      if (sizeof(T) == 4 && stride == 1) return static_cast<const T*>(source);
      each(static_cast<const float*>(source), same);
      break;
    case Dtype::kFloat64:
      if (sizeof(T) == 8 && stride == 1) return static_cast<const T*>(source);
      each(static_cast<const double*>(source), same);
      break;
    case Dtype::kBFloat16:
      each(static_cast<const uint16_t*>(source),
           [](uint16_t h) CROSSENT_INLINE_LAMBDA { return from_bfloat16(h); });
      break;
    case Dtype::kFloat16:
      if constexpr (sizeof(T) == 4)
        if (stride == 1) return from_float16_run(static_cast<const uint16_t*>(source), n, out), out;
      each(static_cast<const uint16_t*>(source),
           [](uint16_t h) CROSSENT_INLINE_LAMBDA { return from_float16(h); });
      break;
  }
  return out;
}

// The reverse: n elements of a gradient to where they belong, rounded once.
template <class T>
CROSSENT_INLINE void write(void* target, Dtype dtype, int64_t stride, int n, const T* in) {
  const auto each = [&](auto* p, auto convert) CROSSENT_INLINE_LAMBDA {
    if (stride == 1)
      for (int i = 0; i < n; ++i) p[i] = convert(in[i]);
    else
      for (int i = 0; i < n; ++i) p[i * stride] = convert(in[i]);
  };
  switch (dtype) {
    case Dtype::kFloat32:
      each(static_cast<float*>(target), [](T x) CROSSENT_INLINE_LAMBDA { return float(x); });
      break;
    case Dtype::kFloat64:
      each(static_cast<double*>(target), [](T x) CROSSENT_INLINE_LAMBDA { return double(x); });
      break;
    case Dtype::kBFloat16:
      each(static_cast<uint16_t*>(target),
           [](T x) CROSSENT_INLINE_LAMBDA { return to_bfloat16(float(x)); });
      break;
    case Dtype::kFloat16:
      if constexpr (sizeof(T) == 4)
        if (stride == 1) return to_float16_run(in, n, static_cast<uint16_t*>(target));
      each(static_cast<uint16_t*>(target),
           [](T x) CROSSENT_INLINE_LAMBDA { return to_float16(float(x)); });
      break;
  }
}

}  // namespace crossent::CROSSENT_ISA
