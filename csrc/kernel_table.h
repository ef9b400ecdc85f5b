// The table of kernels for one instruction set. The including file, kernels_*.cpp, says which:
//
//   CROSSENT_ISA           its name, and the namespace that everything is compiled in
//   CROSSENT_TABLE         the table to define: one of those declared in problem.h
//   CROSSENT_VECTOR_BYTES  the size of a vector: 64 is AVX-512, 32 AVX2, 16 the compiler's baseline
//
// One file for each set: what is compiled for one must never be called for another. Standard
// headers come first, so that only ours are compiled for it. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if CROSSENT_VECTOR_BYTES > 16
// The compiler reads the file before it heeds the pragma: its own macros do not tell.
#define CROSSENT_FMA
#define CROSSENT_F16C
#endif

#if defined(__clang__) && CROSSENT_VECTOR_BYTES == 64
#pragma clang attribute push(__attribute__((target("arch=skylake-avx512"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#elif defined(__clang__) && CROSSENT_VECTOR_BYTES == 32
#pragma clang attribute push(__attribute__((target("arch=haswell"))), apply_to = function)
#elif CROSSENT_VECTOR_BYTES == 64
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#elif CROSSENT_VECTOR_BYTES == 32
#pragma GCC target("arch=haswell")
#endif

#include "pass_kernels.h"
#include "rank.h"
#include "row_tiles.h"

const crossent::Kernels crossent::CROSSENT_TABLE = {
    CROSSENT_ISA::forward_rows<float>,        CROSSENT_ISA::forward_rows<double>,
    CROSSENT_ISA::backward_rows<float>,       CROSSENT_ISA::backward_rows<double>,
    CROSSENT_ISA::pass_rows<float>,           CROSSENT_ISA::pass_rows<double>,
    CROSSENT_ISA::target_rank_rows<float>,    CROSSENT_ISA::target_rank_rows<double>,
    CROSSENT_ISA::backward_with_scale<float>, CROSSENT_ISA::backward_with_scale<double>,
    CROSSENT_ISA::entropy_rows<float>,        CROSSENT_ISA::entropy_rows<double>,
    CROSSENT_ISA::entropy_backward<float>,    CROSSENT_ISA::entropy_backward<double>,
    CROSSENT_ISA::log_probs_rows<float>,      CROSSENT_ISA::log_probs_rows<double>,
    CROSSENT_ISA::log_probs_backward<float>,  CROSSENT_ISA::log_probs_backward<double>,
};

#if defined(__clang__) && CROSSENT_VECTOR_BYTES == 64
#pragma clang attribute pop
#pragma clang attribute pop
#elif defined(__clang__) && CROSSENT_VECTOR_BYTES == 32
#pragma clang attribute pop
#endif
