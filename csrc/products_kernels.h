// Products of bfloat16 by vdpbf16ps: c += a0 b0 + a1 b1 in each of 16 lanes. The including file
// compiles it for AVX512-BF16. Torch-free.
//
// The instruction takes subnormal numbers for zero, and returns none; it rounds each product's
// addition to the nearest (or the pair's sum first: machines differ), whatever the rounding mode.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "macros.h"
#include "products_pack.h"

namespace crossent::avx512_bf16 {

// Where sums go, and what they are added to.
struct Target {
  float* at;
  int64_t stride;
  const float* bias;  // of the columns; none: zero
  bool add;           // to what is there
};

// c[i][j] = (c[i][j] if add) + bias[j] + the sum over pairs of a[k][i] . b[k][j], for i < Rows and
// the first n of 32 columns. With s = the sum of the sizes of the 2 `pairs` products, the error is
// at most (2 pairs + 2) 2^-24 (s + abs(c) + abs(bias)) + (2 pairs + 2) 2^-126.
template <int Rows>
CROSSENT_NOINLINE void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, const Target& c,
                            int64_t n) {
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
    __builtin_prefetch(c.at + i * c.stride, 1);
    __builtin_prefetch(c.at + i * c.stride + std::min<int64_t>(n, 17) - 1, 1);
    __builtin_prefetch(c.at + i * c.stride + n - 1, 1);
  }
  __m512 sum[Rows][2];
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += kTileRows, b += kTileColumns) {
    const __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + 16);
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const __mmask16 there = first(n - 16 * j);
    if (!there) break;
    const __m512 bias =
        c.bias ? _mm512_maskz_loadu_ps(there, c.bias + 16 * j) : _mm512_setzero_ps();
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) {
      float* to = c.at + i * c.stride + 16 * j;
      __m512 x = _mm512_add_ps(sum[i][j], bias);
      if (c.add) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(there, to));
      _mm512_mask_storeu_ps(to, there, x);
    }
  }
}

template <int... I>
constexpr auto tiles(std::integer_sequence<int, I...>) {
  return std::array{&tile<I + 1>...};
}

// The same for m rows and n columns, packed in tiles and panels.
inline void multiply(const uint32_t* a, const uint32_t* b, int64_t m, int64_t n, int64_t pairs,
                     const Target& c) {
  static constexpr auto kTiles = tiles(std::make_integer_sequence<int, int(kTileRows)>());
  for (int64_t i = 0; i < m; i += kTileRows)
    for (int64_t j = 0; j < n; j += kTileColumns) {
      const Target part{c.at + i * c.stride + j, c.stride, c.bias ? c.bias + j : nullptr, c.add};
      kTiles[size_t(std::min(m - i, kTileRows) - 1)](a + i * pairs, b + j * pairs, pairs, part,
                                                     std::min(n - j, kTileColumns));
    }
}

// Columns of B whose panels fit into the second cache, where sums are this long.
inline int64_t columns_at_once(int64_t depth) {
  return std::max(kTileColumns, kBlock / (2 * depth) / kTileColumns * kTileColumns);
}

// Features as tiles of rows: for each kLongest features all rows.
inline void pack_rows(const Matrix<const uint16_t>& x, uint32_t* packed) {
  for (int64_t k = 0; k < x.columns; k += kLongest) {
    const int64_t depth = std::min(kLongest, x.columns - k), pairs = (depth + 1) / 2;
    for (int64_t i = 0; i < x.rows; i += kTileRows, packed += kTileRows * pairs)
      pack_along<Whole, kTileRows>(x.at + i * x.stride + k, x.stride,
                                   std::min(kTileRows, x.rows - i), depth, packed);
  }
}

// Features as panels of columns: for each kRows rows all columns.
inline void pack_columns(const Matrix<const uint16_t>& x, uint32_t* packed) {
  for (int64_t r = 0; r < x.rows; r += kRows) {
    const int64_t depth = std::min(kRows, x.rows - r), pairs = (depth + 1) / 2;
    pack_across<Whole, kTileColumns>(x.at + r * x.stride, x.stride, x.columns, depth, packed);
    packed += round_up(x.columns, kTileColumns) * pairs;
  }
}

// Logits of the classes from begin to end, in their columns of `out`, from features packed by
// pack_rows. With s = sum_d abs(x_d w_d), each is within (D + 2) 2^-24 (s + abs(bias)) + D 2^-125
// of the truth.
inline void logits(const uint32_t* packed, const Matrix<const uint16_t>& weight, const float* bias,
                   const Matrix<float>& out, int64_t begin, int64_t end) {
  const int64_t features = weight.columns, longest = std::min(features, kLongest);
  const int64_t most = std::min(columns_at_once(longest), round_up(end - begin, kTileColumns));
  const Pairs room(most * ((longest + 1) / 2));
  for (int64_t c = begin; c < end; c += most) {
    const int64_t n = std::min(most, end - c);
    for (int64_t k = 0; k < features; k += kLongest) {
      const int64_t depth = std::min(kLongest, features - k), pairs = (depth + 1) / 2;
      for (int64_t j = 0; j < n; j += kTileColumns)
        pack_along<Whole, kTileColumns>(weight.at + (c + j) * weight.stride + k, weight.stride,
                                        std::min(kTileColumns, n - j), depth,
                                        room.get() + j * pairs);
      multiply(packed + round_up(out.rows, kTileRows) * (k / 2), room.get(), out.rows, n, pairs,
               {out.at + c, out.stride, bias && k == 0 ? bias + c : nullptr, k > 0});
    }
  }
}

// The gradient of features, summed over the classes from begin to end. With s = sum_c abs(g_c w_c),
// each is within (kClasses + (end - begin) / kClasses + 4) 2^-24 s of the truth for the g that is
// taken: rounded to bfloat16, or within 2^-16 of each entry where carries_all(V); subnormal numbers
// are zero.
inline void times(const Matrix<const float>& gradient, const Matrix<const uint16_t>& weight,
                  const Matrix<float>& out, int64_t begin, int64_t end) {
  const int64_t rows = gradient.rows, features = weight.columns;
  const int64_t most = std::min(columns_at_once(kClasses), round_up(features, kTileColumns));
  const Pairs a(round_up(rows, kTileRows) * kClasses / 2), b(most * kClasses / 2);
  const auto take = [&](auto kind, int64_t c, bool add) {
    using Kind = decltype(kind);
    const int64_t depth = std::min(kClasses, end - c), pairs = (depth + 1) / 2;
    for (int64_t i = 0; i < rows; i += kTileRows)
      pack_along<Kind, kTileRows>(gradient.at + i * gradient.stride + c, gradient.stride,
                                  std::min(kTileRows, rows - i), depth, a.get() + i * pairs);
    for (int64_t d = 0; d < features; d += most) {
      const int64_t n = std::min(most, features - d);
      pack_across<Whole, kTileColumns>(weight.at + c * weight.stride + d, weight.stride, n, depth,
                                       b.get());
      multiply(a.get(), b.get(), rows, n, pairs, {out.at + d, out.stride, nullptr, add});
    }
  };
  for (int64_t c = begin; c < end; c += kClasses) {
    take(Part<false>(), c, c > begin);
    if (carries_all(weight.rows)) take(Part<true>(), c, true);
  }
}

// The gradient of the weight, of the classes from begin to end, set or added to, from features
// packed by pack_columns. With s = the sum over rows of abs(g_r x_r), each is within
// (min(n, kRows) + n / kRows + 4) 2^-24 (s + abs(what was there)) of the truth for the g that is
// taken, as in times.
inline void outer(const Matrix<const float>& gradient, const uint32_t* packed,
                  const Matrix<float>& out, bool add, int64_t begin, int64_t end) {
  const int64_t rows = gradient.rows, features = out.columns;
  const int64_t longest = std::min(rows, kRows);
  for (int64_t c = begin; rows == 0 && !add && c < end; ++c)
    std::fill(out.at + c * out.stride, out.at + c * out.stride + features, 0.0f);
  const Pairs a(kClassesAtOnce * ((longest + 1) / 2));
  const auto take = [&](auto kind, int64_t c, int64_t r, bool more) {
    using Kind = decltype(kind);
    const int64_t m = std::min(kClassesAtOnce, end - c);
    const int64_t depth = std::min(kRows, rows - r), pairs = (depth + 1) / 2;
    const int64_t most = columns_at_once(depth);
    pack_across<Kind, kTileRows>(gradient.at + r * gradient.stride + c, gradient.stride, m, depth,
                                 a.get());
    const uint32_t* b = packed + round_up(features, kTileColumns) * (r / 2);
    for (int64_t d = 0; d < features; d += most)
      multiply(a.get(), b + d * pairs, m, std::min(most, features - d), pairs,
               {out.at + c * out.stride + d, out.stride, nullptr, more});
  };
  for (int64_t c = begin; c < end; c += kClassesAtOnce)
    for (int64_t r = 0; r < rows; r += kRows) {
      take(Part<false>(), c, r, add || r > 0);
      if (carries_all(gradient.columns)) take(Part<true>(), c, r, true);
    }
}

// Adds to `out` what rounding to bfloat16 takes from a row's large entries (kLarge), be it nothing:
// exactly, as the difference of neighbours. Entries that are no numbers have none. small[0] is the
// sum of the other entries as they are rounded, small[1] that of what rounding takes from them, each
// within 2^-16 of the sum of the sizes of its terms.
inline void errors(const float* row, int64_t classes, sparse::CSRRows<float>& out, float* small) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  for (int64_t c = 0; c < classes; c += 64)
    for (int j = 0; j < 4; ++j) {
      const __mmask16 there = first(classes - c - 16 * j);
      if (!there) break;
      const __m512 x = _mm512_maskz_loadu_ps(there, row + c + 16 * j);
      sums[j] = _mm512_add_ps(sums[j], _mm512_abs_ps(x));
    }
  const float sum = _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
  const __m512 large = _mm512_set1_ps(kLarge * sum);
  __m512 rounded = _mm512_setzero_ps(), lost = _mm512_setzero_ps();
  for (int64_t c = 0; c < classes; c += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(first(classes - c), row + c);
    __mmask16 found = _mm512_cmp_ps_mask(_mm512_abs_ps(x), large, _CMP_GT_OQ);
    const __m512 rest = Part<true>::rest(x);
    lost = _mm512_mask_add_ps(lost, ~found, lost, rest);
    rounded = _mm512_mask_add_ps(rounded, ~found, rounded, _mm512_sub_ps(x, rest));
    if (!found) continue;
    alignas(64) float left[16];
    _mm512_store_ps(left, rest);
    for (; found; found &= found - 1) {
      const int i = __builtin_ctz(found);
      out.add(c + i, left[i]);
    }
  }
  small[0] = _mm512_reduce_add_ps(rounded);
  small[1] = _mm512_reduce_add_ps(lost);
}

}  // namespace crossent::avx512_bf16
