// The operators of src/crossent/ops.py for the CPU, through torch's stable ABI: one binary for every
// torch from 2.10 on, on torch's own threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "problem.h"

namespace {

using crossent::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Fewer logits than this are not worth a second thread.
constexpr int64_t kGrain = 16384;
// From this size on, the pages of a fresh gradient cost more than the gradient: ask for large ones.
constexpr int64_t kHugeBytes = 4 << 20;

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

template <class T>
crossent::Tensor1<const T> numbers_of(const MaybeTensor& t) {
  if (!t) return {};
  return {static_cast<const T*>(t->data_ptr()), layout_of(*t, 0)};
}

int64_t count_rows(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) rows *= logits.size(i);
  return rows;
}

struct Numbers {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;
  bool stats;
};

template <class T>
crossent::Problem<T> problem_of(const Tensor& logits, const Tensor& target,
                                const MaybeTensor& weight, const MaybeTensor& sample_weight,
                                const Numbers& n) {
  crossent::Problem<T> p{};
  p.classes = logits.size(logits.dim() - 1);
  p.rows = count_rows(logits);
  p.logits = rows_of(logits);
  if (target.dim() == logits.dim()) {
    p.probabilities = rows_of(target);
  } else {
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "crossent: expected int64 targets");
    p.index = numbers_of<int64_t>(target);
  }
  if (weight) p.weight = static_cast<const T*>(weight->data_ptr());
  p.sample_weight = numbers_of<T>(sample_weight);
  p.options = {n.ignore_index, n.label_smoothing, n.z_loss, n.softcap, n.logit_scale, n.stats};
  return p;
}

// The kernels for this machine, or those that CROSSENT_ISA names (to test the others).
const crossent::Kernels& kernels() {
  static const crossent::Kernels& chosen = []() -> const crossent::Kernels& {
#if defined(__x86_64__)
    const char* asked = std::getenv("CROSSENT_ISA");
    const std::string name = asked ? asked : "";
    const bool any = name.empty();
    if ((any || name == "avx512") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return crossent::kAvx512;
    if ((any || name == "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return crossent::kAvx2;
    STD_TORCH_CHECK(any || name == "portable", "CROSSENT_ISA: expected portable, avx2 or avx512, and "
                    "a machine that has it, got ", name);
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

// Rows that are summed as one block: a function of the classes alone, so that the sum of a batch has
// the same bits on any number of threads. A multiple of every vector's lanes, or one.
constexpr int64_t kMostRows = 1024;
int64_t rows_a_block(int64_t classes) {
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
constexpr ScalarType kDtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

void advise_huge_pages(const Tensor& t) {
#ifdef __linux__
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  const void* data = t.data_ptr();
  if (bytes < kHugeBytes) return;
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Fresh memory, in large pages where it is large: for small ones, the system clears page after page.
Tensor fresh(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, shape, dtype);
  advise_huge_pages(t);
  return t;
}

std::vector<int64_t> rows_shape(const Tensor& logits) {
  return {logits.sizes().begin(), logits.sizes().end() - 1};
}

template <class T>
Tensor fresh_saved(const Tensor& logits, crossent::Problem<T>& p) {
  kernels();  // an error about them belongs to the caller's thread
  std::vector<int64_t> shape = rows_shape(logits);
  shape.insert(shape.begin(), p.saved_count());
  const Tensor saved = fresh(logits, shape, kDtype<T>);
  p.saved = static_cast<T*>(saved.data_ptr());
  return saved;
}

template <class T>
void run_forward(const crossent::Problem<T>& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 4) kernels().forward32(p, begin, end);
  else kernels().forward64(p, begin, end);
}

using Rows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Rows forward_rows(const Tensor& logits, crossent::Problem<T> p) {
  const std::vector<int64_t> shape = rows_shape(logits), none = {0};
  const auto& shown = p.options.stats ? shape : none;
  const Tensor saved = fresh_saved(logits, p);
  Rows out{fresh(logits, shape, kDtype<T>), fresh(logits, shape, kDtype<T>), saved,
           fresh(logits, shown, kDtype<T>), fresh(logits, shown, kDtype<T>),
           fresh(logits, shown, kDtype<T>), fresh(logits, shown, ScalarType::Long),
           fresh(logits, {}, ScalarType::Long)};
  p.loss = static_cast<T*>(std::get<0>(out).data_ptr());
  p.mass = static_cast<T*>(std::get<1>(out).data_ptr());
  p.wrong = static_cast<int64_t*>(std::get<7>(out).data_ptr());
  *p.wrong = 0;
  if (p.options.stats) {
    p.lse = static_cast<T*>(std::get<3>(out).data_ptr());
    p.log_prob = static_cast<T*>(std::get<4>(out).data_ptr());
    p.entropy = static_cast<T*>(std::get<5>(out).data_ptr());
    p.argmax = static_cast<int64_t*>(std::get<6>(out).data_ptr());
  }
  for_rows(p, [](const auto& q, int64_t begin, int64_t end) { run_forward(q, begin, end); });
  return out;
}

// Sums of loss and mass, and whether a target is wrong, without either of them ever being stored:
// blocks of rows one after the other, whatever thread they are on, then the sums of the blocks.
template <class T>
std::tuple<Tensor, Tensor> forward_total(const Tensor& logits, crossent::Problem<T> p) {
  const Tensor saved = fresh_saved(logits, p);
  const Tensor totals = torch::stable::new_empty(logits, {3}, ScalarType::Double);
  int64_t wrong = 0;
  p.wrong = &wrong;
  const int64_t size = rows_a_block(p.classes), blocks = (p.rows + size - 1) / size;
  struct Sums {
    double loss, mass;
  };
  std::vector<Sums> sums(blocks);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.classes * size));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    T loss[kMostRows], mass[kMostRows];
    for (int64_t b = first; b < last; ++b) {
      crossent::Problem<T> q = p;
      const int64_t begin = b * size, end = std::min(p.rows, begin + size);
      q.first = begin, q.loss = loss, q.mass = mass;
      run_forward(q, begin, end);
      sums[b] = {sum_of(loss, end - begin), sum_of(mass, end - begin)};
    }
  });
  double loss = 0, mass = 0;
  for (const Sums& s : sums) loss += s.loss, mass += s.mass;
  double* out = static_cast<double*>(totals.data_ptr());
  out[0] = loss, out[1] = mass, out[2] = double(wrong);
  return {totals, saved};
}

Rows forward(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
             const MaybeTensor& sample_weight, bool wide, int64_t ignore_index,
             double label_smoothing, double z_loss, double softcap, double logit_scale,
             bool stats) {
  const Numbers n{ignore_index, label_smoothing, z_loss, softcap, logit_scale, stats};
  return wide ? forward_rows(logits, problem_of<double>(logits, target, weight, sample_weight, n))
              : forward_rows(logits, problem_of<float>(logits, target, weight, sample_weight, n));
}

std::tuple<Tensor, Tensor> total(const Tensor& logits, const Tensor& target,
                                 const MaybeTensor& weight, const MaybeTensor& sample_weight,
                                 bool wide, int64_t ignore_index, double label_smoothing,
                                 double z_loss, double softcap, double logit_scale) {
  const Numbers n{ignore_index, label_smoothing, z_loss, softcap, logit_scale, false};
  return wide ? forward_total(logits, problem_of<double>(logits, target, weight, sample_weight, n))
              : forward_total(logits, problem_of<float>(logits, target, weight, sample_weight, n));
}

template <class T>
void run_backward(const Tensor& upstream, crossent::Problem<T> p, const Tensor& saved,
                  const Tensor& gradient) {
  p.upstream = numbers_of<T>(upstream);
  p.saved = static_cast<T*>(saved.data_ptr());
  p.gradient = rows_of(gradient);
  for_rows(p, [](const auto& q, int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 4) kernels().backward32(q, begin, end);
    else kernels().backward64(q, begin, end);
  });
}

void backward_into(const Tensor& gradient, const Tensor& upstream, const Tensor& logits,
                   const Tensor& target, const MaybeTensor& weight,
                   const MaybeTensor& sample_weight, const Tensor& saved, int64_t ignore_index,
                   double label_smoothing, double z_loss, double softcap, double logit_scale) {
  const Numbers n{ignore_index, label_smoothing, z_loss, softcap, logit_scale, false};
  if (saved.scalar_type() == ScalarType::Double)
    run_backward(upstream, problem_of<double>(logits, target, weight, sample_weight, n), saved,
                 gradient);
  else
    run_backward(upstream, problem_of<float>(logits, target, weight, sample_weight, n), saved,
                 gradient);
}

Tensor backward(const Tensor& upstream, const Tensor& logits, const Tensor& target,
                const MaybeTensor& weight, const MaybeTensor& sample_weight, const Tensor& saved,
                int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                double logit_scale) {
  Tensor gradient = torch::stable::empty_like(logits);
  advise_huge_pages(gradient);
  backward_into(gradient, upstream, logits, target, weight, sample_weight, saved, ignore_index,
                label_smoothing, z_loss, softcap, logit_scale);
  return gradient;
}

void backward_(Tensor logits, const Tensor& upstream, const Tensor& target,
               const MaybeTensor& weight, const MaybeTensor& sample_weight, const Tensor& saved,
               int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
               double logit_scale) {
  backward_into(logits, upstream, logits, target, weight, sample_weight, saved, ignore_index,
                label_smoothing, z_loss, softcap, logit_scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("total", TORCH_BOX(&total));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
  m.impl("advise", TORCH_BOX(&advise_huge_pages));
}
