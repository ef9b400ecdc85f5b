// The products of bfloat16 for AVX512-BF16. Standard headers come first, so that only the kernels
// are compiled for it (kernel_table.h).
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "macros.h"
#include "products.h"  // what others instantiate, too, is compiled for every machine

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=cooperlake"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,bmi,bmi2,prefer-vector-width=512")
#endif

#include "products_kernels.h"

const crossent::Products crossent::kAvx512BFloat16 = {
    avx512_bf16::pack_rows, avx512_bf16::pack_columns, avx512_bf16::logits,
    avx512_bf16::times,     avx512_bf16::outer,        avx512_bf16::errors,
};

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute pop
#endif
#endif
