// Rows side by side: one row in each lane of a vector. For few classes, and for classes that are not
// next to each other in memory (images: N, C, H, W), where a row alone would fill no vector.
// Torch-free. Same results as kernels.h to the last digits, not to the last bit.
#pragma once

#include "kernels.h"

#include <type_traits>

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

template <class T, class S, class F>
CROSSENT_INLINE V<T> gather(const S* p, const Tile<T>& tile, F convert) {
  if constexpr (std::is_same_v<S, const T>)
    if (tile.unit) return load(p + tile.offset[0]);
  alignas(64) T v[kLanes<T>];
  if (tile.unit)
    for (int l = 0; l < kLanes<T>; ++l) v[l] = T(convert(p[tile.offset[0] + l]));
  else
    for (int l = 0; l < kLanes<T>; ++l) v[l] = T(convert(p[tile.offset[l]]));
  return load(v);
}

// Class c of every row of the tile.
template <class T>
CROSSENT_INLINE V<T> read_column(const Tensor2& t, const Tile<T>& tile, int64_t c) {
  const int64_t skip = c * t.class_stride;
  const auto same = [](auto x) __attribute__((always_inline)) { return x; };
  switch (t.dtype) {
    case Dtype::kFloat32: return gather<T>(static_cast<const float*>(t.data) + skip, tile, same);
    case Dtype::kFloat64: return gather<T>(static_cast<const double*>(t.data) + skip, tile, same);
    case Dtype::kBFloat16:
      return gather<T>(static_cast<const uint16_t*>(t.data) + skip, tile,
                       [](uint16_t h) __attribute__((always_inline)) { return from_bfloat16(h); });
    default:
      return gather<T>(static_cast<const uint16_t*>(t.data) + skip, tile,
                       [](uint16_t h) __attribute__((always_inline)) { return from_float16(h); });
  }
}

template <class T, class S, class F>
CROSSENT_INLINE void scatter(S* p, const Tile<T>& tile, int count, V<T> v, F convert) {
  if constexpr (std::is_same_v<S, T>)
    if (tile.unit) return store(p + tile.offset[0], v);
  alignas(64) T each[kLanes<T>];
  store(each, v);
  if (tile.unit)
    for (int l = 0; l < kLanes<T>; ++l) p[tile.offset[0] + l] = convert(each[l]);
  else
    for (int l = 0; l < count; ++l) p[tile.offset[l]] = convert(each[l]);
}

template <class T>
CROSSENT_INLINE void write_column(const Tensor2& t, const Tile<T>& tile, int count, int64_t c,
                                  V<T> v) {
  const int64_t skip = c * t.class_stride;
  switch (t.dtype) {
    case Dtype::kFloat32:
      scatter<T>(static_cast<float*>(t.data) + skip, tile, count, v,
                 [](T x) __attribute__((always_inline)) { return float(x); });
      break;
    case Dtype::kFloat64:
      scatter<T>(static_cast<double*>(t.data) + skip, tile, count, v,
                 [](T x) __attribute__((always_inline)) { return double(x); });
      break;
    case Dtype::kBFloat16:
      scatter<T>(static_cast<uint16_t*>(t.data) + skip, tile, count, v,
                 [](T x) __attribute__((always_inline)) { return to_bfloat16(float(x)); });
      break;
    default:
      scatter<T>(static_cast<uint16_t*>(t.data) + skip, tile, count, v,
                 [](T x) __attribute__((always_inline)) { return to_float16(float(x)); });
  }
}

// All classes of a tile, mapped: class c in out[c].
template <class T>
CROSSENT_INLINE void read_tile(const Problem<T>& p, const Tile<T>& tile, V<T>* out) {
  const T scale = T(p.options.logit_scale), cap = T(p.options.softcap);
  for (int c = 0; c < p.classes; ++c) {
    V<T> z = read_column(p.logits, tile, c);
    if (p.mapped()) {
      z = z * scale;
      if (cap != 0) z = tanh_(z / cap) * cap;
    }
    out[c] = z;
  }
}

// Sums over the classes for every lane, in four partial sums so that they keep their digits.
template <class T, class F>
CROSSENT_INLINE V<T> sum_classes(int classes, F term) {
  V<T> s[4] = {};
  int c = 0;
  for (; c + 4 <= classes; c += 4)
    for (int k = 0; k < 4; ++k) s[k] += term(c + k);
  for (; c < classes; ++c) s[c & 3] += term(c);
  return (s[0] + s[1]) + (s[2] + s[3]);
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
  V<T> z[kMaxLaneClasses];
  read_tile(p, Tile<T>(p.logits.rows, row, count), z);

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
  const V<T> below = sum_classes<T>(classes, [&](int c) __attribute__((always_inline)) {
    const I<T> tie = z[c] == m;
    ties -= tie;
    return tie ? V<T>{} : origin.template exp<false>(z[c]);
  });
  V<T> moment = {};
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
    const Tile<T> tile(p.probabilities.rows, row, count);
    const auto y = [&](int c) __attribute__((always_inline)) {
      return read_column(p.probabilities, tile, c);
    };
    given = lane_gap<T>(z, classes, m, [&](int c) __attribute__((always_inline)) {
      return y(c) * weight(c);
    });
    if (p.weight && o.stats) plain = lane_gap<T>(z, classes, m, y);
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
      rest[l] = double(below[l]) * double(Exp<T>::kUnscale) + double(ties[l] - 1);
    for (int l = 0; l < L; ++l) log_sum[l] = log1p_(T(), rest[l]);
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
      s.rest = double(below[l]) * double(Exp<T>::kUnscale) + double(ties[l] - 1);
      s.moment = double(moment[l]) * double(Exp<T>::kUnscale);
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
  V<T> z[kMaxLaneClasses];
  read_tile(p, Tile<T>(p.logits.rows, row, count), z);

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
  const Tile<T> given(p.by_index() ? p.logits.rows : p.probabilities.rows, row, count);
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
      V<T> a = read_column(p.probabilities, given, c);
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
    const V<T> entry = up * (((uniform * load(uniform_masses)) + tilt) * prob -
                             keep * w * others - uniform * w);
    for (int l = 0; l < count; ++l) {
      if (targets[l] < 0) continue;
      T slope = 1;
      if (mapped) slope = map_slope<T>(splat(T(z[targets[l]][l])), o)[0];
      result[targets[l]][l] = entry[l] * slope;
    }
  }
  if (!any_alone) {
    const Tile<T> out(p.gradient.rows, row, count);
    for (int c = 0; c < classes; ++c) write_column(p.gradient, out, count, c, result[c]);
    return;
  }
  for (int l = 0; l < count; ++l) {
    if (alone[l]) {
      backward_row(p, row + l);
      continue;
    }
    const Tile<T> one(p.gradient.rows, row + l, 1);
    for (int c = 0; c < classes; ++c) write_column(p.gradient, one, 1, c, splat(T(result[c][l])));
  }
}

// Whether rows are better done side by side.
template <class T>
CROSSENT_INLINE bool side_by_side(const Problem<T>& p) {
  return p.classes <= (p.logits.class_stride == 1 ? 48 : kMaxLaneClasses);
}

template <class T>
void forward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  if (!side_by_side(p)) {
    for (int64_t row = begin; row < end; ++row) forward_row(p, row);
    return;
  }
  for (int64_t row = begin; row < end; row += kLanes<T>)
    forward_tile(p, row, int(end - row < kLanes<T> ? end - row : kLanes<T>));
}
template <class T>
void backward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  if (!side_by_side(p)) {
    for (int64_t row = begin; row < end; ++row) backward_row(p, row);
    return;
  }
  for (int64_t row = begin; row < end; row += kLanes<T>)
    backward_tile(p, row, int(end - row < kLanes<T> ? end - row : kLanes<T>));
}

}  // namespace crossent::CROSSENT_ISA
