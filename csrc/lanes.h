// Rows side by side: one row in each lane of a vector. For few classes, and for classes that are not
// next to each other in memory (images: N, C, H, W), where a row alone would fill no vector.
// Torch-free. Same results as kernels.h to the last digits, not to the last bit.
#pragma once

#include "tile.h"

namespace crossent::CROSSENT_ISA {

// log1p_ of kernels.h for one number in each lane.
CROSSENT_INLINE void log1p_lanes(float, const double* x, double* out) {
  constexpr int L = kLanes<double>;
  for (int i = 0; i < kLanes<float>; i += L) {
    const V<double> v = load(x + i), u = v + 1.0;
    const I<double> raw = bits<I<double>>(u), e = (raw - 0x3fe6a09e667f3bcdLL) >> 52;
    const V<double> f = bits<V<double>>(raw - (e << 52)) - 1.0, s = f / (f + 2.0), q = s * s;
    V<double> p = splat(2.0 / 13);
    p = p * q + 2.0 / 11;
    p = p * q + 2.0 / 9;
    p = p * q + 2.0 / 7;
    p = p * q + 2.0 / 5;
    p = p * q + 2.0 / 3;
    const V<double> log =
        __builtin_convertvector(e, V<double>) * 0.69314718055994530942 + (s * 2.0 + s * q * p);
    store(out + i, v < 0x1p-26 ? v - v * v * 0.5 : log);
  }
}
CROSSENT_INLINE void log1p_lanes(double, const double* x, double* out) {
  for (int l = 0; l < kLanes<double>; ++l) out[l] = std::log1p(x[l]);
}

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
  LaneSum<T> mass, gap;
};
// As narrow_gap, for every lane; a(c) is what class c weighs. `odd` is set where a sum is infinite.
template <class T, class F>
CROSSENT_INLINE LaneGap<T> lane_gap(const V<T>* z, int classes, V<T> m, I<T>& odd, F a) {
  const V<T> none = splat(-std::numeric_limits<T>::infinity());
  const LaneGap<T> g = {sum_classes<T>(classes, a),
                        sum_classes<T>(classes, [&](int c) __attribute__((always_inline)) {
                          const V<T> w = a(c);
                          return ((z[c] == none) & (w == T(0))) ? V<T>{} : w * (m - z[c]);
                        })};
  odd |= (g.gap.sum - g.gap.sum != T(0)) | (g.mass.sum - g.mass.sum != T(0));
  return g;
}

// finish_row of kernels.h for index targets without smoothing, z-loss and statistics.
template <class T>
CROSSENT_INLINE void finish_tile(const Problem<T>& p, int64_t row, int count, const V<T>* z, V<T> m,
                                 I<T> odd, const LaneSum<T>& below, I<T> ties) {
  constexpr int L = kLanes<T>;
  const Targets<T> targets(p, row, count);
  const V<T> picked = targets.look_up(
      [&](int l, int c) __attribute__((always_inline)) { return z[c][l]; });
  V<T> mass = splat(T(1));
  if (p.weight)
    mass = targets.look_up([&](int, int c) __attribute__((always_inline)) { return p.weight[c]; });
  if (p.sample_weight.data) mass = mass * read_numbers(p.sample_weight, row, count);

  alignas(64) double rest[L], log_sum[L];
  for (int l = 0; l < L; ++l)
    rest[l] = double(below[l] * Wide<T>(Exp<T>::kUnscale) + double(ties[l] - 1));
  log1p_lanes(T(), rest, log_sum);
  alignas(64) T loss[L], rests[L];
  for (int l = 0; l < L; ++l) {
    rests[l] = T(rest[l]);
    loss[l] = T(Wide<T>(mass[l]) * ((Wide<T>(m[l]) - Wide<T>(picked[l])) + log_sum[l]));
  }
  const V<T> weighed = mass == T(0) ? V<T>{} : load(loss);  // 0 * inf = 0
  write_numbers(p.loss + (row - p.first), count, targets.dead ? V<T>{} : weighed);
  write_numbers(p.mass + (row - p.first), count, targets.dead ? V<T>{} : mass);
  write_numbers(&p.saved_at(row, kMaximum), count, m);
  write_numbers(&p.saved_at(row, kRest), count, load(rests));
  const I<T> alone = odd | (~targets.dead & (targets.target < 0));
  if (any<T>(alone))
    for (int l = 0; l < count; ++l)
      if (alone[l]) forward_row(p, row + l);
}

template <class T>
CROSSENT_APART void forward_tile(const Problem<T>& p, int64_t row, int count) {
  const T lowest = -std::numeric_limits<T>::infinity();
  const int classes = int(p.classes);
  const Options& o = p.options;
  V<T> z[kMaxLaneClasses], y[kMaxLaneClasses];
  read_tile(p.logits, Tile<T>(p.logits, row, count, p.rows, classes), classes, z);
  map_tile(p, z);

  V<T> m = splat(lowest);
  I<T> nan = {};
  for (int c = 0; c < classes; ++c) {
    m = z[c] > m ? z[c] : m;
    nan |= z[c] != z[c];
  }
  // Rows that need care are done one by one: nan, infinite and far maxima, all masked, infinite sums.
  const V<T> size = m < T(0) ? -m : m;
  I<T> odd = ~(size <= Exp<T>::kFar) | nan;
  const Origin<T> origin(odd ? V<T>{} : m);
  I<T> ties = {};
  const LaneSum<T> below = sum_classes<T>(classes, [&](int c) __attribute__((always_inline)) {
    const I<T> tie = z[c] == m;
    ties -= tie;
    return tie ? V<T>{} : origin.template exp<false>(z[c]);
  });
  LaneSum<T> moment{};
  if (o.stats)
    moment = sum_classes<T>(classes, [&](int c) __attribute__((always_inline)) {
      return origin.template exp<false>(z[c]) * origin.template gap<false>(z[c]);
    });
  LaneGap<T> given{}, plain{}, uniform{};
  V<T> open = {};
  const auto weight = [&](int c) __attribute__((always_inline)) {
    return splat(p.weight ? p.weight[c] : T(1));
  };
  if (!p.by_index()) {
    read_tile(p.probabilities, Tile<T>(p.probabilities, row, count, p.rows, classes), classes, y);
    given = lane_gap<T>(z, classes, m, odd, [&](int c) __attribute__((always_inline)) {
      return y[c] * weight(c);
    });
    if (p.weight && o.stats)
      plain = lane_gap<T>(z, classes, m, odd, [&](int c) __attribute__((always_inline)) { return y[c]; });
  }
  if (o.label_smoothing != 0) {
    uniform = lane_gap<T>(z, classes, m, odd, [&](int c) __attribute__((always_inline)) {
      return z[c] == lowest ? V<T>{} : weight(c);
    });
    for (int c = 0; c < classes; ++c) open += z[c] == lowest ? V<T>{} : splat(T(1));
  }
  if (p.plain() && !o.stats && o.z_loss == 0)
    return finish_tile(p, row, count, z, m, odd, below, ties);
  for (int l = 0; l < count; ++l) {
    const int64_t target = p.by_index() ? p.index(row + l) : 0;
    if (odd[l]) {
      forward_row(p, row + l);
    } else if (p.by_index() && target == o.ignore_index) {
      skip_row(p, row + l);
    } else {
      RowState<T> s;
      s.m = m[l];
      s.rest = below[l] * Wide<T>(Exp<T>::kUnscale) + double(ties[l] - 1);
      s.moment = moment[l] * Wide<T>(Exp<T>::kUnscale);
      s.mass = given.mass[l], s.gap = given.gap[l];
      s.plain_mass = plain.mass[l], s.plain_gap = plain.gap[l];
      s.uniform_mass = uniform.mass[l], s.uniform_gap = uniform.gap[l], s.open = open[l];
      finish_row(p, row + l, target, s);
    }
  }
}

template <class T>
CROSSENT_APART void backward_tile(const Problem<T>& p, int64_t row, int count) {
  constexpr int L = kLanes<T>;
  const int classes = int(p.classes);
  const Options& o = p.options;
  const V<T> none = splat(-std::numeric_limits<T>::infinity());
  V<T> z[kMaxLaneClasses], y[kMaxLaneClasses], slope[kMaxLaneClasses];
  read_tile(p.logits, Tile<T>(p.logits, row, count, p.rows, classes), classes, z);
  map_tile(p, z, slope);
  if (!p.by_index())
    read_tile(p.probabilities, Tile<T>(p.probabilities, row, count, p.rows, classes), classes, y);

  const bool smooth = o.label_smoothing != 0, mapped = p.mapped();
  const bool plain = p.plain() && o.z_loss == 0;
  const Targets<T> targets(p, row, count);
  using Int = typename Targets<T>::Int;
  const I<T> target = targets.target, dead = targets.dead;
  V<T> w_target = splat(T(1)), tilt = {}, uniform = {}, uniform_mass = {};
  if (p.weight && p.by_index())
    w_target = targets.look_up(
        [&](int, int c) __attribute__((always_inline)) { return p.weight[c]; });
  V<T> mass = w_target, up = read_numbers(p.upstream, row, count);
  if (p.sample_weight.data) up = up * read_numbers(p.sample_weight, row, count);
  if (!plain)
    for (int l = 0; l < count; ++l) {
      const RowGradient<T> g = prepare_gradient(p, row + l, targets.at[l] < 0 ? 0 : targets.at[l]);
      mass[l] = g.mass, tilt[l] = g.tilt, uniform[l] = g.uniform, uniform_mass[l] = g.uniform_mass;
    }
  // nan and far maxima, and targets that are no class, need care.
  const V<T> saved_maximum = read_saved(p, row, count, kMaximum);
  const I<T> usual = (saved_maximum <= Exp<T>::kFar) & (saved_maximum >= -Exp<T>::kFar);
  const I<T> alone = ~dead & ~(p.by_index() ? usual & (target >= 0) : usual);
  const V<T> m = usual ? saved_maximum : V<T>{}, rest = read_saved(p, row, count, kRest);
  const V<T> inverse = T(1) / (rest + T(1)), rest_share = rest * inverse;
  const Origin<T> origin(m);
  const V<T> coefficient = up * (mass + tilt) * inverse, subtract = up * uniform;
  const T keep = T(1 - o.label_smoothing);
  // The targets' entries: minus the share of the others, see target_entry.
  const V<T> z_target =
      targets.look_up([&](int l, int c) __attribute__((always_inline)) { return z[c][l]; });
  const V<T> p_target = origin.template exp<false>(z_target) * Exp<T>::kUnscale * inverse;
  const V<T> others_target = z_target == m ? rest_share : T(1) - p_target;
  const V<T> share = z_target == none ? V<T>{} : uniform;  // a masked target is not smoothed
  V<T> entry = up * ((uniform * uniform_mass + tilt) * p_target - keep * w_target * others_target -
                     share * w_target);
  if (mapped)
    entry = entry * targets.look_up(
        [&](int l, int c) __attribute__((always_inline)) { return slope[c][l]; });

  V<T> result[kMaxLaneClasses];
  for (int c = 0; c < classes; ++c) {
    const T w = p.weight ? p.weight[c] : T(1);
    const V<T> e = origin.template exp<false>(z[c]) * Exp<T>::kUnscale;
    V<T> r;
    if (p.by_index()) {
      r = e * coefficient;
      if (smooth) r = z[c] == none ? V<T>{} : r - subtract * w;
    } else {
      V<T> a = y[c];
      if (smooth) a = a * keep + (z[c] == none ? V<T>{} : uniform);
      a = a * w;
      const V<T> prob = e * inverse;
      const V<T> others = z[c] == m ? rest_share : T(1) - prob;
      r = (((mass - a) + tilt) * prob - a * others) * up;
    }
    if (mapped) r = r * slope[c];
    r = target == Int(c) ? entry : r;
    result[c] = dead ? V<T>{} : r;
  }
  const bool care = any<T>(alone);
  bool skip[L];
  for (int l = 0; l < L; ++l) skip[l] = alone[l];
  const Tile<T> out(p.gradient, row, count, p.rows, classes);
  write_tile(p.gradient, out, classes, count, care || count < L ? skip : nullptr, result);
  if (care)
    for (int l = 0; l < count; ++l)
      if (alone[l]) backward_row(p, row + l);
}

// Whether rows are better done side by side. Where classes are next to each other, a row alone has
// its setting up to pay, and rows side by side the crosswise reading, backward the writing too: measured.
constexpr int kForwardLanes = kMaxLaneClasses, kBackwardLanes = 80;
template <class T>
CROSSENT_INLINE bool side_by_side(const Problem<T>& p, int most) {
  return p.classes <= (p.logits.class_stride == 1 ? most : kMaxLaneClasses);
}

template <class T, class Row, class Tile>
CROSSENT_INLINE void each(bool together, int64_t begin, int64_t end, Row row, Tile tile) {
  if (!together)
    for (int64_t r = begin; r < end; ++r) row(r);
  else
    for (int64_t r = begin; r < end; r += kLanes<T>)
      tile(r, int(end - r < kLanes<T> ? end - r : kLanes<T>));
}

template <class T>
void forward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  each<T>(
      side_by_side(p, kForwardLanes), begin, end,
      [&](int64_t r) __attribute__((always_inline)) { forward_row(p, r); },
      [&](int64_t r, int count) __attribute__((always_inline)) { forward_tile(p, r, count); });
}
template <class T>
void backward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  each<T>(
      side_by_side(p, kBackwardLanes), begin, end,
      [&](int64_t r) __attribute__((always_inline)) { backward_row(p, r); },
      [&](int64_t r, int count) __attribute__((always_inline)) { backward_tile(p, r, count); });
}

}  // namespace crossent::CROSSENT_ISA
