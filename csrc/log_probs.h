// The log-probabilities of K classes of each row, and their gradient. Torch-free.
//
//   log p_k = -((m - z_k) + log1p(rest))
//
// For grad_outputs u_k the gradient is sum over k of u_k ([c = k] - p_c): -U p_c with U = sum u_k
// where no class is chosen; at a chosen class, whose u add up to w,
//
//   w (1 - p_c) - (U - w) p_c
//
// with the share of the others for 1 - p_c at the maximum, so that nothing is taken from one.
#pragma once

#include "scale_gradient.h"

namespace crossent::CROSSENT_ISA {

// Whether any class of a row is wanted.
template <class T>
CROSSENT_INLINE bool any_wanted(const Problem<T>& p, int64_t row, const Selection<T>& s) {
  for (int64_t k = 0; k < s.index.count; ++k)
    if (s.index(row, k) != p.options.ignore_index) return true;
  return false;
}

// From what is known of all classes of a row, log_sum = log1p(rest), to its outputs; scored(c) is
// the scored logit of a class.
template <class T, class F>
CROSSENT_INLINE void finish_log_probs(const Problem<T>& p, int64_t row, const Selection<T>& s, T m,
                                      double rest, double log_sum, F scored) {
  using W = Accumulator<T>;
  T* out = s.log_prob + row * s.index.count;
  for (int64_t k = 0; k < s.index.count; ++k) {
    const int64_t c = s.index(row, k);
    if (c == p.options.ignore_index) out[k] = 0;
    else if (c < 0 || c >= p.classes) out[k] = std::numeric_limits<T>::quiet_NaN();
    else out[k] = T(-((W(m) - W(scored(c))) + log_sum));
  }
  p.saved_at(row, kMaximum) = m, p.saved_at(row, kRest) = T(rest);
}

// Error < 4 ulp, however close to 0; 0 where the index is ignored, nan where it is no class. A row
// of which nothing is wanted is not read.
template <class T>
CROSSENT_NOINLINE void log_probs_row(const Problem<T>& p, int64_t row, const Selection<T>& s) {
  RowState<T> state;
  state.m = 0;
  if (any_wanted(p, row, s)) {
    state.m = -std::numeric_limits<T>::infinity();
    for (int64_t c = 0; c < p.classes && !state.nan; c += kBlock)
      forward_block(p, row, c, int(p.classes - c < kBlock ? p.classes - c : kBlock), state);
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (state.nan || state.m == -std::numeric_limits<T>::infinity())
    state.m = T(nan), state.rest = nan;
  const double rest = double(state.rest);
  const auto scored = [&](int64_t c) CROSSENT_INLINE_LAMBDA { return scored_logit(p, row, c); };
  finish_log_probs(p, row, s, state.m, rest, log1p_(T(), rest), scored);
}

// Ascending by class, of equal ones by weight, in place: n log n steps whatever the order was, but
// for few.
CROSSENT_INLINE bool comes_before(const ChosenClass& a, const ChosenClass& b) {
  return a.at < b.at || (a.at == b.at && a.weight < b.weight);
}
CROSSENT_INLINE void sift_down(ChosenClass* heap, int64_t root, int64_t n) {
  const ChosenClass moved = heap[root];
  for (int64_t child; (child = 2 * root + 1) < n; root = child) {
    if (child + 1 < n && comes_before(heap[child], heap[child + 1])) ++child;
    if (!comes_before(moved, heap[child])) break;
    heap[root] = heap[child];
  }
  heap[root] = moved;
}
CROSSENT_INLINE void sort_chosen(ChosenClass* chosen, int64_t n) {
  constexpr int64_t kFew = 16;
  if (n <= kFew) {
    for (int64_t i = 1; i < n; ++i) {
      const ChosenClass moved = chosen[i];
      int64_t j = i;
      for (; j > 0 && comes_before(moved, chosen[j - 1]); --j) chosen[j] = chosen[j - 1];
      chosen[j] = moved;
    }
    return;
  }
  for (int64_t root = n / 2; root-- > 0;) sift_down(chosen, root, n);
  for (int64_t end = n; end-- > 1;) {
    const ChosenClass largest = chosen[0];
    chosen[0] = chosen[end];
    sift_down(chosen, 0, end);
    chosen[end] = largest;
  }
}

// The classes of a row that are wanted, each once, ascending, with the sum of its weights; in the
// room of this lane.
struct ChosenRow {
  ChosenClass* classes = nullptr;
  int64_t count = 0;
  double total = 0;    // of all weights
  bool wrong = false;  // an index is no class
};
template <class T>
CROSSENT_INLINE ChosenRow gather_chosen(const Problem<T>& p, int64_t row, const Selection<T>& s,
                                        int lane = 0) {
  ChosenRow r;
  ChosenClass* room = r.classes = s.room + lane * s.index.count;
  int64_t n = 0;
  for (int64_t k = 0; k < s.index.count; ++k) {
    const int64_t c = s.index(row, k);
    if (c == p.options.ignore_index) continue;
    if (c < 0 || c >= p.classes) r.wrong = true;
    else room[n++] = {c, double(s.grad_output(row, k))};
  }
  sort_chosen(room, n);
  for (int64_t i = 0; i < n; ++i) {
    r.total += room[i].weight;
    if (r.count && room[r.count - 1].at == room[i].at) room[r.count - 1].weight += room[i].weight;
    else room[r.count++] = room[i];
  }
  return r;
}

// factor exp(z - m) for each z of a block. Error < 3 ulp where that is a normal number; 0 at -inf,
// nan for nan.
template <class T, bool kFar>
CROSSENT_INLINE void scaled_exp(const T* z, int n, T m, T factor, Prefetch next, T* out) {
  constexpr int L = kLanes<T>;
  const Origin<T> origin(m);
  int i = 0;
  for (; i + L <= n; i += L) {
    next(i, L);
    store(out + i, origin.template exp<kFar>(load(z + i)) * Exp<T>::kUnscale * factor);
  }
  if (i < n) {
    const V<T> x = load(z + i, n - i, m);
    store(out + i, n - i, origin.template exp<kFar>(x) * Exp<T>::kUnscale * factor);
  }
}

// What the entries of a row's gradient share. An entry is in double, but for exp(z - m).
struct ChosenFactors {
  double total, inverse, rest_share;  // U, 1 / (1 + rest), rest / (1 + rest)

  CROSSENT_INLINE ChosenFactors(const ChosenRow& chosen, double rest)
      : total(chosen.wrong ? std::numeric_limits<double>::quiet_NaN() : chosen.total),
        inverse(1 / (1 + rest)),
        rest_share(rest * inverse) {}
  CROSSENT_INLINE double entry(double weight, double e, bool at_maximum) const {
    const double probability = e * inverse, others = at_maximum ? rest_share : 1 - probability;
    return weight * others - (total - weight) * probability;
  }
};

template <class T>
CROSSENT_NOINLINE void log_probs_backward_row(const Problem<T>& p, int64_t row,
                                              const Selection<T>& s, double* by_scale) {
  const ChosenRow chosen = gather_chosen(p, row, s);
  if (!chosen.count && !chosen.wrong) return write_zeros(p, row, by_scale);
  const T m = p.saved_at(row, kMaximum);
  const ChosenFactors shared(chosen, p.saved_at(row, kRest));
  const T factor = T(-shared.total * shared.inverse);
  const bool far = is_far(m);
  int64_t next_chosen = 0;
  write_gradient(p, row, by_scale, [&](const ClassBlock<T>& b, int64_t c, T* out) {
    const Prefetch next = prefetch_from(p, row, c + b.n);
    if (far) scaled_exp<T, true>(b.z, b.n, m, factor, next, out);
    else scaled_exp<T, false>(b.z, b.n, m, factor, next, out);
    for (; next_chosen < chosen.count && chosen.classes[next_chosen].at < c + b.n; ++next_chosen) {
      const int64_t i = chosen.classes[next_chosen].at - c;
      const T z = b.z[i];
      const double e = z == m ? 1 : std::exp(double(z) - double(m));
      out[i] = T(shared.entry(chosen.classes[next_chosen].weight, e, z == m));
    }
  });
}

}  // namespace crossent::CROSSENT_ISA
