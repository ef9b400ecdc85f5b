// From tensors to what kernels are given, through torch's stable ABI.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "problem.h"
#include "tensors.h"

namespace {

using crossent::Dtype;

// Fewer logits than this are not worth a second thread.
constexpr int64_t kGrain = 16384;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "crossent: expected a floating-point tensor");
  }
}

// The leading axes of a tensor of rows: all but the last `trailing`, those of size one left out.
crossent::Layout layout_of(const Tensor& t, int trailing) {
  crossent::Layout layout;
  for (int64_t i = 0; i < t.dim() - trailing; ++i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    const int last = layout.rank - 1;
    if (last >= 0 && layout.stride[last] == stride * size) {  // one axis as good as two
      layout.size[last] *= size;
      layout.stride[last] = stride;
      continue;
    }
    STD_TORCH_CHECK(layout.rank < crossent::Layout::kMaxRank, "crossent: too many axes");
    layout.size[layout.rank] = size;
    layout.stride[layout.rank++] = stride;
  }
  return layout;
}

crossent::Tensor2 rows_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.stride(t.dim() - 1), layout_of(t, 1)};
}

// What a tensor of these numbers holds.
template <class T>
constexpr ScalarType kDtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
template <>
constexpr ScalarType kDtype<int64_t> = ScalarType::Long;

template <class T>
crossent::Tensor1<const T> numbers_of(const MaybeTensor& t) {
  if (!t) return {};
  STD_TORCH_CHECK(t->scalar_type() == kDtype<T>,
                  "crossent: expected targets of int64, and factors of the dtype that is computed "
                  "in");
  return {static_cast<const T*>(t->data_ptr()), layout_of(*t, 0)};
}

int64_t count_rows(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) rows *= logits.size(i);
  return rows;
}

// What a loss is computed from.
struct LossInputs {
  const Tensor &logits, &target;
  const MaybeTensor &weight, &sample_weight;
  crossent::Options options;
};

template <class T>
crossent::Problem<T> problem_of(const LossInputs& in) {
  crossent::Problem<T> p{};
  p.classes = in.logits.size(in.logits.dim() - 1);
  p.rows = p.kept_rows = count_rows(in.logits);
  p.logits = rows_of(in.logits);
  if (in.target.dim() == in.logits.dim()) {
    p.probabilities = rows_of(in.target);
  } else {
    p.index = numbers_of<int64_t>(in.target);
  }
  if (in.weight) p.weight = numbers_of<T>(in.weight).data;
  p.sample_weight = numbers_of<T>(in.sample_weight);
  p.options = in.options;
  return p;
}

// Runs f with a zero of the dtype that is computed in.
template <class F>
auto with_dtype(bool compute_in_float64, F f) {
  return compute_in_float64 ? f(double()) : f(float());
}

#if defined(__x86_64__)
// __builtin_cpu_supports does not know f16c in every compiler; bit 29 of ecx does. That the system
// keeps the registers is what asking for avx2 beside it makes sure of.
inline bool supports_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// The kernels for this machine, or those that CROSSENT_ISA names (to test the others).
const crossent::Kernels& kernels() {
  static const crossent::Kernels& chosen = []() -> const crossent::Kernels& {
#if defined(__x86_64__)
    const char* asked = std::getenv("CROSSENT_ISA");
    const std::string name = asked ? asked : "";
    const bool any = name.empty();
    if ((any || name == "avx512" || name == "avx512_bf16") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return crossent::kAvx512;
    if ((any || name == "avx2") && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma") && supports_f16c())
      return crossent::kAvx2;
    STD_TORCH_CHECK(
        any || name == "portable",
        "CROSSENT_ISA: expected portable, avx2, avx512 or avx512_bf16, and a machine that "
        "has it, got ",
        name);
#endif
    return crossent::kPortable;
  }();
  return chosen;
}

template <class T, class F>
void for_rows(const crossent::Problem<T>& p, F run) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.classes));
  torch::stable::parallel_for(0, p.rows, grain,
                              [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

// Rows that are summed as one block: a function of the classes alone, so that the sum of a batch
// has the same bits on any number of threads. A multiple of every vector's lanes, or one.
constexpr int64_t kMostRows = 1024;
[[maybe_unused]] int64_t rows_per_block(int64_t classes) {
  const int64_t rows = kGrain / std::max<int64_t>(1, classes);
  return rows >= kMostRows ? kMostRows : rows >= 16 ? rows / 16 * 16 : 1;
}

template <class T>
double sum_of(const T* x, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += x[i + k];
  for (; i < n; ++i) sums[i % 8] += x[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class T>
void run_forward(const crossent::Problem<T>& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 4) kernels().forward32(p, begin, end);
  else kernels().forward64(p, begin, end);
}
template <class T>
void run_backward(const crossent::Problem<T>& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 4) kernels().backward32(p, begin, end);
  else kernels().backward64(p, begin, end);
}

template <class T>
void run_pass(const crossent::Problem<T>& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 4) kernels().pass32(p, begin, end);
  else kernels().pass64(p, begin, end);
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace
