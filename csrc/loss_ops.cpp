// The loss's operators (src/crossent/backends/ops.py) for the CPU, through torch's stable ABI: one
// binary for every torch from 2.10 on, on torch's own threads.

#include <tuple>
#include <utility>

#include "row_outputs.h"

namespace {

using ForwardTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
ForwardTuple forward_rows(const Tensor& logits, crossent::Problem<T> p) {
  const std::vector<int64_t> shape = rows_shape(logits);
  const Tensor loss = fresh(shape, kDtype<T>);
  const Tensor denominator_weight = fresh(shape, kDtype<T>);
  const Tensor saved = fresh_saved(logits, p), wrong = fresh({}, ScalarType::Long);
  const Statistics stats = statistics_of(logits, p);
  p.loss = data_of<T>(loss);
  p.denominator_weight = data_of<T>(denominator_weight);
  p.wrong = data_of<int64_t>(wrong);
  *p.wrong = 0;
  for_rows(p, [](const auto& q, int64_t begin, int64_t end) { run_forward(q, begin, end); });
  const auto shown = [&](const MaybeTensor& t, ScalarType dtype = kDtype<T>) {
    return t ? *t : fresh({0}, dtype);
  };
  return {loss,
          denominator_weight,
          saved,
          shown(stats.lse),
          shown(stats.log_prob),
          shown(stats.entropy),
          shown(stats.argmax, ScalarType::Long),
          wrong};
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
    return forward_rows(logits, problem_of<decltype(zero)>(in));
  });
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
  const Tensor gradient = gradient_like(logits);
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
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
}
