// Entropies, log-probabilities and gradients by the logit scale of rows side by side, one in each
// lane of a vector: for few classes, as tile_kernels.h for losses. Torch-free. Same contracts as the
// rows alone, which do what is unusual: nan, infinite and far maxima, all masked.
#pragma once

#include "entropy.h"
#include "log_probs.h"
#include "tile_kernels.h"

namespace crossent::CROSSENT_ISA {

// The logits of a tile as they are stored and as they are scored, and what sum_tile makes of them.
template <class T>
struct LogitTile {
  V<T> stored[kMaxLaneClasses], z[kMaxLaneClasses];

  CROSSENT_INLINE LogitTile(const Problem<T>& p, int64_t row, int count) {
    const int classes = int(p.classes);
    read_tile(p.logits, Tile<T>(p.logits, row, count, p.rows, classes), classes, stored);
    for (int c = 0; c < classes; ++c) z[c] = stored[c];
    map_tile(p, z);
  }
};

// The sum without the maximum of each row, and log1p of it.
template <class T>
struct RestLanes {
  alignas(64) double rest[kLanes<T>], log_sum[kLanes<T>];

  CROSSENT_INLINE explicit RestLanes(const TileState<T>& s) {
    for (int l = 0; l < kLanes<T>; ++l) rest[l] = double(s.rest(l));
    log1p_lanes(T(), rest, log_sum);
  }
};

template <class T>
CROSSENT_NOINLINE void entropy_tile(const Problem<T>& p, int64_t row, int count) {
  const LogitTile<T> tile(p, row, count);
  TileState<T> s{};
  sum_tile<T, false>(p, tile.z, s, nullptr);
  const RestLanes<T> rests(s);
  for (int l = 0; l < count; ++l) {
    if (s.needs_slow_path[l]) entropy_row(p, row + l);
    else {
      const Accumulator<T> mean_gap = s.moment_of(l) / (1 + s.rest(l));
      finish_entropy(p, row + l, s.m[l], rests.rest[l], rests.log_sum[l], mean_gap);
    }
  }
}

template <class T>
CROSSENT_NOINLINE void log_probs_tile(const Problem<T>& p, int64_t row, int count,
                                      const Selection<T>& selection) {
  const LogitTile<T> tile(p, row, count);
  TileState<T> s{};
  sum_tile<T, false>(p, tile.z, s, nullptr);
  const RestLanes<T> rests(s);
  for (int l = 0; l < count; ++l) {
    if (s.needs_slow_path[l]) log_probs_row(p, row + l, selection);
    else
      finish_log_probs(p, row + l, selection, s.m[l], rests.rest[l], rests.log_sum[l],
                       [&](int64_t c) CROSSENT_INLINE_LAMBDA { return tile.z[c][l]; });
  }
}

// What forward saved of a tile's rows; far maxima and nan are for the slow path.
template <class T>
struct SavedLanes {
  V<T> m;
  I<T> near;

  CROSSENT_INLINE SavedLanes(const Problem<T>& p, int64_t row, int count) {
    const V<T> saved = read_saved(p, row, count, kMaximum);
    near = (saved <= Exp<T>::kFar) & (saved >= -Exp<T>::kFar);
    m = near ? saved : V<T>{};
  }
};

// The gradients of a tile from g, those by the scored logits, as write_gradient; rows that are not
// `near` are left to the caller.
template <class T>
CROSSENT_INLINE void write_gradient_tile(const Problem<T>& p, int64_t row, int count,
                                         const V<T>* stored, I<T> near, V<T>* g, double* by_scale) {
  constexpr int L = kLanes<T>;
  const int classes = int(p.classes);
  const Options& o = p.options;
  // Where g is 0 the logit may be anything: that of a row that is ignored.
  const auto sloped = [&](int c, T factor) CROSSENT_INLINE_LAMBDA {
    const V<T> slope =
        o.softcap == 0 ? splat(factor) : sech2(stored[c], o.logit_scale / o.softcap, factor);
    return g[c] == T(0) ? V<T>{} : g[c] * slope;
  };
  if (by_scale) {
    double sums[L] = {};
    for (int c = 0; c < classes; ++c) {
      const V<T> s = sloped(c, T(1));
      for (int l = 0; l < L; ++l) sums[l] += s[l] == 0 ? 0.0 : double(s[l]) * double(stored[c][l]);
    }
    for (int l = 0; l < count; ++l) by_scale[row + l] = sums[l];
  }
  if (!p.gradient.data) return;
  if (p.mapped())
    for (int c = 0; c < classes; ++c) g[c] = sloped(c, T(o.logit_scale));
  bool skip[L];
  for (int l = 0; l < L; ++l) skip[l] = !near[l];
  const bool all = count == L && !any<T>(~near);
  write_tile(p.gradient, Tile<T>(p.gradient, row, count, p.rows, classes), classes, count,
             all ? nullptr : skip, g);
}

template <class T>
CROSSENT_NOINLINE void entropy_backward_tile(const Problem<T>& p, int64_t row, int count,
                                             double* by_scale) {
  const LogitTile<T> tile(p, row, count);
  const SavedLanes<T> saved(p, row, count);
  const Origin<T> origin(saved.m);
  const V<T> mean_gap = read_saved(p, row, count, kMeanGap);
  const V<T> total = read_saved(p, row, count, kRest) + T(1);
  const V<T> factor = read_numbers(p.grad_output, row, count) / total;
  V<T> g[kMaxLaneClasses];
  for (int c = 0; c < p.classes; ++c) {
    const V<T> e = origin.template exp<false>(tile.z[c]) * Exp<T>::kUnscale;
    g[c] = e * factor * (origin.template gap<false>(tile.z[c]) - mean_gap);
  }
  write_gradient_tile(p, row, count, tile.stored, saved.near, g, by_scale);
  for (int l = 0; l < count; ++l)
    if (!saved.near[l]) entropy_backward_row(p, row + l, by_scale ? by_scale + row + l : nullptr);
}

template <class T>
CROSSENT_NOINLINE void log_probs_backward_tile(const Problem<T>& p, int64_t row, int count,
                                               const Selection<T>& s, double* by_scale) {
  const LogitTile<T> tile(p, row, count);
  const SavedLanes<T> saved(p, row, count);
  const Origin<T> origin(saved.m);
  ChosenRow chosen[kLanes<T>];
  V<T> factor{};
  I<T> wanted{};
  for (int l = 0; l < count; ++l) {
    chosen[l] = gather_chosen(p, row + l, s, l);
    const ChosenFactors shared(chosen[l], p.saved_at(row + l, kRest));
    factor[l] = T(-shared.total * shared.inverse);
    wanted[l] = chosen[l].count || chosen[l].wrong ? -1 : 0;
  }
  V<T> e[kMaxLaneClasses], g[kMaxLaneClasses];
  for (int c = 0; c < p.classes; ++c) {
    e[c] = origin.template exp<false>(tile.z[c]) * Exp<T>::kUnscale;
    g[c] = wanted ? e[c] * factor : V<T>{};
  }
  for (int l = 0; l < count; ++l) {
    const ChosenFactors shared(chosen[l], p.saved_at(row + l, kRest));
    for (int64_t i = 0; i < chosen[l].count; ++i) {
      const ChosenClass& one = chosen[l].classes[i];
      const bool at_maximum = tile.z[one.at][l] == saved.m[l];
      g[one.at][l] = T(shared.entry(one.weight, at_maximum ? 1 : e[one.at][l], at_maximum));
    }
  }
  write_gradient_tile(p, row, count, tile.stored, saved.near, g, by_scale);
  for (int l = 0; l < count; ++l)
    if (!saved.near[l])
      log_probs_backward_row(p, row + l, s, by_scale ? by_scale + row + l : nullptr);
}

// The gradient of losses, as backward_tile, and by the logit scale.
template <class T>
CROSSENT_NOINLINE void backward_tile_with_scale(const Problem<T>& p, int64_t row, int count,
                                                double* by_scale) {
  const int classes = int(p.classes);
  const LogitTile<T> tile(p, row, count);
  V<T> y[kMaxLaneClasses], g[kMaxLaneClasses];
  if (!p.by_index())
    read_tile(p.probabilities, Tile<T>(p.probabilities, row, count, p.rows, classes), classes, y);
  const Targets<T> targets(p, row, count);
  const TileFactors<T, false> factors(p, row, count, targets);
  const GradientFormula<T, V<T>> formula(factors.g, p.options.label_smoothing != 0);
  const Origin<T> origin(factors.g.m);
  V<T> exps[kMaxLaneClasses];
  for (int c = 0; c < classes; ++c) exps[c] = origin.template exp<false>(tile.z[c]);
  const V<T> entry = target_entries<T>(factors.g, factors.target_class_weight,
                                       targets.pick(tile.z, classes), targets.pick(exps, classes));
  for (int c = 0; c < classes; ++c) {
    const V<T> w = splat(p.weight ? p.weight[c] : T(1)), z = tile.z[c];
    const V<T> e = exps[c] * Exp<T>::kUnscale;
    const V<T> r =
        p.by_index() ? formula.for_index(z, e, w) : formula.for_probabilities(z, e, w, y[c]);
    g[c] = targets.target == typename Targets<T>::Int(c) ? entry : r;
    g[c] = targets.ignored ? V<T>{} : g[c];
  }
  write_gradient_tile(p, row, count, tile.stored, ~factors.needs_slow_path, g, by_scale);
  for (int l = 0; l < count; ++l)
    if (factors.needs_slow_path[l])
      backward_row_with_scale(p, row + l, by_scale ? by_scale + row + l : nullptr);
}

template <class T>
void backward_with_scale(const Problem<T>& p, int64_t begin, int64_t end, double* scale) {
  each<T>(
      side_by_side(p, kBackwardLanes), begin, end,
      [&](int64_t r)
          CROSSENT_INLINE_LAMBDA { backward_row_with_scale(p, r, scale ? scale + r : nullptr); },
      [&](int64_t r, int count)
          CROSSENT_INLINE_LAMBDA { backward_tile_with_scale(p, r, count, scale); });
}
template <class T>
void entropy_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  each<T>(
      side_by_side(p, kForwardLanes), begin, end,
      [&](int64_t r) CROSSENT_INLINE_LAMBDA { entropy_row(p, r); },
      [&](int64_t r, int count) CROSSENT_INLINE_LAMBDA { entropy_tile(p, r, count); });
}
template <class T>
void entropy_backward(const Problem<T>& p, int64_t begin, int64_t end, double* scale) {
  each<T>(
      side_by_side(p, kBackwardLanes), begin, end,
      [&](int64_t r)
          CROSSENT_INLINE_LAMBDA { entropy_backward_row(p, r, scale ? scale + r : nullptr); },
      [&](int64_t r, int count)
          CROSSENT_INLINE_LAMBDA { entropy_backward_tile(p, r, count, scale); });
}
template <class T>
void log_probs_rows(const Problem<T>& p, int64_t begin, int64_t end, const Selection<T>& s) {
  each<T>(
      side_by_side(p, kForwardLanes), begin, end,
      [&](int64_t r) CROSSENT_INLINE_LAMBDA { log_probs_row(p, r, s); },
      [&](int64_t r, int count) CROSSENT_INLINE_LAMBDA { log_probs_tile(p, r, count, s); });
}
template <class T>
void log_probs_backward(const Problem<T>& p, int64_t begin, int64_t end, const Selection<T>& s,
                        double* scale) {
  each<T>(
      side_by_side(p, kBackwardLanes), begin, end,
      [&](int64_t r)
          CROSSENT_INLINE_LAMBDA { log_probs_backward_row(p, r, s, scale ? scale + r : nullptr); },
      [&](int64_t r, int count)
          CROSSENT_INLINE_LAMBDA { log_probs_backward_tile(p, r, count, s, scale); });
}

}  // namespace crossent::CROSSENT_ISA
