// From rows of logits to one loss a row, and back to the gradient. Torch-free.
#pragma once

#include "problem.h"
#include "rows.h"
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

template <class T>
CROSSENT_INLINE void forward_block(const Problem<T>& p, int64_t row, int64_t c, int n,
                                   RowState<T>& s) {
  alignas(64) T buffer[kBlock], target[kBlock];
  const T* z = read_logits(p, row, c, n, buffer);
  const BlockMax<T> top = block_max(z, n);
  s.nan |= top.nan | (top.max == std::numeric_limits<T>::infinity());
  if (s.nan) return;
  const bool raised = top.max > s.m;
  if (raised) s.raise(top.max);
  if (s.m != -std::numeric_limits<T>::infinity()) {
    const BlockSum sum = p.options.stats ? block_sum<T, true>(z, n, s.m)
                                         : block_sum<T, false>(z, n, s.m);
    s.add(sum.below);
    // One of those that equal the maximum is the one that is left out.
    s.add(raised ? sum.ties - 1 : sum.ties);
    s.moment += sum.moment;
  }
  if (p.by_index() && p.options.label_smoothing == 0) return;
  const T m = s.m == -std::numeric_limits<T>::infinity() ? T(0) : s.m;
  const T* w = p.weight ? p.weight + c : nullptr;
  if (!p.by_index()) {
    const Tensor2& y = p.probabilities;
    const T* a = read(y.at(row, c), y.dtype, y.class_stride, n, target);
    const BlockGap g = block_gap(z, a, w, n, m, false);
    s.mass += g.mass, s.gap += g.gap;
    if (w && p.options.stats) {
      const BlockGap plain = block_gap(z, a, static_cast<const T*>(nullptr), n, m, false);
      s.plain_mass += plain.mass, s.plain_gap += plain.gap;
    }
  }
  if (p.options.label_smoothing != 0) {
    const BlockGap u = block_gap(z, static_cast<const T*>(nullptr), w, n, m, true);
    s.uniform_mass += u.mass, s.uniform_gap += u.gap, s.open += u.open;
  }
}

template <class T>
CROSSENT_INLINE T scored_logit(const Problem<T>& p, int64_t row, int64_t c) {
  T z;
  return *read_logits(p, row, c, 1, &z);
}

template <class T>
CROSSENT_INLINE int64_t first_at(const Problem<T>& p, int64_t row, T m) {
  alignas(64) T buffer[kBlock];
  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const int n = int(p.classes - c < kBlock ? p.classes - c : kBlock);
    const T* z = read_logits(p, row, c, n, buffer);
    for (int i = 0; i < n; ++i)
      if (z[i] == m || (m != m && z[i] != z[i])) return c + i;
  }
  return 0;
}

CROSSENT_INLINE double times(double factor, double x) {  // 0 * inf = 0
  return factor == 0 && std::isinf(x) ? 0 : factor * x;
}

template <class T>
CROSSENT_INLINE void forward_row(const Problem<T>& p, int64_t row) {
  const Options& o = p.options;
  T* saved = p.saved + row * kSaved;
  const int64_t target = p.by_index() ? p.index(row) : 0;
  if (p.by_index() && target == o.ignore_index) {
    for (int k = 0; k < kSaved; ++k) saved[k] = 0;
    p.loss[row] = p.mass[row] = 0;
    if (o.stats) p.lse[row] = p.log_prob[row] = p.entropy[row] = 0, p.argmax[row] = -1;
    return;
  }
  RowState<T> s;
  for (int64_t c = 0; c < p.classes && !s.nan; c += kBlock)
    forward_block(p, row, c, int(p.classes - c < kBlock ? p.classes - c : kBlock), s);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (s.nan || s.m == -std::numeric_limits<T>::infinity()) s.m = T(nan), s.rest = nan;

  const double log_sum = s.log_sum(), lse = double(s.m) + log_sum;
  const double eps = o.label_smoothing;
  double loss = 0, plain = 0, mass = 1, a_mass;
  if (p.by_index()) {
    // A target outside the classes was reported before, or could not be looked at: nan marks it.
    const bool wrong = target < 0 || target >= p.classes;
    plain = wrong ? nan : (double(s.m) - double(scored_logit(p, row, target))) + log_sum;
    mass = wrong ? nan : p.weight ? double(p.weight[target]) : 1;
    loss = times(mass, plain), a_mass = mass;
  } else {
    loss = s.gap + s.mass * log_sum, a_mass = s.mass;
    plain = p.weight ? s.plain_gap + s.plain_mass * log_sum : loss;
  }
  if (eps != 0) {
    const double smooth = (s.uniform_gap + s.uniform_mass * log_sum) / s.open;
    loss = eps < 1 ? (1 - eps) * loss + eps * smooth : smooth;
    a_mass = (1 - eps) * a_mass + eps * s.uniform_mass / s.open;
  }
  if (o.z_loss != 0) loss += o.z_loss * lse * lse;
  const double factor = p.sample_weight.data ? double(p.sample_weight(row)) : 1;
  p.loss[row] = T(times(factor, loss));
  p.mass[row] = T(mass * factor);
  saved[kMaximum] = s.m, saved[kRest] = T(s.rest + s.rest_low);
  saved[kMass] = T(a_mass), saved[kOpen] = T(s.open), saved[kUniformMass] = T(s.uniform_mass);
  if (o.stats) {
    p.lse[row] = T(lse), p.log_prob[row] = T(-plain);
    p.entropy[row] = T(log_sum + s.moment / (1 + (s.rest + s.rest_low)));
    p.argmax[row] = first_at(p, row, s.m);
  }
}

// d(scored logit) / d(logit), from the scored logit.
template <class T>
CROSSENT_INLINE V<T> map_slope(V<T> z, const Options& o) {
  const T scale = T(o.logit_scale), cap = T(o.softcap);
  const V<T> t = cap != 0 ? z / cap : V<T>{};
  return (T(1) - t * t) * scale;
}

// gradient_c = up ((A + 2 z_loss lse) p_c - a_c), where a is the weighted, smoothed target and A its
// sum. For indices the target's entry is put right by the caller; for probabilities p_c - 1 never
// cancels: (A - a_c) p_c - a_c (1 - p_c).
template <class T>
struct RowGradient {
  T m, inverse, rest_share;  // 1 / (1 + rest), rest / (1 + rest)
  T mass, tilt, up;          // A, 2 z_loss lse, upstream times sample weight
  T uniform, keep;           // eps / open, 1 - eps
};
template <class T, bool kIndex>
CROSSENT_INLINE void gradient_block(const T* z, const T* y, const T* w, int n,
                                    const RowGradient<T>& g, const Options& o, T* out) {
  constexpr int L = kLanes<T>;
  const V<T> m = splat(g.m), none = splat(-std::numeric_limits<T>::infinity());
  const T coefficient = g.up * (g.mass + g.tilt) * g.inverse;
  const T subtract = g.up * g.uniform;
  const bool smooth = g.uniform != 0, mapped = o.logit_scale != 1 || o.softcap != 0;
  for (int i = 0; i < n; i += L) {
    const int k = n - i < L ? n - i : L;
    const V<T> x = k == L ? load(z + i) : load(z + i, k, -std::numeric_limits<T>::infinity());
    const V<T> e = exp_difference<T>(x, m);
    V<T> r;
    if (kIndex) {
      r = e * coefficient;
      if (smooth) {
        const V<T> u = w ? load(w + i, k, T(0)) * subtract : splat(subtract);
        r = x == none ? V<T>{} : r - u;
      }
    } else {
      V<T> a = load(y + i, k, T(0));
      if (smooth) a = a * g.keep + (x == none ? V<T>{} : splat(g.uniform));
      if (w) a = a * load(w + i, k, T(0));
      const V<T> p = e * g.inverse;
      const V<T> others = x == m ? splat(g.rest_share) : T(1) - p;
      r = (((g.mass - a) + g.tilt) * p - a * others) * g.up;
    }
    if (mapped) r = r * map_slope<T>(x, o);
    if (k == L) store(out + i, r);
    else store(out + i, k, r);
  }
}

template <class T>
CROSSENT_INLINE void backward_row(const Problem<T>& p, int64_t row) {
  alignas(64) T buffer[kBlock], target[kBlock], result[kBlock];
  const Options& o = p.options;
  const T* saved = p.saved + row * kSaved;
  const int64_t t = p.by_index() ? p.index(row) : -1;
  const Tensor2& out = p.gradient;
  const bool direct = out.class_stride == 1 && item_size(out.dtype) == sizeof(T);
  const bool ignored = p.by_index() && t == o.ignore_index;

  const double rest = saved[kRest], total = 1 + rest;
  const double lse = double(saved[kMaximum]) + std::log1p(rest);
  const double factor = p.sample_weight.data ? double(p.sample_weight(row)) : 1;
  const double uniform = o.label_smoothing != 0 ? o.label_smoothing / double(saved[kOpen]) : 0;
  const double keep = 1 - o.label_smoothing, tilt = 2 * o.z_loss * lse;
  const double up = double(p.upstream(row)) * factor;
  const RowGradient<T> g{saved[kMaximum], T(1 / total), T(rest / total), saved[kMass], T(tilt),
                         T(up),           T(uniform),   T(keep)};
  // The target's entry, before its gradient overwrites the logit (the memory may be the same).
  double z_t = 0;
  const bool has_target = p.by_index() && !ignored && t >= 0 && t < p.classes;
  if (has_target) z_t = double(scored_logit(p, row, t));

  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const int n = int(p.classes - c < kBlock ? p.classes - c : kBlock);
    T* r = direct ? reinterpret_cast<T*>(out.at(row, c)) : result;
    if (ignored) {
      for (int i = 0; i < n; ++i) r[i] = 0;
    } else {
      const T* z = read_logits(p, row, c, n, buffer);
      const T* w = p.weight ? p.weight + c : nullptr;
      if (p.by_index()) {
        gradient_block<T, true>(z, nullptr, w, n, g, o, r);
      } else {
        const Tensor2& y = p.probabilities;
        const T* a = read(y.at(row, c), y.dtype, y.class_stride, n, target);
        gradient_block<T, false>(z, a, w, n, g, o, r);
      }
    }
    if (has_target && t >= c && t < c + n) {
      const double e = std::exp(z_t - double(g.m)), w = p.weight ? double(p.weight[t]) : 1;
      const double others = z_t == double(g.m) ? rest : total - e;
      const double smooth = uniform * double(saved[kUniformMass]) + tilt;
      double entry = up * ((smooth * e - keep * w * others) / total - uniform * w);
      if (p.mapped()) entry *= double(map_slope<T>(splat(T(z_t)), o)[0]);
      r[t - c] = T(entry);
    }
    if (!direct) write(out.at(row, c), out.dtype, out.class_stride, n, r);
  }
}

template <class T>
void forward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) forward_row(p, row);
}
template <class T>
void backward_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) backward_row(p, row);
}

}  // namespace crossent::CROSSENT_ISA
