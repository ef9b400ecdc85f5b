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
// kFar: abs(m) > Exp::kFar. kTies: some element may equal m. Error of the sums, whatever their terms
// and their number: those of the terms (exp: 2 ulp), and twice half an ulp from adding four at a time;
// nothing more where four are equal.
template <class T>
struct BlockSum {
  Wide<T> below;
  double ties;
  Wide<T> moment;
};
template <class T, bool kMoment, bool kFar, bool kTies>
CROSSENT_INLINE BlockSum<T> block_sum(const T* z, int n, T maximum, Ahead next) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const Origin<T> origin(maximum);
  LaneSum<T> sum, moment;
  I<T> others = {};  // how many are below m, in each lane
  V<T> e[4], u[4];
  const auto term = [&](V<T> x, int k) __attribute__((always_inline)) {
    e[k] = origin.template exp<kFar>(x);
    if (kTies) {
      const I<T> below = x != origin.m;
      others -= below;
      e[k] = below ? e[k] : V<T>{};
    }
    if (kMoment) u[k] = e[k] * origin.template gap<kFar>(x);
  };
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    next(i, 4 * L);
    for (int k = 0; k < 4; ++k) term(load(z + i + k * L), k);
    sum.add(e);
    if (kMoment) moment.add(u);
  }
  for (; i < n; i += L) {
    term(i + L <= n ? load(z + i) : load_tail(z, n, lowest), 0);
    sum.add(e[0]);
    if (kMoment) moment.add(u[0]);
  }
  double ties = 0;
  if (kTies) ties = (n + L - 1) / L * L;
  for (int k = 0; k < L && kTies; ++k) ties -= double(others[k]);
  constexpr Wide<T> unscale = Exp<T>::kUnscale;
  return {sum.total() * unscale, ties, moment.total() * unscale};
}
template <class T, bool kMoment>
CROSSENT_INLINE BlockSum<T> block_sum(const T* z, int n, T m, bool ties, Ahead next) {
  if (is_far(m)) return block_sum<T, kMoment, true, true>(z, n, m, next);
  return ties ? block_sum<T, kMoment, false, true>(z, n, m, next)
              : block_sum<T, kMoment, false, false>(z, n, m, next);
}

// Sum of a and of a (m - z), where a class with z = -inf and a = 0 adds nothing; and how many
// classes are not -inf. `a` is the product of the factors that are not null; with `finite_only`, classes
// at -inf add nothing whatever a is. kUniform: both are null, a is one, and finite_only is meant.
// Error of the sums as above: that of the terms (3 roundings), and twice half an ulp. What is infinite
// is nan here.
template <class T>
struct BlockGap {
  Wide<T> mass, gap;
  double open;
};
template <class T, bool kUniform>
CROSSENT_INLINE BlockGap<T> narrow_gap(const T* z, const T* y, const T* w, int n, T maximum,
                                       bool finite_only) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const V<T> m = splat(maximum), none = splat(lowest);
  LaneSum<T> mass, gap;
  I<T> open = {};
  V<T> h[4], g[4];
  // The factors at i; `last`: in the lanes of the last vector, as load_tail has them.
  const auto term = [&](int i, int k, bool last) __attribute__((always_inline)) {
    const auto at = [&](const T* p, T fill) __attribute__((always_inline)) {
      return last ? load_tail(p, n, fill) : load(p + i);
    };
    const V<T> x = at(z, lowest);
    const I<T> shut = x == none;
    open += shut + 1;
    if (kUniform) {
      g[k] = shut ? V<T>{} : m - x;
      return;
    }
    V<T> a = y ? at(y, T(0)) : splat(T(1));
    if (w) a = a * at(w, T(0));
    h[k] = a;
    if (finite_only) h[k] = shut ? V<T>{} : a;
    g[k] = (shut & (h[k] == T(0))) ? V<T>{} : h[k] * (m - x);
  };
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int k = 0; k < 4; ++k) term(i + k * L, k, false);
    gap.add(g);
    if (!kUniform) mass.add(h);
  }
  for (; i < n; i += L) {
    term(i, 0, i + L > n);
    gap.add(g[0]);
    if (!kUniform) mass.add(h[0]);
  }
  double count = 0;
  for (int k = 0; k < L; ++k) count += double(open[k]);
  return {kUniform ? Wide<T>(count) : mass.total(), gap.total(), count};
}
// The same also where sums are infinite, or beyond the largest T: those of masks at the lowest float are.
template <class T>
CROSSENT_INLINE BlockGap<T> block_gap(const T* z, const T* y, const T* w, int n, T m,
                                      bool finite_only) {
  BlockGap<T> sum = !y && !w
                        ? narrow_gap<T, true>(z, nullptr, nullptr, n, m, true)
                        : narrow_gap<T, false>(z, y, w, n, m, finite_only);
  if (std::isfinite(sum.gap) && std::isfinite(sum.mass)) return sum;
  sum.mass = sum.gap = 0;
  for (int i = 0; i < n; ++i) {
    const bool shut = z[i] == -std::numeric_limits<T>::infinity();
    const T a = finite_only && shut ? T(0) : (y ? y[i] : T(1)) * (w ? w[i] : T(1));
    sum.mass += a;
    if (!shut || a != 0) sum.gap += Wide<T>(a) * (Wide<T>(m) - Wide<T>(z[i]));
  }
  return sum;
}

CROSSENT_INLINE double times(double factor, double x) {  // 0 * inf = 0
  return factor == 0 && std::isinf(x) ? 0 : factor * x;
}
CROSSENT_INLINE long double times(long double factor, long double x) {
  return factor == 0 && std::isinf(x) ? 0 : factor * x;
}

// What is known of the classes of a row that have been seen.
template <class T>
struct RowState {
  using W = Wide<T>;
  T m = -std::numeric_limits<T>::infinity();
  W rest = 0;               // sum of exp(z - m) without the maximum
  W moment = 0;             // sum of exp(z - m) (m - z)
  W mass = 0, gap = 0;      // sum of a, of a (m - z): targets that are probabilities
  W plain_mass = 0, plain_gap = 0;      // the same without class weights, for statistics
  W uniform_mass = 0, uniform_gap = 0;  // the same for a uniform target: label smoothing
  double open = 0;                      // classes that are not -inf
  bool nan = false;
  int64_t top_block = -1;               // where the block of the maximum begins; -1: unknown

  // A new maximum: everything is counted from there. In W, for a row may raise it in every block, and
  // a factor that is off by the same in each would add up.
  CROSSENT_INLINE void raise(T to) {
    if (m != -std::numeric_limits<T>::infinity()) {
      const W up = W(to) - W(m), factor = std::exp(-up);
      moment = factor * moment + times(factor, up) * (rest + 1);
      rest = (rest + 1) * factor;
      gap += times(mass, up);
      plain_gap += times(plain_mass, up);
      uniform_gap += times(uniform_mass, up);
    }
    m = to;
  }
};

}  // namespace crossent::CROSSENT_ISA
