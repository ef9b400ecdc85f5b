// The entropy of rows, and its gradient. Torch-free.
//
//   H = log1p(rest) + mean gap,   mean gap = sum over c of p_c (m - z_c)
//
// are two sums of numbers that are never negative, and nothing cancels. In the gradient
//
//   dH / dz_c = -p_c (log p_c + H) = p_c ((m - z_c) - mean gap)
//
// the logarithms of the sum, which are in both, are left out: the maximum's entry is -p mean gap
// to the last digits, however little probability is left for others.
#pragma once

#include "scale_gradient.h"

namespace crossent::CROSSENT_ISA {

// What forward hands to backward besides the maximum and the rest.
constexpr Saved kMeanGap = kOneHotSaved;
constexpr int kEntropySaved = kMeanGap + 1;

template <class T>
CROSSENT_INLINE void finish_entropy(const Problem<T>& p, int64_t row, T m, double rest,
                                    double log_sum, Accumulator<T> mean_gap) {
  p.entropy[row] = T(log_sum + mean_gap);
  p.saved_at(row, kMaximum) = m, p.saved_at(row, kRest) = T(rest);
  p.saved_at(row, kMeanGap) = T(mean_gap);
}

// Error of the entropy < 4 ulp, however small it is; nan where a logit is nan or inf, or all are
// masked. (Statistics on, no target: what forward_block sums is the maximum, the rest, the moment.)
template <class T>
CROSSENT_NOINLINE void entropy_row(const Problem<T>& p, int64_t row) {
  RowState<T> s;
  for (int64_t c = 0; c < p.classes && !s.nan; c += kBlock)
    forward_block(p, row, c, int(p.classes - c < kBlock ? p.classes - c : kBlock), s);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (s.nan || s.m == -std::numeric_limits<T>::infinity()) s.m = T(nan), s.rest = nan;
  const double rest = double(s.rest);
  finish_entropy(p, row, s.m, rest, log1p_(T(), rest), s.moment / (1 + s.rest));
}

// factor exp(z - m) ((m - z) - mean_gap) for each z of a block. Error < 2^-20 of
// abs(factor) exp(z - m) max(m - z, mean_gap); 0 at -inf, nan for nan. (Of double: 2^-48.)
template <class T, bool kFar>
CROSSENT_INLINE void entropy_gradient(const T* z, int n, T m, T factor, T mean_gap, Prefetch next,
                                      T* out) {
  constexpr int L = kLanes<T>;
  const Origin<T> origin(m);
  const auto step = [&](V<T> x) CROSSENT_INLINE_LAMBDA {
    const V<T> e = origin.template exp<kFar>(x) * Exp<T>::kUnscale;
    return e * factor * (origin.template gap<kFar>(x) - mean_gap);
  };
  int i = 0;
  for (; i + L <= n; i += L) {
    next(i, L);
    store(out + i, step(load(z + i)));
  }
  if (i < n) store(out + i, n - i, step(load(z + i, n - i, m)));
}

template <class T>
CROSSENT_NOINLINE void entropy_backward_row(const Problem<T>& p, int64_t row, double* by_scale) {
  const T m = p.saved_at(row, kMaximum), mean_gap = p.saved_at(row, kMeanGap);
  const T factor = T(double(p.grad_output(row)) / (1 + double(p.saved_at(row, kRest))));
  const bool far = is_far(m);
  write_gradient(p, row, by_scale, [&](const ClassBlock<T>& b, int64_t c, T* out) {
    const Prefetch next = prefetch_from(p, row, c + b.n);
    if (far) entropy_gradient<T, true>(b.z, b.n, m, factor, mean_gap, next, out);
    else entropy_gradient<T, false>(b.z, b.n, m, factor, mean_gap, next, out);
  });
}

}  // namespace crossent::CROSSENT_ISA
