// The loss's operators (src/crossent/backends/ops.py) for the CPU, through torch's stable ABI: one
// binary for every torch from 2.10 on, on torch's own threads.

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "torch_bridge.h"

namespace {

// From this size on, the pages of a fresh gradient cost more than the gradient: ask for large ones.
constexpr int64_t kHugeBytes = 4 << 20;

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

// Fresh memory, in large pages where it is large: for small ones, the system clears page after
// page.
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

struct ForwardOutputs {
  Tensor loss, denominator_weight, saved, lse, log_prob, entropy, argmax, wrong;

  auto tuple() const {
    return std::tuple(loss, denominator_weight, saved, lse, log_prob, entropy, argmax, wrong);
  }
};
using ForwardTuple = decltype(std::declval<ForwardOutputs>().tuple());

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
ForwardOutputs forward_rows(const Tensor& logits, crossent::Problem<T> p) {
  const std::vector<int64_t> shape = rows_shape(logits), none = {0};
  const auto& shown = p.options.stats ? shape : none;
  const Tensor saved = fresh_saved(logits, p);
  const ForwardOutputs out{.loss = fresh(logits, shape, kDtype<T>),
                           .denominator_weight = fresh(logits, shape, kDtype<T>),
                           .saved = saved,
                           .lse = fresh(logits, shown, kDtype<T>),
                           .log_prob = fresh(logits, shown, kDtype<T>),
                           .entropy = fresh(logits, shown, kDtype<T>),
                           .argmax = fresh(logits, shown, ScalarType::Long),
                           .wrong = fresh(logits, {}, ScalarType::Long)};
  p.loss = data_of<T>(out.loss);
  p.denominator_weight = data_of<T>(out.denominator_weight);
  p.wrong = data_of<int64_t>(out.wrong);
  *p.wrong = 0;
  if (p.options.stats) {
    p.lse = data_of<T>(out.lse);
    p.log_prob = data_of<T>(out.log_prob);
    p.entropy = data_of<T>(out.entropy);
    p.argmax = data_of<int64_t>(out.argmax);
  }
  for_rows(p, [](const auto& q, int64_t begin, int64_t end) { run_forward(q, begin, end); });
  return out;
}

struct Total {
  Tensor totals, saved;
};
using TotalTuple = std::tuple<Tensor, Tensor>;

// The sums of losses and of denominator weights, and whether a target is wrong, without a row's
// numbers ever being stored: blocks of rows one after the other, whatever thread they are on, then
// the sums of the blocks.
template <class T>
Total forward_total(const Tensor& logits, crossent::Problem<T> p) {
  const Tensor saved = fresh_saved(logits, p);
  const Tensor totals = torch::stable::new_empty(logits, {3}, ScalarType::Double);
  int64_t wrong = 0;
  p.wrong = &wrong;
  const int64_t size = rows_per_block(p.classes), blocks = (p.rows + size - 1) / size;
  std::vector<Sums> sums(blocks);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.classes * size));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      sums[b] = sum_block(p, b * size, std::min(p.rows, (b + 1) * size));
  });
  Sums all;
  for (const Sums& s : sums) all += s;
  double* out = data_of<double>(totals);
  out[0] = all.loss, out[1] = all.denominator, out[2] = double(wrong);
  return {totals, saved};
}

// `gradient` may be the logits' own memory.
void backward_into(const Tensor& gradient, const Tensor& grad_output, const LossInputs& in,
                   const Tensor& saved) {
  with_dtype(saved.scalar_type() == ScalarType::Double, [&](auto zero) {
    using T = decltype(zero);
    crossent::Problem<T> p = problem_of<T>(in);
    p.grad_output = numbers_of<T>(grad_output);
    p.saved = data_of<T>(saved);
    p.gradient = rows_of(gradient);
    for_rows(p, [](const auto& q, int64_t begin, int64_t end) { run_backward(q, begin, end); });
  });
}

// The operators: their arguments are those of the schemas in src/crossent/backends/ops.py.

ForwardTuple forward(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                     const MaybeTensor& sample_weight, bool compute_in_float64,
                     int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                     double logit_scale, bool stats) {
  const LossInputs in{logits,
                      target,
                      weight,
                      sample_weight,
                      {ignore_index, label_smoothing, z_loss, softcap, logit_scale, stats}};
  return with_dtype(compute_in_float64, [&](auto zero) {
    return forward_rows(logits, problem_of<decltype(zero)>(in)).tuple();
  });
}

TotalTuple total(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                 const MaybeTensor& sample_weight, bool compute_in_float64, int64_t ignore_index,
                 double label_smoothing, double z_loss, double softcap, double logit_scale) {
  const LossInputs in{logits,
                      target,
                      weight,
                      sample_weight,
                      {ignore_index, label_smoothing, z_loss, softcap, logit_scale, false}};
  const Total out = with_dtype(compute_in_float64, [&](auto zero) {
    return forward_total(logits, problem_of<decltype(zero)>(in));
  });
  return {out.totals, out.saved};
}

Tensor backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                const MaybeTensor& weight, const MaybeTensor& sample_weight, const Tensor& saved,
                int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                double logit_scale) {
  const LossInputs in{logits,
                      target,
                      weight,
                      sample_weight,
                      {ignore_index, label_smoothing, z_loss, softcap, logit_scale, false}};
  Tensor gradient = torch::stable::empty_like(logits);
  advise_huge_pages(gradient);
  backward_into(gradient, grad_output, in, saved);
  return gradient;
}

void backward_(Tensor logits, const Tensor& grad_output, const Tensor& target,
               const MaybeTensor& weight, const MaybeTensor& sample_weight, const Tensor& saved,
               int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
               double logit_scale) {
  const LossInputs in{logits,
                      target,
                      weight,
                      sample_weight,
                      {ignore_index, label_smoothing, z_loss, softcap, logit_scale, false}};
  backward_into(logits, grad_output, in, saved);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("total", TORCH_BOX(&total));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
  m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages));
}
