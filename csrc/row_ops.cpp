// The operators of src/crossent/backends/row_ops.py: entropies, log-probabilities of several
// classes of a row, and gradients by the logit scale.

#include <tuple>
#include <vector>

#include "row_outputs.h"
#include "torch_bridge.h"

namespace {

using Pair = std::tuple<Tensor, Tensor>;

// Rows of logits without a target.
template <class T>
crossent::Problem<T> problem_of_logits(const Tensor& logits, const crossent::Options& options) {
  kernels();  // an error about them belongs to the caller's thread
  crossent::Problem<T> p{};
  p.classes = logits.size(logits.dim() - 1);
  p.rows = p.kept_rows = count_rows(logits);
  p.logits = rows_of(logits);
  p.options = options;
  return p;
}

template <class T>
Tensor fresh_numbers(const Tensor& logits, int64_t each, crossent::Problem<T>& p) {
  std::vector<int64_t> shape = rows_shape(logits);
  shape.insert(shape.begin(), each);
  const Tensor saved = fresh(shape, kDtype<T>);
  p.saved = data_of<T>(saved);
  return saved;
}

// The gradients that are wanted, by logits and by the logit scale; the others have no elements.
template <class T>
struct Gradients {
  Tensor of_logits, of_scale;
  double* scale = nullptr;

  Gradients(const Tensor& logits, bool by_logits, bool by_scale, crossent::Problem<T>& p)
      : of_logits(by_logits ? gradient_like(logits)
                            : torch::stable::new_empty(logits, {0}, logits.scalar_type())),
        of_scale(by_scale ? fresh(rows_shape(logits), ScalarType::Double)
                          : torch::stable::new_empty(logits, {0}, ScalarType::Double)) {
    if (by_logits) p.gradient = rows_of(of_logits);
    if (by_scale) scale = data_of<double>(of_scale);
  }
};

Pair backward_with_scale(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                         const MaybeTensor& weight, const MaybeTensor& sample_weight,
                         const Tensor& saved, int64_t ignore_index, double label_smoothing,
                         double z_loss, double softcap, double logit_scale, bool of_logits,
                         bool of_scale) {
  const LossInputs in{logits,
                      target,
                      weight,
                      sample_weight,
                      {ignore_index, label_smoothing, z_loss, softcap, logit_scale, false}};
  return with_dtype(saved.scalar_type() == ScalarType::Double, [&](auto zero) {
    using T = decltype(zero);
    kernels();
    crossent::Problem<T> p = problem_of<T>(in);
    p.grad_output = numbers_of<T>(grad_output);
    p.saved = data_of<T>(saved);
    const Gradients<T> out(logits, of_logits, of_scale, p);
    for_rows(p, [&](const auto& q, int64_t begin, int64_t end) {
      if constexpr (sizeof(T) == 4) kernels().backward_with_scale32(q, begin, end, out.scale);
      else kernels().backward_with_scale64(q, begin, end, out.scale);
    });
    return Pair(out.of_logits, out.of_scale);
  });
}

constexpr int64_t kEntropySaved = 3;  // as in entropy.h

Pair entropy(const Tensor& logits, bool compute_in_float64, double softcap, double logit_scale) {
  return with_dtype(compute_in_float64, [&](auto zero) {
    using T = decltype(zero);
    auto p = problem_of_logits<T>(logits,
                                  {.softcap = softcap, .logit_scale = logit_scale, .stats = true});
    const Tensor saved = fresh_numbers(logits, kEntropySaved, p);
    const Tensor values = fresh(rows_shape(logits), kDtype<T>);
    p.entropy = data_of<T>(values);
    for_rows(p, [](const auto& q, int64_t begin, int64_t end) {
      if constexpr (sizeof(T) == 4) kernels().entropy32(q, begin, end);
      else kernels().entropy64(q, begin, end);
    });
    return Pair(values, saved);
  });
}

Pair entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& saved,
                      double softcap, double logit_scale, bool of_logits, bool of_scale) {
  return with_dtype(saved.scalar_type() == ScalarType::Double, [&](auto zero) {
    using T = decltype(zero);
    auto p = problem_of_logits<T>(logits, {.softcap = softcap, .logit_scale = logit_scale});
    p.grad_output = numbers_of<T>(grad_output);
    p.saved = data_of<T>(saved);
    const Gradients<T> out(logits, of_logits, of_scale, p);
    for_rows(p, [&](const auto& q, int64_t begin, int64_t end) {
      if constexpr (sizeof(T) == 4) kernels().entropy_backward32(q, begin, end, out.scale);
      else kernels().entropy_backward64(q, begin, end, out.scale);
    });
    return Pair(out.of_logits, out.of_scale);
  });
}

template <class T>
crossent::TensorK<const T> several_of(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == kDtype<T>,
                  "crossent: expected indices of int64, and grad_outputs of the dtype that is "
                  "computed in");
  const int64_t last = t.dim() - 1;
  return {static_cast<const T*>(t.data_ptr()), t.size(last), t.stride(last), layout_of(t, 1)};
}

Pair log_probs(const Tensor& logits, const Tensor& index, bool compute_in_float64,
               int64_t ignore_index, double softcap, double logit_scale) {
  return with_dtype(compute_in_float64, [&](auto zero) {
    using T = decltype(zero);
    auto p = problem_of_logits<T>(
        logits, {.ignore_index = ignore_index, .softcap = softcap, .logit_scale = logit_scale});
    const Tensor saved = fresh_numbers(logits, crossent::kOneHotSaved, p);
    std::vector<int64_t> shape = rows_shape(logits);
    shape.push_back(index.size(index.dim() - 1));
    const Tensor values = fresh(shape, kDtype<T>);
    crossent::Selection<T> s;
    s.index = several_of<int64_t>(index);
    s.log_prob = data_of<T>(values);
    for_rows(p, [&](const auto& q, int64_t begin, int64_t end) {
      if constexpr (sizeof(T) == 4) kernels().log_probs32(q, begin, end, s);
      else kernels().log_probs64(q, begin, end, s);
    });
    return Pair(values, saved);
  });
}

Pair log_probs_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& index,
                        const Tensor& saved, int64_t ignore_index, double softcap,
                        double logit_scale, bool of_logits, bool of_scale) {
  return with_dtype(saved.scalar_type() == ScalarType::Double, [&](auto zero) {
    using T = decltype(zero);
    auto p = problem_of_logits<T>(
        logits, {.ignore_index = ignore_index, .softcap = softcap, .logit_scale = logit_scale});
    p.saved = data_of<T>(saved);
    const Gradients<T> out(logits, of_logits, of_scale, p);
    crossent::Selection<T> s;
    s.index = several_of<int64_t>(index);
    s.grad_output = several_of<T>(grad_output);
    for_rows(p, [&](const auto& q, int64_t begin, int64_t end) {
      std::vector<crossent::ChosenClass> room(crossent::kMostLanes * s.index.count);
      crossent::Selection<T> own = s;
      own.room = room.data();
      if constexpr (sizeof(T) == 4) kernels().log_probs_backward32(q, begin, end, own, out.scale);
      else kernels().log_probs_backward64(q, begin, end, own, out.scale);
    });
    return Pair(out.of_logits, out.of_scale);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) {
  m.impl("backward_with_scale", TORCH_BOX(&backward_with_scale));
  m.impl("entropy", TORCH_BOX(&entropy));
  m.impl("entropy_backward", TORCH_BOX(&entropy_backward));
  m.impl("log_probs", TORCH_BOX(&log_probs));
  m.impl("log_probs_backward", TORCH_BOX(&log_probs_backward));
}
