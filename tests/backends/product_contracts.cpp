// Holds the functions of csrc/products_kernels.h to what is written above them, where the machine
// has the instructions: built and run by test_contracts.py. Prints what fails; the exit code counts
// it.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "products_kernels.h"

namespace ours = crossent::avx512_bf16;
using namespace crossent::products;
using crossent::Matrix;

int failures = 0;
std::mt19937_64 generator(0);

double normal() { return std::normal_distribution<double>()(generator); }

void check(bool holds, const char* what, double got, double wanted) {
  if (holds) return;
  if (++failures <= 20) std::printf("%s: got %.17g, expected %.17g\n", what, got, wanted);
}

double widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// To the nearest bfloat16, ties to even.
double rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return widened(uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

// Rows that are longer than they need to be, the rest nan.
template <class T>
struct Rows {
  int64_t rows, columns, stride;
  std::vector<T> numbers;

  Rows(int64_t rows, int64_t columns, int64_t more, T rest)
      : rows(rows), columns(columns), stride(columns + more), numbers(rows * stride, rest) {}
  T& at(int64_t r, int64_t c) { return numbers[r * stride + c]; }
  Matrix<const T> matrix() const { return {numbers.data(), rows, columns, stride}; }
  Matrix<T> room() { return {numbers.data(), rows, columns, stride}; }
};

Rows<uint16_t> halves(int64_t rows, int64_t columns) {
  Rows<uint16_t> x(rows, columns, 3, 0x7fc0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const float wide = float(normal() * std::exp2(3 * normal()));
      uint32_t bits;
      std::memcpy(&bits, &wide, 4);
      x.at(r, c) = uint16_t(bits >> 16);
    }
  return x;
}

Rows<float> floats(int64_t rows, int64_t columns) {
  Rows<float> x(rows, columns, 5, NAN);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) x.at(r, c) = float(normal() * std::exp2(3 * normal()));
  return x;
}

struct Sum {
  long double value = 0, sizes = 0;
  void add(long double x) { value += x, sizes += std::fabs(x); }
};

void hold(const char* what, float got, const Sum& sum, double units, double absolute) {
  const double most = double(sum.sizes) * units * 0x1p-24 + absolute;
  check(std::fabs((long double)got - sum.value) <= most, what, double(got), double(sum.value));
}

void hold_logits(int64_t n, int64_t features, int64_t classes, bool with_bias) {
  Rows<uint16_t> x = halves(n, features), w = halves(classes, features);
  std::vector<float> bias(classes);
  for (float& b : bias) b = float(normal());
  Rows<float> out(n, classes, 2, NAN);
  const ours::Pairs packed(packed_rows(n, features));
  ours::pack_rows(x.matrix(), packed.get());
  const int64_t half = classes / 2;
  for (auto [begin, end] : {std::pair{int64_t(0), half}, std::pair{half, classes}})
    ours::logits(packed.get(), w.matrix(), with_bias ? bias.data() : nullptr, out.room(), begin,
                 end);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < classes; ++c) {
      Sum sum;
      for (int64_t d = 0; d < features; ++d) sum.add(widened(x.at(r, d)) * widened(w.at(c, d)));
      if (with_bias) sum.add(bias[c]);
      hold("logits", out.at(r, c), sum, double(features + 2), double(features) * 0x1p-125);
    }
    check(std::isnan(out.at(r, classes)), "beyond the logits", out.at(r, classes), NAN);
  }
}

void hold_gradients(int64_t n, int64_t features, int64_t classes) {
  Rows<uint16_t> x = halves(n, features), w = halves(classes, features);
  Rows<float> g = floats(n, classes);
  const bool all = carries_all(classes);
  // What is taken of g, and what that may be beside it.
  const auto taken = [&](int64_t r, int64_t c) {
    return all ? double(g.at(r, c)) : rounded(g.at(r, c));
  };
  const double beside = all ? 256 : 0;
  Rows<float> dx(n, features, 1, NAN);
  ours::times(g.matrix(), w.matrix(), dx.room(), 0, classes);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t d = 0; d < features; ++d) {
      Sum sum;
      for (int64_t c = 0; c < classes; ++c) sum.add(taken(r, c) * widened(w.at(c, d)));
      const double units = double(kClasses + classes / kClasses + 4) + beside;
      hold("times", dx.at(r, d), sum, units, double(classes) * 0x1p-125);
    }
  Rows<float> dw(classes, features, 1, 0.5f);
  const ours::Pairs packed(packed_columns(n, features));
  ours::pack_columns(x.matrix(), packed.get());
  for (bool add : {false, true}) ours::outer(g.matrix(), packed.get(), dw.room(), add, 0, classes);
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t d = 0; d < features; ++d) {
      Sum sum;
      for (int64_t r = 0; r < n; ++r) sum.add(2 * taken(r, c) * widened(x.at(r, d)));
      const double units = double(std::min(n, kRows) + n / kRows + 4) + beside;
      hold("outer", dw.at(c, d), sum, units, double(n) * 0x1p-125);
    }
}

// Large entries have their errors carried, exactly; there are at most 1 / kLarge of them.
void hold_errors(int64_t classes) {
  Rows<float> g = floats(1, classes);
  double sizes = 0;
  for (int64_t c = 0; c < classes; ++c) sizes += std::fabs(g.at(0, c));
  crossent::sparse::CSRRows<float> found;
  float small[2];
  ours::errors(g.numbers.data(), classes, found, small);
  double taken = 0, lost = 0;
  check(double(found.value.size()) <= 1 / kLarge, "errors", double(found.value.size()), 256);
  size_t next = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const bool here = next < found.column.size() && found.column[next] == c;
    const float x = g.at(0, c);
    const double wanted = double(x) - rounded(x), share = std::fabs(x) / (kLarge * sizes);
    if (here) check(found.value[next] == wanted, "error", found.value[next], wanted);
    if (here) check(share > 0.999, "a large entry", share, 1);
    if (!here) check(share < 1.001, "a small entry", share, 1);
    if (!here) taken += rounded(x), lost += wanted;
    next += here;
  }
  check(std::fabs(small[0] - taken) <= 0x1p-16 * sizes, "small entries", small[0], taken);
  check(std::fabs(small[1] - lost) <= 0x1p-24 * sizes, "what they lose", small[1], lost);
  check(next == found.column.size(), "classes ascend", double(next), double(found.column.size()));
}

int main() {
  for (int64_t n : {1, 13, 14, 15, 33})
    for (int64_t features : {1, 2, 31, 33, 70})
      for (int64_t classes : {1, 16, 17, 32, 33, 100}) {
        hold_logits(n, features, classes, n % 2);
        hold_gradients(n, features, classes);
      }
  hold_logits(3, 2 * kLongest + 5, 40, true);
  hold_logits(3, kLongest, 600, true);
  hold_gradients(2, 9, 2049);
  hold_gradients(15, 33, 3000);
  hold_gradients(2 * kRows + 3, 5, 20);
  hold_gradients(kRows + 1, 40, 2100);
  hold_gradients(3, 1100, 600);
  for (int64_t classes : {1, 15, 16, 17, 64, 65, 5000}) hold_errors(classes);
  return failures > 100 ? 100 : failures;
}
