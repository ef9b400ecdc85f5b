// Holds csrc/entropy.h, log_probs.h and scale_gradient.h to what is written above their functions.
// Part of contracts.cpp, whose helpers it uses.
#pragma once

#include "row_tiles.h"

// One row, its entropy and the log-probabilities of some of its classes, and what belongs to them.
template <class T>
struct RowOf {
  const std::vector<T>& z;
  crossent::Problem<T> p{};
  T entropy = 0, saved[ours::kEntropySaved], up = 1;
  std::vector<T> gradient;
  double by_scale = 0;

  explicit RowOf(const std::vector<T>& z) : z(z), gradient(z.size()) {
    const auto dtype = sizeof(T) == 4 ? crossent::Dtype::kFloat32 : crossent::Dtype::kFloat64;
    crossent::Layout rows;
    rows.rank = 1, rows.size[0] = 1, rows.stride[0] = int64_t(z.size());
    p.classes = int64_t(z.size()), p.rows = p.kept_rows = 1;
    p.logits = {const_cast<T*>(z.data()), dtype, 1, rows};
    p.gradient = {gradient.data(), dtype, 1, rows};
    p.saved = saved, p.entropy = &entropy, p.grad_output.data = &up;
  }
  void run_entropy() {
    p.options.stats = true;
    ours::entropy_rows<T>(p, 0, 1);
    ours::entropy_backward<T>(p, 0, 1, &by_scale);
  }
  std::vector<T> run_log_probs(const std::vector<int64_t>& index, const std::vector<T>& weights) {
    const int64_t count = int64_t(index.size());
    std::vector<T> values(count);
    std::vector<crossent::ChosenClass> room(count * crossent::kMostLanes);
    const crossent::Layout none{};
    crossent::Selection<T> s;
    s.index = {index.data(), count, 1, none}, s.log_prob = values.data();
    s.grad_output = {weights.data(), count, 1, none}, s.room = room.data();
    ours::log_probs_rows<T>(p, 0, 1, s);
    ours::log_probs_backward<T>(p, 0, 1, s, &by_scale);
    return values;
  }
};

// The truth of a row in long double, the maximum left out of the sum.
struct Truth {
  long double m = 0, rest = 0, moment = 0;
  int top = 0;

  template <class T>
  explicit Truth(const std::vector<T>& z) {
    for (size_t c = 0; c < z.size(); ++c)
      if (z[c] > z[top]) top = int(c);
    m = z[top];
    Exact others, moments;
    for (size_t c = 0; c < z.size(); ++c) {
      if (int(c) == top || z[c] < m - 11000) continue;
      const long double e = std::exp((long double)z[c] - m);
      others += e, moments += e * (m - z[c]);
    }
    rest = others, moment = moments;
  }
  long double mean_gap() const { return moment / (1 + rest); }
  long double entropy() const { return std::log1p(rest) + mean_gap(); }
  // p of a class, and the share of all others.
  long double p(long double z, bool at_top) const {
    return (at_top ? 1 : std::exp(z - m)) / (1 + rest);
  }
  long double others(long double z, bool at_top) const {
    return at_top ? rest / (1 + rest) : 1 - p(z, false);
  }
};

template <class T>
std::vector<T> random_row(int n) {
  std::vector<T> z(n);
  const double size = std::exp2(uniform(-12, 5)),
               offset = uniform(-1, 1) * std::exp2(uniform(0, 9));
  for (T& x : z) x = T(offset + size * uniform(-1, 1));
  if (n > 1 && int(uniform(0, 3)) == 0) z[n / 2] = z[0] + T(uniform(0, 70));  // confident
  if (n > 3 && int(uniform(0, 3)) == 0) z[n / 3] = -std::numeric_limits<T>::infinity();
  if (n > 3 && int(uniform(0, 4)) == 0) z[n - 1] = z[n / 2];
  return z;
}

template <class T>
void entropies() {
  const double limit = sizeof(T) == 4 ? 0x1p-20 : 0x1p-45;  // of double: exp to 2 ulp, gaps
  const double smallest = sizeof(T) == 4 ? 1e-30 : 1e-290;
  for (int n : {1, 2, 3, 7, 16, 33, 100, 2048, 2049, 5000})
    for (int i = 0; i < 200; ++i) {
      const std::vector<T> z = random_row<T>(n);
      const Truth truth(z);
      RowOf<T> row(z);
      row.up = T(uniform(-3, 3));
      row.run_entropy();
      check(ulps(row.entropy, truth.entropy()) <= 4, "entropy", double(row.entropy),
            double(truth.entropy()));
      Exact by_scale, size;
      for (int c = 0; c < n; ++c) {
        const bool masked = std::isinf(z[c]);
        const long double p = masked ? 0 : truth.p(z[c], z[c] == z[truth.top]) * row.up;
        const long double gap = masked ? 0 : truth.m - z[c];
        const long double wanted = p * (gap - truth.mean_gap());
        const long double scale = std::fabs(p) * std::fmax(gap, truth.mean_gap());
        by_scale += masked ? 0 : row.gradient[c] * (long double)z[c];
        size += masked ? 0 : std::fabs(row.gradient[c] * (long double)z[c]);
        if (scale < smallest && scale > 0) continue;
        check(std::fabs(row.gradient[c] - wanted) <= limit * scale, "entropy's gradient",
              double(row.gradient[c]), double(wanted));
      }
      const long double wanted = by_scale, most = size;
      check(std::fabs(row.by_scale - wanted) <= 0x1p-44L * most, "by scale", row.by_scale,
            double(wanted));
    }
}

template <class T>
void several_log_probs() {
  const double limit = sizeof(T) == 4 ? 1e-6 : 1e-12;
  for (int n : {1, 2, 3, 7, 33, 2049, 5000})
    for (int i = 0; i < 200; ++i) {
      const std::vector<T> z = random_row<T>(n);
      const Truth truth(z);
      RowOf<T> row(z);
      std::vector<int64_t> index(i % 4 ? int(uniform(0, i % 2 ? 5 : 60)) : 1);
      std::vector<T> weights(index.size());
      std::vector<long double> at(n), own(n);
      long double total = 0, size = 0;
      for (size_t k = 0; k < index.size(); ++k) {
        index[k] = int(uniform(0, 5)) ? int64_t(uniform(0, n)) : row.p.options.ignore_index;
        if (k == 0) index[k] = truth.top;
        weights[k] = T(uniform(-1, 2));
        if (index[k] < 0) continue;
        at[index[k]] += weights[k], own[index[k]] += std::fabs(weights[k]), total += weights[k],
            size += std::fabs(weights[k]);
      }
      const std::vector<T> values = row.run_log_probs(index, weights);
      for (size_t k = 0; k < index.size(); ++k) {
        const bool skipped = index[k] < 0;
        const long double wanted =
            skipped ? 0 : -((truth.m - z[index[k]]) + std::log1p(truth.rest));
        check(skipped ? values[k] == 0 : ulps(T(-values[k]), -wanted) <= 4, "log p",
              double(values[k]), double(wanted));
      }
      for (int c = 0; c < n; ++c) {
        const bool top = z[c] == z[truth.top];
        const long double p = std::isinf(z[c]) ? 0 : truth.p(z[c], top);
        const long double others = std::isinf(z[c]) ? 1 : truth.others(z[c], top);
        const long double wanted = at[c] * others - (total - at[c]) * p;
        // Of a class that is chosen alone no part may hide behind a larger one: p - 1 cancels.
        const long double elsewhere = size - own[c] > 1e-9L * size ? size - own[c] : 0;
        const long double scale = std::fabs(at[c]) * others + elsewhere * p;
        if (scale < 1e-30) continue;
        check(std::fabs(row.gradient[c] - wanted) <= limit * scale, "log p's gradient",
              double(row.gradient[c]), double(wanted));
      }
    }
}

void sorted() {
  for (int n = 0; n < 200; ++n) {
    std::vector<crossent::ChosenClass> chosen(n), wanted;
    for (auto& each : chosen) each = {int64_t(uniform(0, 20)), uniform(-1, 1)};
    wanted = chosen;
    std::sort(wanted.begin(), wanted.end(), ours::comes_before);
    ours::sort_chosen(chosen.data(), n);
    for (int i = 0; i < n; ++i)
      check(chosen[i].at == wanted[i].at && chosen[i].weight == wanted[i].weight, "sorted",
            double(chosen[i].at), double(wanted[i].at));
  }
}

template <class T>
void products() {
  const T inf = std::numeric_limits<T>::infinity();
  for (int n = 0; n < 300; ++n) {
    std::vector<T> g(n), x(n);
    Exact sum, size;
    for (int i = 0; i < n; ++i) {
      g[i] = T(uniform(-1, 1) * std::exp2(uniform(-30, 30)));
      x[i] = T(uniform(-1, 1) * std::exp2(uniform(-30, 30)));
      if (i % 7 == 3) g[i] = 0, x[i] = i % 2 ? -inf : inf;
      else sum += (long double)g[i] * x[i], size += std::fabs((long double)g[i] * x[i]);
    }
    const double got = double(ours::sum_of_products(g.data(), x.data(), n));
    check(std::fabs(got - (long double)sum) <= 0x1p-44L * size, "products", got, double(sum));
  }
}

void row_contracts() {
  entropies<float>();
  entropies<double>();
  several_log_probs<float>();
  several_log_probs<double>();
  sorted();
  products<float>();
  products<double>();
}
