// The operator of src/crossent/backends/ops.py for the rank of a target among the classes of its
// row.

#include <tuple>

#include "torch_bridge.h"

namespace {

using TargetRankTuple = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
TargetRankTuple target_ranks(const Tensor& logits, const crossent::Problem<T>& p) {
  const Tensor rank = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  const Tensor runner_up = torch::stable::new_empty(logits, {p.rows}, ScalarType::Long);
  const Tensor best = torch::stable::new_empty(logits, {p.rows}, kDtype<T>);
  const crossent::TargetRanks<T> out{static_cast<int64_t*>(rank.data_ptr()),
                                     static_cast<int64_t*>(runner_up.data_ptr()),
                                     static_cast<T*>(best.data_ptr())};
  kernels();  // an error about them belongs to the caller's thread
  for_rows(p, [&](const auto& q, int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 4) kernels().target_rank32(q, begin, end, out);
    else kernels().target_rank64(q, begin, end, out);
  });
  return {rank, runner_up, best};
}

TargetRankTuple target_rank(const Tensor& logits, const Tensor& target) {
  const MaybeTensor none;
  const LossInputs in{logits, target, none, none, {.ignore_index = -1}};
  return with_dtype(logits.scalar_type() == ScalarType::Double, [&](auto zero) {
    return target_ranks(logits, problem_of<decltype(zero)>(in));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) { m.impl("target_rank", TORCH_BOX(&target_rank)); }
