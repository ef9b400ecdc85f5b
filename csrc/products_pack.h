// Matrices packed for products_kernels.h: pairs of neighbours along the sum, in the order in which
// they are taken. Compiled as that file is. Torch-free.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "macros.h"
#include "products.h"

namespace crossent::avx512_bf16 {

using namespace products;

// Memory in whole lines, not filled.
class Pairs {
 public:
  explicit Pairs(int64_t n)
      : memory_(static_cast<uint32_t*>(std::aligned_alloc(64, size_t(round_up(n + 16, 16) * 4)))) {
    if (!memory_) throw std::bad_alloc();
  }
  uint32_t* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(uint32_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint32_t[], Free> memory_;
};

CROSSENT_INLINE __mmask16 first(int64_t n) {
  return __mmask16(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
}
CROSSENT_INLINE __mmask32 first32(int64_t n) {
  return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1;
}

// What a number contributes: itself where it is bfloat16; of a float32 the nearest bfloat16, or
// what that leaves over, rounded in its turn. The two sum up to it within 2^-16 of its size, and
// within 2^-126.
struct Whole {
  using Number = uint16_t;
  // 16 numbers, in the lower halves of 32 bits.
  static CROSSENT_INLINE __m512i sixteen(const Number* from, __mmask16 m) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, from));
  }
  // 32 numbers.
  static CROSSENT_INLINE __m512i thirty_two(const Number* from, int64_t n) {
    return _mm512_maskz_loadu_epi16(first32(n), from);
  }
};
template <bool Rest>
struct Part {
  using Number = float;
  static CROSSENT_INLINE __m256i round(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
  static CROSSENT_INLINE __m512i widen(__m256i x) { return _mm512_cvtepu16_epi32(x); }
  static CROSSENT_INLINE __m512 rest(__m512 x) {
    return _mm512_sub_ps(x, (__m512)_mm512_slli_epi32(widen(round(x)), 16));
  }
  static CROSSENT_INLINE __m512i sixteen(const Number* from, __mmask16 m) {
    const __m512 x = _mm512_maskz_loadu_ps(m, from);
    return widen(round(Rest ? rest(x) : x));
  }
  static CROSSENT_INLINE __m512i thirty_two(const Number* from, int64_t n) {
    const __m512 x = _mm512_maskz_loadu_ps(first(n), from);
    const __m512 y = _mm512_maskz_loadu_ps(first(n - 16), from + (n > 16 ? 16 : 0));
    return Rest ? (__m512i)_mm512_cvtne2ps_pbh(rest(y), rest(x))
                : (__m512i)_mm512_cvtne2ps_pbh(y, x);
  }
};

// x[i][j] <-> x[j][i], of 16 vectors of 32-bit numbers.
CROSSENT_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // x[i + j]: lane 4 l + k is number 4 l + j of row i + k
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // of each four lanes, those of the same number side by side
    const __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    y[j] = _mm512_shuffle_i32x4(a, b, 0x88), y[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88), y[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Packs n <= Width rows whose numbers, `depth` of them, are summed over: pair k of row i goes to
// to[k Width + i]. Zeros stand for rows and numbers that there are not.
template <class Kind, int Width>
void pack_along(const typename Kind::Number* from, int64_t stride, int64_t n, int64_t depth,
                uint32_t* to) {
  for (int64_t k = 0; k < depth; k += 32)
    for (int64_t i = 0; i < Width; i += 16) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
        x[j] = i + j < n ? Kind::thirty_two(from + (i + j) * stride + k, depth - k)
                         : _mm512_setzero_si512();
      transpose(x);
      const int64_t pairs = std::min<int64_t>(16, (depth - k + 1) / 2);
      uint32_t* place = to + k / 2 * Width + i;
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p)
        if (p < pairs) _mm512_mask_storeu_epi32(place + p * Width, first(Width - i), x[p]);
    }
}

// Packs n columns of `depth` rows, which are summed over, into panels of Width: pair k of column i
// goes to to[(i / Width) ceil(depth / 2) Width + k Width + i % Width]; zeros as above.
template <class Kind, int Width>
void pack_across(const typename Kind::Number* from, int64_t stride, int64_t n, int64_t depth,
                 uint32_t* to) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t k = 0; k < pairs; ++k) {
    const typename Kind::Number *even = from + 2 * k * stride, *odd = even + stride;
    const bool both = 2 * k + 1 < depth;
    for (int64_t i = 0; i < n; i += Width)
      for (int64_t j = 0; j < Width; j += 16) {
        const __mmask16 there = first(std::min<int64_t>(Width - j, n - i - j));
        const int64_t c = there ? i + j : 0;
        __m512i x = Kind::sixteen(even + c, there);
        if (both) x = _mm512_or_si512(x, _mm512_slli_epi32(Kind::sixteen(odd + c, there), 16));
        _mm512_mask_storeu_epi32(to + i * pairs + k * Width + j, first(Width - j), x);
      }
  }
}

}  // namespace crossent::avx512_bf16
