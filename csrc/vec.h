// Vectors of a fixed number of lanes, and exp on them. No torch, no intrinsics: the compiler lowers
// the vector types to what the instruction set of the including file has (CROSSENT_ISA names it).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "problem.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are never passed between files

namespace crossent::CROSSENT_ISA {

template <class T>
struct Vec;
template <>
struct Vec<float> {
  typedef float V __attribute__((vector_size(CROSSENT_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(CROSSENT_VECTOR_BYTES)));
};
template <>
struct Vec<double> {
  typedef double V __attribute__((vector_size(CROSSENT_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(CROSSENT_VECTOR_BYTES)));
};
template <class T>
using V = typename Vec<T>::V;
template <class T>
using I = typename Vec<T>::I;
template <class T>
constexpr int kLanes = CROSSENT_VECTOR_BYTES / sizeof(T);

template <class T>
CROSSENT_INLINE V<T> load(const T* p) {
  V<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// The first n lanes from memory, the others hold `fill`.
template <class T>
CROSSENT_INLINE V<T> load(const T* p, int n, T fill) {
  V<T> v = fill - V<T>{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}
template <class T>
CROSSENT_INLINE void store(T* p, V<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
CROSSENT_INLINE void store(T* p, int n, V<T> v) {
  std::memcpy(p, &v, n * sizeof(T));
}
template <class T>
CROSSENT_INLINE V<T> splat(T x) {
  return x - V<T>{};
}
template <class To, class From>
CROSSENT_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
// Sums of lanes in a fixed order, in double.
template <class T>
CROSSENT_INLINE double sum_lanes(V<T> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kBias = 127, kMantissa = 23;
  static constexpr float kLow = -104.0f;  // exp of it rounds to 0, subnormals included
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
};
template <>
struct ExpConstants<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kBias = 1023, kMantissa = 52;
  static constexpr double kLow = -746.0;
  static constexpr double kLn2Hi = 6.93145751953125e-1, kLn2Lo = 1.42860682030941723212e-6;
};

// exp(r) for |r| <= 0.35. Error < 1 ulp.
CROSSENT_INLINE V<float> exp_reduced(V<float> r) {
  V<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r) + 1.0f;
}
CROSSENT_INLINE V<double> exp_reduced(V<double> r) {  // Taylor; the next term is 4e-18
  V<double> p = splat(1.0 / 6227020800.0);
  constexpr double kFactorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                    720.0,       120.0,      24.0,      6.0,      2.0};
  for (double f : kFactorials) p = p * r + 1.0 / f;
  return (p * r * r + r) + 1.0;
}

// exp(d + err) for kLow <= d <= 0 and |err| < 2^-17: what rounding took from d.
// Error < 2 ulp, subnormal results included (the power of two is applied in two halves).
template <class T>
CROSSENT_INLINE V<T> exp_compensated(V<T> d, V<T> err) {
  using C = ExpConstants<T>;
  const V<T> shifted = d * T(1.4426950408889634) + C::kMagic;
  const V<T> n = shifted - C::kMagic;
  V<T> r = d - n * C::kLn2Hi;
  r = r - n * C::kLn2Lo;
  r = r + err;
  const I<T> k = bits<I<T>>(shifted) - bits<I<T>>(splat(C::kMagic));
  const I<T> half = k >> 1;
  const V<T> a = bits<V<T>>((half + C::kBias) << C::kMantissa);
  const V<T> b = bits<V<T>>((k - half + C::kBias) << C::kMantissa);
  return exp_reduced(r) * a * b;
}

// exp(z - m) for z <= m with m finite; 0 for -inf. Error < 2 ulp: the rounding error of the
// difference (Knuth's two-sum) goes into the reduced argument.
template <class T>
CROSSENT_INLINE V<T> exp_difference(V<T> z, V<T> m) {
  const V<T> low = m + ExpConstants<T>::kLow;
  const V<T> c = z > low ? z : low;
  const V<T> d = c - m;
  const V<T> minus_m = d - c;
  const V<T> err = (c - (d - minus_m)) - (m + minus_m);
  const V<T> e = exp_compensated<T>(d, err);
  return z < low ? V<T>{} : e;
}

// exp(x) for x <= 0; used where x itself is exact.
template <class T>
CROSSENT_INLINE V<T> exp_nonpositive(V<T> x) {
  const V<T> low = splat(ExpConstants<T>::kLow);
  return exp_compensated<T>(x > low ? x : low, V<T>{});
}

// tanh(x); nan for nan. Absolute error < 2^-23, relative < 2^-22.
CROSSENT_INLINE V<float> tanh_(V<float> x) {
  const V<float> a = x < 0.0f ? -x : x;
  const V<float> e = exp_nonpositive<float>(-2.0f * a);
  const V<float> far = (1.0f - e) / (1.0f + e);
  const V<float> s = x * x;
  V<float> p = splat(62.0f / 2835.0f);
  p = p * s - 17.0f / 315.0f;
  p = p * s + 2.0f / 15.0f;
  p = p * s - 1.0f / 3.0f;
  const V<float> near = x + x * s * p;
  const V<float> t = a < 0.25f ? near : (x < 0.0f ? -far : far);
  return x == x ? t : x;
}
CROSSENT_INLINE V<double> tanh_(V<double> x) {
  V<double> t;
  for (int i = 0; i < kLanes<double>; ++i) t[i] = std::tanh(x[i]);
  return t;
}

}  // namespace crossent::CROSSENT_ISA
