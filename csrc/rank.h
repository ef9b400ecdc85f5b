// The rank of a target among the classes of its row. Torch-free.
#pragma once

#include "row_kernels.h"

namespace crossent::CROSSENT_ISA {

// Of n numbers: how many are above `own`, and the largest; nan is neither. n >= 1.
template <class T>
CROSSENT_INLINE int64_t count_above(const T* z, int n, T own, T* largest) {
  constexpr int L = kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const V<T> limit = splat(own);
  V<T> max = splat(lowest);
  I<T> above = {};
  for (int i = 0; i < n; i += L) {
    const V<T> x = i + L <= n ? load(z + i) : load_tail(z, n, lowest);
    above -= x > limit;
    max = x > max ? x : max;
  }
  int64_t count = 0;
  *largest = lowest;
  for (int l = 0; l < L; ++l) {
    count += above[l];
    if (max[l] > *largest) *largest = max[l];
  }
  return count;
}

// Rows begin to end of a problem with index targets: the rank of the target (1 is best, equals
// share the better rank), the best of the other classes (the first of several; -1 if there is
// none), its logit. Rows whose target is no class hold 0, -1 and 0.
template <class T>
void target_rank_rows(const Problem<T>& p, int64_t begin, int64_t end, const TargetRanks<T>& out) {
  alignas(64) T buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = p.index(row);
    out.rank[row] = 0, out.runner_up[row] = -1, out.best[row] = 0;
    if (target < 0 || target >= p.classes) continue;
    const T own = scored_logit(p, row, target);
    int64_t above = 0, where = -1;
    T top = -std::numeric_limits<T>::infinity();
    const auto look = [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; c += kBlock) {
        const int n = int(to - c < kBlock ? to - c : kBlock);
        const T* z = read_logits(p, row, c, n, buffer);
        T largest;
        above += count_above(z, n, own, &largest);
        if (!(largest > top) && where >= 0) continue;
        for (int i = 0; i < n && (largest > top || where < 0); ++i)
          if (z[i] == largest) top = largest, where = c + i;
      }
    };
    look(0, target);
    look(target + 1, p.classes);
    out.rank[row] = above + 1, out.runner_up[row] = where, out.best[row] = top;
  }
}

}  // namespace crossent::CROSSENT_ISA
