// What kernels are given: tensors as pointers and strides, options as numbers. Torch-free, and the
// same for every instruction set.
#pragma once

#include <cstdint>

#include "macros.h"

namespace crossent {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

CROSSENT_INLINE int item_size(Dtype d) {
  return d == Dtype::kFloat64 ? 8 : d == Dtype::kFloat32 ? 4 : 2;
}

// Rows of a strided tensor: where row r begins, for any leading shape.
struct Layout {
  static constexpr int kMaxRank = 8;
  int rank = 0;  // leading axes
  int64_t size[kMaxRank], stride[kMaxRank];

  CROSSENT_INLINE int64_t operator()(int64_t row) const {
    if (rank == 1) return row * stride[0];
    int64_t offset = 0;
    for (int i = rank - 1; i >= 0; --i) {
      offset += row % size[i] * stride[i];
      row /= size[i];
    }
    return offset;
  }
  // How many rows from this one on are `step` apart, at most `most`: divisions are slow, so they
  // are done once for a run of rows.
  CROSSENT_INLINE int run(int64_t row, int most, int64_t* step) const {
    *step = rank ? stride[rank - 1] : 0;
    if (rank <= 1) return most;
    const int64_t left = size[rank - 1] - row % size[rank - 1];
    return left < most ? int(left) : most;
  }
};

struct Tensor2 {  // rows of classes
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t class_stride = 1;
  Layout rows;

  CROSSENT_INLINE char* at(int64_t row, int64_t c) const {
    return static_cast<char*>(data) + (rows(row) + c * class_stride) * item_size(dtype);
  }
};
template <class T>
struct Tensor1 {  // one number a row; null where there is none
  T* data = nullptr;
  Layout rows;

  CROSSENT_INLINE T operator()(int64_t row) const { return data[rows(row)]; }
  // Those of `row` and the rows after it where they lie next to each other, else null.
  CROSSENT_INLINE const T* run(int64_t row) const {
    return rows.rank == 1 && rows.stride[0] == 1 ? data + row : nullptr;
  }
};

struct Options {
  int64_t ignore_index = -100;
  double label_smoothing = 0, z_loss = 0, softcap = 0, logit_scale = 1;  // softcap 0: none
  bool stats = false;
};

// What forward hands to backward for each row. Index targets without smoothing need the first two.
enum Saved {
  kMaximum,
  kRest,
  kOneHotSaved,
  kTargetWeight = kOneHotSaved,
  kUnmasked,
  kUniformWeight,
  kSaved
};

template <class T>
struct Problem {
  int64_t classes;
  Tensor2 logits;
  Tensor2 probabilities;  // data null: targets are indices
  Tensor1<const int64_t> index;
  const T* weight = nullptr;  // class weights
  Tensor1<const T> sample_weight;
  Options options;
  int64_t rows;  // how many there are
  // Outputs of forward, contiguous: one number a row. Loss, denominator_weight and what is saved
  // have room for `kept_rows` of them, from row `first` on; of what is saved, first all the maxima,
  // then all the rests, and so on. Statistics are those of all rows; null where not wanted.
  int64_t first = 0, kept_rows = 0;
  T *loss, *denominator_weight, *saved, *lse, *log_prob, *entropy;
  int64_t* argmax;
  int64_t* wrong;  // set to one if a target is neither a class nor ignored
  // Backward.
  Tensor1<const T> grad_output;
  Tensor2 gradient;

  CROSSENT_INLINE bool by_index() const { return probabilities.data == nullptr; }
  // Index targets without smoothing.
  CROSSENT_INLINE bool one_hot() const { return by_index() && options.label_smoothing == 0; }
  CROSSENT_INLINE T& saved_at(int64_t row, Saved what) const {
    return saved[what * kept_rows + (row - first)];
  }
  CROSSENT_INLINE int saved_count() const { return one_hot() ? kOneHotSaved : kSaved; }
  CROSSENT_INLINE bool mapped() const { return options.logit_scale != 1 || options.softcap != 0; }
};

// Where the target stands among the classes of its row: arrays of one number a row.
template <class T>
struct TargetRanks {
  int64_t *rank, *runner_up;
  T* best;
};

// K numbers of each row.
template <class T>
struct TensorK {
  T* data = nullptr;
  int64_t count = 0, stride = 1;
  Layout rows;

  CROSSENT_INLINE T operator()(int64_t row, int64_t k) const {
    return data[rows(row) + k * stride];
  }
};
// A class of a row that was chosen, and what its log-probability weighs in the gradient.
constexpr int kMostLanes = 16;  // of any vector
struct ChosenClass {
  int64_t at;
  double weight;
};
// K classes of each row, and their log-probabilities: outputs of forward, contiguous.
template <class T>
struct Selection {
  TensorK<const int64_t> index;
  T* log_prob = nullptr;
  // Backward.
  TensorK<const T> grad_output;
  ChosenClass* room = nullptr;  // for the K classes of kMostLanes rows
};

// The kernels, compiled for one instruction set: rows begin to end of a problem. Backward writes a
// gradient by the logits where there is memory for it, and one by the logit scale, one number a row.
struct Kernels {
  void (*forward32)(const Problem<float>&, int64_t begin, int64_t end);
  void (*forward64)(const Problem<double>&, int64_t begin, int64_t end);
  void (*backward32)(const Problem<float>&, int64_t begin, int64_t end);
  void (*backward64)(const Problem<double>&, int64_t begin, int64_t end);
  void (*pass32)(const Problem<float>&, int64_t begin, int64_t end);  // both, row by row
  void (*pass64)(const Problem<double>&, int64_t begin, int64_t end);
  void (*target_rank32)(const Problem<float>&, int64_t begin, int64_t end,
                        const TargetRanks<float>& out);
  void (*target_rank64)(const Problem<double>&, int64_t begin, int64_t end,
                        const TargetRanks<double>& out);
  void (*backward_with_scale32)(const Problem<float>&, int64_t begin, int64_t end, double* scale);
  void (*backward_with_scale64)(const Problem<double>&, int64_t begin, int64_t end, double* scale);
  void (*entropy32)(const Problem<float>&, int64_t begin, int64_t end);
  void (*entropy64)(const Problem<double>&, int64_t begin, int64_t end);
  void (*entropy_backward32)(const Problem<float>&, int64_t begin, int64_t end, double* scale);
  void (*entropy_backward64)(const Problem<double>&, int64_t begin, int64_t end, double* scale);
  void (*log_probs32)(const Problem<float>&, int64_t begin, int64_t end, const Selection<float>&);
  void (*log_probs64)(const Problem<double>&, int64_t begin, int64_t end, const Selection<double>&);
  void (*log_probs_backward32)(const Problem<float>&, int64_t begin, int64_t end,
                               const Selection<float>&, double* scale);
  void (*log_probs_backward64)(const Problem<double>&, int64_t begin, int64_t end,
                               const Selection<double>&, double* scale);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace crossent
