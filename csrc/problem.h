// What kernels are asked: tensors as pointers and strides, options as numbers. Torch-free, and the
// same for every instruction set.
#pragma once

#include <cstdint>

#define CROSSENT_INLINE inline __attribute__((always_inline))
// For what a row or a tile is done by: one function each, so that neither takes the other's registers.
#define CROSSENT_APART __attribute__((noinline))

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
enum Saved { kMaximum, kRest, kPlainSaved, kMass = kPlainSaved, kOpen, kUniformMass, kSaved };

template <class T>
struct Problem {
  int64_t classes;
  Tensor2 logits;
  Tensor2 probabilities;        // data null: targets are indices
  Tensor1<const int64_t> index;
  const T* weight = nullptr;    // class weights
  Tensor1<const T> sample_weight;
  Options options;
  int64_t rows;                 // how many there are
  // Outputs of forward, contiguous: one number a row, loss and mass from row `first` on; of what is
  // saved, first all the maxima, then all the rests, and so on. Statistics null where not wanted.
  int64_t first = 0;
  T *loss, *mass, *saved, *lse, *log_prob, *entropy;
  int64_t* argmax;
  int64_t* wrong;  // set to one if a target is neither a class nor ignored
  // Backward.
  Tensor1<const T> upstream;
  Tensor2 gradient;

  CROSSENT_INLINE bool by_index() const { return probabilities.data == nullptr; }
  CROSSENT_INLINE bool plain() const { return by_index() && options.label_smoothing == 0; }
  CROSSENT_INLINE T& saved_at(int64_t row, Saved what) const { return saved[what * rows + row]; }
  CROSSENT_INLINE int saved_count() const { return plain() ? kPlainSaved : kSaved; }
  CROSSENT_INLINE bool mapped() const { return options.logit_scale != 1 || options.softcap != 0; }
};

// The kernels, compiled for one instruction set: rows begin to end of a problem.
struct Kernels {
  const char* name;
  void (*forward32)(const Problem<float>&, int64_t begin, int64_t end);
  void (*forward64)(const Problem<double>&, int64_t begin, int64_t end);
  void (*backward32)(const Problem<float>&, int64_t begin, int64_t end);
  void (*backward64)(const Problem<double>&, int64_t begin, int64_t end);
  void (*standing32)(const Problem<float>&, int64_t begin, int64_t end, int64_t* rank,
                     int64_t* rival, float* best);
  void (*standing64)(const Problem<double>&, int64_t begin, int64_t end, int64_t* rank,
                     int64_t* rival, double* best);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace crossent
