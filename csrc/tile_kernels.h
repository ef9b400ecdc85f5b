// Rows side by side: one row in each lane of a vector. For few classes, and for classes that are
// not next to each other in memory (images: N, C, H, W), where a row alone would fill no vector.
// Torch-free. Same results as row_kernels.h to the last digits, not to the last bit.
#pragma once

#include "gradient.h"
#include "planes.h"
#include "tile_sums.h"

namespace crossent::CROSSENT_ISA {

// finish_row of row_kernels.h for index targets without smoothing, z-loss and statistics.
template <class T, bool kPlain>
CROSSENT_INLINE void finish_tile(const Problem<T>& p, int64_t row, int count, const V<T>* z,
                                 const TileState<T>& s, const Targets<T>& targets) {
  using W = Accumulator<T>;
  constexpr int L = kLanes<T>;
  const V<T> picked = targets.pick(z, int(p.classes));
  V<T> weight = splat(T(1));
  if (!kPlain && p.weight)
    weight = targets.look_up([&](int, int c) CROSSENT_INLINE_LAMBDA { return p.weight[c]; });
  if (!kPlain && p.sample_weight.data) weight = weight * read_numbers(p.sample_weight, row, count);

  alignas(64) double rest[L], log_sum[L];
  for (int l = 0; l < L; ++l) rest[l] = double(s.rest(l));
  log1p_lanes(T(), rest, log_sum);
  alignas(64) T loss[L], rests[L];
  for (int l = 0; l < L; ++l) {
    rests[l] = T(rest[l]);
    loss[l] = T(W(weight[l]) * ((W(s.m[l]) - W(picked[l])) + log_sum[l]));
  }
  const V<T> weighted = weight == T(0) ? V<T>{} : load(loss);  // 0 * inf = 0
  write_numbers(p.loss + (row - p.first), count, targets.ignored ? V<T>{} : weighted);
  write_numbers(p.denominator_weight + (row - p.first), count, targets.ignored ? V<T>{} : weight);
  write_numbers(&p.saved_at(row, kMaximum), count, s.m);
  write_numbers(&p.saved_at(row, kRest), count, load(rests));
  const I<T> needs_slow_path = s.needs_slow_path | (~targets.ignored & (targets.target < 0));
  if (any<T>(needs_slow_path))
    for (int l = 0; l < count; ++l)
      if (needs_slow_path[l]) forward_row(p, row + l);
}

// A tile as it is worked on: scored logits and their slopes, probabilities that are targets, exps.
template <class T>
struct TileNumbers {
  V<T> z[kMaxLaneClasses], slope[kMaxLaneClasses], y[kMaxLaneClasses], e[kMaxLaneClasses];

  CROSSENT_INLINE void read(const Problem<T>& p, int64_t row, int count) {
    const int classes = int(p.classes);
    read_tile(p.logits, Tile<T>(p.logits, row, count, p.rows, classes), classes, z);
  }
  CROSSENT_INLINE void map(const Problem<T>& p, int64_t row, int count, bool slopes) {
    const int classes = int(p.classes);
    map_tile(p, z, slopes ? slope : nullptr);
    if (p.by_index()) return;
    read_tile(p.probabilities, Tile<T>(p.probabilities, row, count, p.rows, classes), classes, y);
  }
};

// Whether nothing is asked for but torch's own loss of index targets: what tiles are made fast for.
template <class T>
CROSSENT_INLINE bool is_plain(const Problem<T>& p) {
  return p.one_hot() && !p.options.stats && p.options.z_loss == 0 && !p.mapped() && !p.weight &&
         !p.sample_weight.data;
}

// From the numbers to the outputs of forward.
template <class T, bool kPlain>
CROSSENT_INLINE void score_tile(const Problem<T>& p, int64_t row, int count,
                                const TileNumbers<T>& t, const Targets<T>& targets, V<T>* e) {
  TileState<T> s{};
  sum_tile<T, kPlain>(p, t.z, s, e);
  if (kPlain || (p.one_hot() && !p.options.stats && p.options.z_loss == 0))
    return finish_tile<T, kPlain>(p, row, count, t.z, s, targets);
  TileTargets<T> of_targets{};
  if (!p.one_hot()) sum_targets(p, t.z, t.y, s, of_targets);
  for (int l = 0; l < count; ++l) {
    const int64_t target = p.by_index() ? p.index(row + l) : 0;
    if (s.needs_slow_path[l]) forward_row(p, row + l);
    else if (p.by_index() && target == p.options.ignore_index) skip_row(p, row + l);
    else finish_row(p, row + l, target, of_targets.row(s, l));
  }
}

template <class T, bool kPlain>
CROSSENT_NOINLINE void forward_tile(const Problem<T>& p, int64_t row, int count) {
  TileNumbers<T> t;
  t.read(p, row, count);
  if (!kPlain) t.map(p, row, count, false);
  score_tile<T, kPlain>(p, row, count, t, Targets<T>(p, row, count), static_cast<V<T>*>(nullptr));
}

// What the gradients of a tile's rows share. Rows that need the slow path are done one by one: nan
// and far maxima, and targets that are no class.
template <class T, bool kPlain>
struct TileFactors {
  GradientFactors<V<T>> g;
  V<T> target_class_weight;
  I<T> needs_slow_path;

  CROSSENT_INLINE TileFactors(const Problem<T>& p, int64_t row, int count,
                              const Targets<T>& targets) {
    const V<T> saved_maximum = read_saved(p, row, count, kMaximum);
    const I<T> near = (saved_maximum <= Exp<T>::kFar) & (saved_maximum >= -Exp<T>::kFar);
    needs_slow_path = ~targets.ignored & ~(p.by_index() ? near & (targets.target >= 0) : near);
    const V<T> rest = read_saved(p, row, count, kRest), one = splat(T(1));
    g.m = near ? saved_maximum : V<T>{};
    g.inverse = T(1) / (rest + T(1)), g.rest_share = rest * g.inverse;
    g.scale = read_numbers(p.grad_output, row, count);
    g.target_weight = target_class_weight = g.keep = one;
    g.tilt = g.uniform = g.uniform_weight = V<T>{};
    if (!kPlain) read_options(p, row, count, targets);
  }
  CROSSENT_INLINE void read_options(const Problem<T>& p, int64_t row, int count,
                                    const Targets<T>& targets) {
    if (p.weight && p.by_index())
      target_class_weight =
          targets.look_up([&](int, int c) CROSSENT_INLINE_LAMBDA { return p.weight[c]; });
    g.target_weight = target_class_weight;
    g.keep = splat(T(1 - p.options.label_smoothing));
    if (p.sample_weight.data) g.scale = g.scale * read_numbers(p.sample_weight, row, count);
    if (!p.one_hot() || p.options.z_loss != 0)
      for (int l = 0; l < count; ++l) {
        const int64_t target = targets.at[l] < 0 ? 0 : targets.at[l];
        const GradientFactors<T> own = gradient_factors(p, row + l, target);
        g.target_weight[l] = own.target_weight, g.tilt[l] = own.tilt;
        g.uniform[l] = own.uniform, g.uniform_weight[l] = own.uniform_weight;
      }
  }
};

// The entries of index targets, of class weight w, whose logits are z and whose
// exps, kScale times too large, e.
template <class T>
CROSSENT_INLINE V<T> target_entries(const GradientFactors<V<T>>& g, V<T> w, V<T> z, V<T> e) {
  const V<T> probability = e * Exp<T>::kUnscale * g.inverse;
  const V<T> others = z == g.m ? g.rest_share : T(1) - probability;
  const V<T> none = splat(-std::numeric_limits<T>::infinity());
  const V<T> share = z == none ? V<T>{} : g.uniform;  // a masked target is not smoothed
  return target_gradient(g, probability, others, w, share * w);
}

// From the numbers to the gradient, over the exps in `e`: those of all classes, kScale times too
// large, unless they are still to be taken.
template <class T, bool kPlain, bool kHasExps>
CROSSENT_INLINE void differentiate_tile(const Problem<T>& p, int64_t row, int count,
                                        TileNumbers<T>& t, const Targets<T>& targets) {
  constexpr int L = kLanes<T>;
  const int classes = int(p.classes);
  const bool mapped = !kPlain && p.mapped(), by_index = kPlain || p.by_index();
  using Int = typename Targets<T>::Int;
  const TileFactors<T, kPlain> factors(p, row, count, targets);
  const GradientFormula<T, V<T>> formula(factors.g, !kPlain && p.options.label_smoothing != 0);
  if (!kHasExps) {
    const Origin<T> origin(factors.g.m);
    for (int c = 0; c < classes; ++c) t.e[c] = origin.template exp<false>(t.z[c]);
  }
  V<T> entry = target_entries<T>(factors.g, factors.target_class_weight, targets.pick(t.z, classes),
                                 targets.pick(t.e, classes));
  if (mapped) entry = entry * targets.pick(t.slope, classes);
  for (int c = 0; c < classes; ++c) {
    const V<T> w = splat(!kPlain && p.weight ? p.weight[c] : T(1)), e = t.e[c] * Exp<T>::kUnscale;
    V<T> r = by_index ? formula.for_index(t.z[c], e, w)
                      : formula.for_probabilities(t.z[c], e, w, t.y[c]);
    if (mapped) r = r * t.slope[c];
    r = targets.target == Int(c) ? entry : r;
    t.e[c] = targets.ignored ? V<T>{} : r;
  }
  const bool any_slow = any<T>(factors.needs_slow_path);
  bool skip[L];
  if (any_slow || count < L)
    for (int l = 0; l < L; ++l) skip[l] = factors.needs_slow_path[l];
  const Tile<T> out(p.gradient, row, count, p.rows, classes);
  write_tile(p.gradient, out, classes, count, any_slow || count < L ? skip : nullptr, t.e);
  if (any_slow)
    for (int l = 0; l < count; ++l)
      if (skip[l]) backward_row(p, row + l);
}

template <class T>
CROSSENT_NOINLINE void backward_tile(const Problem<T>& p, int64_t row, int count) {
  TileNumbers<T> t;
  t.read(p, row, count);
  t.map(p, row, count, p.mapped());
  differentiate_tile<T, false, false>(p, row, count, t, Targets<T>(p, row, count));
}

// Whether rows are better done side by side. Where classes are next to each other, a row alone has
// its setting up to pay, and rows side by side the crosswise reading, backward the writing too:
// measured.
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
  const bool plain = is_plain(p);
  const bool together = side_by_side(p, kForwardLanes);
  by_planes(p, begin, end, false,
            [&](const Problem<T>& q, int64_t from, int64_t to) CROSSENT_INLINE_LAMBDA {
              each<T>(
                  together, from, to, [&](int64_t r) CROSSENT_INLINE_LAMBDA { forward_row(q, r); },
                  [&](int64_t r, int count) CROSSENT_INLINE_LAMBDA {
                    plain ? forward_tile<T, true>(q, r, count)
                          : forward_tile<T, false>(q, r, count);
                  });
            });
}
template <class T>
void backward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  const bool together = side_by_side(p, kBackwardLanes);
  by_planes(p, begin, end, true,
            [&](const Problem<T>& q, int64_t from, int64_t to) CROSSENT_INLINE_LAMBDA {
              each<T>(
                  together, from, to, [&](int64_t r) CROSSENT_INLINE_LAMBDA { backward_row(q, r); },
                  [&](int64_t r, int count) CROSSENT_INLINE_LAMBDA { backward_tile(q, r, count); });
            });
}

}  // namespace crossent::CROSSENT_ISA
