// The operators of src/crossent/backends/ops.py for sparse gradients on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <map>
#include <mutex>
#include <tuple>

#include "sparse.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace sparse = crossent::sparse;

template <class T>
const T* numbers(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

// A gradient (n, V), for each row its scale, its target and the number that its draws depend on,
// and what is wanted of it.
struct SparsifyInputs {
  const Tensor &gradient, &scale, &target, &row;
  double tau;
  bool unbiased;
  int64_t seed, limit;
};

using CSRTuple = std::tuple<Tensor, Tensor, Tensor>;
struct CSRTensors {
  Tensor start, column, value;

  CSRTuple tuple() const { return {start, column, value}; }
};

// What each thread made of its rows, by first row; and the entries of all of them, at most.
template <class T>
struct SparseParts {
  std::map<int64_t, sparse::CSRRows<T>> rows;
  int64_t total = 0;
};

// Writes how many entries row r has to counts[r]. Stops early once there are more than the limit.
template <class T>
SparseParts<T> sparsify_parts(const SparsifyInputs& in, int64_t* counts) {
  const int64_t rows = in.gradient.size(0), classes = in.gradient.size(1);
  const int64_t stride = in.gradient.stride(0);
  const T *g = numbers<T>(in.gradient), *scales = numbers<T>(in.scale);
  const int64_t *targets = numbers<int64_t>(in.target), *ids = numbers<int64_t>(in.row);
  SparseParts<T> parts;
  std::mutex guard;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    sparse::CSRRows<T> mine;
    for (int64_t r = begin; r < end; ++r) {
      const size_t before = mine.value.size();
      const sparse::GradientRow<T> row{g + r * stride, classes, targets[r]};
      const int64_t left =
          in.unbiased ? sparse::sparsify_unbiased(row, T(in.tau * scales[r]), uint64_t(in.seed),
                                                  uint64_t(ids[r]), mine)
                      : sparse::sparsify_bounded(row, in.tau * double(scales[r]), in.limit, mine);
      counts[r] = int64_t(mine.value.size() - before);
      if (__atomic_add_fetch(&parts.total, left, __ATOMIC_RELAXED) > in.limit) return;
    }
    const std::lock_guard<std::mutex> lock(guard);
    parts.rows.emplace(begin, std::move(mine));
  });
  return parts;
}

// Nothing where more than `limit` entries could be left. Whether they could depends on the gradient
// alone, not on what is drawn nor on the threads.
template <class T>
CSRTensors sparsify_rows(const SparsifyInputs& in) {
  const Tensor& like = in.gradient;
  const int64_t rows = like.size(0);
  const Tensor start = torch::stable::new_empty(like, {rows + 1}, ScalarType::Long);
  int64_t* begins = static_cast<int64_t*>(start.data_ptr());
  begins[0] = 0;
  const SparseParts<T> parts = sparsify_parts<T>(in, begins + 1);
  const bool dense = parts.total > in.limit;
  int64_t total = 0;
  for (const auto& [_, part] : parts.rows) total += dense ? 0 : int64_t(part.value.size());
  const Tensor column = torch::stable::new_empty(like, {total}, ScalarType::Int);
  const Tensor value = torch::stable::new_empty(like, {total}, like.scalar_type());
  if (dense) return {torch::stable::new_empty(like, {0}, ScalarType::Long), column, value};
  for (int64_t r = 0; r < rows; ++r) begins[r + 1] += begins[r];
  for (const auto& [begin, part] : parts.rows) {
    const size_t n = part.value.size();
    if (n == 0) continue;
    std::memcpy(static_cast<int32_t*>(column.data_ptr()) + begins[begin], part.column.data(),
                n * sizeof(int32_t));
    std::memcpy(static_cast<T*>(value.data_ptr()) + begins[begin], part.value.data(),
                n * sizeof(T));
  }
  return {start, column, value};
}

CSRTuple sparsify(const Tensor& gradient, const Tensor& scale, const Tensor& target,
                  const Tensor& row, double tau, bool unbiased, int64_t seed, int64_t limit) {
  STD_TORCH_CHECK(gradient.stride(1) == 1, "crossent: expected rows of neighbouring classes");
  STD_TORCH_CHECK(scale.scalar_type() == gradient.scalar_type() &&
                      target.scalar_type() == ScalarType::Long &&
                      row.scalar_type() == ScalarType::Long,
                  "crossent: expected scales of the gradient's dtype, targets and rows of int64");
  const SparsifyInputs in{gradient, scale, target, row, tau, unbiased, seed, limit};
  const bool is_double = gradient.scalar_type() == ScalarType::Double;
  return (is_double ? sparsify_rows<double>(in) : sparsify_rows<float>(in)).tuple();
}

// A sparse gradient: the entries of row r are start[r] to start[r + 1].
template <class T>
struct CSRView {
  const int64_t* start;
  const int32_t* column;
  const T* value;

  CSRView(const Tensor& start, const Tensor& column, const Tensor& value)
      : start(numbers<int64_t>(start)),
        column(numbers<int32_t>(column)),
        value(numbers<T>(value)) {}
};

// Runs f with a pointer to rows as they are stored.
template <class F>
void with_rows(const Tensor& t, F f) {
  STD_TORCH_CHECK(t.size(1) < 2 || t.stride(1) == 1,
                  "crossent: expected rows of neighbouring features");
  switch (t.scalar_type()) {
    case ScalarType::Double: return f(numbers<double>(t));
    case ScalarType::Float: return f(numbers<float>(t));
    case ScalarType::BFloat16: return f(numbers<crossent::BFloat16>(t));
    case ScalarType::Half: return f(numbers<crossent::Float16>(t));
    default: STD_TORCH_CHECK(false, "crossent: expected a floating-point tensor");
  }
}

template <class T>
void csr_matmul_rows(const CSRView<T>& g, const Tensor& weight, const Tensor& out) {
  const int64_t rows = out.size(0), features = out.size(1);
  T* to = static_cast<T*>(out.data_ptr());
  with_rows(weight, [&](const auto* w) {
    const int64_t stride = weight.stride(0);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = to + r * features;
        std::fill(row, row + features, T(0));
        sparse::add_rows(
            g.column + g.start[r], g.value + g.start[r], g.start[r + 1] - g.start[r], features,
            [&](int32_t c) { return w + c * stride; }, row);
      }
    });
  });
}

// A sparse gradient (n, V), times a weight (V, D).
Tensor csr_matmul(const Tensor& start, const Tensor& column, const Tensor& value,
                  const Tensor& weight) {
  const Tensor out =
      torch::stable::new_empty(value, {start.numel() - 1, weight.size(1)}, value.scalar_type());
  if (value.scalar_type() == ScalarType::Double)
    csr_matmul_rows(CSRView<double>(start, column, value), weight, out);
  else csr_matmul_rows(CSRView<float>(start, column, value), weight, out);
  return out;
}

template <class T>
void csr_matmul_add_rows(const Tensor& dweight, const CSRView<T>& g, const Tensor& x) {
  const int64_t rows = x.size(0), features = x.size(1), stride = x.stride(0);
  T* out = static_cast<T*>(dweight.data_ptr());
  const T* from = numbers<T>(x);
  // Each thread has its own classes: sums are in the order of rows, on any number of threads.
  torch::stable::parallel_for(0, dweight.size(0), 1024, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t *last = g.column + g.start[r + 1],
                    *c = std::lower_bound(g.column + g.start[r], last, int32_t(begin));
      const T* row = from + r * stride;
      for (; c < last && *c < end; ++c) {
        if (c + 4 < last) {  // the lines of a later row come while this one is added to
          const char* later = reinterpret_cast<const char*>(out + int64_t(c[4]) * features);
          for (int line = 0; line < 4; ++line) __builtin_prefetch(later + 64 * line, 1);
        }
        const T v = g.value[c - g.column];
        T* to = out + int64_t(*c) * features;
        for (int64_t i = 0; i < features; ++i) to[i] += v * row[i];
      }
    }
  });
}

// dweight (V, D) += a sparse gradient (n, V), transposed, times x (n, D).
void csr_matmul_add_(Tensor dweight, const Tensor& start, const Tensor& column, const Tensor& value,
                     const Tensor& x) {
  STD_TORCH_CHECK(
      x.stride(1) == 1 && dweight.stride(1) == 1 && dweight.stride(0) == dweight.size(1),
      "crossent: expected neighbouring features");
  if (value.scalar_type() == ScalarType::Double)
    csr_matmul_add_rows(dweight, CSRView<double>(start, column, value), x);
  else csr_matmul_add_rows(dweight, CSRView<float>(start, column, value), x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) {
  m.impl("sparsify", TORCH_BOX(&sparsify));
  m.impl("csr_matmul", TORCH_BOX(&csr_matmul));
  m.impl("csr_matmul_add_", TORCH_BOX(&csr_matmul_add_));
}
