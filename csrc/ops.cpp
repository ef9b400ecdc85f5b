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

int64_t count_rows(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) rows *= logits.size(i);
  return rows;
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
void for_rows(const crossent::Problem<T>& p, int64_t rows, F run) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.classes));
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Forward run_forward(const Tensor& logits, crossent::Problem<T> p, ScalarType dtype, bool stats) {
  kernels();  // an error about them belongs to the caller's thread
  std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().end() - 1);
  std::vector<int64_t> several = shape, none = {0};
  several.push_back(p.saved_count());
  const auto fresh = [&](const std::vector<int64_t>& size, ScalarType type) {
    return torch::stable::new_empty(logits, size, type);
  };
  const auto& shown = stats ? shape : none;
  Forward out{fresh(shape, dtype), fresh(shape, dtype), fresh(several, dtype), fresh(shown, dtype),
              fresh(shown, dtype), fresh(shown, dtype), fresh(shown, ScalarType::Long),
              fresh({}, ScalarType::Long)};
  p.loss = static_cast<T*>(std::get<0>(out).data_ptr());
  p.mass = static_cast<T*>(std::get<1>(out).data_ptr());
  p.saved = static_cast<T*>(std::get<2>(out).data_ptr());
  p.wrong = static_cast<int64_t*>(std::get<7>(out).data_ptr());
  *p.wrong = 0;
  if (stats) {
    p.lse = static_cast<T*>(std::get<3>(out).data_ptr());
    p.log_prob = static_cast<T*>(std::get<4>(out).data_ptr());
    p.entropy = static_cast<T*>(std::get<5>(out).data_ptr());
    p.argmax = static_cast<int64_t*>(std::get<6>(out).data_ptr());
  }
  for_rows(p, count_rows(logits), [](const auto& q, int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 4) kernels().forward32(q, begin, end);
    else kernels().forward64(q, begin, end);
  });
  return out;
}

Forward forward(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                const MaybeTensor& sample_weight, bool wide, int64_t ignore_index,
                double label_smoothing, double z_loss, double softcap, double logit_scale,
                bool stats) {
  const Numbers n{ignore_index, label_smoothing, z_loss, softcap, logit_scale, stats};
  if (wide)
    return run_forward(logits, problem_of<double>(logits, target, weight, sample_weight, n),
                       ScalarType::Double, stats);
  return run_forward(logits, problem_of<float>(logits, target, weight, sample_weight, n),
                     ScalarType::Float, stats);
}

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  if (bytes < kHugeBytes) return;
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
void run_backward(const Tensor& upstream, crossent::Problem<T> p, const Tensor& saved,
                  const Tensor& gradient) {
  p.upstream = numbers_of<T>(upstream);
  p.saved = static_cast<T*>(saved.data_ptr());
  p.gradient = rows_of(gradient);
  for_rows(p, count_rows(gradient), [](const auto& q, int64_t begin, int64_t end) {
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
  advise_huge_pages(gradient.data_ptr(), gradient.numel() * int64_t(gradient.element_size()));
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
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
}
