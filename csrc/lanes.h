// Rows side by side: one row in each lane of a vector. For few classes, and for classes that are not
// next to each other in memory (images: N, C, H, W), where a row alone would fill no vector.
// Torch-free. Same results as kernels.h to the last digits, not to the last bit.
#pragma once

#include "kernels.h"

namespace crossent::CROSSENT_ISA {

constexpr int kMaxLaneClasses = 256;  // a tile of this many classes stays in the first cache

// Where the rows of a tile begin, in elements; lanes past the end repeat the last row.
template <class T>
struct Tile {
  int64_t offset[kLanes<T>] = {};
  bool unit = false;  // the rows are next to each other

  CROSSENT_INLINE Tile(const Layout& layout, int64_t row, int count) {
    int64_t step;
    for (int l = 0; l < count;) {
      const int64_t first = layout(row + l);
      const int run = layout.run(row + l, count - l, &step);
      for (int k = 0; k < run; ++k) offset[l + k] = first + k * step;
      unit = run == kLanes<T> && step == 1;
      l += run;
    }
    for (int l = count; l < kLanes<T>; ++l) offset[l] = offset[count - 1];
  }
};

// Runs f on the stored numbers, converters to and from T beside them.
template <class T, class F>
CROSSENT_INLINE void with_storage(const Tensor2& t, F f) {
  switch (t.dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(t.data), [](float x) __attribute__((always_inline)) { return T(x); },
               [](T x) __attribute__((always_inline)) { return float(x); });
    case Dtype::kFloat64:
      return f(static_cast<double*>(t.data), [](double x) __attribute__((always_inline)) { return T(x); },
               [](T x) __attribute__((always_inline)) { return double(x); });
    case Dtype::kBFloat16:
      return f(static_cast<uint16_t*>(t.data),
               [](uint16_t h) __attribute__((always_inline)) { return T(from_bfloat16(h)); },
               [](T x) __attribute__((always_inline)) { return to_bfloat16(float(x)); });
    case Dtype::kFloat16:
      return f(static_cast<uint16_t*>(t.data),
               [](uint16_t h) __attribute__((always_inline)) { return T(from_float16(h)); },
               [](T x) __attribute__((always_inline)) { return to_float16(float(x)); });
  }
}

// All classes of a tile: class c in out[c]. Rows that are not next to each other are read one after
// the other, so that memory is walked in order and no vector is loaded from stores just made.
template <class T>
CROSSENT_INLINE void read_tile(const Tensor2& t, const Tile<T>& tile, int classes, V<T>* out) {
  constexpr int L = kLanes<T>;
  T* each = reinterpret_cast<T*>(out);
  with_storage<T>(t, [&](const auto* p, auto from, auto) __attribute__((always_inline)) {
    if (tile.unit)
      for (int c = 0; c < classes; ++c)
        for (int l = 0; l < L; ++l)
          each[c * L + l] = from(p[tile.offset[0] + c * t.class_stride + l]);
    else
      for (int l = 0; l < L; ++l)
        for (int c = 0; c < classes; ++c)
          each[c * L + l] = from(p[tile.offset[l] + c * t.class_stride]);
  });
}

template <class T>
CROSSENT_INLINE void map_tile(const Problem<T>& p, V<T>* z) {
  if (!p.mapped()) return;
  const T scale = T(p.options.logit_scale), cap = T(p.options.softcap);
  for (int c = 0; c < p.classes; ++c) {
    z[c] = z[c] * scale;
    if (cap != 0) z[c] = tanh_(z[c] / cap) * cap;
  }
}

// The rows of a tile that are meant, back to where they belong.
template <class T>
CROSSENT_INLINE void write_tile(const Tensor2& t, const Tile<T>& tile, int classes, int count,
                                const bool* skip, const V<T>* in) {
  constexpr int L = kLanes<T>;
  const T* each = reinterpret_cast<const T*>(in);
  with_storage<T>(t, [&](auto* p, auto, auto to) __attribute__((always_inline)) {
    if (tile.unit && !skip)
      for (int c = 0; c < classes; ++c)
        for (int l = 0; l < L; ++l)
          p[tile.offset[0] + c * t.class_stride + l] = to(each[c * L + l]);
    else
      for (int l = 0; l < count; ++l)
        for (int c = 0; c < classes && !(skip && skip[l]); ++c)
          p[tile.offset[l] + c * t.class_stride] = to(each[c * L + l]);
  });
}

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
    store(out + i, v < 0x1p-28 ? v - v * v * 0.5 : log);
  }
}
CROSSENT_INLINE void log1p_lanes(double, const double* x, double* out) {
  for (int l = 0; l < kLanes<double>; ++l) out[l] = std::log1p(x[l]);
}

// A sum for every lane, and what rounding took from it.
template <class T>
struct LaneSum {
  V<T> sum, lost;

  CROSSENT_INLINE double operator[](int l) const { return double(sum[l]) + double(lost[l]); }
};
// Sums over the classes for every lane: eight terms pairwise, then these with their rounding errors
// kept (Knuth's two-sum), so that the sum is as exact as its terms.
template <class T, class F>
CROSSENT_INLINE LaneSum<T> sum_classes(int classes, F term) {
  LaneSum<T> s{};
  const auto add = [&](V<T> x) __attribute__((always_inline)) {
    const V<T> sum = s.sum + x, part = sum - s.sum;
    s.lost += (s.sum - (sum - part)) + (x - part);
    s.sum = sum;
  };
  int c = 0;
  for (; c + 8 <= classes; c += 8) {
    V<T> t[8];
    for (int k = 0; k < 8; ++k) t[k] = term(c + k);
    add(((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7])));
  }
  for (; c < classes; ++c) add(term(c));
  return s;
}

template <class T>
struct LaneGap {
  V<T> mass, gap;
};
// As block_gap, for every lane; a(c) is what class c weighs.
template <class T, class F>
CROSSENT_INLINE LaneGap<T> lane_gap(const V<T>* z, int classes, V<T> m, F a) {
  const V<T> none = splat(-std::numeric_limits<T>::infinity());
  V<T> mass = {}, gap = {};
  for (int c = 0; c < classes; ++c) {
    const V<T> w = a(c);
    mass += w;
    gap += ((z[c] == none) & (w == T(0))) ? V<T>{} : w * (m - z[c]);
  }
  return {mass, gap};
}

template <class T>
CROSSENT_INLINE void forward_tile(const Problem<T>& p, int64_t row, int count) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const int classes = int(p.classes);
  const Options& o = p.options;
  V<T> z[kMaxLaneClasses], y[kMaxLaneClasses];
  read_tile(p.logits, Tile<T>(p.logits.rows, row, count), classes, z);
  map_tile(p, z);

  V<T> m = splat(lowest);
  I<T> nan = {}, huge = {};
  for (int c = 0; c < classes; ++c) {
    m = z[c] > m ? z[c] : m;
    nan |= z[c] != z[c];
  }
  // Rows that need care are done one by one: nan, infinite and huge maxima, all masked.
  const V<T> size = m < T(0) ? -m : m;
  huge = ~(size <= Exp<T>::kHuge) | nan;
  const TwoSum<T> origin(huge ? V<T>{} : m);
  I<T> ties = {};
  const LaneSum<T> below = sum_classes<T>(classes, [&](int c) __attribute__((always_inline)) {
    const I<T> tie = z[c] == m;
    ties -= tie;
    return tie ? V<T>{} : origin.template exp<false>(z[c]);
  });
  LaneSum<T> moment{};
  if (o.stats)
    moment = sum_classes<T>(classes, [&](int c) __attribute__((always_inline)) {
      return origin.template exp<false>(z[c]) * (origin.m - origin.clamp(z[c]));
    });
  LaneGap<T> given{}, plain{}, uniform{};
  V<T> open = {};
  const auto weight = [&](int c) __attribute__((always_inline)) {
    return splat(p.weight ? p.weight[c] : T(1));
  };
  if (!p.by_index()) {
    read_tile(p.probabilities, Tile<T>(p.probabilities.rows, row, count), classes, y);
    given = lane_gap<T>(z, classes, m, [&](int c) __attribute__((always_inline)) {
      return y[c] * weight(c);
    });
    if (p.weight && o.stats)
      plain = lane_gap<T>(z, classes, m, [&](int c) __attribute__((always_inline)) { return y[c]; });
  }
  if (o.label_smoothing != 0) {
    uniform = lane_gap<T>(z, classes, m, [&](int c) __attribute__((always_inline)) {
      return z[c] == lowest ? V<T>{} : weight(c);
    });
    for (int c = 0; c < classes; ++c) open += z[c] == lowest ? V<T>{} : splat(T(1));
  }
  if (p.plain() && !o.stats && o.z_loss == 0) {
    double rest[L], log_sum[L];
    for (int l = 0; l < L; ++l)
      rest[l] = below[l] * double(Exp<T>::kUnscale) + double(ties[l] - 1);
    log1p_lanes(T(), rest, log_sum);
    for (int l = 0; l < count; ++l) {
      const int64_t target = p.index(row + l);
      const bool usual = !huge[l] & (target >= 0) & (target < classes) & (target != o.ignore_index);
      if (!usual) {
        forward_row(p, row + l);
        continue;
      }
      const double mass = p.weight ? double(p.weight[target]) : 1;
      const double factor = p.sample_weight.data ? double(p.sample_weight(row + l)) : 1;
      const double loss = (double(m[l]) - double(z[target][l])) + log_sum[l];
      p.loss[row + l] = T(times(factor * mass, loss));
      p.mass[row + l] = T(factor * mass);
      p.saved[(row + l) * kPlainSaved + kMaximum] = m[l];
      p.saved[(row + l) * kPlainSaved + kRest] = T(rest[l]);
    }
    return;
  }
  for (int l = 0; l < count; ++l) {
    const int64_t target = p.by_index() ? p.index(row + l) : 0;
    if (huge[l]) {
      forward_row(p, row + l);
    } else if (p.by_index() && target == o.ignore_index) {
      skip_row(p, row + l);
    } else {
      RowState<T> s;
      s.m = m[l];
      s.rest = below[l] * double(Exp<T>::kUnscale) + double(ties[l] - 1);
      s.moment = moment[l] * double(Exp<T>::kUnscale);
      s.mass = given.mass[l], s.gap = given.gap[l];
      s.plain_mass = plain.mass[l], s.plain_gap = plain.gap[l];
      s.uniform_mass = uniform.mass[l], s.uniform_gap = uniform.gap[l], s.open = open[l];
      finish_row(p, row + l, target, s);
    }
  }
}

template <class T>
CROSSENT_INLINE void backward_tile(const Problem<T>& p, int64_t row, int count) {
  constexpr int L = kLanes<T>;
  const int classes = int(p.classes);
  const Options& o = p.options;
  const V<T> none = splat(-std::numeric_limits<T>::infinity());
  V<T> z[kMaxLaneClasses], y[kMaxLaneClasses];
  read_tile(p.logits, Tile<T>(p.logits.rows, row, count), classes, z);
  map_tile(p, z);
  if (!p.by_index())
    read_tile(p.probabilities, Tile<T>(p.probabilities.rows, row, count), classes, y);

  const bool smooth = o.label_smoothing != 0, mapped = p.mapped();
  const bool plain = p.plain() && o.z_loss == 0;
  alignas(64) T maximum[L], rest[L], upstream[L], masses[L], tilts[L] = {}, uniforms[L] = {},
      uniform_masses[L] = {}, weights[L];
  int targets[L];  // -1: none
  bool ignored[L], any_alone = false, alone[L];
  for (int l = 0; l < L; ++l) {
    const int64_t r = row + (l < count ? l : count - 1);
    const int64_t t = p.by_index() ? p.index(r) : -1;
    const T* saved = p.saved + r * p.saved_count();
    const bool inside = t >= 0 && t < classes;
    ignored[l] = p.by_index() && t == o.ignore_index;
    targets[l] = inside && !ignored[l] ? int(t) : -1;
    weights[l] = p.weight && inside ? p.weight[t] : T(1);
    maximum[l] = saved[kMaximum], rest[l] = saved[kRest];
    upstream[l] = p.upstream(r) * (p.sample_weight.data ? p.sample_weight(r) : T(1));
    masses[l] = weights[l];
    if (!plain) {
      const RowGradient<T> g = prepare_gradient(p, r, ignored[l] ? 0 : t);
      masses[l] = g.mass, tilts[l] = g.tilt;
      uniforms[l] = g.uniform, uniform_masses[l] = g.uniform_mass;
    }
    // nan and huge maxima, and targets that are no class, need care.
    const bool usual = maximum[l] <= Exp<T>::kHuge && maximum[l] >= -Exp<T>::kHuge &&
                       (inside || !p.by_index());
    alone[l] = !usual && !ignored[l] && l < count;
    any_alone |= alone[l];
    if (!usual || ignored[l]) maximum[l] = 0;
  }
  I<T> dead, target;
  for (int l = 0; l < L; ++l) dead[l] = ignored[l] ? -1 : 0, target[l] = targets[l];
  const V<T> m = load(maximum), inverse = T(1) / (load(rest) + T(1));
  const V<T> rest_share = load(rest) * inverse, up = load(upstream), mass = load(masses);
  const V<T> tilt = load(tilts), uniform = load(uniforms);
  const TwoSum<T> origin(m);
  const V<T> coefficient = up * (mass + tilt) * inverse, subtract = up * uniform;
  const T keep = T(1 - o.label_smoothing);
  V<T> result[kMaxLaneClasses], e_target{};
  for (int c = 0; c < classes; ++c) {
    const T w = p.weight ? p.weight[c] : T(1);
    const V<T> e = origin.template exp<false>(z[c]) * Exp<T>::kUnscale;
    V<T> r;
    if (p.by_index()) {
      r = e * coefficient;
      if (smooth) r = z[c] == none ? V<T>{} : r - subtract * w;
      e_target = target == c ? e : e_target;
    } else {
      V<T> a = y[c];
      if (smooth) a = a * keep + (z[c] == none ? V<T>{} : uniform);
      a = a * w;
      const V<T> prob = e * inverse;
      const V<T> others = z[c] == m ? rest_share : T(1) - prob;
      r = (((mass - a) + tilt) * prob - a * others) * up;
    }
    if (mapped) r = r * map_slope<T>(z[c], o);
    result[c] = dead ? V<T>{} : r;
  }
  if (p.by_index()) {  // the targets' entries: minus the share of the others, see target_entry
    const V<T> w = load(weights), prob = e_target * inverse;
    const V<T> others = e_target == T(1) ? rest_share : T(1) - prob;
    alignas(64) T shares[L];  // of the smoothing; a masked target has none
    for (int l = 0; l < L; ++l)
      shares[l] = targets[l] >= 0 && z[targets[l]][l] == none[0] ? T(0) : uniforms[l];
    const V<T> entry = up * (((uniform * load(uniform_masses)) + tilt) * prob -
                             keep * w * others - load(shares) * w);
    for (int l = 0; l < count; ++l) {
      if (targets[l] < 0) continue;
      T slope = 1;
      if (mapped) slope = map_slope<T>(splat(T(z[targets[l]][l])), o)[0];
      result[targets[l]][l] = entry[l] * slope;
    }
  }
  const Tile<T> out(p.gradient.rows, row, count);
  write_tile(p.gradient, out, classes, count, any_alone || count < L ? alone : nullptr, result);
  for (int l = 0; l < count; ++l)
    if (alone[l]) backward_row(p, row + l);
}

// Whether rows are better done side by side. Where classes are next to each other, a row alone has
// its setting up to pay, and rows side by side the crosswise reading, backward the writing too: measured.
constexpr int kForwardLanes = 160, kBackwardLanes = 48;
template <class T>
CROSSENT_INLINE bool side_by_side(const Problem<T>& p, int most) {
  return p.classes <= (p.logits.class_stride == 1 ? most : kMaxLaneClasses);
}

template <class T>
void forward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  if (!side_by_side(p, kForwardLanes)) {
    for (int64_t row = begin; row < end; ++row) forward_row(p, row);
    return;
  }
  for (int64_t row = begin; row < end; row += kLanes<T>)
    forward_tile(p, row, int(end - row < kLanes<T> ? end - row : kLanes<T>));
}
template <class T>
void backward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  if (!side_by_side(p, kBackwardLanes)) {
    for (int64_t row = begin; row < end; ++row) backward_row(p, row);
    return;
  }
  for (int64_t row = begin; row < end; row += kLanes<T>)
    backward_tile(p, row, int(end - row < kLanes<T> ? end - row : kLanes<T>));
}

}  // namespace crossent::CROSSENT_ISA
