// The operators of src/crossent/backends/ops.py for products of bfloat16 on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "products.h"

namespace {

using crossent::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace products = crossent::products;
namespace sparse = crossent::sparse;

// The products of this machine; none where it lacks them, or CROSSENT_ISA names another set.
const crossent::Products* machines() {
  static const crossent::Products* chosen = []() -> const crossent::Products* {
#if defined(__x86_64__)
    const char* asked = std::getenv("CROSSENT_ISA");
    const std::string name = asked ? asked : "";
    if ((name.empty() || name == "avx512_bf16") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return &crossent::kAvx512BFloat16;
#endif
    return nullptr;
  }();
  return chosen;
}

const crossent::Products& kernels() {
  STD_TORCH_CHECK(machines(), "crossent: this machine has no products of bfloat16");
  return *machines();
}

bool has_bf16_products() { return machines() != nullptr; }

template <class T>
Matrix<T> matrix_of(const Tensor& t) {
  constexpr bool wide = sizeof(T) == 4;
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == 0 || t.size(1) < 2 || t.stride(1) == 1) &&
                      t.scalar_type() == (wide ? ScalarType::Float : ScalarType::BFloat16),
                  "crossent: expected a matrix of ", wide ? "float32" : "bfloat16",
                  " whose columns are neighbours");
  return {static_cast<T*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0)};
}
Matrix<const uint16_t> halves_of(const Tensor& t) { return matrix_of<const uint16_t>(t); }

using Packed = std::unique_ptr<uint32_t[], decltype(&std::free)>;
Packed room(int64_t pairs) {
  const size_t bytes = size_t(products::round_up(4 * pairs + 64, 64));
  Packed memory(static_cast<uint32_t*>(std::aligned_alloc(64, bytes)), &std::free);
  STD_TORCH_CHECK(memory != nullptr, "crossent: no memory for packed features");
  return memory;
}

void check_inner(int64_t left, int64_t right) {
  STD_TORCH_CHECK(left == right, "crossent: expected matrices that can be multiplied, got ", left,
                  " and ", right);
}

// Runs f(begin, end) over all of n, in whole parts of `step`.
template <class F>
void in_steps(int64_t n, int64_t step, F f) {
  torch::stable::parallel_for(0, (n + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    f(begin * step, std::min(n, end * step));
  });
}

// logits (n, V) = x (n, D) weight (V, D)^T + bias
void bf16_logits_(Tensor logits, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias) {
  const Matrix<const uint16_t> from = halves_of(x), w = halves_of(weight);
  const Matrix<float> out = matrix_of<float>(logits);
  check_inner(from.columns, w.columns);
  STD_TORCH_CHECK(out.rows == from.rows && out.columns == w.rows,
                  "crossent: expected logits of every row and class");
  const float* added = nullptr;
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->numel() == w.rows &&
                        (w.rows < 2 || bias->stride(0) == 1),
                    "crossent: expected a bias of float32 for every class");
    added = static_cast<const float*>(bias->data_ptr());
  }
  const Packed packed = room(products::packed_rows(from.rows, from.columns));
  kernels().pack_rows(from, packed.get());
  in_steps(w.rows, products::kTileColumns, [&](int64_t begin, int64_t end) {
    kernels().logits(packed.get(), w, added, out, begin, end);
  });
}

// The sum over classes is taken in parts, each by one thread: these boundaries are a function of
// the number of classes alone.
int64_t classes_of_part(int64_t classes) {
  const int64_t blocks = (classes + products::kClasses - 1) / products::kClasses;
  return (blocks + products::kParts - 1) / products::kParts * products::kClasses;
}

// gradient (n, V) times weight (V, D)
Tensor bf16_times(const Tensor& gradient, const Tensor& weight) {
  const Matrix<const float> g = matrix_of<const float>(gradient);
  const Matrix<const uint16_t> w = halves_of(weight);
  check_inner(g.columns, w.rows);
  const int64_t step = std::max<int64_t>(1, classes_of_part(w.rows));
  const int64_t parts = (w.rows + step - 1) / step, numbers = g.rows * w.columns;
  const Tensor all = torch::stable::new_empty(
      gradient, {std::max<int64_t>(1, parts), g.rows, w.columns}, ScalarType::Float);
  float* sums = static_cast<float*>(all.data_ptr());
  if (parts == 0) std::fill(sums, sums + numbers, 0.0f);
  // More threads than parts share the rows of a part, in whole tiles.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t groups = std::max<int64_t>(1, threads / std::max<int64_t>(1, parts));
  const int64_t rows =
      std::max<int64_t>(1, products::round_up((g.rows + groups - 1) / groups, products::kTileRows));
  const int64_t shares = (g.rows + rows - 1) / rows;
  torch::stable::parallel_for(0, parts * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / shares, row = task % shares * rows;
      const int64_t n = std::min(rows, g.rows - row);
      kernels().times({g.at + row * g.stride, n, g.columns, g.stride}, w,
                      {sums + part * numbers + row * w.columns, n, w.columns, w.columns},
                      part * step, std::min(w.rows, (part + 1) * step));
    }
  });
  in_steps(numbers, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[part * numbers + i];
  });
  return torch::stable::select(all, 0, 0);
}

// dweight (V, D) = or += gradient (n, V)^T x (n, D)
void bf16_outer_(Tensor dweight, const Tensor& gradient, const Tensor& x, bool add) {
  const Matrix<const float> g = matrix_of<const float>(gradient);
  const Matrix<const uint16_t> from = halves_of(x);
  const Matrix<float> out = matrix_of<float>(dweight);
  check_inner(g.rows, from.rows);
  STD_TORCH_CHECK(out.rows == g.columns && out.columns == from.columns,
                  "crossent: expected a gradient for every class and feature");
  const Packed packed = room(products::packed_columns(from.rows, from.columns));
  kernels().pack_columns(from, packed.get());
  in_steps(out.rows, products::kClassesAtOnce, [&](int64_t begin, int64_t end) {
    kernels().outer(g, packed.get(), out, add, begin, end);
  });
}

// What the products above leave out of the large entries of a gradient (n, V), as sparse rows; these
// entries as they are rounded; and of the others of each row the sums of what is taken and lost.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bf16_errors(const Tensor& gradient) {
  const Matrix<const float> g = matrix_of<const float>(gradient);
  const Tensor start = torch::stable::new_empty(gradient, {g.rows + 1}, ScalarType::Long);
  int64_t* begins = static_cast<int64_t*>(start.data_ptr());
  const Tensor sums = torch::stable::new_empty(gradient, {g.rows, 2}, ScalarType::Float);
  float* small = static_cast<float*>(sums.data_ptr());
  std::fill(small, small + 2 * g.rows, 0.0f);
  std::map<int64_t, sparse::CSRRows<float>> parts;  // what each thread found, by first row
  std::mutex guard;
  std::fill(begins, begins + g.rows + 1, 0);
  if (!products::carries_all(g.columns))
    torch::stable::parallel_for(0, g.rows, 1, [&](int64_t begin, int64_t end) {
      sparse::CSRRows<float> mine;
      for (int64_t r = begin; r < end; ++r) {
        kernels().errors(g.at + r * g.stride, g.columns, mine, small + 2 * r);
        begins[r + 1] = int64_t(mine.value.size());
      }
      const std::lock_guard<std::mutex> lock(guard);
      parts.emplace(begin, std::move(mine));
    });
  int64_t total = 0;
  for (auto part = parts.begin(); part != parts.end(); ++part) {
    const auto next = std::next(part);
    const int64_t end = next == parts.end() ? g.rows : next->first;
    for (int64_t r = part->first; r < end; ++r) begins[r + 1] += total;
    total += int64_t(part->second.value.size());
  }
  const Tensor column = torch::stable::new_empty(gradient, {total}, ScalarType::Int);
  const Tensor value = torch::stable::new_empty(gradient, {total}, ScalarType::Float);
  for (const auto& [begin, part] : parts) {
    const size_t bytes = part.value.size() * 4;
    if (bytes == 0) continue;
    std::memcpy(static_cast<int32_t*>(column.data_ptr()) + begins[begin], part.column.data(),
                bytes);
    std::memcpy(static_cast<float*>(value.data_ptr()) + begins[begin], part.value.data(), bytes);
  }
  const Tensor rounded = torch::stable::new_empty(gradient, {total}, ScalarType::Float);
  const int32_t* where = static_cast<const int32_t*>(column.data_ptr());
  const float* lost = static_cast<const float*>(value.data_ptr());
  float* taken = static_cast<float*>(rounded.data_ptr());
  for (int64_t r = 0; r < g.rows; ++r)
    for (int64_t k = begins[r]; k < begins[r + 1]; ++k)
      taken[k] = g.at[r * g.stride + where[k]] - lost[k];
  return {start, column, value, rounded, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) {
  m.impl("bf16_logits_", TORCH_BOX(&bf16_logits_));
  m.impl("bf16_times", TORCH_BOX(&bf16_times));
  m.impl("bf16_outer_", TORCH_BOX(&bf16_outer_));
  m.impl("bf16_errors", TORCH_BOX(&bf16_errors));
}

STABLE_TORCH_LIBRARY_IMPL(crossent, CompositeExplicitAutograd, m) {
  m.impl("has_bf16_products", TORCH_BOX(&has_bf16_products));
}
