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

// Where classes from c on are stored; a prefetch past the end of the logits does no harm.
template <class T>
CROSSENT_INLINE Ahead ahead_of(const Problem<T>& p, int64_t row, int64_t c) {
  if (p.logits.class_stride != 1) return {nullptr, 0};
  return {p.logits.at(row, c), item_size(p.logits.dtype)};
}

template <class T>
CROSSENT_INLINE bool any_nan(const T* z, int n) {
  bool any = false;
  for (int i = 0; i < n; ++i) any |= z[i] != z[i];
  return any;
}

template <class T>
CROSSENT_INLINE void forward_block(const Problem<T>& p, int64_t row, int64_t c, int n,
                                   RowState<T>& s) {
  alignas(64) T buffer[kBlock], target[kBlock];
  const T* z = read_logits(p, row, c, n, buffer);
  bool odd;
  const T top = block_max(z, n, &odd);
  if (odd) s.nan |= any_nan(z, n);
  s.nan |= top == std::numeric_limits<T>::infinity();
  if (s.nan) return;
  const bool raised = top > s.m;
  if (raised) s.raise(top), s.top_block = c;
  if (s.m != -std::numeric_limits<T>::infinity()) {
    const Ahead next = ahead_of(p, row, c + n);
    const BlockSum<T> sum = p.options.stats ? block_sum<T, true>(z, n, s.m, top == s.m, next)
                                            : block_sum<T, false>(z, n, s.m, top == s.m, next);
    // One of those that equal the maximum is the one that is left out.
    s.rest += sum.below + (raised ? sum.ties - 1 : sum.ties);
    s.moment += sum.moment;
  }
  if (p.by_index() && p.options.label_smoothing == 0) return;
  const T m = s.m == -std::numeric_limits<T>::infinity() ? T(0) : s.m;
  const T* w = p.weight ? p.weight + c : nullptr;
  if (!p.by_index()) {
    const Tensor2& y = p.probabilities;
    const T* a = read(y.at(row, c), y.dtype, y.class_stride, n, target);
    const BlockGap<T> g = block_gap(z, a, w, n, m, false);
    s.mass += g.mass, s.gap += g.gap;
    if (w && p.options.stats) {
      const BlockGap<T> plain = block_gap(z, a, static_cast<const T*>(nullptr), n, m, false);
      s.plain_mass += plain.mass, s.plain_gap += plain.gap;
    }
  }
  if (p.options.label_smoothing != 0) {
    const BlockGap<T> u = block_gap(z, static_cast<const T*>(nullptr), w, n, m, true);
    s.uniform_mass += u.mass, s.uniform_gap += u.gap, s.open += u.open;
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

// The first place of the maximum, as torch.argmax: the first nan where there is one. `m` is the maximum
// and `from` where the block that has it begins; below 0 where neither is known.
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

// log1p(x) for x >= 0, or nan. In float the error is < 2^-26, without a call: through
// log(u) = e ln 2 + 2 atanh(f / (2 + f)) for u = 1 + x = 2^e (1 + f), and x - x^2 / 2 where u
// would lose digits of x.
CROSSENT_INLINE double log1p_(float, double x) {
  const double u = 1 + x;
  const int64_t raw = bits<int64_t>(u), e = (raw - 0x3fe6a09e667f3bcdLL) >> 52;
  const double f = bits<double>(raw - int64_t(uint64_t(e) << 52)) - 1;
  const double s = f / (2 + f), q = s * s;
  double p = 2.0 / 13;
  p = p * q + 2.0 / 11;
  p = p * q + 2.0 / 9;
  p = p * q + 2.0 / 7;
  p = p * q + 2.0 / 5;
  p = p * q + 2.0 / 3;
  const double log = double(e) * 0.69314718055994530942 + (s * 2.0 + s * q * p);
  return x != x ? x : x < 0x1p-26 ? x - 0.5 * x * x : log;
}
CROSSENT_INLINE double log1p_(double, double x) { return std::log1p(x); }

template <class T>
CROSSENT_INLINE void skip_row(const Problem<T>& p, int64_t row) {
  for (int k = 0; k < p.saved_count(); ++k) p.saved_at(row, Saved(k)) = 0;
  p.loss[row - p.first] = p.mass[row - p.first] = 0;
  if (p.options.stats) p.lse[row] = p.log_prob[row] = p.entropy[row] = 0, p.argmax[row] = -1;
}

// From what is known of all classes of a row to its outputs.
template <class T>
CROSSENT_INLINE void finish_row(const Problem<T>& p, int64_t row, int64_t target, RowState<T> s) {
  using W = Wide<T>;
  const Options& o = p.options;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (s.nan || s.m == -std::numeric_limits<T>::infinity()) s.m = T(nan), s.rest = nan;

  const double rest = double(s.rest), log_sum = log1p_(T(), rest), eps = o.label_smoothing;
  const W lse = W(s.m) + log_sum;
  W loss = 0, plain = 0, mass = 1, a_mass;
  if (p.by_index()) {
    // The caller raises for a target outside the classes; where it cannot, nan marks the row.
    const bool wrong = target < 0 || target >= p.classes;
    if (wrong) __atomic_store_n(p.wrong, 1, __ATOMIC_RELAXED);
    plain = wrong ? nan : (W(s.m) - W(scored_logit(p, row, target))) + log_sum;
    mass = wrong ? nan : p.weight ? W(p.weight[target]) : 1;
    loss = times(mass, plain), a_mass = mass;
  } else {
    loss = s.gap + s.mass * log_sum, a_mass = s.mass;
    plain = p.weight ? s.plain_gap + s.plain_mass * log_sum : loss;
  }
  if (eps != 0) {
    const W smooth = (s.uniform_gap + s.uniform_mass * log_sum) / s.open;
    loss = eps < 1 ? (1 - eps) * loss + eps * smooth : smooth;
    a_mass = (1 - eps) * a_mass + eps * s.uniform_mass / s.open;
  }
  if (o.z_loss != 0) loss += o.z_loss * lse * lse;
  const W factor = p.sample_weight.data ? W(p.sample_weight(row)) : 1;
  p.loss[row - p.first] = T(times(factor, loss));
  p.mass[row - p.first] = T(mass * factor);
  p.saved_at(row, kMaximum) = s.m, p.saved_at(row, kRest) = T(rest);
  if (!p.plain()) {
    p.saved_at(row, kMass) = T(a_mass), p.saved_at(row, kOpen) = T(s.open);
    p.saved_at(row, kUniformMass) = T(s.uniform_mass);
  }
  if (o.stats) {
    p.lse[row] = T(lse), p.log_prob[row] = T(-plain);
    p.entropy[row] = T(log_sum + s.moment / (1 + rest));
    p.argmax[row] = argmax_of(p, row, rest == rest ? s.m : T(nan), s.top_block);
  }
}

template <class T>
CROSSENT_APART void forward_row(const Problem<T>& p, int64_t row) {
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

// gradient_c = up ((A + 2 z_loss lse) p_c - a_c), where a is the weighted, smoothed target and A its
// sum. For indices the target's entry is put right by the caller; for probabilities p_c - 1 never
// cancels: (A - a_c) p_c - a_c (1 - p_c).
template <class T>
struct RowGradient {
  T m, inverse, rest_share;  // 1 / (1 + rest), rest / (1 + rest)
  T mass, tilt, up;          // A, 2 z_loss lse, upstream times sample weight
  T uniform, keep;           // eps / open, 1 - eps
  T uniform_mass;            // sum of the class weights that are open
};
// z are the scored logits, `stored` what they were made from.
template <class T, bool kIndex, bool kFar>
CROSSENT_INLINE void gradient_block(const T* z, const T* stored, const T* y, const T* w, int n,
                                    const RowGradient<T>& g, const Options& o, Ahead next,
                                    T* out) {
  constexpr int L = kLanes<T>;
  const Origin<T> origin(g.m);
  const V<T> none = splat(-std::numeric_limits<T>::infinity());
  const T coefficient = g.up * (g.mass + g.tilt) * g.inverse;
  const T subtract = g.up * g.uniform;
  const bool smooth = g.uniform != 0, mapped = o.logit_scale != 1 || o.softcap != 0;
  const auto step = [&](V<T> x, V<T> s, V<T> u, V<T> a) __attribute__((always_inline)) {
    const V<T> e = origin.template exp<kFar>(x) * Exp<T>::kUnscale;
    V<T> r;
    if (kIndex) {
      r = e * coefficient;
      if (smooth && g.m == g.m) r = x == none ? V<T>{} : r - u * subtract;  // a row of nan stays one
    } else {
      if (smooth) a = a * g.keep + (x == none ? V<T>{} : splat(g.uniform));
      a = a * u;
      const V<T> p = e * g.inverse;
      const V<T> others = x == origin.m ? splat(g.rest_share) : T(1) - p;
      r = (((g.mass - a) + g.tilt) * p - a * others) * g.up;
    }
    return mapped ? r * map_slope<T>(s, o) : r;
  };
  const V<T> one = splat(T(1));
  // The last vector overlaps the one before; it is read first, for `out` may be where z is.
  const int tail = n < L ? 0 : n - L;
  const V<T> last = n < L ? load(z, n, none[0]) : load(z + tail);
  const V<T> last_stored = n < L ? load(stored, n, T(0)) : load(stored + tail);
  int i = 0;
  for (; i + L <= n; i += L) {
    next(i, L);
    store(out + i, step(load(z + i), load(stored + i), w ? load(w + i) : one,
                        kIndex ? one : load(y + i)));
  }
  if (i == n) return;
  if (n < L)
    store(out, n, step(last, last_stored, w ? load(w, n, T(0)) : one,
                       kIndex ? one : load(y, n, T(0))));
  else
    store(out + tail, step(last, last_stored, w ? load(w + tail) : one,
                           kIndex ? one : load(y + tail)));
}

template <class T>
CROSSENT_INLINE RowGradient<T> prepare_gradient(const Problem<T>& p, int64_t row, int64_t target) {
  const Options& o = p.options;
  const double rest = p.saved_at(row, kRest), total = 1 + rest;
  const double factor = p.sample_weight.data ? double(p.sample_weight(row)) : 1;
  RowGradient<T> g{};
  g.m = p.saved_at(row, kMaximum), g.inverse = T(1 / total), g.rest_share = T(rest / total);
  g.up = T(double(p.upstream(row)) * factor), g.keep = T(1 - o.label_smoothing);
  if (o.z_loss != 0) g.tilt = T(2 * o.z_loss * (double(g.m) + log1p_(T(), rest)));
  if (p.plain()) {
    const bool wrong = target < 0 || target >= p.classes;
    g.mass = wrong ? std::numeric_limits<T>::quiet_NaN() : p.weight ? p.weight[target] : T(1);
  } else {
    g.mass = p.saved_at(row, kMass);
    if (o.label_smoothing != 0) {
      g.uniform = T(o.label_smoothing / double(p.saved_at(row, kOpen)));
      g.uniform_mass = p.saved_at(row, kUniformMass);
    }
  }
  return g;
}

// The target's entry: minus the share of the others, so that it never cancels to zero.
template <class T>
CROSSENT_INLINE T target_entry(const Problem<T>& p, int64_t row, int64_t target,
                               const RowGradient<T>& g) {
  const T z = scored_logit(p, row, target);
  const double w = p.weight ? double(p.weight[target]) : 1;
  const double probability =
      z == g.m ? double(g.inverse) : std::exp(double(z) - double(g.m)) * double(g.inverse);
  const double others = z == g.m ? double(g.rest_share) : 1 - probability;
  const double smooth = double(g.uniform) * double(g.uniform_mass) + double(g.tilt);
  const bool shut = z == -std::numeric_limits<T>::infinity();  // no share of the smoothing
  double entry = double(g.up) * (smooth * probability - double(g.keep) * w * others -
                                 (shut ? 0 : double(g.uniform) * w));
  if (p.mapped()) entry *= double(map_slope<T>(splat(stored_logit(p, row, target)), p.options)[0]);
  return T(entry);
}

template <class T>
CROSSENT_APART void backward_row(const Problem<T>& p, int64_t row) {
  alignas(64) T buffer[kBlock], scored[kBlock], target[kBlock], result[kBlock];
  const int64_t t = p.by_index() ? p.index(row) : -1;
  const Tensor2& out = p.gradient;
  const bool direct = out.class_stride == 1 && item_size(out.dtype) == sizeof(T);
  const bool ignored = p.by_index() && t == p.options.ignore_index;
  const RowGradient<T> g = prepare_gradient(p, row, ignored ? 0 : t);
  const bool far = is_far(g.m);
  // Before its gradient overwrites the logit: the memory may be the same.
  const bool has_target = p.by_index() && !ignored && t >= 0 && t < p.classes;
  const T entry = has_target ? target_entry(p, row, t, g) : T(0);

  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const int n = int(p.classes - c < kBlock ? p.classes - c : kBlock);
    T* r = direct ? reinterpret_cast<T*>(out.at(row, c)) : result;
    if (ignored) {
      for (int i = 0; i < n; ++i) r[i] = 0;
    } else {
      const T* stored = read(p.logits.at(row, c), p.logits.dtype, p.logits.class_stride, n, buffer);
      const T* z = p.mapped() ? scored : stored;
      if (p.mapped()) map_block(stored, n, p.options, scored);
      const T* w = p.weight ? p.weight + c : nullptr;
      const Ahead next = ahead_of(p, row, c + n);
      if (p.by_index()) {
        if (far) gradient_block<T, true, true>(z, stored, nullptr, w, n, g, p.options, next, r);
        else gradient_block<T, true, false>(z, stored, nullptr, w, n, g, p.options, next, r);
      } else {
        const Tensor2& y = p.probabilities;
        const T* a = read(y.at(row, c), y.dtype, y.class_stride, n, target);
        if (far) gradient_block<T, false, true>(z, stored, a, w, n, g, p.options, next, r);
        else gradient_block<T, false, false>(z, stored, a, w, n, g, p.options, next, r);
      }
    }
    if (has_target && t >= c && t < c + n) r[t - c] = entry;
    if (!direct) write(out.at(row, c), out.dtype, out.class_stride, n, r);
  }
}

}  // namespace crossent::CROSSENT_ISA
