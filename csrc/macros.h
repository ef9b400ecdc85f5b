// What every header needs of the compiler. Torch-free.
#pragma once

#include <cstring>

#define CROSSENT_INLINE inline __attribute__((always_inline))
// For what a row or a tile is done by: one function each, so that neither takes the other's
// registers.
#define CROSSENT_NOINLINE __attribute__((noinline))
// The same for a lambda, which without it may stay a call within a loop.
#define CROSSENT_INLINE_LAMBDA __attribute__((always_inline))

namespace crossent {

// The same bits as another type. (Never a call: what is compiled for one instruction set must not
// be merged with the same function compiled for another.)
template <class To, class From>
CROSSENT_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace crossent
