// The operator of src/crossent/backends/ops.py for calls so small that each question costs as much
// as the answer.

#include <cmath>
#include <tuple>
#include <vector>

#include "torch_bridge.h"

namespace {

// As warn_if_probabilities in src/crossent/problem/warnings.py: rows that are distributions
// already.
constexpr int64_t kInspectedRows = 4;
constexpr float kTolerance = 1e-3f;

bool are_probabilities(const Tensor& logits) {
  const int64_t rows = std::min(kInspectedRows, logits.size(0)), classes = logits.size(1);
  const int64_t step = logits.stride(0), stride = logits.stride(1);
  const float* z = static_cast<const float*>(logits.data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    float sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const float value = z[r * step + c * stride];
      if (!(value >= 0 && value <= 1)) return false;
      sum += value;
    }
    if (std::fabs(sum - 1) >= kTolerance) return false;
  }
  return true;
}

struct SmallLoss {
  Tensor loss, gradient;
  int64_t needs_slow_path;
};
using SmallTuple = std::tuple<Tensor, Tensor, int64_t>;

// The reduced loss (0-d), its gradient if asked for (else 0 elements), and whether the slow path
// has to look: at a target that is wrong, a denominator of 0, probabilities instead of logits.
SmallLoss small_loss(const LossInputs& in, bool mean, bool differentiate) {
  const Tensor& logits = in.logits;
  crossent::Problem<float> p = problem_of<float>(in);
  std::vector<float> saved(p.saved_count() * p.rows);
  int64_t wrong = 0;
  p.saved = saved.data(), p.wrong = &wrong;
  Sums sums;
  const int64_t size = rows_per_block(p.classes);
  for (int64_t begin = 0; begin < p.rows; begin += size)
    sums += sum_block(p, begin, std::min(p.rows, begin + size));

  const double divisor = mean ? sums.denominator : 1;
  const Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  *static_cast<float*>(loss.data_ptr()) = float(sums.loss / divisor);
  const Tensor gradient = differentiate ? torch::stable::empty_like(logits)
                                        : torch::stable::new_empty(logits, {0}, ScalarType::Float);
  if (differentiate) {
    const float grad_output = float(1 / divisor);
    p.grad_output = {&grad_output, {}};
    p.gradient = rows_of(gradient);
    run_backward(p, 0, p.rows);
  }
  const bool needs_slow_path =
      wrong || divisor == 0 || (p.classes > 1 && are_probabilities(logits));
  return {loss, gradient, int64_t(needs_slow_path)};
}

SmallTuple small(const Tensor& logits, const Tensor& target, int64_t ignore_index, bool mean,
                 bool differentiate) {
  const MaybeTensor none;
  const LossInputs in{logits, target, none, none, {.ignore_index = ignore_index}};
  const SmallLoss out = small_loss(in, mean, differentiate);
  return {out.loss, out.gradient, out.needs_slow_path};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) { m.impl("small", TORCH_BOX(&small)); }
