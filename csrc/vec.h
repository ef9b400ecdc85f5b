// Vectors of a fixed number of lanes, and exp on them. No torch, no intrinsics: the compiler lowers
// the vector types to what the instruction set of the including file has (CROSSENT_ISA names it).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

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
// The last n % lanes of n numbers: in the last lanes of the vector that ends with them, or in the
// first ones where n < lanes. The other lanes are `outside`, and hold `fill`.
template <class T>
CROSSENT_INLINE I<T> outside_tail(int n) {
  constexpr int L = kLanes<T>;
  I<T> lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  return n < L ? lane >= n : lane < L - n % L;
}
template <class T>
CROSSENT_INLINE V<T> load_tail(const T* p, int n, T fill) {
  if (n < kLanes<T>) return load(p, n, fill);
  return outside_tail<T>(n) ? splat(fill) : load(p + n - kLanes<T>);
}
// What belongs at i of n numbers, from a vector that load has filled, or load_tail.
template <class T>
CROSSENT_INLINE void store_tail(T* p, int i, int n, V<T> v) {
  constexpr int L = kLanes<T>;
  if (i + L <= n) return store(p + i, v);
  alignas(64) T lanes[L];
  store(lanes, v);
  std::memcpy(p + i, n < L ? lanes : lanes + L - (n - i), (n - i) * sizeof(T));
}

// What sums of many T are kept in: more digits than T has, and a wider range. (Where long double is
// double, sums of doubles over more than one block have the rounding of doubles.)
template <class T>
using Accumulator = std::conditional_t<sizeof(T) == 4, double, long double>;

// A sum for every lane, and what rounding took from it (Knuth's two-sum): as exact as its terms.
// Where the sum is infinite, nan.
template <class T>
struct LaneSum {
  V<T> sum{}, lost{};

  CROSSENT_INLINE void add(V<T> x) {
    const V<T> next = sum + x, part = next - sum;
    lost += (sum - (next - part)) + (x - part);
    sum = next;
  }
  // Four terms pairwise: each of them is rounded twice, and terms that are equal are not rounded at
  // all.
  CROSSENT_INLINE void add(const V<T>* x) { add((x[0] + x[1]) + (x[2] + x[3])); }

  CROSSENT_INLINE Accumulator<T> operator[](int l) const {
    return Accumulator<T>(sum[l]) + Accumulator<T>(lost[l]);
  }
  // The sum of all lanes, in a fixed order.
  CROSSENT_INLINE Accumulator<T> total() const {
    Accumulator<T> all = 0;
    for (int l = 0; l < kLanes<T>; ++l) all += (*this)[l];
    return all;
  }
};

// exp comes out times kScale, a power of two, so that nothing on the way is subnormal: where the
// sum of a row is tiny, all of its digits are there. kLow is so far down that exp of it, unscaled,
// is 0. From abs(m) > kFar on, z - m is exact wherever it is above kLow (Sterbenz: z and m are that
// much alike).
template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr int kMantissa = 23, kShift = 64;
  static constexpr float kScale = 0x1p64f, kUnscale = 0x1p-64f;
  static constexpr float kMagic = 12582912.0f + kShift;  // 1.5 * 2^23: adding it rounds to integers
  static constexpr float kLow = -130.0f, kFar = 0x1p20f;
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
};
template <>
struct Exp<double> {
  static constexpr int kMantissa = 52, kShift = 256;
  static constexpr double kScale = 0x1p256, kUnscale = 0x1p-256;
  static constexpr double kMagic = 6755399441055744.0 + kShift;  // 1.5 * 2^52
  static constexpr double kLow = -850.0, kFar = 0x1p50;
  static constexpr double kLn2Hi = 6.93145751953125e-1, kLn2Lo = 1.42860682030941723212e-6;
};

// p * 2^n, where `shifted` is n + kMagic: its low bits are n + kShift, added to the exponent of p.
template <class T>
CROSSENT_INLINE V<T> scale_by(V<T> p, V<T> shifted) {
  return bits<V<T>>(bits<I<T>>(p) + (bits<I<T>>(shifted) << Exp<T>::kMantissa));
}

// 2^f for abs(f) <= 0.51. Error < 1 ulp. (Coefficients: Cephes.)
CROSSENT_INLINE V<float> exp2_reduced(V<float> f) {
  V<float> p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.0f;
}
// exp(r) for abs(r) <= 0.35. Error < 1 ulp. (Taylor; the next term is 4e-18.)
CROSSENT_INLINE V<double> exp_reduced(V<double> r) {
  V<double> p = splat(1.0 / 6227020800.0);
  constexpr double kFactorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                    720.0,       120.0,      24.0,      6.0,      2.0};
  for (double f : kFactorials) p = p * r + 1.0 / f;
  return (p * r * r + r) + 1.0;
}
CROSSENT_INLINE V<float> exp_reduced(V<float> r) {  // Cephes
  V<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r) + 1.0f;
}

template <class T>
CROSSENT_INLINE bool is_far(T m) {
  return m > Exp<T>::kFar || m < -Exp<T>::kFar;
}

// kScale exp(d + error) for kLow <= d <= 0 and an error far below 1; nan for nan. Error < 2 ulp.
template <class T>
CROSSENT_INLINE V<T> exp_scaled(V<T> d, V<T> error) {
  using C = Exp<T>;
  const V<T> shifted = d * T(1.44269504088896340736) + C::kMagic;
  const V<T> n = shifted - C::kMagic;
  return scale_by<T>(exp_reduced(((d - n * C::kLn2Hi) - n * C::kLn2Lo) + error), shifted);
}

// z - m, but at least kLow, also where it is below the lowest float; nan for nan.
template <class T>
CROSSENT_INLINE V<T> difference(V<T> z, V<T> m) {
  const V<T> d = z - m;
  return d < Exp<T>::kLow ? splat(Exp<T>::kLow) : d;
}

// Where exp(z - m) is measured from: a finite m, prepared once for many z.
//
// exp gives kScale exp(z - m) for z <= m: less than any float where z <= m + kLow, nan for nan.
// Error < 3 ulp however large the gap, where the rounding of z - m alone would cost 32 ulp at a gap
// of 80: that error is known exactly (Knuth's two-sum) and goes into the reduced argument. kFar
// says that abs(m) > Exp::kFar, up to the largest float: then there is no such error, but m + kLow
// may be no other number than m. gap gives m - z, but at most -kLow.
template <class T>
struct TwoSum {
  V<T> m, low;

  CROSSENT_INLINE explicit TwoSum(V<T> at) : m(at), low(at + Exp<T>::kLow) {}
  CROSSENT_INLINE V<T> clamp(V<T> z) const { return z < low ? low : z; }

  template <bool kFar>
  CROSSENT_INLINE V<T> exp(V<T> z) const {
    if (kFar) return exp_scaled<T>(difference<T>(z, m), V<T>{});
    const V<T> c = clamp(z), d = c - m, minus_m = d - c;
    return exp_scaled<T>(d, (c - (d - minus_m)) - (m + minus_m));
  }
  template <bool kFar>
  CROSSENT_INLINE V<T> gap(V<T> z) const {
    return kFar ? -difference<T>(z, m) : m - clamp(z);
  }
};

template <class T>
struct Origin : TwoSum<T> {
  CROSSENT_INLINE explicit Origin(T at) : TwoSum<T>(splat(at)) {}
  CROSSENT_INLINE explicit Origin(V<T> at) : TwoSum<T>(at) {}
};

#if defined(CROSSENT_FMA) || defined(__ARM_FEATURE_FMA)
// The same with a third fewer operations where products are added unrounded: z - m is never formed.
// With n = round((z - m) log2(e)) and m log2(e) = hi + lo, where hi is a multiple of a power of two
// so coarse that n + hi is exact, the reduced argument is
//   fma(z, log2(e), -(n + hi)) + (z (log2(e) - its float) - lo).
template <>
struct Origin<float> {
  typedef double Doubles __attribute__((vector_size(2 * CROSSENT_VECTOR_BYTES)));
  static constexpr float kLog2e = 1.44269504088896340736f, kRest = 1.92596299112661746887e-8f;
  V<float> m, low, hi, lo;

  CROSSENT_INLINE explicit Origin(float at) : Origin(splat(at)) {}
  CROSSENT_INLINE explicit Origin(V<float> at) : m(at), low(at + Exp<float>::kLow) {
    // Adding 3 * 2^e rounds to multiples of 2^(e - 23), where 2^e <= 1.5 abs(m) + 256.
    const V<float> size = (m < 0.0f ? -m : m) * 1.5f + 256.0f;
    const V<float> magic = bits<V<float>>(bits<I<float>>(size) & 0x7f800000) * 3.0f;
    const Doubles scaled = __builtin_convertvector(m, Doubles) * 1.44269504088896340736;
    hi = (__builtin_convertvector(scaled, V<float>) + magic) - magic;
    lo = __builtin_convertvector(scaled - __builtin_convertvector(hi, Doubles), V<float>);
  }
  CROSSENT_INLINE V<float> clamp(V<float> z) const { return z < low ? low : z; }

  template <bool kFar>
  CROSSENT_INLINE V<float> gap(V<float> z) const {
    return kFar ? -difference<float>(z, m) : m - clamp(z);
  }
  template <bool kFar>
  CROSSENT_INLINE V<float> exp(V<float> z) const {
    using C = Exp<float>;
    if (kFar) return exp_scaled<float>(difference<float>(z, m), V<float>{});
    const V<float> c = clamp(z);
    const V<float> shifted = (c * kLog2e - hi) + C::kMagic;
    const V<float> n = shifted - C::kMagic;
    const V<float> w = n + hi;
    return scale_by<float>(exp2_reduced((c * kLog2e - w) + (c * kRest - lo)), shifted);
  }
};
#endif

// tanh(x); nan for nan. Absolute error < 2^-23, relative < 2^-22.
CROSSENT_INLINE V<float> tanh_(V<float> x) {
  const V<float> a = x < 0.0f ? -x : x;
  const V<float> e = Origin<float>(0.0f).exp<false>(-2.0f * a) * Exp<float>::kUnscale;
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
CROSSENT_INLINE V<double> tanh_(V<double> x) {  // the C library's: error < 3 ulp
  V<double> t{};
  for (int i = 0; i < kLanes<double>; ++i) t[i] = std::tanh(x[i]);
  return t;
}

// The first half of the digits of a float: with the second half, products are exact (Dekker).
template <class X>
CROSSENT_INLINE X upper_half(X x) {
  using Bits = std::conditional_t<std::is_same_v<X, float>, int32_t, I<float>>;
  return bits<X>(bits<Bits>(x) & -4096);
}

// The slope of tanh: sech^2(k z) = 4 e / (1 + e)^2 with e = exp(-2 abs(k z)), where 1 - tanh^2
// would cancel; times `factor`; nan for nan. Relative error < 5e-7 (of doubles: < 1e-12) wherever
// it is a normal number: what rounding takes from k z is kept, for exp makes a relative error of
// it.
CROSSENT_INLINE V<float> sech2(V<float> z, double k, float factor) {
  const double twice = 2 * std::fabs(k), lowest = double(Exp<float>::kLow) / twice;
  const float most = std::numeric_limits<float>::max();
  const float low = lowest < -most ? -most : float(lowest);
  const V<float> minus = z < 0.0f ? z : -z, x = minus < low ? splat(low) : minus;
  const float k1 = float(twice), k_upper = upper_half(k1), k_lower = k1 - k_upper;
  const V<float> x_upper = upper_half(x), x_lower = x - x_upper, d = x * k1;
  const V<float> lost = (x_upper * k_upper - d) + x_upper * k_lower + x_lower * k_upper +
                        x_lower * k_lower + x * float(twice - k1);
  const V<float> e = exp_scaled<float>(d, lost), one = e * Exp<float>::kUnscale + 1.0f;
  // kUnscale in two halves, the second of them on the side where it keeps a number in range.
  const bool small = std::fabs(factor) < 1;
  const float first = small ? factor : 0x1p-32f * factor, second = small ? 0x1p-32f : 1.0f;
  return e * 4.0f / (one * one) * 0x1p-32f * first * second;
}
CROSSENT_INLINE V<double> sech2(V<double> z, double k, double factor) {
  const V<double> x = (z < 0.0 ? z : -z) * (2 * std::fabs(k));
  const V<double> e = exp_scaled<double>(difference<double>(x, V<double>{}), V<double>{});
  const V<double> one = e * Exp<double>::kUnscale + 1.0;
  const bool small = std::fabs(factor) < 1;
  const double first = small ? factor : 0x1p-128 * factor, second = small ? 0x1p-128 : 1.0;
  return e * 4.0 / (one * one) * 0x1p-128 * first * second;
}

}  // namespace crossent::CROSSENT_ISA
