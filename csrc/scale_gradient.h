// Gradients of rows by their logits, and by the one factor that all logits are scaled with.
// Torch-free.
//
// Both come from the gradient g by the scored logits z = cap tanh(scale x / cap):
//
//   by x_c      g_c scale slope_c             slope_c = sech^2(scale x_c / cap), 1 without a cap
//   by scale    sum over c of g_c slope_c x_c
#pragma once

#include "row_kernels.h"

namespace crossent::CROSSENT_ISA {

// A block's g becomes g slope: that of the cap alone, times `factor`.
template <class T>
CROSSENT_INLINE void multiply_by_slope(const T* stored, int n, const Options& o, T factor, T* g) {
  const auto slope = [&](V<T> x) CROSSENT_INLINE_LAMBDA {
    return o.softcap == 0 ? splat(factor) : sech2(x, o.logit_scale / o.softcap, factor);
  };
  int i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(g + i, load(g + i) * slope(load(stored + i)));
  if (i < n) store(g + i, n - i, load(g + i, n - i, T(0)) * slope(load(stored + i, n - i, T(0))));
}

// As many doubles as a vector has lanes.
template <class T>
struct Wide {
  typedef double V __attribute__((vector_size(kLanes<T> * sizeof(double))));
};

// Sum of g x in double, where g = 0 adds nothing whatever x is. Error < 2^-44 of the sum of
// abs(g x); of floats, whose products are exact in double, nothing else.
template <class T>
CROSSENT_INLINE Accumulator<T> sum_of_products(const T* g, const T* x, int n) {
  using Doubles = typename Wide<T>::V;
  constexpr int L = kLanes<T>;
  Doubles sums[2] = {};
  const auto add = [&](int which, V<T> a, V<T> b) CROSSENT_INLINE_LAMBDA {
    b = a == T(0) ? V<T>{} : b;
    sums[which] += __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
  };
  int i = 0;
  for (; i + 2 * L <= n; i += 2 * L)
    for (int k = 0; k < 2; ++k) add(k, load(g + i + k * L), load(x + i + k * L));
  for (; i < n; i += L) {
    if (i + L <= n) add(0, load(g + i), load(x + i));
    else add(1, load(g + i, n - i, T(0)), load(x + i, n - i, T(0)));
  }
  Accumulator<T> all = 0;
  for (int l = 0; l < L; ++l) all += sums[0][l] + sums[1][l];
  return all;
}

// A row's gradient: by its logits into p.gradient, where that is anywhere; and into *by_scale,
// where that is. block(b, c, g) makes the gradient by the scored logits of the classes from c on.
template <class T, class F>
CROSSENT_INLINE void write_gradient(const Problem<T>& p, int64_t row, double* by_scale, F block) {
  alignas(64) T buffer[kBlock], scored[kBlock], result[kBlock], sloped[kBlock];
  const Tensor2& out = p.gradient;
  const bool direct = out.data && out.class_stride == 1 && item_size(out.dtype) == sizeof(T);
  const Options& o = p.options;
  Accumulator<T> sum = 0;
  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const int n = int(p.classes - c < kBlock ? p.classes - c : kBlock);
    T* g = direct ? reinterpret_cast<T*>(out.at(row, c)) : result;
    ClassBlock<T> b{nullptr, nullptr, nullptr, p.weight ? p.weight + c : nullptr, n};
    b.stored = read(p.logits.at(row, c), p.logits.dtype, p.logits.class_stride, n, buffer);
    b.z = p.mapped() ? scored : b.stored;
    if (p.mapped()) map_block(b.stored, n, o, scored);
    block(b, c, g);
    if (by_scale) {
      const T* with_slope = g;
      if (o.softcap != 0) {
        std::memcpy(sloped, g, n * sizeof(T));
        multiply_by_slope(b.stored, n, o, T(1), sloped);
        with_slope = sloped;
      }
      sum += sum_of_products(with_slope, b.stored, n);
    }
    if (!out.data) continue;
    if (p.mapped()) multiply_by_slope(b.stored, n, o, T(o.logit_scale), g);
    if (!direct) write(out.at(row, c), out.dtype, out.class_stride, n, g);
  }
  if (by_scale) *by_scale = double(sum);
}

// A row that costs nothing, which is not read.
template <class T>
CROSSENT_INLINE void write_zeros(const Problem<T>& p, int64_t row, double* by_scale) {
  if (by_scale) *by_scale = 0;
  if (!p.gradient.data) return;
  alignas(64) const T zeros[kBlock] = {};
  const Tensor2& out = p.gradient;
  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const int n = int(p.classes - c < kBlock ? p.classes - c : kBlock);
    write(out.at(row, c), out.dtype, out.class_stride, n, zeros);
  }
}

// The gradient of a loss, as backward_row, and by the logit scale.
template <class T>
CROSSENT_NOINLINE void backward_row_with_scale(const Problem<T>& p, int64_t row, double* by_scale) {
  alignas(64) T buffer[kBlock];
  const int64_t t = p.by_index() ? p.index(row) : -1;
  if (p.by_index() && t == p.options.ignore_index) return write_zeros(p, row, by_scale);
  const GradientFactors<T> g = gradient_factors(p, row, t);
  const bool has_target = p.by_index() && t >= 0 && t < p.classes;
  const T entry = has_target ? T(scored_target_entry(p, row, t, g)) : T(0);
  Problem<T> scored = p;  // whose logits are the scored ones: no slope
  scored.options.logit_scale = 1, scored.options.softcap = 0;
  const Tensor2& y = p.probabilities;
  write_gradient(p, row, by_scale, [&](ClassBlock<T> b, int64_t c, T* out) {
    if (!p.by_index()) b.y = read(y.at(row, c), y.dtype, y.class_stride, b.n, buffer);
    gradient_block(b, g, scored, prefetch_from(p, row, c + b.n), out);
    if (has_target && t >= c && t < c + b.n) out[t - c] = entry;
  });
}

}  // namespace crossent::CROSSENT_ISA
