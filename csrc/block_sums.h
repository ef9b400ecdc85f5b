// Sums over blocks of contiguous logits, and what is known of a row from them. Torch-free. Each
// function says what it computes, for which arguments, and how exactly; tests/backends/contracts.cpp holds
// them to it.
//
// A row is read in blocks of at most kBlock classes. What is known of the classes seen so far is a
// RowState; the maximum is left out of its sum, so that 1 + tiny is never formed:
//
//   lse = m + log1p(rest),   -log p_c = (m - z_c) + log1p(rest).
//
// Order of summation depends on the number of classes and on whether they are next to each other:
// results are the same bits for every batch of that layout and every number of threads.
#pragma once

#include "vec.h"

namespace crossent::CROSSENT_ISA {

constexpr int kBlock = 2048;

// The next block as it is stored: it comes from memory while this one is computed.
struct Prefetch {
  const char* data;
  int item;  // bytes an element

  CROSSENT_INLINE void operator()(int i, int count) const {
    for (int b = 0; b < count * item; b += 64) __builtin_prefetch(data + i * item + b);
  }
};

// Largest element of a block; nan is skipped. n >= 1. `nonfinite` tells whether some element
// is no finite number: a sum of zeros is nan then.
template <class T>
CROSSENT_INLINE T block_max(const T* z, int n, bool* nonfinite) {
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
  *nonfinite = false;
  for (int k = 0; k < L; ++k) *nonfinite |= zeros0[k] != T(0);
  m0 = m0 > m1 ? m0 : m1;
  T max = m0[0];
  for (int k = 1; k < L; ++k) max = m0[k] > max ? m0[k] : max;
  return max;
}

// Sum of exp(z - m) over the elements below m, how many equal m, and if kMoment also the sum of
// exp(z - m) (m - z). m is finite and at least every element; -inf adds nothing; nan makes nan.
// kFar: abs(m) > Exp::kFar. kTies: some element may equal m. Error of the sums, whatever their
// terms and their number: those of the terms (exp: 3 ulp), and twice half an ulp from adding four
// at a time; nothing more where four are equal. The terms, kScale times too large, go to `terms`
// where it is not null, those of the maximum among them.
template <class T>
struct BlockSum {
  Accumulator<T> below;
  double ties;
  Accumulator<T> moment;
};
template <class T, bool kMoment, bool kFar, bool kTies>
CROSSENT_INLINE BlockSum<T> block_sum(const T* z, int n, T maximum, Prefetch next, T* terms) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const Origin<T> origin(maximum);
  LaneSum<T> sum, moment;
  I<T> others = {};  // how many are below m, in each lane
  V<T> e[4], u[4], t[4];
  const auto term = [&](V<T> x, int k) CROSSENT_INLINE_LAMBDA {
    t[k] = e[k] = origin.template exp<kFar>(x);
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
    for (int k = 0; k < 4 && terms; ++k) store(terms + i + k * L, t[k]);
  }
  for (; i < n; i += L) {
    term(i + L <= n ? load(z + i) : load_tail(z, n, lowest), 0);
    if (terms) store_tail(terms, i, n, t[0]);
    sum.add(e[0]);
    if (kMoment) moment.add(u[0]);
  }
  double ties = 0;
  if (kTies) ties = (n + L - 1) / L * L;
  for (int k = 0; k < L && kTies; ++k) ties -= double(others[k]);
  constexpr Accumulator<T> unscale = Exp<T>::kUnscale;
  return {sum.total() * unscale, ties, moment.total() * unscale};
}
template <class T, bool kMoment>
CROSSENT_INLINE BlockSum<T> block_sum(const T* z, int n, T m, bool ties, Prefetch next,
                                      T* terms = nullptr) {
  if (is_far(m)) return block_sum<T, kMoment, true, true>(z, n, m, next, terms);
  return ties ? block_sum<T, kMoment, false, true>(z, n, m, next, terms)
              : block_sum<T, kMoment, false, false>(z, n, m, next, terms);
}

// Sum of a and of a (m - z), where a class with z = -inf and a = 0 adds nothing; and how many
// classes are not -inf. `a` is the product of the factors that are not null; with `finite_only`,
// classes at -inf add nothing whatever a is. kUniform: both are null, a is one, and finite_only is
// meant. Error of the sums as above: that of the terms (3 roundings), and twice half an ulp. What
// is infinite is nan here.
template <class T>
struct BlockGap {
  Accumulator<T> weight, gap;
  double unmasked;
};
template <class T, bool kUniform>
CROSSENT_INLINE BlockGap<T> narrow_gap(const T* z, const T* y, const T* w, int n, T maximum,
                                       bool finite_only) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const V<T> m = splat(maximum), none = splat(lowest);
  LaneSum<T> weight, gap;
  I<T> unmasked = {};
  V<T> h[4], g[4];
  // The factors at i; `last`: in the lanes of the last vector, as load_tail has them.
  const auto term = [&](int i, int k, bool last) CROSSENT_INLINE_LAMBDA {
    const auto at = [&](const T* p, T fill) CROSSENT_INLINE_LAMBDA {
      return last ? load_tail(p, n, fill) : load(p + i);
    };
    const V<T> x = at(z, lowest);
    const I<T> masked = x == none;
    unmasked += masked + 1;
    if (kUniform) {
      g[k] = masked ? V<T>{} : m - x;
      return;
    }
    V<T> a = y ? at(y, T(0)) : splat(T(1));
    if (w) a = a * at(w, T(0));
    h[k] = a;
    if (finite_only) h[k] = masked ? V<T>{} : a;
    g[k] = (masked & (h[k] == T(0))) ? V<T>{} : h[k] * (m - x);
  };
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int k = 0; k < 4; ++k) term(i + k * L, k, false);
    gap.add(g);
    if (!kUniform) weight.add(h);
  }
  for (; i < n; i += L) {
    term(i, 0, i + L > n);
    gap.add(g[0]);
    if (!kUniform) weight.add(h[0]);
  }
  double count = 0;
  for (int k = 0; k < L; ++k) count += double(unmasked[k]);
  return {kUniform ? Accumulator<T>(count) : weight.total(), gap.total(), count};
}
// The same also where sums are infinite, or beyond the largest T: those of masks at the lowest
// float are.
template <class T>
CROSSENT_INLINE BlockGap<T> block_gap(const T* z, const T* y, const T* w, int n, T m,
                                      bool finite_only) {
  using W = Accumulator<T>;
  BlockGap<T> sum = !y && !w ? narrow_gap<T, true>(z, nullptr, nullptr, n, m, true)
                             : narrow_gap<T, false>(z, y, w, n, m, finite_only);
  if (std::isfinite(sum.gap) && std::isfinite(sum.weight)) return sum;
  sum.weight = sum.gap = 0;
  for (int i = 0; i < n; ++i) {
    const bool masked = z[i] == -std::numeric_limits<T>::infinity();
    const T a = finite_only && masked ? T(0) : (y ? y[i] : T(1)) * (w ? w[i] : T(1));
    sum.weight += a;
    if (!masked || a != 0) sum.gap += W(a) * (W(m) - W(z[i]));
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
  using W = Accumulator<T>;
  T m = -std::numeric_limits<T>::infinity();
  W rest = 0;    // sum of exp(z - m) without the maximum
  W moment = 0;  // sum of exp(z - m) (m - z)
  // The sums of a and of a (m - z) for targets that are probabilities; the same without class
  // weights, for statistics; and for a uniform target, for label smoothing.
  W target_weight = 0, target_gap = 0;
  W probability_mass = 0, probability_gap = 0;
  W uniform_weight = 0, uniform_gap = 0;
  double unmasked = 0;  // classes that are not -inf
  bool nan = false;
  int64_t top_block = -1;  // where the block of the maximum begins; -1: unknown

  // A new maximum: everything is measured from there. In W, for a row may raise it in every block,
  // and a factor that is off by the same in each would add up.
  CROSSENT_INLINE void raise(T to) {
    if (m != -std::numeric_limits<T>::infinity()) {
      const W up = W(to) - W(m), factor = std::exp(-up);
      moment = factor * moment + times(factor, up) * (rest + 1);
      rest = (rest + 1) * factor;
      target_gap += times(target_weight, up);
      probability_gap += times(probability_mass, up);
      uniform_gap += times(uniform_weight, up);
    }
    m = to;
  }
};

}  // namespace crossent::CROSSENT_ISA
