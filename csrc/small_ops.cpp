// The operator of src/crossent/ops.py for calls so small that each question costs as much as the answer.

#include <cmath>
#include <tuple>
#include <vector>

#include "call.h"

namespace {

// As warn_if_probabilities in src/crossent/warn.py: rows that are distributions already.
constexpr int64_t kLookedAt = 4;
constexpr float kTolerance = 1e-3f;

bool are_probabilities(const Tensor& logits) {
  const int64_t rows = std::min(kLookedAt, logits.size(0)), classes = logits.size(1);
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

using Small = std::tuple<Tensor, Tensor, int64_t>;

// The reduced loss (0-d), its gradient if asked for (else 0 elements), and whether somebody has to look
// closer: at a target that is wrong, at no mass, at probabilities instead of logits.
Small small(const Tensor& logits, const Tensor& target, int64_t ignore_index, bool mean,
            bool differentiate) {
  crossent::Problem<float> p =
      problem_of<float>(logits, target, {}, {}, {ignore_index, 0, 0, 0, 1, false});
  std::vector<float> saved(p.saved_count() * p.rows);
  int64_t wrong = 0;
  p.saved = saved.data(), p.wrong = &wrong;
  Sums sums;
  const int64_t size = rows_a_block(p.classes);
  for (int64_t begin = 0; begin < p.rows; begin += size)
    sums += sum_block(p, begin, std::min(p.rows, begin + size));

  const double divisor = mean ? sums.mass : 1;
  const Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  *static_cast<float*>(loss.data_ptr()) = float(sums.loss / divisor);
  const Tensor gradient = differentiate ? torch::stable::empty_like(logits)
                                        : torch::stable::new_empty(logits, {0}, ScalarType::Float);
  if (differentiate) {
    float slope = float(1 / divisor);
    p.upstream = {&slope, {}};
    p.gradient = rows_of(gradient);
    kernels().backward32(p, 0, p.rows);
  }
  const bool odd = wrong || divisor == 0 || (p.classes > 1 && are_probabilities(logits));
  return {loss, gradient, int64_t(odd)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) { m.impl("small", TORCH_BOX(&small)); }
