// The operators of src/crossent/ops.py for thinned gradients on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <map>
#include <mutex>
#include <tuple>

#include "thin.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace thin = crossent::thin;

template <class T>
const T* numbers(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

using Thinned = std::tuple<Tensor, Tensor, Tensor>;

// Rows of `gradient` (n, V) thinned; nothing where more than `limit` entries could be left. Whether they
// could depends on the gradient alone, not on what is drawn nor on the threads.
template <class T>
Thinned thin_rows(const Tensor& gradient, const Tensor& scale, const Tensor& target,
                  const Tensor& row, double tau, bool is_unbiased, int64_t seed, int64_t limit,
                  ScalarType dtype) {
  const int64_t rows = gradient.size(0), classes = gradient.size(1), stride = gradient.stride(0);
  const T *g = numbers<T>(gradient), *scales = numbers<T>(scale);
  const int64_t *targets = numbers<int64_t>(target), *ids = numbers<int64_t>(row);
  const Tensor start = torch::stable::new_empty(gradient, {rows + 1}, ScalarType::Long);
  int64_t* begins = static_cast<int64_t*>(start.data_ptr());
  begins[0] = 0;
  std::map<int64_t, thin::Entries<T>> parts;  // by first row
  std::mutex guard;
  int64_t total = 0;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    thin::Entries<T> mine;
    for (int64_t r = begin; r < end; ++r) {
      const size_t before = mine.value.size();
      int64_t left = 0;
      if (is_unbiased)
        left = thin::unbiased(g + r * stride, classes, targets[r], T(tau * scales[r]), uint64_t(seed),
                              uint64_t(ids[r]), mine);
      else
        left = thin::bounded(g + r * stride, classes, targets[r], tau * double(scales[r]), limit,
                             mine);
      begins[r + 1] = int64_t(mine.value.size() - before);
      if (__atomic_add_fetch(&total, left, __ATOMIC_RELAXED) > limit) return;
    }
    const std::lock_guard<std::mutex> lock(guard);
    parts.emplace(begin, std::move(mine));
  });
  const bool dense = total > limit;
  total = 0;
  for (const auto& [_, part] : parts) total += dense ? 0 : int64_t(part.value.size());
  const Tensor column = torch::stable::new_empty(gradient, {total}, ScalarType::Int);
  const Tensor value = torch::stable::new_empty(gradient, {total}, dtype);
  if (dense) return {torch::stable::new_empty(gradient, {0}, ScalarType::Long), column, value};
  for (int64_t r = 0; r < rows; ++r) begins[r + 1] += begins[r];
  for (const auto& [begin, part] : parts) {
    const size_t n = part.value.size();
    if (n == 0) continue;
    std::memcpy(static_cast<int32_t*>(column.data_ptr()) + begins[begin], part.column.data(),
                n * sizeof(int32_t));
    std::memcpy(static_cast<T*>(value.data_ptr()) + begins[begin], part.value.data(),
                n * sizeof(T));
  }
  return {start, column, value};
}

Thinned thin_(const Tensor& gradient, const Tensor& scale, const Tensor& target, const Tensor& row,
              double tau, bool is_unbiased, int64_t seed, int64_t limit) {
  STD_TORCH_CHECK(gradient.stride(1) == 1, "crossent: expected rows of neighbouring classes");
  STD_TORCH_CHECK(scale.scalar_type() == gradient.scalar_type() &&
                      target.scalar_type() == ScalarType::Long && row.scalar_type() == ScalarType::Long,
                  "crossent: expected scales of the gradient's dtype, targets and rows of int64");
  if (gradient.scalar_type() == ScalarType::Double)
    return thin_rows<double>(gradient, scale, target, row, tau, is_unbiased, seed, limit,
                             ScalarType::Double);
  return thin_rows<float>(gradient, scale, target, row, tau, is_unbiased, seed, limit,
                          ScalarType::Float);
}

// Runs f<S> with a pointer to rows as they are stored.
template <class T, class F>
void with_rows(const Tensor& t, F f) {
  STD_TORCH_CHECK(t.stride(1) == 1, "crossent: expected rows of neighbouring features");
  switch (t.scalar_type()) {
    case ScalarType::Double: return f(numbers<double>(t));
    case ScalarType::Float: return f(numbers<float>(t));
    case ScalarType::BFloat16: return f(numbers<thin::BFloat16>(t));
    case ScalarType::Half: return f(numbers<thin::Float16>(t));
    default: STD_TORCH_CHECK(false, "crossent: expected a floating-point tensor");
  }
}

template <class T>
void gather_rows(const int64_t* begins, const int32_t* columns, const Tensor& value,
                 const Tensor& weight, const Tensor& out) {
  const int64_t rows = out.size(0), features = out.size(1);
  T* to = static_cast<T*>(out.data_ptr());
  with_rows<T>(weight, [&](const auto* w) {
    const int64_t stride = weight.stride(0);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = to + r * features;
        std::fill(row, row + features, T(0));
        thin::combine(columns + begins[r], numbers<T>(value) + begins[r], begins[r + 1] - begins[r],
                      features, [&](int32_t c) { return w + c * stride; }, row);
      }
    });
  });
}

// (n, V) thinned, times a weight (V, D).
Tensor gather(const Tensor& start, const Tensor& column, const Tensor& value,
              const Tensor& weight) {
  const Tensor out = torch::stable::new_empty(
      value, {start.numel() - 1, weight.size(1)}, value.scalar_type());
  if (value.scalar_type() == ScalarType::Double)
    gather_rows<double>(numbers<int64_t>(start), numbers<int32_t>(column), value, weight, out);
  else
    gather_rows<float>(numbers<int64_t>(start), numbers<int32_t>(column), value, weight, out);
  return out;
}

template <class T>
void scatter_rows(T* out, int64_t classes, const int64_t* begins, const int32_t* columns,
                  const T* values, const Tensor& x) {
  const int64_t rows = x.size(0), features = x.size(1), stride = x.stride(0);
  const T* from = numbers<T>(x);
  // Each thread has its own classes: sums are in the order of rows, on any number of threads.
  torch::stable::parallel_for(0, classes, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t *last = columns + begins[r + 1],
                    *c = std::lower_bound(columns + begins[r], last, int32_t(begin));
      const T* row = from + r * stride;
      for (; c < last && *c < end; ++c) {
        if (c + 4 < last) {  // the lines of a later row come while this one is added to
          const char* later = reinterpret_cast<const char*>(out + int64_t(c[4]) * features);
          for (int line = 0; line < 4; ++line) __builtin_prefetch(later + 64 * line, 1);
        }
        const T v = values[c - columns];
        T* to = out + int64_t(*c) * features;
        for (int64_t i = 0; i < features; ++i) to[i] += v * row[i];
      }
    }
  });
}

// dweight (V, D) += (n, V) thinned, transposed, times x (n, D).
void scatter_(Tensor dweight, const Tensor& start, const Tensor& column, const Tensor& value,
              const Tensor& x) {
  const int64_t* begins = numbers<int64_t>(start);
  const int32_t* columns = numbers<int32_t>(column);
  const int64_t classes = dweight.size(0);
  STD_TORCH_CHECK(x.stride(1) == 1 && dweight.stride(1) == 1 &&
                      dweight.stride(0) == dweight.size(1),
                  "crossent: expected neighbouring features");
  if (value.scalar_type() == ScalarType::Double)
    scatter_rows(static_cast<double*>(dweight.data_ptr()), classes, begins, columns,
                 numbers<double>(value), x);
  else
    scatter_rows(static_cast<float*>(dweight.data_ptr()), classes, begins, columns,
                 numbers<float>(value), x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) {
  m.impl("thin", TORCH_BOX(&thin_));
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("scatter_", TORCH_BOX(&scatter_));
}
