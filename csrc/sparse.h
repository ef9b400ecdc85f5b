// Gradients sparsified to few entries a row (CSR), and their products with a weight. Torch-free.
//
// A row g of the gradient has the scale s: what its entries are measured by (for a loss of class
// indices grad_output times the row's denominator weight, so that abs(g_c) / s is the probability
// of class c). The target's entry is kept as it is. docs/sparse-gradients.md proves what is claimed
// here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "float16.h"

namespace crossent::sparse {

// The entries that are left of some rows, in order of row and class.
template <class T>
struct CSRRows {
  std::vector<int32_t> column;
  std::vector<T> value;

  void add(int64_t c, T v) { column.push_back(int32_t(c)), value.push_back(v); }
};

// A row of a gradient, and its target: a class, or -1.
template <class T>
struct GradientRow {
  const T* entry;
  int64_t classes, target;
};

// A uniform number in [0, 1) that depends on its arguments alone (splitmix64).
inline double uniform(uint64_t seed, uint64_t row, uint64_t count) {
  uint64_t x = seed + 0x9e3779b97f4a7c15u * (row + 1) + 0xd1b54a32d192ed03u * (count + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return double((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

// Points on the line of accumulated sizes: one in each segment of length `step`, anywhere in it.
struct Points {
  double step, passed = 0, next;
  uint64_t seed, row, count = 0, stream;

  Points(double step, uint64_t seed, uint64_t row, uint64_t stream)
      : step(step), seed(seed), row(row), stream(stream) {
    place();
  }
  void place() { next = (double(count) + uniform(seed, row, 2 * count + stream)) * step; }
  bool reached(double size) const { return passed + size >= next; }
  // How many points lie in the next stretch.
  int walk(double size) {
    int points = 0;
    for (passed += size; passed >= next; place()) ++points, ++count;
    return points;
  }
};

// The sums of the sizes of a block's positive and negative entries, and whether all are below
// `step`.
struct BlockSizes {
  static constexpr int64_t kCount = 64;
  double positive = 0, negative = 0;
  bool all_small = true;
};
template <class T>
BlockSizes block_sizes(const T* g, T step) {
  T plus[8] = {}, minus[8] = {}, largest[8] = {};
  for (int64_t c = 0; c < BlockSizes::kCount; c += 8)
    for (int k = 0; k < 8; ++k) {
      const T x = g[c + k], y = -x;
      plus[k] += x > 0 ? x : T(0), minus[k] += y > 0 ? y : T(0);
      const T size = x < 0 ? y : x;
      largest[k] = size < largest[k] ? largest[k] : size;  // nan is largest
    }
  BlockSizes b;
  for (int k = 0; k < 8; ++k)
    b.positive += plus[k], b.negative += minus[k], b.all_small &= largest[k] < step;
  return b;
}

// Entries below tau s are replaced by tau s, each as often on average as keeps its expectation;
// those of one sign by one in each segment of total tau s, so that their sum changes by less than
// tau s. Returns how many are left at most: a number that is the same whatever is drawn, for a
// gradient that is kept or sparsified by what was drawn would no longer be right on average.
template <class T>
int64_t sparsify_unbiased(const GradientRow<T>& g, T step, uint64_t seed, uint64_t row,
                          CSRRows<T>& out) {
  Points positive(step, seed, row, 0), negative(step, seed, row, 1);
  // As `passed` of the two, but in an order without draws.
  double positive_total = 0, negative_total = 0;
  int64_t kept = 0;
  for (int64_t begin = 0; begin < g.classes; begin += BlockSizes::kCount) {
    const int64_t end = std::min(g.classes, begin + BlockSizes::kCount);
    bool summed = false;
    if (end - begin == BlockSizes::kCount && !(begin <= g.target && g.target < end)) {
      const BlockSizes b = block_sizes(g.entry + begin, step);
      summed = b.all_small;
      if (summed) positive_total += b.positive, negative_total += b.negative;
      if (summed && !positive.reached(b.positive) && !negative.reached(b.negative)) {
        positive.passed += b.positive, negative.passed += b.negative;
        continue;
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      const T x = g.entry[c], size = std::fabs(x);
      if (c == g.target || !(size < step)) {
        if (x != 0) out.add(c, x), ++kept;
        continue;
      }
      if (!summed) (x < 0 ? negative_total : positive_total) += size;
      const int points = (x < 0 ? negative : positive).walk(size);
      if (points) out.add(c, T(points) * (x < 0 ? -step : step));
    }
  }
  const auto segments = [&](double total) {
    return total > 0 ? int64_t(std::ceil(total / step)) : 0;
  };
  return kept + segments(positive_total) + segments(negative_total);
}

// The smallest entries are dropped as long as their sizes add up to at most `most`: to a sixteenth
// of an octave, by a histogram of sizes. Returns how many are left; they are added to `out` if that
// is at most `limit`.
template <class T>
int64_t sparsify_bounded(const GradientRow<T>& g, double most, int64_t limit, CSRRows<T>& out) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kShift = sizeof(T) == 4 ? 23 - 4 : 52 - 4;
  struct Bucket {
    double sum = 0;
    int64_t count = 0;
  };
  const auto bucket = [](T x) { return size_t((bits<Bits>(x) & (~Bits(0) >> 1)) >> kShift); };
  std::vector<Bucket> buckets(size_t(1) << (8 * sizeof(T) - 1 - kShift));
  for (int64_t c = 0; c < g.classes; ++c) {
    if (c == g.target || g.entry[c] == 0) continue;
    Bucket& b = buckets[bucket(g.entry[c])];
    b.sum += std::fabs(double(g.entry[c])), ++b.count;
  }
  size_t kept = 0;
  for (double dropped = 0; kept < buckets.size(); ++kept)
    if (!((dropped += buckets[kept].sum) <= most)) break;
  int64_t left = 1;
  for (size_t b = kept; b < buckets.size(); ++b) left += buckets[b].count;
  if (left > limit) return left;
  for (int64_t c = 0; c < g.classes; ++c)
    if (g.entry[c] != 0 && (c == g.target || bucket(g.entry[c]) >= kept)) out.add(c, g.entry[c]);
  return left;
}

// out += value[0] row(column[0]) + value[1] row(column[1]) + ..., four rows at a time.
template <class T, class Row>
inline void add_rows(const int32_t* column, const T* value, int64_t n, int64_t features, Row row,
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

}  // namespace crossent::sparse
