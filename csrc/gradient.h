// The gradient of a row's loss with respect to its scored logits, for rows and for tiles alike.
// Torch-free.
//
//   gradient_c = scale ((A + tilt) p_c - a_c)
//
// where p is softmax, a the weighted, smoothed target, A its sum, and tilt = 2 z_loss lse.
#pragma once

#include "vec.h"

namespace crossent::CROSSENT_ISA {

// What the entries of a row's gradient share. X is a number, or a vector of one number a row.
template <class X>
struct GradientFactors {
  X m, inverse, rest_share;      // the maximum, 1 / (1 + rest), rest / (1 + rest)
  X target_weight, tilt, scale;  // A, 2 z_loss lse, grad_output times sample weight
  X uniform, keep;               // eps / unmasked classes, 1 - eps
  X uniform_weight;              // sum of the class weights that are unmasked

  CROSSENT_INLINE GradientFactors<double> in_double() const {
    return {double(m),     double(inverse), double(rest_share), double(target_weight), double(tilt),
            double(scale), double(uniform), double(keep),       double(uniform_weight)};
  }
};

template <class T>
CROSSENT_INLINE V<T> broadcast(T x) {
  return splat(x);
}
template <class T>
CROSSENT_INLINE V<T> broadcast(V<T> x) {
  return x;
}

// The gradient's entries: z are scored logits, e is exp(z - m) and w the class weights. X as above.
// With `smooth`, targets are smoothed.
template <class T, class X>
struct GradientFormula {
  GradientFactors<X> g;
  X coefficient, subtract;
  bool smooth;

  CROSSENT_INLINE GradientFormula(const GradientFactors<X>& factors, bool smooth)
      : g(factors),
        coefficient(g.scale * (g.target_weight + g.tilt) * g.inverse),
        subtract(g.scale * g.uniform),
        smooth(smooth) {}

  static CROSSENT_INLINE I<T> masked(V<T> z) {
    return z == splat(-std::numeric_limits<T>::infinity());
  }
  // Index targets, without the target's own term: that entry is target_gradient.
  CROSSENT_INLINE V<T> for_index(V<T> z, V<T> e, V<T> w) const {
    const V<T> r = e * coefficient;
    if (!smooth) return r;
    return masked(z) ? V<T>{} : r - w * subtract;
  }
  // Targets y that are probabilities: p_c - 1 never cancels, (A - a_c) p_c - a_c (1 - p_c).
  CROSSENT_INLINE V<T> for_probabilities(V<T> z, V<T> e, V<T> w, V<T> y) const {
    V<T> a = y;
    if (smooth) a = a * g.keep + (masked(z) ? V<T>{} : broadcast<T>(g.uniform));
    a = a * w;
    const V<T> p = e * g.inverse;
    const V<T> others = z == broadcast<T>(g.m) ? broadcast<T>(g.rest_share) : T(1) - p;
    return (((g.target_weight - a) + g.tilt) * p - a * others) * g.scale;
  }
};

// The entry of an index target: minus the share of the others, so that it never cancels to zero.
// `others` is 1 - probability, w the target's class weight, `smoothing` what the uniform target
// takes from it: w uniform, or 0 where the target is masked.
template <class X>
CROSSENT_INLINE X target_gradient(const GradientFactors<X>& g, X probability, X others, X w,
                                  X smoothing) {
  return g.scale *
         ((g.uniform * g.uniform_weight + g.tilt) * probability - g.keep * w * others - smoothing);
}

}  // namespace crossent::CROSSENT_ISA
