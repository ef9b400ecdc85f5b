// From rows of logits to one loss a row, and back to the gradient. Torch-free.
#pragma once

#include "block_sums.h"
#include "gradient.h"
#include "log1p.h"
#include "problem.h"
#include "storage.h"

namespace crossent::CROSSENT_ISA {

// The logits that are scored: scaled, then capped.
template <class T>
CROSSENT_INLINE void map_block(const T* z, int n, const Options& o, T* out) {
  const T scale = T(o.logit_scale), cap = T(o.softcap);
  for (int i = 0; i < n; i += kLanes<T>) {
    const int k = n - i < kLanes<T> ? n - i : kLanes<T>;
    V<T> x = load(z + i, k, T(0)) * scale;
    if (cap != 0) x = tanh_(x / cap) * cap;
    store(out + i, k, x);
  }
}

template <class T>
CROSSENT_INLINE const T* read_logits(const Problem<T>& p, int64_t row, int64_t c, int n, T* out) {
  const T* z = read(p.logits.at(row, c), p.logits.dtype, p.logits.class_stride, n, out);
  if (!p.mapped()) return z;
  map_block(z, n, p.options, out);
  return out;
}

// Where classes from c on are stored; a prefetch past the end of the logits does no harm.
template <class T>
CROSSENT_INLINE Prefetch prefetch_from(const Problem<T>& p, int64_t row, int64_t c) {
  if (p.logits.class_stride != 1) return {nullptr, 0};
  return {p.logits.at(row, c), item_size(p.logits.dtype)};
}

template <class T>
CROSSENT_INLINE bool any_nan(const T* z, int n) {
  bool any = false;
  for (int i = 0; i < n; ++i) any |= z[i] != z[i];
  return any;
}

// What is known of a row after one more block. `terms`, where not null: as block_sum has them.
template <class T>
CROSSENT_INLINE void forward_block(const Problem<T>& p, int64_t row, int64_t c, int n,
                                   RowState<T>& s, T* terms = nullptr) {
  alignas(64) T buffer[kBlock], target[kBlock];
  const T* z = read_logits(p, row, c, n, buffer);
  bool nonfinite;
  const T top = block_max(z, n, &nonfinite);
  if (nonfinite) s.nan |= any_nan(z, n);
  s.nan |= top == std::numeric_limits<T>::infinity();
  if (s.nan) return;
  const bool raised = top > s.m;
  if (raised) s.raise(top), s.top_block = c;
  if (s.m != -std::numeric_limits<T>::infinity()) {
    const Prefetch next = prefetch_from(p, row, c + n);
    const BlockSum<T> sum = p.options.stats
                                ? block_sum<T, true>(z, n, s.m, top == s.m, next, terms)
                                : block_sum<T, false>(z, n, s.m, top == s.m, next, terms);
    // One of those that equal the maximum is the one that is left out.
    s.rest += sum.below + (raised ? sum.ties - 1 : sum.ties);
    s.moment += sum.moment;
  } else if (terms) {
    for (int i = 0; i < n; ++i) terms[i] = 0;
  }
  if (p.one_hot()) return;
  const T m = s.m == -std::numeric_limits<T>::infinity() ? T(0) : s.m;
  const T* w = p.weight ? p.weight + c : nullptr;
  if (!p.by_index()) {
    const Tensor2& y = p.probabilities;
    const T* a = read(y.at(row, c), y.dtype, y.class_stride, n, target);
    const T* none = nullptr;
    const BlockGap<T> weighted = block_gap(z, a, w, n, m, false);
    s.target_weight += weighted.weight, s.target_gap += weighted.gap;
    if (w && p.options.stats) {
      const BlockGap<T> unweighted = block_gap(z, a, none, n, m, false);
      s.probability_mass += unweighted.weight, s.probability_gap += unweighted.gap;
    }
  }
  if (p.options.label_smoothing != 0) {
    const BlockGap<T> u = block_gap(z, static_cast<const T*>(nullptr), w, n, m, true);
    s.uniform_weight += u.weight, s.uniform_gap += u.gap, s.unmasked += u.unmasked;
  }
}

template <class T>
CROSSENT_INLINE T stored_logit(const Problem<T>& p, int64_t row, int64_t c) {
  T z{};
  return *read(p.logits.at(row, c), p.logits.dtype, p.logits.class_stride, 1, &z);
}
template <class T>
CROSSENT_INLINE T scored_logit(const Problem<T>& p, int64_t row, int64_t c) {
  T z;
  return *read_logits(p, row, c, 1, &z);
}

// The first place of the maximum, as torch.argmax: the first nan where there is one. `m` is the
// maximum and `from` where the block that has it begins; below 0 where neither is known.
template <class T>
CROSSENT_INLINE int64_t argmax_of(const Problem<T>& p, int64_t row, T m, int64_t from) {
  alignas(64) T buffer[kBlock];
  T best = 0;
  int64_t place = -1;
  const bool known = from >= 0 && m == m;
  for (int64_t c = known ? from : 0; c < p.classes; c += kBlock) {
    const int n = int(p.classes - c < kBlock ? p.classes - c : kBlock);
    const T* z = read_logits(p, row, c, n, buffer);
    for (int i = 0; i < n; ++i) {
      if (known ? z[i] == m : z[i] != z[i]) return c + i;
      if (place < 0 || z[i] > best) best = z[i], place = c + i;
    }
  }
  return place;
}

template <class T>
CROSSENT_INLINE void skip_row(const Problem<T>& p, int64_t row) {
  for (int k = 0; k < p.saved_count(); ++k) p.saved_at(row, Saved(k)) = 0;
  p.loss[row - p.first] = p.denominator_weight[row - p.first] = 0;
  if (p.options.stats) p.lse[row] = p.log_prob[row] = p.entropy[row] = 0, p.argmax[row] = -1;
}

// From what is known of all classes of a row to its outputs.
template <class T>
CROSSENT_INLINE void finish_row(const Problem<T>& p, int64_t row, int64_t target, RowState<T> s) {
  using W = Accumulator<T>;
  const Options& o = p.options;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (s.nan || s.m == -std::numeric_limits<T>::infinity()) s.m = T(nan), s.rest = nan;

  const double rest = double(s.rest), log_sum = log1p_(T(), rest), eps = o.label_smoothing;
  const W lse = W(s.m) + log_sum;
  // The loss, that without class weights, the row's weight in the mean's denominator, and the sum
  // of the weighted target.
  W loss = 0, unweighted = 0, denominator_weight = 1, target_weight;
  if (p.by_index()) {
    // The caller raises for a target outside the classes; where it cannot, nan marks the row.
    const bool wrong = target < 0 || target >= p.classes;
    if (wrong) __atomic_store_n(p.wrong, 1, __ATOMIC_RELAXED);
    unweighted = wrong ? nan : (W(s.m) - W(scored_logit(p, row, target))) + log_sum;
    denominator_weight = wrong ? nan : p.weight ? W(p.weight[target]) : 1;
    loss = times(denominator_weight, unweighted), target_weight = denominator_weight;
  } else {
    loss = s.target_gap + s.target_weight * log_sum, target_weight = s.target_weight;
    unweighted = p.weight ? s.probability_gap + s.probability_mass * log_sum : loss;
  }
  if (eps != 0) {
    const W smooth = (s.uniform_gap + s.uniform_weight * log_sum) / s.unmasked;
    loss = eps < 1 ? (1 - eps) * loss + eps * smooth : smooth;
    target_weight = (1 - eps) * target_weight + eps * s.uniform_weight / s.unmasked;
  }
  if (o.z_loss != 0) loss += o.z_loss * lse * lse;
  const W factor = p.sample_weight.data ? W(p.sample_weight(row)) : 1;
  p.loss[row - p.first] = T(times(factor, loss));
  p.denominator_weight[row - p.first] = T(denominator_weight * factor);
  p.saved_at(row, kMaximum) = s.m, p.saved_at(row, kRest) = T(rest);
  if (!p.one_hot()) {
    p.saved_at(row, kTargetWeight) = T(target_weight), p.saved_at(row, kUnmasked) = T(s.unmasked);
    p.saved_at(row, kUniformWeight) = T(s.uniform_weight);
  }
  if (o.stats) {
    p.lse[row] = T(lse), p.log_prob[row] = T(-unweighted);
    p.entropy[row] = T(log_sum + s.moment / (1 + rest));
    p.argmax[row] = argmax_of(p, row, rest == rest ? s.m : T(nan), s.top_block);
  }
}

template <class T>
CROSSENT_NOINLINE void forward_row(const Problem<T>& p, int64_t row) {
  const int64_t target = p.by_index() ? p.index(row) : 0;
  if (p.by_index() && target == p.options.ignore_index) return skip_row(p, row);
  RowState<T> s;
  for (int64_t c = 0; c < p.classes && !s.nan; c += kBlock)
    forward_block(p, row, c, int(p.classes - c < kBlock ? p.classes - c : kBlock), s);
  finish_row(p, row, target, s);
}

// d(scored logit) / d(logit), from the logit as it is stored.
template <class T>
CROSSENT_INLINE V<T> map_slope(V<T> stored, const Options& o) {
  if (o.softcap == 0) return splat(T(o.logit_scale));
  return sech2(stored, o.logit_scale / o.softcap, T(o.logit_scale));
}

// A block of classes: scored logits, what they were made from, probabilities and class weights
// (null where there are none).
template <class T>
struct ClassBlock {
  const T *z, *stored, *y, *w;
  int n;
};

// The gradient of a block, but for the entry of an index target. `out` may be where the logits are.
template <class T, bool kIndex, bool kFar>
CROSSENT_INLINE void gradient_block(const ClassBlock<T>& b, const GradientFactors<T>& g,
                                    const Problem<T>& p, Prefetch next, T* out) {
  constexpr int L = kLanes<T>;
  const int n = b.n;
  const Origin<T> origin(g.m);
  // A row of nan stays one.
  const GradientFormula<T, T> formula(g, g.uniform != 0 && (!kIndex || g.m == g.m));
  const bool mapped = p.mapped();
  const auto step = [&](V<T> z, V<T> stored, V<T> w, V<T> y) CROSSENT_INLINE_LAMBDA {
    const V<T> e = origin.template exp<kFar>(z) * Exp<T>::kUnscale;
    const V<T> r = kIndex ? formula.for_index(z, e, w) : formula.for_probabilities(z, e, w, y);
    return mapped ? r * map_slope<T>(stored, p.options) : r;
  };
  const V<T> one = splat(T(1));
  // The last vector overlaps the one before; it is read first, for `out` may be where z is.
  const T lowest = -std::numeric_limits<T>::infinity();
  const int tail = n < L ? 0 : n - L;
  const V<T> last = n < L ? load(b.z, n, lowest) : load(b.z + tail);
  const V<T> last_stored = n < L ? load(b.stored, n, T(0)) : load(b.stored + tail);
  int i = 0;
  for (; i + L <= n; i += L) {
    next(i, L);
    store(out + i, step(load(b.z + i), load(b.stored + i), b.w ? load(b.w + i) : one,
                        kIndex ? one : load(b.y + i)));
  }
  if (i == n) return;
  if (n < L)
    store(
        out, n,
        step(last, last_stored, b.w ? load(b.w, n, T(0)) : one, kIndex ? one : load(b.y, n, T(0))));
  else
    store(out + tail,
          step(last, last_stored, b.w ? load(b.w + tail) : one, kIndex ? one : load(b.y + tail)));
}

// What the entries of a row's gradient share, from what forward saved.
template <class T>
CROSSENT_INLINE GradientFactors<T> gradient_factors(const Problem<T>& p, int64_t row,
                                                    int64_t target) {
  const Options& o = p.options;
  const double rest = p.saved_at(row, kRest), total = 1 + rest;
  const double factor = p.sample_weight.data ? double(p.sample_weight(row)) : 1;
  GradientFactors<T> g{};
  g.m = p.saved_at(row, kMaximum), g.inverse = T(1 / total), g.rest_share = T(rest / total);
  g.scale = T(double(p.grad_output(row)) * factor), g.keep = T(1 - o.label_smoothing);
  if (o.z_loss != 0) g.tilt = T(2 * o.z_loss * (double(g.m) + log1p_(T(), rest)));
  if (p.one_hot()) {
    const bool wrong = target < 0 || target >= p.classes;
    g.target_weight = wrong      ? std::numeric_limits<T>::quiet_NaN()
                      : p.weight ? p.weight[target]
                                 : T(1);
  } else {
    g.target_weight = p.saved_at(row, kTargetWeight);
    if (o.label_smoothing != 0) {
      g.uniform = T(o.label_smoothing / double(p.saved_at(row, kUnmasked)));
      g.uniform_weight = p.saved_at(row, kUniformWeight);
    }
  }
  return g;
}

// The entry of an index target, computed in double: by the scored logit, and by the stored one.
template <class T>
CROSSENT_INLINE double scored_target_entry(const Problem<T>& p, int64_t row, int64_t target,
                                           const GradientFactors<T>& factors) {
  const GradientFactors<double> g = factors.in_double();
  const double z = scored_logit(p, row, target), w = p.weight ? double(p.weight[target]) : 1;
  const double probability = z == g.m ? g.inverse : std::exp(z - g.m) * g.inverse;
  const double others = z == g.m ? g.rest_share : 1 - probability;
  const bool masked = z == -std::numeric_limits<double>::infinity();  // no share of the smoothing
  return target_gradient(g, probability, others, w, masked ? 0 : g.uniform * w);
}
template <class T>
CROSSENT_INLINE T target_entry(const Problem<T>& p, int64_t row, int64_t target,
                               const GradientFactors<T>& factors) {
  double entry = scored_target_entry(p, row, target, factors);
  if (p.mapped()) entry *= double(map_slope<T>(splat(stored_logit(p, row, target)), p.options)[0]);
  return T(entry);
}

template <class T>
CROSSENT_INLINE void gradient_block(const ClassBlock<T>& b, const GradientFactors<T>& g,
                                    const Problem<T>& p, Prefetch next, T* out) {
  const bool far = is_far(g.m);
  if (p.by_index()) {
    if (far) gradient_block<T, true, true>(b, g, p, next, out);
    else gradient_block<T, true, false>(b, g, p, next, out);
  } else {
    if (far) gradient_block<T, false, true>(b, g, p, next, out);
    else gradient_block<T, false, false>(b, g, p, next, out);
  }
}

template <class T>
CROSSENT_NOINLINE void backward_row(const Problem<T>& p, int64_t row) {
  alignas(64) T buffer[kBlock], scored[kBlock], target[kBlock], result[kBlock];
  const int64_t t = p.by_index() ? p.index(row) : -1;
  const Tensor2 &out = p.gradient, &y = p.probabilities;
  const bool direct = out.class_stride == 1 && item_size(out.dtype) == sizeof(T);
  const bool ignored = p.by_index() && t == p.options.ignore_index;
  const GradientFactors<T> g = gradient_factors(p, row, ignored ? 0 : t);
  // Before its gradient overwrites the logit: the memory may be the same.
  const bool has_target = p.by_index() && !ignored && t >= 0 && t < p.classes;
  const T entry = has_target ? target_entry(p, row, t, g) : T(0);

  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const int n = int(p.classes - c < kBlock ? p.classes - c : kBlock);
    T* r = direct ? reinterpret_cast<T*>(out.at(row, c)) : result;
    if (ignored) {
      for (int i = 0; i < n; ++i) r[i] = 0;
    } else {
      ClassBlock<T> b{nullptr, nullptr, nullptr, p.weight ? p.weight + c : nullptr, n};
      b.stored = read(p.logits.at(row, c), p.logits.dtype, p.logits.class_stride, n, buffer);
      b.z = p.mapped() ? scored : b.stored;
      if (p.mapped()) map_block(b.stored, n, p.options, scored);
      if (!p.by_index()) b.y = read(y.at(row, c), y.dtype, y.class_stride, n, target);
      gradient_block(b, g, p, prefetch_from(p, row, c + n), r);
    }
    if (has_target && t >= c && t < c + n) r[t - c] = entry;
    if (!direct) write(out.at(row, c), out.dtype, out.class_stride, n, r);
  }
}

}  // namespace crossent::CROSSENT_ISA
