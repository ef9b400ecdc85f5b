// Gradients thinned to few entries a row, and their products with a weight. Torch-free.
//
// A row g of the gradient has the scale s: what its entries are measured by (for a loss of class indices
// the upstream gradient times the row's mass, so that abs(g_c) / s is the probability of class c). The
// target's entry is kept as it is. docs/sparse-gradients.md proves what is claimed here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace crossent::thin {

// Halves as they are stored.
struct BFloat16 {
  uint16_t bits;

  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &wide, sizeof f);
    return f;
  }
};
struct Float16 {
  uint16_t bits;

  operator float() const {  // exact, subnormals, inf and nan included
    const uint32_t magnitude = uint32_t(bits & 0x7fffu) << 13;
    float f;
    std::memcpy(&f, &magnitude, sizeof f);
    f *= 0x1p112f;
    uint32_t wide;
    std::memcpy(&wide, &f, sizeof wide);
    wide |= (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    wide |= uint32_t(bits & 0x8000u) << 16;
    std::memcpy(&f, &wide, sizeof f);
    return f;
  }
};

// The entries that are left of some rows, in order of row and class.
template <class T>
struct Entries {
  std::vector<int32_t> column;
  std::vector<T> value;

  void add(int64_t c, T v) { column.push_back(int32_t(c)), value.push_back(v); }
};

// A uniform number in [0, 1) that depends on its arguments alone (splitmix64).
inline double uniform(uint64_t seed, uint64_t row, uint64_t count) {
  uint64_t x = seed + 0x9e3779b97f4a7c15u * (row + 1) + 0xd1b54a32d192ed03u * (count + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return double((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

// Points on the line of accumulated masses: one in each segment of length `step`, anywhere in it.
struct Points {
  double step, passed = 0, next;
  uint64_t seed, row, count = 0, stream;

  Points(double step, uint64_t seed, uint64_t row, uint64_t stream)
      : step(step), seed(seed), row(row), stream(stream) { place(); }
  void place() { next = (double(count) + uniform(seed, row, 2 * count + stream)) * step; }
  bool reached(double mass) const { return passed + mass >= next; }
  // How many points lie in the next stretch.
  int walk(double mass) {
    int points = 0;
    for (passed += mass; passed >= next; place()) ++points, ++count;
    return points;
  }
};

// Entries below tau s are replaced by tau s, each as often on average as keeps its expectation; those of
// one sign by one in each segment of total tau s, so that their sum changes by less than tau s.
// Returns how many are left at most: a number that is the same whatever is drawn, for a gradient that is
// kept or thinned by what was drawn would no longer be right on average.
template <class T>
int64_t unbiased(const T* g, int64_t classes, int64_t target, T step, uint64_t seed, uint64_t row,
              Entries<T>& out) {
  constexpr int64_t kBlock = 64;
  Points above(step, seed, row, 0), below(step, seed, row, 1);
  double mass_above = 0, mass_below = 0;  // as `passed` of the two, but in an order without draws
  int64_t kept = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = std::min(classes, begin + kBlock);
    bool counted = false;
    if (end - begin == kBlock && !(begin <= target && target < end)) {
      T plus[8] = {}, minus[8] = {}, largest[8] = {};
      for (int64_t c = begin; c < end; c += 8)
        for (int k = 0; k < 8; ++k) {
          const T x = g[c + k], y = -x;
          plus[k] += x > 0 ? x : T(0), minus[k] += y > 0 ? y : T(0);
          const T size = x < 0 ? y : x;
          largest[k] = size < largest[k] ? largest[k] : size;  // nan is largest
        }
      double p = 0, m = 0;
      bool small = true;
      for (int k = 0; k < 8; ++k) p += plus[k], m += minus[k], small &= largest[k] < step;
      counted = small;
      if (small) mass_above += p, mass_below += m;
      if (small && !above.reached(p) && !below.reached(m)) {
        above.passed += p, below.passed += m;
        continue;
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      const T x = g[c], size = std::fabs(x);
      if (c == target || !(size < step)) {
        if (x != 0) out.add(c, x), ++kept;
        continue;
      }
      if (!counted) (x < 0 ? mass_below : mass_above) += size;
      const int points = (x < 0 ? below : above).walk(size);
      if (points) out.add(c, T(points) * (x < 0 ? -step : step));
    }
  }
  const auto segments = [&](double mass) { return mass > 0 ? int64_t(std::ceil(mass / step)) : 0; };
  return kept + segments(mass_above) + segments(mass_below);
}

// The smallest entries are dropped as long as their sizes add up to at most `most`: to a sixteenth of an
// octave, by a histogram of sizes. Returns how many are left; they are added to `out` if that is at
// most `limit`.
template <class T>
int64_t bounded(const T* g, int64_t classes, int64_t target, double most, int64_t limit,
                Entries<T>& out) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kShift = sizeof(T) == 4 ? 23 - 4 : 52 - 4;
  struct Bucket {
    double sum = 0;
    int64_t count = 0;
  };
  const auto bucket = [](T x) {
    Bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    return size_t((bits & (~Bits(0) >> 1)) >> kShift);
  };
  std::vector<Bucket> buckets(size_t(1) << (8 * sizeof(T) - 1 - kShift));
  for (int64_t c = 0; c < classes; ++c) {
    if (c == target || g[c] == 0) continue;
    Bucket& b = buckets[bucket(g[c])];
    b.sum += std::fabs(double(g[c])), ++b.count;
  }
  size_t kept = 0;
  for (double dropped = 0; kept < buckets.size(); ++kept)
    if (!((dropped += buckets[kept].sum) <= most)) break;
  int64_t left = 1;
  for (size_t b = kept; b < buckets.size(); ++b) left += buckets[b].count;
  if (left > limit) return left;
  for (int64_t c = 0; c < classes; ++c)
    if (g[c] != 0 && (c == target || bucket(g[c]) >= kept)) out.add(c, g[c]);
  return left;
}

// out += value[0] row(column[0]) + value[1] row(column[1]) + ..., four rows at a time.
template <class T, class Row>
inline void combine(const int32_t* column, const T* value, int64_t n, int64_t features, Row row,
                    T* out) {
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    const auto a = row(column[k]), b = row(column[k + 1]), c = row(column[k + 2]),
               d = row(column[k + 3]);
    const T va = value[k], vb = value[k + 1], vc = value[k + 2], vd = value[k + 3];
    for (int64_t i = 0; i < features; ++i)
      out[i] += (va * T(a[i]) + vb * T(b[i])) + (vc * T(c[i]) + vd * T(d[i]));
  }
  for (; k < n; ++k) {
    const auto a = row(column[k]);
    for (int64_t i = 0; i < features; ++i) out[i] += value[k] * T(a[i]);
  }
}

}  // namespace crossent::thin
