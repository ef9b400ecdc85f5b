// Row mathematics on blocks of contiguous logits. Torch-free. Each function says what it computes,
// for which arguments, and how exactly; tests/test_kernels.py holds them to it.
//
// A row is read in blocks of at most kBlock classes. What is known of the classes seen so far is a
// RowState; the maximum is left out of its sum, so that 1 + tiny is never formed:
//
//   lse = m + log1p(rest),   -log p_c = (m - z_c) + log1p(rest).
//
// Order of summation depends on the number of classes and on whether they are next to each other: results
// are the same bits for every batch of that layout and every number of threads.
#pragma once

#include "vec.h"

namespace crossent::CROSSENT_ISA {

constexpr int kBlock = 2048;

// The next block as it is stored: it comes from memory while this one is computed.
struct Ahead {
  const char* data;
  int item;  // bytes an element

  CROSSENT_INLINE void operator()(int i, int count) const {
    for (int b = 0; b < count * item; b += 64) __builtin_prefetch(data + i * item + b);
  }
};

// Largest element of a block; nan is passed over. n >= 1. `odd` tells whether some element is no
// finite number: a sum of zeros is nan then.
template <class T>
CROSSENT_INLINE T block_max(const T* z, int n, bool* odd) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  V<T> m0 = splat(lowest), m1 = m0, zeros0 = {}, zeros1 = {};
  int i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const V<T> a = load(z + i), b = load(z + i + L);
    m0 = a > m0 ? a : m0;
    m1 = b > m1 ? b : m1;
    zeros0 += a * T(0);
    zeros1 += b * T(0);
  }
  for (; i < n; i += L) {
    const V<T> a = i + L <= n ? load(z + i) : load_tail(z, n, lowest);
    m0 = a > m0 ? a : m0;
    zeros0 += (i + L <= n ? a : load_tail(z, n, T(0))) * T(0);
  }
  zeros0 += zeros1;
  *odd = false;
  for (int k = 0; k < L; ++k) *odd |= zeros0[k] != T(0);
  m0 = m0 > m1 ? m0 : m1;
  T max = m0[0];
  for (int k = 1; k < L; ++k) max = m0[k] > max ? m0[k] : max;
  return max;
}

// Sum of exp(z - m) over the elements below m, how many equal m, and if kMoment also the sum of
// exp(z - m) (m - z). m is finite and at least every element; -inf adds nothing; nan makes nan.
// Error of the sums: 2 ulp of their terms and that of adding at most 64 of them in a lane.
struct BlockSum {
  double below, ties, moment;
};
template <class T, bool kMoment, bool kHuge>
CROSSENT_INLINE BlockSum block_sum(const T* z, int n, T maximum, Ahead next) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const Origin<T> origin(maximum);
  V<T> s0 = {}, s1 = {}, u0 = {}, u1 = {};
  I<T> ties = {};
  const auto step = [&](V<T> x, V<T>& s, V<T>& u) __attribute__((always_inline)) {
    const V<T> e = origin.template exp<kHuge>(x);
    const I<T> tie = x == origin.m;
    ties -= tie;
    const V<T> below = tie ? V<T>{} : e;
    s += below;
    if (kMoment) u += below * (origin.m - origin.clamp(x));
  };
  int i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    next(i, 2 * L);
    step(load(z + i), s0, u0);
    step(load(z + i + L), s1, u1);
  }
  for (; i < n; i += L) step(i + L <= n ? load(z + i) : load_tail(z, n, lowest), s0, u0);
  double count = 0;
  for (int k = 0; k < L; ++k) count += double(ties[k]);
  constexpr double unscale = Exp<T>::kUnscale;
  return {(sum_lanes<T>(s0) + sum_lanes<T>(s1)) * unscale, count,
          (sum_lanes<T>(u0) + sum_lanes<T>(u1)) * unscale};
}

// Sum of a and of a (m - z), where a class with z = -inf and a = 0 adds nothing; and how many
// classes are not -inf. `a` is the product of the factors that are not null (one where both are);
// with `finite_only`, classes at -inf add nothing whatever a is.
struct BlockGap {
  double mass, gap, open;
};
template <class T>
CROSSENT_INLINE BlockGap block_gap(const T* z, const T* y, const T* w, int n, T maximum,
                                   bool finite_only) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const V<T> m = splat(maximum), none = splat(lowest);
  V<T> mass = {}, gap = {}, open = {};
  const auto step = [&](V<T> x, V<T> a, I<T> outside) __attribute__((always_inline)) {
    const I<T> shut = x == none;
    if (finite_only) a = shut ? V<T>{} : a;
    mass += a;
    gap += (shut & (a == T(0))) ? V<T>{} : a * (m - x);
    open += shut | outside ? V<T>{} : splat(T(1));
  };
  int i = 0;
  for (; i + L <= n; i += L) {
    V<T> a = y ? load(y + i) : splat(T(1));
    if (w) a = a * load(w + i);
    step(load(z + i), a, I<T>{});
  }
  if (i < n) {
    const I<T> outside = outside_tail<T>(n);
    V<T> a = y ? load_tail(y, n, T(0)) : outside ? V<T>{} : splat(T(1));
    if (w) a = a * load_tail(w, n, T(0));
    step(load_tail(z, n, lowest), a, outside);
  }
  return {sum_lanes<T>(mass), sum_lanes<T>(gap), sum_lanes<T>(open)};
}

template <class T>
CROSSENT_INLINE BlockSum block_sum(const T* z, int n, T m, bool moment, Ahead next) {
  const bool huge = m > Exp<T>::kHuge || m < -Exp<T>::kHuge;
  if (huge) return block_sum<T, true, true>(z, n, m, next);
  return moment ? block_sum<T, true, false>(z, n, m, next)
                : block_sum<T, false, false>(z, n, m, next);
}

// What is known of the classes of a row that have been seen.
template <class T>
struct RowState {
  T m = -std::numeric_limits<T>::infinity();
  double rest = 0, rest_low = 0;  // sum of exp(z - m) without the maximum, and its rounding error
  double moment = 0;              // sum of exp(z - m) (m - z)
  double mass = 0, gap = 0;       // sum of a, of a (m - z): targets that are probabilities
  double plain_mass = 0, plain_gap = 0;       // the same without class weights, for statistics
  double uniform_mass = 0, uniform_gap = 0;   // the same for a uniform target: label smoothing
  double open = 0;                            // classes that are not -inf
  bool nan = false;
  int64_t top_block = -1;                     // where the block of the maximum begins; -1: unknown

  // Sum of two doubles and what rounding took from it (Knuth).
  CROSSENT_INLINE void add(double x) {
    const double sum = rest + x, part = sum - rest;
    rest_low += (rest - (sum - part)) + (x - part);
    rest = sum;
  }
  // A new maximum: everything is counted from there.
  CROSSENT_INLINE void raise(T to) {
    if (m != -std::numeric_limits<T>::infinity()) {
      const double up = double(to) - double(m), factor = std::exp(-up);
      moment = factor * (moment + up * (rest + rest_low + 1));
      const double had = rest;
      rest = 0, rest_low *= factor;
      add(had * factor);
      add(factor);
      gap += mass * up;
      plain_gap += plain_mass * up;
      uniform_gap += uniform_mass * up;
    }
    m = to;
  }
  CROSSENT_INLINE double log_sum() const { return std::log1p(rest + rest_low); }
};

}  // namespace crossent::CROSSENT_ISA
