// What is known of the rows of a tile from all of their classes. Torch-free.
#pragma once

#include "tile.h"

namespace crossent::CROSSENT_ISA {

// Sums over the classes for every lane, four at a time: error as block_sum.
template <class T, class F>
CROSSENT_INLINE LaneSum<T> sum_classes(int classes, F term) {
  LaneSum<T> s;
  int c = 0;
  for (; c + 4 <= classes; c += 4) {
    V<T> t[4];
    for (int k = 0; k < 4; ++k) t[k] = term(c + k);
    s.add(t);
  }
  for (; c < classes; ++c) s.add(term(c));
  return s;
}

template <class T>
struct LaneGap {
  LaneSum<T> weight, gap;
};
// As narrow_gap, for every lane; a(c) is what class c weighs. Sets `needs_slow_path` where a sum is
// infinite.
template <class T, class F>
CROSSENT_INLINE LaneGap<T> lane_gap(const V<T>* z, int classes, V<T> m, I<T>& needs_slow_path,
                                    F a) {
  const V<T> none = splat(-std::numeric_limits<T>::infinity());
  const LaneGap<T> g = {sum_classes<T>(classes, a),
                        sum_classes<T>(classes, [&](int c) CROSSENT_INLINE_LAMBDA {
                          const V<T> w = a(c);
                          return ((z[c] == none) & (w == T(0))) ? V<T>{} : w * (m - z[c]);
                        })};
  needs_slow_path |= (g.gap.sum - g.gap.sum != T(0)) | (g.weight.sum - g.weight.sum != T(0));
  return g;
}

// What is known of the rows of a tile, as RowState: of their classes, and of their targets. Rows
// that need the slow path are done one by one: nan, infinite and far maxima, all masked, infinite
// sums.
template <class T>
struct TileState {
  V<T> m;
  I<T> needs_slow_path, ties;
  LaneSum<T> below, moment;

  CROSSENT_INLINE Accumulator<T> rest(int l) const {
    return below[l] * Accumulator<T>(Exp<T>::kUnscale) + double(ties[l] - 1);
  }
  CROSSENT_INLINE Accumulator<T> moment_of(int l) const {
    return moment[l] * Accumulator<T>(Exp<T>::kUnscale);
  }
};
template <class T>
struct TileTargets {
  LaneGap<T> target, probability, uniform;
  V<T> unmasked{};

  CROSSENT_INLINE RowState<T> row(const TileState<T>& s, int l) const {
    RowState<T> r;
    r.m = s.m[l];
    r.rest = s.rest(l);
    r.moment = s.moment_of(l);
    r.target_weight = target.weight[l], r.target_gap = target.gap[l];
    r.probability_mass = probability.weight[l], r.probability_gap = probability.gap[l];
    r.uniform_weight = uniform.weight[l], r.uniform_gap = uniform.gap[l];
    r.unmasked = unmasked[l];
    return r;
  }
};

// The maximum, the sum of the others, and the moment where statistics are wanted. The exps of all
// classes, kScale times too large, go to `e` where it is not null.
template <class T, bool kPlain>
CROSSENT_INLINE void sum_tile(const Problem<T>& p, const V<T>* z, TileState<T>& s, V<T>* e) {
  const int classes = int(p.classes);
  V<T> m = splat(-std::numeric_limits<T>::infinity());
  I<T> nan = {};
  for (int c = 0; c < classes; ++c) {
    m = z[c] > m ? z[c] : m;
    nan |= z[c] != z[c];
  }
  const V<T> size = m < T(0) ? -m : m;
  s.m = m;
  s.needs_slow_path = ~(size <= Exp<T>::kFar) | nan;
  const Origin<T> origin(s.needs_slow_path ? V<T>{} : m);
  I<T> ties = {};
  s.below = sum_classes<T>(classes, [&](int c) CROSSENT_INLINE_LAMBDA {
    const I<T> tie = z[c] == m;
    ties -= tie;
    const V<T> exp = origin.template exp<false>(z[c]);
    if (e) e[c] = exp;
    return tie ? V<T>{} : exp;
  });
  s.ties = ties;
  if (!kPlain && p.options.stats)
    s.moment = sum_classes<T>(classes, [&](int c) CROSSENT_INLINE_LAMBDA {
      return origin.template exp<false>(z[c]) * origin.template gap<false>(z[c]);
    });
}

// What targets that are probabilities y, or smoothed, need of all classes.
template <class T>
CROSSENT_INLINE void sum_targets(const Problem<T>& p, const V<T>* z, const V<T>* y, TileState<T>& s,
                                 TileTargets<T>& t) {
  const T lowest = -std::numeric_limits<T>::infinity();
  const int classes = int(p.classes);
  const auto weight = [&](int c)
                          CROSSENT_INLINE_LAMBDA { return splat(p.weight ? p.weight[c] : T(1)); };
  if (!p.by_index()) {
    t.target = lane_gap<T>(z, classes, s.m, s.needs_slow_path,
                           [&](int c) CROSSENT_INLINE_LAMBDA { return y[c] * weight(c); });
    if (p.weight && p.options.stats)
      t.probability = lane_gap<T>(z, classes, s.m, s.needs_slow_path,
                                  [&](int c) CROSSENT_INLINE_LAMBDA { return y[c]; });
  }
  if (p.options.label_smoothing != 0) {
    t.uniform = lane_gap<T>(z, classes, s.m, s.needs_slow_path, [&](int c) CROSSENT_INLINE_LAMBDA {
      return z[c] == lowest ? V<T>{} : weight(c);
    });
    for (int c = 0; c < classes; ++c) t.unmasked += z[c] == lowest ? V<T>{} : splat(T(1));
  }
}

}  // namespace crossent::CROSSENT_ISA
