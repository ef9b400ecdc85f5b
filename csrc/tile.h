// Tiles: as many rows as a vector has lanes, one in each, classes in turn. Torch-free.
#pragma once

#include <type_traits>
#include <utility>

#include "row_kernels.h"

namespace crossent::CROSSENT_ISA {

constexpr int kFewClasses = 32;       // up to here, looking at each beats looking one up
constexpr int kMaxLaneClasses = 256;  // a tile of this many classes stays in the first cache

// Where the rows of a tile begin, in elements.
template <class T>
struct Tile {
  static constexpr int L = kLanes<T>;
  bool unit = false;   // the rows are next to each other, class by class
  bool dense = false;  // they are `step` apart, with at least a row's classes between them
  int64_t first, step;
  int64_t end = 0;            // where dense: of the memory that rows of this tensor are in
  int64_t scattered[L] = {};  // each, where neither holds; lanes past the end repeat the last row

  CROSSENT_INLINE Tile(const Tensor2& t, int64_t row, int count, int64_t rows, int64_t classes) {
    const Layout& layout = t.rows;
    first = layout(row);
    const int run = layout.run(row, count, &step);
    if (run == L) {
      unit = step == 1;
      dense = layout.rank == 1 && t.class_stride == 1 && step >= classes;
      end = (rows - 1) * step + classes;
      if (unit || dense) return;
    }
    for (int l = 0; l < count;) {
      const int64_t from = layout(row + l);
      const int next = layout.run(row + l, count - l, &step);
      for (int k = 0; k < next; ++k) scattered[l + k] = from + k * step;
      l += next;
    }
    for (int l = count; l < L; ++l) scattered[l] = scattered[count - 1];
  }
};

// Lane j of one of the two vectors that a block of two by two becomes: L and more are the second's.
template <int L, int S, bool kOdd>
constexpr int transposed_lane(int j) {
  if (kOdd) return j & S ? L + j : j | S;
  return j & S ? L + (j ^ S) : j;
}
#ifndef __has_builtin
#define __has_builtin(name) 0
#endif
#if __has_builtin(__builtin_shufflevector)  // clang, and gcc from 12 on
template <class T, int S, bool kOdd, int... J>
CROSSENT_INLINE V<T> transpose_pair(V<T> a, V<T> b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, transposed_lane<kLanes<T>, S, kOdd>(J)...);
}
#else
template <class T, int S, bool kOdd, int... J>
CROSSENT_INLINE V<T> transpose_pair(V<T> a, V<T> b, std::integer_sequence<int, J...>) {
  return __builtin_shuffle(a, b, I<T>{transposed_lane<kLanes<T>, S, kOdd>(J)...});
}
#endif

// x[i][j] becomes x[j][i], for as many vectors as each has lanes: blocks of s change places, for
// s = 1, 2, 4, ...
template <class T, int S = 1>
CROSSENT_INLINE void transpose(V<T>* x) {
  constexpr int L = kLanes<T>;
  const std::make_integer_sequence<int, L> lanes;
  for (int i = 0; i < L; ++i) {
    if (i & S) continue;
    const V<T> a = x[i], b = x[i | S];
    x[i] = transpose_pair<T, S, false>(a, b, lanes);
    x[i | S] = transpose_pair<T, S, true>(a, b, lanes);
  }
  if constexpr (2 * S < L) transpose<T, 2 * S>(x);
}

// Runs f on the stored numbers, converters to and from T beside them.
template <class T, class F>
CROSSENT_INLINE void with_storage(const Tensor2& t, F f) {
  switch (t.dtype) {
    case Dtype::kFloat32:
      return f(
          static_cast<float*>(t.data), [](float x) CROSSENT_INLINE_LAMBDA { return T(x); },
          [](T x) CROSSENT_INLINE_LAMBDA { return float(x); });
    case Dtype::kFloat64:
      return f(
          static_cast<double*>(t.data), [](double x) CROSSENT_INLINE_LAMBDA { return T(x); },
          [](T x) CROSSENT_INLINE_LAMBDA { return double(x); });
    case Dtype::kBFloat16:
      return f(
          static_cast<uint16_t*>(t.data),
          [](uint16_t h) CROSSENT_INLINE_LAMBDA { return T(from_bfloat16(h)); },
          [](T x) CROSSENT_INLINE_LAMBDA { return to_bfloat16(float(x)); });
    case Dtype::kFloat16:
      return f(
          static_cast<uint16_t*>(t.data),
          [](uint16_t h) CROSSENT_INLINE_LAMBDA { return T(from_float16(h)); },
          [](T x) CROSSENT_INLINE_LAMBDA { return to_float16(float(x)); });
  }
}

// How many classes of a dense tile are taken in blocks that are transposed: few that are left over
// are cheaper one by one.
template <class T>
CROSSENT_INLINE int transposed_classes(int classes) {
  constexpr int L = kLanes<T>;
  return (classes % L <= L / 8 ? classes : classes + L - 1) / L * L;
}

// All classes of a tile: class c in out[c], which has room for a multiple of L of them. Rows one
// after the other are read as they lie in memory and transposed in blocks; a block may look beyond
// its row, but never beyond the tensor.
template <class T>
CROSSENT_INLINE void read_tile(const Tensor2& t, const Tile<T>& tile, int classes, V<T>* out) {
  constexpr int L = kLanes<T>;
  T* each = reinterpret_cast<T*>(out);
  const int64_t first = tile.first, step = tile.step;
  const int whole = transposed_classes<T>(classes);
  with_storage<T>(t, [&](const auto* p, auto from, auto) CROSSENT_INLINE_LAMBDA {
    if (tile.unit) {
      for (int c = 0; c < classes; ++c)
        for (int l = 0; l < L; ++l) each[c * L + l] = from(p[first + c * t.class_stride + l]);
    } else if (tile.dense && first + (L - 1) * step + whole <= tile.end) {
      for (int c = 0; c < whole; c += L) {
        V<T> block[L];
        for (int l = 0; l < L; ++l) {
          alignas(64) T row[L];
          const auto* place = p + first + l * step + c;
          __builtin_prefetch(place + L * step);  // of the next tile
          for (int k = 0; k < L; ++k) row[k] = from(place[k]);
          block[l] = load(row);
        }
        transpose<T>(block);
        for (int k = 0; k < L; ++k) out[c + k] = block[k];
      }
      for (int c = whole; c < classes; ++c) {
        V<T> column;
        for (int l = 0; l < L; ++l) column[l] = from(p[first + l * step + c]);
        out[c] = column;
      }
    } else {
      const bool even = tile.dense;
      for (int l = 0; l < L; ++l)
        for (int c = 0; c < classes; ++c)
          each[c * L + l] =
              from(p[(even ? first + l * step : tile.scattered[l]) + c * t.class_stride]);
    }
  });
}

// From logits as they are stored to scored ones; and their slopes where these are wanted.
template <class T>
CROSSENT_INLINE void map_tile(const Problem<T>& p, V<T>* z, V<T>* slope = nullptr) {
  if (!p.mapped()) return;
  const T scale = T(p.options.logit_scale), cap = T(p.options.softcap);
  for (int c = 0; c < p.classes; ++c) {
    if (slope) slope[c] = map_slope<T>(z[c], p.options);
    z[c] = z[c] * scale;
    if (cap != 0) z[c] = tanh_(z[c] / cap) * cap;
  }
}

// A tile whose rows lie one after the other without gaps, transposed block by block. It is put
// together in the first cache: memory is written from one end to the other, and a block that reaches
// beyond its row goes first, for the next rows overwrite what is not its own.
template <class T, class S, class F>
CROSSENT_INLINE void write_dense_tile(S* place, int classes, const V<T>* in, F to) {
  constexpr int L = kLanes<T>;
  alignas(64) S rows[(kMaxLaneClasses + 1) * L];
  const int whole = transposed_classes<T>(classes), blocks = whole / L;
  for (int b = 0; b < blocks; ++b) {
    const int c = (b ? b - 1 : blocks - 1) * L;
    V<T> block[L];
    for (int k = 0; k < L; ++k) block[k] = in[c + k];
    transpose<T>(block);
    for (int l = 0; l < L; ++l) {
      alignas(64) T row[L];
      store(row, block[l]);
      for (int k = 0; k < L; ++k) rows[l * classes + c + k] = to(row[k]);
    }
  }
  for (int c = whole; c < classes; ++c)
    for (int l = 0; l < L; ++l) rows[l * classes + c] = to(in[c][l]);
  std::memcpy(place, rows, L * classes * sizeof(S));
}

// The rows of a tile that are meant, back to where they belong.
template <class T>
CROSSENT_INLINE void write_tile(const Tensor2& t, const Tile<T>& tile, int classes, int count,
                                const bool* skip, const V<T>* in) {
  constexpr int L = kLanes<T>;
  const T* each = reinterpret_cast<const T*>(in);
  with_storage<T>(t, [&](auto* p, auto, auto to) CROSSENT_INLINE_LAMBDA {
    if (tile.unit && !skip) {
      for (int c = 0; c < classes; ++c)
        for (int l = 0; l < L; ++l) p[tile.first + c * t.class_stride + l] = to(each[c * L + l]);
    } else if (tile.dense && !skip && tile.step == classes) {
      write_dense_tile<T>(p + tile.first, classes, in, to);
    } else {
      const bool even = tile.unit || tile.dense;
      for (int l = 0; l < count; ++l)
        for (int c = 0; c < classes && !(skip && skip[l]); ++c)
          p[(even ? tile.first + l * tile.step : tile.scattered[l]) + c * t.class_stride] =
              to(each[c * L + l]);
    }
  });
}

// A number of each row, one a lane; lanes past the end repeat the last row.
template <class T>
CROSSENT_INLINE V<T> read_numbers(const Tensor1<const T>& t, int64_t row, int count) {
  constexpr int L = kLanes<T>;
  if (count == L)
    if (const T* next_to_each_other = t.run(row)) return load(next_to_each_other);
  alignas(64) T out[L];
  for (int l = 0; l < L; ++l) out[l] = t(row + (l < count ? l : count - 1));
  return load(out);
}
// The same of what forward saved.
template <class T>
CROSSENT_INLINE V<T> read_saved(const Problem<T>& p, int64_t row, int count, Saved what) {
  const T* from = &p.saved_at(row, what);
  if (count == kLanes<T>) return load(from);
  alignas(64) T out[kLanes<T>];
  for (int l = 0; l < kLanes<T>; ++l) out[l] = from[l < count ? l : count - 1];
  return load(out);
}
// The first `count` lanes, one number a row.
template <class T>
CROSSENT_INLINE void write_numbers(T* to, int count, V<T> v) {
  if (count == kLanes<T>) return store(to, v);
  for (int l = 0; l < count; ++l) to[l] = v[l];
}

// What the rows of a tile are scored against: a class, or -1 where the row is ignored (it costs
// nothing), where the target is no class, where it is probabilities, and in lanes past the end.
template <class T>
struct Targets {
  static constexpr int L = kLanes<T>;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  alignas(64) Int at[L];
  I<T> target, ignored;

  CROSSENT_INLINE Targets(const Problem<T>& p, int64_t row, int count) {
    if (!p.by_index()) {  // probabilities: no row is ignored, none has a class
      ignored = I<T>{}, target = ignored - 1;
      std::memcpy(at, &target, sizeof target);
      return;
    }
    alignas(64) int64_t raw[L];
    const int64_t* run = count == L ? p.index.run(row) : nullptr;
    if (run) std::memcpy(raw, run, sizeof raw);
    else
      for (int l = 0; l < L; ++l) raw[l] = l < count ? p.index(row + l) : p.options.ignore_index;
    const int64_t classes = p.classes, ignore_index = p.options.ignore_index;
    alignas(64) Int is_ignored[L];
    for (int l = 0; l < L; ++l) {
      const bool inside = (raw[l] >= 0) & (raw[l] < classes), skipped = raw[l] == ignore_index;
      is_ignored[l] = Int(-int64_t(skipped));
      at[l] = Int((inside & !skipped) ? raw[l] : -1);
    }
    std::memcpy(&target, at, sizeof target);
    std::memcpy(&ignored, is_ignored, sizeof ignored);
  }
  // The number of each row at its target, of those of class c in x[c]; 0 where there is none.
  CROSSENT_INLINE V<T> pick(const V<T>* x, int classes) const {
    if (classes > kFewClasses)
      return look_up([&](int l, int c) CROSSENT_INLINE_LAMBDA { return x[c][l]; });
    V<T> out{};
    for (int c = 0; c < classes; ++c) out = target == Int(c) ? x[c] : out;
    return out;
  }
  // The same of numbers that are somewhere else.
  template <class F>
  CROSSENT_INLINE V<T> look_up(F number) const {
    alignas(64) T out[L];
    for (int l = 0; l < L; ++l) out[l] = number(l, int(at[l] < 0 ? 0 : at[l]));
    return target < 0 ? V<T>{} : load(out);
  }
};

template <class T>
CROSSENT_INLINE bool any(I<T> mask) {
  int64_t all = 0;
  for (int l = 0; l < kLanes<T>; ++l) all |= mask[l];
  return all != 0;
}

}  // namespace crossent::CROSSENT_ISA
