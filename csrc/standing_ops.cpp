// The operator of src/crossent/ops.py that says where a class stands among the others.

#include <tuple>

#include "call.h"

namespace {

using Standing = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Standing standing_of(const Tensor& logits, const crossent::Problem<T>& p) {
  const Tensor rank = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  const Tensor rival = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  const Tensor best = torch::stable::new_empty(logits, {p.rows}, kDtype<T>);
  kernels();  // an error about them belongs to the caller's thread
  for_rows(p, [&](const auto& q, int64_t begin, int64_t end) {
    int64_t* ranks = static_cast<int64_t*>(rank.data_ptr());
    int64_t* rivals = static_cast<int64_t*>(rival.data_ptr());
    T* bests = static_cast<T*>(best.data_ptr());
    if constexpr (sizeof(T) == 4) kernels().standing32(q, begin, end, ranks, rivals, bests);
    else kernels().standing64(q, begin, end, ranks, rivals, bests);
  });
  return {rank, rival, best};
}

Standing standing(const Tensor& logits, const Tensor& target) {
  const Numbers n{-1, 0, 0, 0, 1, false};
  return logits.scalar_type() == ScalarType::Double
             ? standing_of(logits, problem_of<double>(logits, target, {}, {}, n))
             : standing_of(logits, problem_of<float>(logits, target, {}, {}, n));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) { m.impl("standing", TORCH_BOX(&standing)); }
