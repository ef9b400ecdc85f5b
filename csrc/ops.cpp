// The operators of src/crossent/ops.py for the CPU, through torch's stable ABI: one binary for every
// torch from 2.10 on, on torch's own threads.

#include <algorithm>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "call.h"

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
  std::vector<Sums> sums(blocks);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.classes * size));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      sums[b] = sum_block(p, b * size, std::min(p.rows, (b + 1) * size));
  });
  Sums all;
  for (const Sums& s : sums) all += s;
  double* out = static_cast<double*>(totals.data_ptr());
  out[0] = all.loss, out[1] = all.mass, out[2] = double(wrong);
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
