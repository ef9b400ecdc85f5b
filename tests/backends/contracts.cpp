// Holds the functions of csrc/*.h to what is written above them: built and run by test_contracts.py
// for each instruction set. Prints what fails; the exit code counts it.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "sparse.h"
#include "tile_kernels.h"

namespace ours = crossent::CROSSENT_ISA;
using ours::Exp;
using ours::kLanes;
using ours::V;

int failures = 0;
std::mt19937_64 generator(0);

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

void check(bool holds, const char* what, double got, double wanted) {
  if (holds) return;
  if (++failures <= 20) std::printf("%s: got %.17g, expected %.17g\n", what, got, wanted);
}

template <class T>
double ulps(T got, long double wanted) {
  const T rounded = T(wanted);
  if (std::isinf(rounded)) return got == rounded ? 0 : std::numeric_limits<double>::infinity();
  const T next = std::nextafter(rounded, std::numeric_limits<T>::infinity());
  return double(std::fabs((long double)got - wanted) / ((long double)next - rounded));
}

// exp(z - m) within 3 ulp for every gap; nothing below the floor; nan stays nan.
template <class T, class Origin, class Maker>
void exponential(const char* what, Maker make) {
  const double largest = sizeof(T) == 4 ? 80 : 700;
  for (int i = 0; i < 200000; ++i) {
    const double size = std::exp2(uniform(-8, i % 3 ? 7 : 19));
    const T m = T(uniform(-size, size)), z = T(double(m) - uniform(0, largest));
    const Origin origin = make(m);
    const T got = origin.template exp<false>(ours::splat(z))[0] * Exp<T>::kUnscale;
    const long double gap = (long double)z - (long double)m;
    if (gap < -largest) continue;
    check(ulps(got, std::exp(gap)) < 3, what, double(got), double(std::exp(gap)));
  }
  for (int i = 0; i < 20000; ++i) {  // far from zero, up to the largest number
    const int exponent = std::numeric_limits<T>::max_exponent - 1;
    const T m = T(std::exp2(uniform(sizeof(T) == 4 ? 20 : 50, exponent)) * (i % 2 ? 1.1 : -1.1));
    const T ulp = std::nextafter(std::fabs(m), std::numeric_limits<T>::infinity()) - std::fabs(m);
    const T z = i % 5 ? m - T(int(uniform(0, 20))) * ulp : T(uniform(-1, 1)) * m;
    if (!(z <= m) || !ours::is_far(m)) continue;
    const Origin origin = make(m);
    const T got = origin.template exp<true>(ours::splat(z))[0] * Exp<T>::kUnscale;
    const long double gap = (long double)m - (long double)z;
    if (gap <= largest)
      check(ulps(got, std::exp(-gap)) < 3, what, double(got), double(std::exp(-gap)));
    else check(got >= 0 && got <= std::exp(-largest), what, double(got), 0);
    const T seen = origin.template gap<true>(ours::splat(z))[0];
    check(seen == std::fmin(T(gap), -Exp<T>::kLow), "gap", double(seen), double(gap));
  }
  const T lowest = std::numeric_limits<T>::lowest();
  const Origin top = make(-lowest);
  for (T z : {lowest, -std::numeric_limits<T>::infinity()}) {
    const T e = top.template exp<true>(ours::splat(z))[0] * Exp<T>::kUnscale;
    check(e >= 0 && e < std::numeric_limits<T>::min(), what, double(e), 0);
  }
  const Origin origin = make(T(3));
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T one = origin.template exp<false>(ours::splat(T(3)))[0] * Exp<T>::kUnscale;
  check(ulps(one, 1) < 2, what, double(one), 1);
  const T low = origin.template exp<false>(ours::splat(-inf))[0] * Exp<T>::kUnscale;
  check(low >= 0 && low < std::numeric_limits<T>::min(), what, double(low), 0);
  const T not_a_number = origin.template exp<false>(ours::splat(nan))[0];
  check(not_a_number != not_a_number, what, double(not_a_number), double(nan));
}

void hyperbolic_tangent() {
  for (int i = 0; i < 200000; ++i) {
    const float x = float(uniform(-1, 1) * std::exp2(uniform(-20, 5)));
    const float got = ours::tanh_(ours::splat(x))[0];
    const double wanted = std::tanh(double(x));
    check(std::fabs(got - wanted) < 0x1p-23, "tanh, absolute", got, wanted);
    check(std::fabs(got - wanted) <= 0x1p-22 * std::fabs(wanted), "tanh, relative", got, wanted);
  }
  for (int i = 0; i < 20000; ++i) {
    const double x = uniform(-1, 1) * std::exp2(uniform(-20, 5));
    const double got = ours::tanh_(ours::splat(x))[0];
    check(ulps(std::fabs(got), std::fabs(std::tanh((long double)x))) < 3, "tanh, double", got, x);
  }
  const float nan = ours::tanh_(ours::splat(std::nanf("")))[0];
  check(nan != nan, "tanh of nan", nan, nan);
}

// The slope of a cap keeps its digits up to saturation, and is the same in rows and in tiles.
template <class T>
void slope() {
  const double limit = sizeof(T) == 4 ? 5e-7 : 1e-12, end = sizeof(T) == 4 ? 44 : 350;
  for (int i = 0; i < 200000; ++i) {
    crossent::Options o;
    o.softcap = uniform(1, 50), o.logit_scale = std::exp2(uniform(-20, 20)) * (i % 7 ? 1 : -1);
    const T z =
        T(uniform(-end, end) * std::exp2(i % 2 ? 0 : uniform(-20, 0)) * o.softcap / o.logit_scale);
    const long double e = std::exp(-2 * std::fabs((long double)z * o.logit_scale / o.softcap));
    const long double wanted = o.logit_scale * 4 * e / ((1 + e) * (1 + e));
    if (std::fabs(wanted) < std::numeric_limits<T>::min()) continue;
    const double got = ours::map_slope<T>(ours::splat(z), o)[0];
    check(std::fabs(got - wanted) <= limit * std::fabs(wanted), "slope", got, double(wanted));
  }
  crossent::Options o;
  o.softcap = 30;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  for (T z : {inf, -inf, std::numeric_limits<T>::max()}) {
    const T flat = ours::map_slope<T>(ours::splat(z), o)[0];
    check(flat >= 0 && flat < std::numeric_limits<T>::min(), "slope, saturated", double(flat), 0);
  }
  const T unknown = ours::map_slope<T>(ours::splat(nan), o)[0];
  check(unknown != unknown, "slope of nan", double(unknown), double(nan));
}

void logarithm() {
  std::vector<double> xs = {0, 1e-300, 1e-30, 1, 3e5};
  for (int i = 0; i < 100000; ++i) xs.push_back(std::exp2(uniform(-60, 20)));
  alignas(64) double x[kLanes<float>], lanes[kLanes<float>];
  for (double v : xs) {
    const double wanted = std::log1p(v), got = ours::log1p_(0.0f, v);
    check(std::fabs(got - wanted) <= 0x1p-26 * wanted, "log1p", got, wanted);
    for (double& each : x) each = v;
    ours::log1p_lanes(0.0f, x, lanes);
    check(std::fabs(lanes[0] - wanted) <= 0x1p-26 * wanted, "log1p, lanes", lanes[0], wanted);
  }
}

// What float16 means, without the compiler's own type, which not every compiler has.
float value_of_float16(uint32_t h) {
  const int sign = h >> 15 ? -1 : 1, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                          : std::ldexp(float(fraction), -24));
}

// The float16 number nearest to x, ties to even.
float nearest_float16(float x) {
  const float size = std::fabs(x);
  if (size >= 65520) return std::copysign(INFINITY, x);
  const float ulp = std::ldexp(1.0f, std::max(size > 0 ? std::ilogb(size) : -14, -14) - 10);
  return std::copysign(std::nearbyint(size / ulp) * ulp, x);
}

void halves() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float wide = crossent::from_float16(uint16_t(h));
    const float wanted = value_of_float16(h);
    const bool nan = wanted != wanted;
    check(nan ? wide != wide : wide == wanted, "from float16", wide, wanted);
    check(nan || crossent::to_float16(wide) == h, "to float16", crossent::to_float16(wide), h);
    const crossent::Float16 stored{uint16_t(h)};
    check(nan ? float(stored) != float(stored) : float(stored) == wanted, "Float16", float(stored),
          wanted);
    const float brain = crossent::from_bfloat16(uint16_t(h));
    check(brain != brain || crossent::to_bfloat16(brain) == h, "bfloat16", brain, brain);
  }
  for (int i = 0; i < 200000; ++i) {  // rounding to nearest, ties to even
    const float x = float(uniform(-1, 1) * std::exp2(uniform(-30, 18)));
    const float got = value_of_float16(crossent::to_float16(x)), wanted = nearest_float16(x);
    check(got == wanted, "rounding to float16", got, wanted);
  }
}

// Runs of every length are converted as single numbers are.
void runs_of_halves() {
  uint16_t halves[300], back[300];
  float floats[300];
  for (uint32_t first = 0; first < 65536; first += 256)
    for (int n : {1, 7, 8, 9, 255, 256}) {
      for (int i = 0; i < n; ++i) halves[i] = uint16_t(first + i);
      ours::from_float16_run(halves, n, floats);
      for (int i = 0; i < n; ++i) {
        const float wanted = crossent::from_float16(halves[i]);
        const bool nan = wanted != wanted;
        check(nan ? floats[i] != floats[i] : floats[i] == wanted, "run from float16", floats[i],
              wanted);
        floats[i] *= 1.0f + float(i % 5) * 0x1.001p-11f;  // off the grid, and halfway
      }
      back[n] = 12345;
      ours::to_float16_run(floats, n, back);
      check(back[n] == 12345, "run to float16, end", back[n], 12345);
      for (int i = 0; i < n; ++i) {
        const uint16_t wanted = crossent::to_float16(floats[i]);
        const bool nan = floats[i] != floats[i];
        check(nan ? (back[i] & 0x7fff) > 0x7c00 : back[i] == wanted, "run to float16", back[i],
              wanted);
      }
    }
}

// Blocks of every length around the vectors: maximum, sums and gaps against long double.
template <class T>
void blocks() {
  for (int n = 1; n <= 4 * kLanes<T> + 3; ++n) {
    std::vector<T> z(n), y(n), w(n);
    for (int i = 0; i < n; ++i)
      z[i] = T(uniform(-30, 3)), y[i] = T(uniform(0, 1)), w[i] = T(uniform(0, 2));
    if (n > 2) z[n / 2] = -std::numeric_limits<T>::infinity(), y[n / 2] = 0;
    T m = z[0];
    for (T v : z) m = v > m ? v : m;
    bool nonfinite = true, with_nan = false;
    const T found = ours::block_max(z.data(), n, &nonfinite);
    check(found == m, "block_max", found, m);
    const bool infinite = std::any_of(z.begin(), z.begin() + n, [](T x) { return std::isinf(x); });
    check(nonfinite == infinite, "block_max, nonfinite", nonfinite, infinite);
    std::vector<T> strange(z.begin(), z.begin() + n);
    strange[n / 2] = std::numeric_limits<T>::quiet_NaN();
    ours::block_max(strange.data(), n, &with_nan);
    check(with_nan, "block_max, nan is nonfinite", with_nan, 1);
    long double below = 0, moment = 0, weight = 0, gap = 0;
    int ties = 0, unmasked = 0;
    for (int i = 0; i < n; ++i) {
      const long double e = std::exp((long double)z[i] - m), a = (long double)y[i] * w[i];
      const bool masked = std::isinf(z[i]);
      ties += z[i] == m, unmasked += !masked, weight += a;
      if (!masked) gap += a * ((long double)m - z[i]);
      if (z[i] != m && !masked) below += e, moment += e * ((long double)m - z[i]);
    }
    const ours::BlockSum<T> s =
        ours::block_sum<T, true>(z.data(), n, m, true, ours::Prefetch{nullptr, 0});
    const double eps = 8 * std::numeric_limits<T>::epsilon();
    check(s.ties == ties, "block_sum, ties", s.ties, ties);
    check(std::fabs(s.below - below) <= eps * below + 1e-50L, "block_sum", s.below, double(below));
    check(std::fabs(s.moment - moment) <= eps * moment + 1e-50L, "block_sum, moment", s.moment,
          double(moment));
    const ours::BlockGap<T> g = ours::block_gap(z.data(), y.data(), w.data(), n, m, false);
    check(std::fabs(g.weight - weight) <= eps * weight, "block_gap, weight", g.weight,
          double(weight));
    check(std::fabs(g.gap - gap) <= eps * gap + 1e-30L, "block_gap", g.gap, double(gap));
    check(g.unmasked == unmasked, "block_gap, unmasked", g.unmasked, unmasked);
    const T* none = nullptr;
    const ours::BlockGap<T> u = ours::block_gap(z.data(), none, none, n, m, true);
    check(u.weight == unmasked && u.unmasked == unmasked, "block_gap, uniform", u.weight, unmasked);
  }
}

// One row through the kernels: its loss, its entropy, and the gradient of its loss.
template <class T>
struct Row {
  T loss, weight, saved[crossent::kSaved], lse, log_prob, entropy;
  int64_t argmax, wrong = 0;
  std::vector<T> gradient;

  Row(const std::vector<T>& z, int64_t target, double smoothing = 0, const T* y = nullptr) {
    const T one = 1;
    crossent::Problem<T> p{};
    const auto dtype = sizeof(T) == 4 ? crossent::Dtype::kFloat32 : crossent::Dtype::kFloat64;
    crossent::Layout rows;
    rows.rank = 1, rows.size[0] = 1, rows.stride[0] = int64_t(z.size());
    gradient.resize(z.size());
    p.classes = int64_t(z.size()), p.rows = p.kept_rows = 1;
    p.logits = {const_cast<T*>(z.data()), dtype, 1, rows};
    if (y) p.probabilities = {const_cast<T*>(y), dtype, 1, rows};
    p.index.data = &target;
    p.options.label_smoothing = smoothing, p.options.stats = true;
    p.loss = &loss, p.denominator_weight = &weight, p.saved = saved, p.wrong = &wrong;
    p.lse = &lse, p.log_prob = &log_prob, p.entropy = &entropy, p.argmax = &argmax;
    ours::forward_rows<T>(p, 0, 1);
    p.grad_output.data = &one;
    p.gradient = {gradient.data(), dtype, 1, rows};
    ours::backward_rows<T>(p, 0, 1);
  }
};

// A sum without the rounding of one addition after the other (Neumaier).
struct Exact {
  long double sum = 0, lost = 0;

  void operator+=(long double x) {
    const long double next = sum + x, part = next - sum;
    lost += (sum - (next - part)) + (x - part);
    sum = next;
  }
  operator long double() const { return sum + lost; }
};

// A row whose maximum stands first, against sums of long doubles: at most 4 ulp for the losses of
// three kinds of targets and for the entropy, 1e-6 for the gradient.
template <class T>
void hold_row(const char* what, const std::vector<T>& z) {
  const int64_t n = int64_t(z.size());
  Exact others, moments, all, weighted, weights;
  std::vector<T> y(n);
  for (int64_t c = 0; c < n; ++c) {
    const long double gap = (long double)z[0] - z[c], e = std::exp(-gap);
    y[c] = T(1) / T(n) + T(c % 7) / T(n);
    if (c) others += e;
    moments += e * gap, all += gap, weighted += y[c] * gap, weights += y[c];
  }
  const long double rest = others, moment = moments, gaps = all, weight = weights;
  const long double log_sum = std::log1p(rest), smooth = 0.1L * (gaps / n + log_sum);
  const auto hold = [&](const char* kind, T got, long double wanted) {
    const double off = ulps(got, wanted);
    const std::string told = std::string(what) + ", " + kind + ", V = " + std::to_string(n);
    check(off <= 4, told.c_str(), double(got), double(wanted));
  };
  const Row<T> row(z, 0), smoothed(z, 0, 0.1), soft(z, 0, 0, y.data());
  hold("loss", row.loss, log_sum);
  hold("entropy", row.entropy, log_sum + moment / (1 + rest));
  hold("smoothed", smoothed.loss, (1 - 0.1L) * log_sum + smooth);
  hold("soft", soft.loss, weighted + weight * log_sum);
  const double limit = sizeof(T) == 4 ? 1e-6 : 4e-15;
  const double top = double(-rest / (1 + rest));
  const double last = double(std::exp((long double)z[n - 1] - z[0]) / (1 + rest));
  if (rest > 1e-30)
    check(std::fabs(row.gradient[0] - top) <= -limit * top, "gradient", row.gradient[0], top);
  if (n > 1 && last > 1e-30)
    check(std::fabs(row.gradient[n - 1] - last) <= limit * last, "gradient", row.gradient[n - 1],
          last);
}

// Sums are as exact as their terms where all of these are rounded the same way.
template <class T>
void adversarial() {
  const double deepest = sizeof(T) == 4 ? 70 : 600;
  for (int64_t n : {2, 3, 7, 100, 255, 256, 257, 1000, 2048, 2049, 5000, 32768, 100003, 262144}) {
    const int times = n < 3000 ? 30 : n < 50000 ? 6 : 2;
    std::vector<T> z(n);
    for (int i = 0; i < times; ++i) {
      const T gap = T(i % 3 ? uniform(0.01, 30) : uniform(0, deepest));
      const T other = T(uniform(0.01, 20));
      const auto fill = [&](const char* what, auto value) {
        for (int64_t c = 0; c < n; ++c) z[c] = c ? -std::fabs(T(value(c))) : T(0);
        hold_row<T>(what, z);
      };
      fill("equal", [&](int64_t) { return gap; });
      fill("two in turn", [&](int64_t c) { return c % 2 ? gap : gap + T(0.4); });
      fill("eight in turn", [&](int64_t c) { return gap + T(c % 8) * other / 64; });
      fill("ramp", [&](int64_t c) { return gap + T(double(c) * 1e-3 * double(other)); });
      fill("one large", [&](int64_t c) { return c == 1 ? other : other + gap; });
      fill("noise", [&](int64_t) { return gap + T(uniform(0, 1)); });
    }
  }
}

// A maximum that rises from block to block by the same each time; and rows far from zero.
template <class T>
void rising() {
  for (int64_t n : {10000, 100003, 262144})
    for (int i = 0; i < 6; ++i) {
      std::vector<T> z(n);
      const double step = std::exp2(uniform(-12, 4));
      for (int64_t c = 0; c < n; ++c) z[c] = T(double(c / ours::kBlock) * step + 0.3);
      const T m = z[n - 1];
      Exact sum;
      for (T x : z) sum += std::exp((long double)x - m);
      const long double wanted = std::log1p(sum - 1);
      const Row<T> row(z, n - 1);
      check(ulps(row.loss, wanted) <= 4, "rising", double(row.loss), double(wanted));
    }
}

template <class T>
void far() {
  const int exponent = std::numeric_limits<T>::max_exponent;
  for (int64_t n : {2, 5, 300, 5000})
    for (int e = 18; e < exponent; ++e)
      for (double sign : {1.0, -1.0}) {
        std::vector<T> z(n, T(sign * std::ldexp(1.0, e)));
        const T unit = std::ldexp(T(1), e - std::numeric_limits<T>::digits);  // below 2^e
        for (int64_t c = 1; c < n; ++c) {
          const T step = (sign > 0 ? unit : 2 * unit) * T(1 + c % 3);
          z[c] = c % 5 == 4 ? std::numeric_limits<T>::lowest() : z[0] - step;
        }
        hold_row<T>("far", z);
      }
}

template <class T>
void transposed() {
  constexpr int L = kLanes<T>;
  V<T> x[L];
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) x[i][j] = T(100 * i + j);
  ours::transpose<T>(x);
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) check(x[i][j] == T(100 * j + i), "transpose", x[i][j], 100 * j + i);
}

#include "row_contracts.h"

int main() {
  exponential<float, ours::Origin<float>>("exp, float",
                                          [](float m) { return ours::Origin<float>(m); });
  exponential<float, ours::Origin<float>>(
      "exp, float, lanes", [](float m) { return ours::Origin<float>(ours::splat(m)); });
  exponential<float, ours::TwoSum<float>>(
      "exp, float, two-sum", [](float m) { return ours::TwoSum<float>(ours::splat(m)); });
  exponential<double, ours::Origin<double>>("exp, double",
                                            [](double m) { return ours::Origin<double>(m); });
  hyperbolic_tangent();
  slope<float>();
  slope<double>();
  logarithm();
  halves();
  runs_of_halves();
  blocks<float>();
  blocks<double>();
  adversarial<float>();
  adversarial<double>();
  rising<float>();
  rising<double>();
  far<float>();
  far<double>();
  transposed<float>();
  transposed<double>();
  row_contracts();
  return failures > 100 ? 100 : failures;
}
