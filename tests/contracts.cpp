// Holds the functions of csrc/*.h to what is written above them: built and run by test_contracts.py for
// each instruction set. Prints what fails; the exit code counts it.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "lanes.h"
#include "thin.h"

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
  const T next = std::nextafter(rounded, std::numeric_limits<T>::infinity());
  return double(std::fabs((long double)got - wanted) / ((long double)next - rounded));
}

// exp(z - m) within 2 ulp for every gap; nothing below the floor; nan stays nan.
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
    check(ulps(got, std::exp(gap)) < 2, what, double(got), double(std::exp(gap)));
  }
  const Origin origin = make(T(3));
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T one = origin.template exp<false>(ours::splat(T(3)))[0] * Exp<T>::kUnscale;
  check(ulps(one, 1) < 2, what, double(one), 1);
  const T low = origin.template exp<false>(ours::splat(-inf))[0] * Exp<T>::kUnscale;
  check(low >= 0 && low < std::numeric_limits<T>::min(), what, double(low), 0);
  const T not_a_number = origin.template exp<false>(ours::splat(nan))[0];
  check(not_a_number != not_a_number, what, double(not_a_number), double(nan));
  const Origin far = make(T(3e30));
  check(far.template exp<true>(ours::splat(T(3e30)))[0] == Exp<T>::kScale, what, 0, 1);
  check(far.template exp<true>(ours::splat(T(2.9e30)))[0] == 0, what, 0, 0);
}

void hyperbolic_tangent() {
  for (int i = 0; i < 200000; ++i) {
    const float x = float(uniform(-1, 1) * std::exp2(uniform(-20, 5)));
    const float got = ours::tanh_(ours::splat(x))[0];
    const double wanted = std::tanh(double(x));
    check(std::fabs(got - wanted) < 0x1p-23, "tanh, absolute", got, wanted);
    check(std::fabs(got - wanted) <= 0x1p-22 * std::fabs(wanted), "tanh, relative", got, wanted);
  }
  const float nan = ours::tanh_(ours::splat(std::nanf("")))[0];
  check(nan != nan, "tanh of nan", nan, nan);
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

void halves() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float wide = ours::from_float16(uint16_t(h));
    _Float16 same;
    const uint16_t bits = uint16_t(h);
    std::memcpy(&same, &bits, 2);
    const float wanted = float(same);
    const bool nan = wanted != wanted;
    check(nan ? wide != wide : wide == wanted, "from float16", wide, wanted);
    check(nan || ours::to_float16(wide) == h, "to float16", ours::to_float16(wide), h);
    const crossent::thin::Float16 stored{uint16_t(h)};
    check(nan ? float(stored) != float(stored) : float(stored) == wanted, "thin::Float16",
          float(stored), wanted);
    const float brain = ours::from_bfloat16(uint16_t(h));
    check(brain != brain || ours::to_bfloat16(brain) == h, "bfloat16", brain, brain);
  }
  for (int i = 0; i < 200000; ++i) {  // rounding to nearest, ties to even
    const float x = float(uniform(-1, 1) * std::exp2(uniform(-30, 18)));
    const _Float16 rounded = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    check(ours::to_float16(x) == bits, "rounding to float16", ours::to_float16(x), bits);
  }
}

// Runs of every length are converted as single numbers are.
void runs_of_halves() {
  uint16_t halves[300], back[300];
  float floats[300];
  for (uint32_t first = 0; first < 65536; first += 256)
    for (int n : {1, 7, 8, 9, 255, 256}) {
      for (int i = 0; i < n; ++i) halves[i] = uint16_t(first + i);
      ours::from_float16(halves, n, floats);
      for (int i = 0; i < n; ++i) {
        const float wanted = ours::from_float16(halves[i]);
        const bool nan = wanted != wanted;
        check(nan ? floats[i] != floats[i] : floats[i] == wanted, "run from float16", floats[i],
              wanted);
        floats[i] *= 1.0f + float(i % 5) * 0x1.001p-11f;  // off the grid, and halfway
      }
      back[n] = 12345;
      ours::to_float16(floats, n, back);
      check(back[n] == 12345, "run to float16, end", back[n], 12345);
      for (int i = 0; i < n; ++i) {
        const uint16_t wanted = ours::to_float16(floats[i]);
        const bool nan = floats[i] != floats[i];
        check(nan ? (back[i] & 0x7fff) > 0x7c00 : back[i] == wanted, "run to float16", back[i], wanted);
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
    bool odd = true, odder = false;
    const T found = ours::block_max(z.data(), n, &odd);
    check(found == m, "block_max", found, m);
    const bool infinite = std::any_of(z.begin(), z.begin() + n, [](T x) { return std::isinf(x); });
    check(odd == infinite, "block_max, odd", odd, infinite);
    std::vector<T> strange(z.begin(), z.begin() + n);
    strange[n / 2] = std::numeric_limits<T>::quiet_NaN();
    ours::block_max(strange.data(), n, &odder);
    check(odder, "block_max, nan is odd", odder, 1);
    long double below = 0, moment = 0, mass = 0, gap = 0;
    int ties = 0, open = 0;
    for (int i = 0; i < n; ++i) {
      const long double e = std::exp((long double)z[i] - m), a = (long double)y[i] * w[i];
      const bool shut = std::isinf(z[i]);
      ties += z[i] == m, open += !shut, mass += a;
      if (!shut) gap += a * ((long double)m - z[i]);
      if (z[i] != m && !shut) below += e, moment += e * ((long double)m - z[i]);
    }
    const ours::BlockSum s = ours::block_sum(z.data(), n, m, true, ours::Ahead{nullptr, 0});
    const double eps = 8 * std::numeric_limits<T>::epsilon();
    check(s.ties == ties, "block_sum, ties", s.ties, ties);
    check(std::fabs(s.below - below) <= eps * below + 1e-50L, "block_sum", s.below, double(below));
    check(std::fabs(s.moment - moment) <= eps * moment + 1e-50L, "block_sum, moment", s.moment,
          double(moment));
    const ours::BlockGap g = ours::block_gap(z.data(), y.data(), w.data(), n, m, false);
    check(std::fabs(g.mass - mass) <= eps * mass, "block_gap, mass", g.mass, double(mass));
    check(std::fabs(g.gap - gap) <= eps * gap + 1e-30L, "block_gap", g.gap, double(gap));
    check(g.open == open, "block_gap, open", g.open, open);
    const T* none = nullptr;
    const ours::BlockGap u = ours::block_gap(z.data(), none, none, n, m, true);
    check(u.mass == open && u.open == open, "block_gap, uniform", u.mass, open);
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

int main() {
  exponential<float, ours::Origin<float>>("exp, float", [](float m) { return ours::Origin<float>(m); });
  exponential<float, ours::Origin<float>>("exp, float, lanes", [](float m) {
    return ours::Origin<float>(ours::splat(m));
  });
  exponential<float, ours::TwoSum<float>>("exp, float, two-sum", [](float m) {
    return ours::TwoSum<float>(ours::splat(m));
  });
  exponential<double, ours::Origin<double>>("exp, double", [](double m) { return ours::Origin<double>(m); });
  hyperbolic_tangent();
  logarithm();
  halves();
  runs_of_halves();
  blocks<float>();
  blocks<double>();
  transposed<float>();
  transposed<double>();
  return failures > 100 ? 100 : failures;
}
