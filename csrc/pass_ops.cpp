// The operator that reduces: the loss, and its gradient made while the row is in the cache
// (src/crossent/backends/ops.py).

#include <cmath>
#include <limits>
#include <tuple>

#include "float16.h"
#include "row_outputs.h"

namespace {

// What the caller has to look at.
enum Flags : int64_t { kWrongTarget = 1, kNothingCounts = 2, kProbabilities = 4 };

double number_at(const crossent::Tensor2& t, int64_t row, int64_t c) {
  const char* place = t.at(row, c);
  switch (t.dtype) {
    case Dtype::kFloat32: return *reinterpret_cast<const float*>(place);
    case Dtype::kFloat64: return *reinterpret_cast<const double*>(place);
    case Dtype::kBFloat16:
      return crossent::from_bfloat16(*reinterpret_cast<const uint16_t*>(place));
    default: return crossent::from_float16(*reinterpret_cast<const uint16_t*>(place));
  }
}

// As warn_if_probabilities in src/crossent/problem/warnings.py: rows that are distributions
// already.
bool are_probabilities(const Tensor& logits, const crossent::Tensor2& z, int64_t classes) {
  if (classes < 2 || logits.numel() == 0) return false;
  const double tolerance = crossent::item_size(z.dtype) >= 4 ? 1e-3 : 2e-2;
  const int64_t beside = logits.dim() > 1 ? logits.size(logits.dim() - 2) : 1;
  for (int64_t r = 0; r < std::min<int64_t>(4, beside); ++r) {
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const double value = number_at(z, r, c);
      if (!(value >= 0 && value <= 1)) return false;
      sum += value;
    }
    if (std::fabs(float(sum) - 1) >= tolerance) return false;
  }
  return true;
}

// Runs f on blocks of rows, whatever thread they are on; returns what they give, summed in the
// blocks' order: the same bits for any number of threads.
template <class T, class F>
double sum_blocks(const crossent::Problem<T>& p, int64_t classes, F f) {
  const int64_t size = rows_per_block(classes), blocks = (p.rows + size - 1) / size;
  const auto sums_of = [&](int64_t b) { return f(b * size, std::min(p.rows, (b + 1) * size)); };
  double all = 0;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, classes * size));
  if (blocks <= grain) {
    for (int64_t b = 0; b < blocks; ++b) all += sums_of(b);
    return all;
  }
  std::vector<double> sums(blocks);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) sums[b] = sums_of(b);
  });
  for (const double s : sums) all += s;
  return all;
}

// What divides the sum in a mean, from the targets alone; nan where one of them is no class.
template <class T>
double denominator_of(const crossent::Problem<T>& p) {
  const auto weight_of = [&](int64_t row) -> T {
    const T factor = p.sample_weight.data ? p.sample_weight(row) : T(1);
    if (!p.by_index()) return factor;
    const int64_t target = p.index(row);
    if (target == p.options.ignore_index) return 0;
    if (target < 0 || target >= p.classes) return std::numeric_limits<T>::quiet_NaN();
    return p.weight ? T(double(p.weight[target]) * double(factor)) : factor;
  };
  if (!p.by_index() && !p.sample_weight.data) return double(p.rows);
  return sum_blocks(p, 16, [&](int64_t begin, int64_t end) {
    T weights[kMostRows];
    for (int64_t r = begin; r < end; ++r) weights[r - begin] = weight_of(r);
    return sum_of(weights, end - begin);
  });
}

// A number of the loss's dtype, 0-d.
Tensor scalar(ScalarType dtype, double value) {
  const Tensor t = fresh({}, dtype);
  switch (dtype_of(t)) {
    case Dtype::kFloat64: *data_of<double>(t) = value; break;
    case Dtype::kFloat32: *data_of<float>(t) = float(value); break;
    case Dtype::kBFloat16: *data_of<uint16_t>(t) = crossent::to_bfloat16(float(value)); break;
    case Dtype::kFloat16: *data_of<uint16_t>(t) = crossent::to_float16(float(value)); break;
  }
  return t;
}

struct Reduction {
  bool mean;
  std::optional<double> divisor;  // instead of what the reduction says
  double empty;                   // the loss where the divisor is 0
  ScalarType dtype;               // of the loss
};

struct Loss {
  Tensor loss;
  MaybeTensor kept;  // the gradient, or what backward needs of the rows
  double slope = 0;
  int64_t flags = 0;
  Statistics stats;

  auto tuple() const {
    return std::tuple(loss, kept, slope, flags, stats.lse, stats.log_prob, stats.entropy,
                      stats.argmax);
  }
};
using LossTuple = decltype(std::declval<Loss>().tuple());

template <class T>
Loss reduced_loss(const LossInputs& in, const Reduction& reduction, Keep keep, double grad_output) {
  kernels();  // an error about them belongs to the caller's thread
  const Tensor& logits = in.logits;
  crossent::Problem<T> p = problem_of<T>(in);
  int64_t wrong = 0;
  p.wrong = &wrong;
  Loss out;
  out.stats = statistics_of(logits, p);

  const double divisor = reduction.divisor ? *reduction.divisor
                         : reduction.mean  ? denominator_of(p)
                                           : 1;
  out.slope = divisor == 0 ? 0 : 1 / divisor;
  const T row_slope = T(out.slope) * T(grad_output);
  if (keep == Keep::kGradient) {
    out.kept = gradient_like(logits);
    p.gradient = rows_of(*out.kept);
    p.grad_output = {&row_slope, {}};
  } else if (keep == Keep::kRows) {
    out.kept = fresh_saved(logits, p);
  }
  const double sum = sum_blocks(
      p, p.classes, [&](int64_t begin, int64_t end) { return sum_block(p, begin, end, keep); });
  if (wrong) out.flags |= kWrongTarget;
  if (divisor == 0) out.flags |= kNothingCounts;
  if (are_probabilities(logits, p.logits, p.classes)) out.flags |= kProbabilities;
  const double value = divisor == 0 ? reduction.empty : sum / divisor;
  out.loss = scalar(reduction.dtype, value);
  return out;
}

LossTuple loss(const Tensor& logits, const Tensor& target, int64_t keep, bool mean,
               int64_t ignore_index, const MaybeTensor& weight, const MaybeTensor& sample_weight,
               bool compute_in_float64, double label_smoothing, double z_loss, double softcap,
               double logit_scale, bool stats, std::optional<double> divisor,
               std::optional<double> empty, std::optional<ScalarType> dtype, double grad_output) {
  const LossInputs in{logits,
                      target,
                      weight,
                      sample_weight,
                      {ignore_index, label_smoothing, z_loss, softcap, logit_scale, stats}};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Reduction reduction{mean, divisor, empty.value_or(nan),
                            dtype.value_or(logits.scalar_type())};
  return with_dtype(compute_in_float64, [&](auto zero) {
    return reduced_loss<decltype(zero)>(in, reduction, Keep(keep), grad_output).tuple();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) { m.impl("loss", TORCH_BOX(&loss)); }
