// What operators give back of each row, and what is kept for backward.
#pragma once

#include <vector>

#include "memory.h"
#include "torch_bridge.h"

namespace {

std::vector<int64_t> rows_shape(const Tensor& logits) {
  return {logits.sizes().begin(), logits.sizes().end() - 1};
}

// Memory for what backward needs of all rows, with its place in the problem.
template <class T>
Tensor fresh_saved(const Tensor& logits, crossent::Problem<T>& p) {
  kernels();  // an error about them belongs to the caller's thread
  std::vector<int64_t> shape = rows_shape(logits);
  shape.insert(shape.begin(), p.saved_count());
  const Tensor saved = fresh(shape, kDtype<T>);
  p.saved = data_of<T>(saved);
  return saved;
}

// Numbers of each row that are wanted for themselves; none where they are not.
struct Statistics {
  MaybeTensor lse, log_prob, entropy, argmax;
};

template <class T>
Statistics statistics_of(const Tensor& logits, crossent::Problem<T>& p) {
  if (!p.options.stats) return {};
  const std::vector<int64_t> shape = rows_shape(logits);
  const auto numbers = [&](T*& place) {
    const Tensor t = fresh(shape, kDtype<T>);
    place = data_of<T>(t);
    return t;
  };
  Statistics out{numbers(p.lse), numbers(p.log_prob), numbers(p.entropy), {}};
  out.argmax = fresh(shape, ScalarType::Long);
  p.argmax = data_of<int64_t>(*out.argmax);
  return out;
}

enum class Keep : int64_t { kNothing, kGradient, kRows };  // for backward

// The sum of the losses of some rows, which are never stored.
template <class T>
double sum_block(crossent::Problem<T> p, int64_t begin, int64_t end, Keep keep) {
  T loss[kMostRows], denominator_weight[kMostRows], saved[crossent::kSaved * kMostRows];
  p.loss = loss, p.denominator_weight = denominator_weight;
  if (keep == Keep::kRows) {
    // Loss and denominator_weight begin with this block, what is saved with the first row.
    p.saved += begin;
  } else {
    p.saved = saved, p.kept_rows = kMostRows;
  }
  p.first = begin;
  if (keep == Keep::kGradient) run_pass(p, begin, end);
  else run_forward(p, begin, end);
  return sum_of(loss, end - begin);
}

}  // namespace
