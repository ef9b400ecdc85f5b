// Products of bfloat16 matrices with float32 sums, for a linear head: what a machine with
// instructions for them is asked for. products_kernels.h has the kernels. Torch-free.
//
//   logits (n, V) = x W^T + bias,   dx (n, D) = g W,   dW (V, D) += g^T x
//
// with x (n, D) and W (V, D) of bfloat16, and the logits' gradient g (n, V) of float32.
//
// Blocking, with pairs of neighbours along the sum (the instruction takes two products at a time):
// a tile of C has 14 rows and 32 columns, 28 of 32 registers; a step of its sum is 28 instructions
// for 128 bytes of B and 56 of A. A's 14 rows stay in the first cache (at most kLongest long), while
// panels of 32 columns of B stream from the second: 9 bytes a cycle, where it gives 64. A tile of C
// is asked for when its sum begins, some 2000 cycles before it is added to.
#pragma once

#include <cstdint>

#include "sparse.h"

namespace crossent {

template <class T>
struct Matrix {
  T* at;
  int64_t rows, columns, stride;  // numbers of a row are neighbours
};

namespace products {

constexpr int64_t kTileRows = 14, kTileColumns = 32;
constexpr int64_t kLongest = 2048;              // features that a tile of logits sums at a time
constexpr int64_t kClasses = 512, kRows = 512;  // the same for classes, and for rows
constexpr int64_t kBlock = 512 * 1024;          // bytes of packed B that stay in the second cache
constexpr int64_t kParts = 4;  // of the sum over classes, each with room of its own
constexpr int64_t kClassesAtOnce = 16 * kTileRows;  // whose gradients are packed together

// Of a row of g the entries above this share of the sum of their sizes have their rounding errors
// carried, one by one; where classes are so few that those may be an eighth of all, every entry's
// is, by a second product.
constexpr float kLarge = 0x1p-8f;
inline bool carries_all(int64_t classes) { return classes <= 2048; }

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Numbers of 32 bits (pairs) in packed features, for logits and for the weight's gradient.
inline int64_t packed_rows(int64_t rows, int64_t features) {
  return round_up(rows, kTileRows) * ((features + 1) / 2);
}
inline int64_t packed_columns(int64_t rows, int64_t features) {
  return round_up(features, kTileColumns) * ((rows + 1) / 2);
}

}  // namespace products

// The kernels of one instruction set. Results are a function of the arguments, whatever the ranges
// that they are made in. Their contracts stand in products_kernels.h.
struct Products {
  void (*pack_rows)(const Matrix<const uint16_t>& x, uint32_t* packed);
  void (*pack_columns)(const Matrix<const uint16_t>& x, uint32_t* packed);
  void (*logits)(const uint32_t* packed, const Matrix<const uint16_t>& weight, const float* bias,
                 const Matrix<float>& out, int64_t begin, int64_t end);
  void (*times)(const Matrix<const float>& gradient, const Matrix<const uint16_t>& weight,
                const Matrix<float>& out, int64_t begin, int64_t end);
  void (*outer)(const Matrix<const float>& gradient, const uint32_t* packed,
                const Matrix<float>& out, bool add, int64_t begin, int64_t end);
  void (*errors)(const float* row, int64_t classes, sparse::CSRRows<float>& out, float* small);
};

#if defined(__x86_64__)
extern const Products kAvx512BFloat16;
#endif

}  // namespace crossent
