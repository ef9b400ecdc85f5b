// log1p of a number, or of one in each lane of a vector. Torch-free.
#pragma once

#include <cmath>

#include "vec.h"

namespace crossent::CROSSENT_ISA {

CROSSENT_INLINE double to_double(int64_t x) { return double(x); }
CROSSENT_INLINE V<double> to_double(I<double> x) { return __builtin_convertvector(x, V<double>); }

// log1p(x) for x >= 0, or nan; X is double, or a vector of doubles, and Int the integers of its
// size. Error < 2^-26, without a call: through log(u) = e ln 2 + 2 atanh(f / (2 + f)) for
// u = 1 + x = 2^e (1 + f), and x - x^2 / 2 where u would lose digits of x.
template <class X, class Int>
CROSSENT_INLINE X log1p_polynomial(X x) {
  const X u = x + 1.0;
  const Int raw = bits<Int>(u), e = (raw - int64_t(0x3fe6a09e667f3bcd)) >> 52;
  const X f = bits<X>(raw - (e << 52)) - 1.0;
  const X s = f / (f + 2.0), q = s * s;
  X p = X{} + 2.0 / 13;
  p = p * q + 2.0 / 11;
  p = p * q + 2.0 / 9;
  p = p * q + 2.0 / 7;
  p = p * q + 2.0 / 5;
  p = p * q + 2.0 / 3;
  const X log = to_double(e) * 0.69314718055994530942 + (s * 2.0 + s * q * p);
  const X near_zero = x - x * 0.5 * x;
  const X result = x < 0x1p-26 ? near_zero : log;
  return x != x ? x : result;
}

// The first argument says what is computed in: in float, as above; in double, the C library's.
CROSSENT_INLINE double log1p_(float, double x) { return log1p_polynomial<double, int64_t>(x); }
CROSSENT_INLINE double log1p_(double, double x) { return std::log1p(x); }

// The same for as many numbers as a vector has lanes.
CROSSENT_INLINE void log1p_lanes(float, const double* x, double* out) {
  for (int i = 0; i < kLanes<float>; i += kLanes<double>)
    store(out + i, log1p_polynomial<V<double>, I<double>>(load(x + i)));
}
CROSSENT_INLINE void log1p_lanes(double, const double* x, double* out) {
  for (int l = 0; l < kLanes<double>; ++l) out[l] = std::log1p(x[l]);
}

}  // namespace crossent::CROSSENT_ISA
