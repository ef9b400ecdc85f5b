// The loss and its gradient in one pass: a row is read from memory once. Torch-free.
#pragma once

#include <cstdlib>

#include "tile_kernels.h"

namespace crossent::CROSSENT_ISA {

constexpr int kMostBlocks = 512;  // of a row whose exps are kept

// Memory of a thread for one row; it stays for the next.
template <class T>
struct RowScratch {
  T* data = nullptr;
  int64_t size = 0;

  CROSSENT_INLINE T* of_size(int64_t n) {
    if (n > size) {
      std::free(data);
      data = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64));
      size = data ? n : 0;
    }
    return data;
  }
  ~RowScratch() { std::free(data); }
};
template <class T>
thread_local RowScratch<T> row_scratch;

// The entries of an index target's gradient, but for its own: `factor` times the terms of a block.
template <class T>
CROSSENT_INLINE void scale_terms(const T* terms, int n, T factor, T* out) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < n; i += L) {
    const int k = n - i < L ? n - i : L;
    const V<T> e = k == L ? load(terms + i) : load(terms + i, k, T(0));
    const V<T> r = e * Exp<T>::kUnscale * factor;
    if (k == L) store(out + i, r);
    else store(out + i, k, r);
  }
}

// A row with an index target, whose exps are taken once: measured from the maximum so far, they go
// to the gradient's memory (or to scratch, where that holds other numbers) and are scaled there.
template <class T>
CROSSENT_INLINE void pass_one_hot(const Problem<T>& p, int64_t row, int64_t target) {
  alignas(64) T result[kBlock];
  const Tensor2& out = p.gradient;
  const bool direct = out.class_stride == 1 && item_size(out.dtype) == sizeof(T);
  T* terms = direct ? reinterpret_cast<T*>(out.at(row, 0)) : row_scratch<T>.of_size(p.classes);
  T origins[kMostBlocks];
  RowState<T> s;
  const auto block = [&](int64_t c) {
    return int(p.classes - c < kBlock ? p.classes - c : kBlock);
  };
  for (int64_t c = 0; c < p.classes && !s.nan; c += kBlock) {
    forward_block(p, row, c, block(c), s, terms + c);
    origins[c / kBlock] = s.m;
  }
  finish_row(p, row, target, s);
  if (s.nan || s.m == -std::numeric_limits<T>::infinity()) return backward_row(p, row);

  const GradientFactors<T> g = gradient_factors(p, row, target);
  const double coefficient = GradientFormula<T, T>(g, false).coefficient;
  const bool has_target = target >= 0 && target < p.classes;
  const T entry = has_target ? target_entry(p, row, target, g) : T(0);
  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const int n = block(c);
    const T m = origins[c / kBlock];
    const double lower = m == s.m ? 1 : std::exp(double(m) - double(s.m));
    T* r = direct ? terms + c : result;
    scale_terms(terms + c, n, T(coefficient * lower), r);
    if (has_target && target >= c && target < c + n) r[target - c] = entry;
    if (!direct) write(out.at(row, c), out.dtype, out.class_stride, n, r);
  }
}

template <class T>
CROSSENT_NOINLINE void pass_row(const Problem<T>& p, int64_t row) {
  if (p.one_hot() && !p.mapped() && p.classes <= kBlock * kMostBlocks) {
    const int64_t target = p.index(row);
    if (target != p.options.ignore_index) return pass_one_hot(p, row, target);
  }
  forward_row(p, row);
  backward_row(p, row);
}

template <class T, bool kPlain>
CROSSENT_NOINLINE void pass_tile(const Problem<T>& p, int64_t row, int count) {
  TileNumbers<T> t;
  const Targets<T> targets(p, row, count);
  t.read(p, row, count);
  if (!kPlain) t.map(p, row, count, p.mapped());
  score_tile<T, kPlain>(p, row, count, t, targets, t.e);
  differentiate_tile<T, kPlain, true>(p, row, count, t, targets);
}

constexpr int kPassLanes = kMaxLaneClasses;
template <class T>
void pass_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  const bool plain = is_plain(p), together = side_by_side(p, kPassLanes);
  by_planes(p, begin, end, true,
            [&](const Problem<T>& q, int64_t from, int64_t to) CROSSENT_INLINE_LAMBDA {
              each<T>(
                  together, from, to, [&](int64_t r) CROSSENT_INLINE_LAMBDA { pass_row(q, r); },
                  [&](int64_t r, int count) CROSSENT_INLINE_LAMBDA {
                    plain ? pass_tile<T, true>(q, r, count) : pass_tile<T, false>(q, r, count);
                  });
            });
}

}  // namespace crossent::CROSSENT_ISA
