// Rounding to bfloat16 by the instruction that does it, for loops that are compiled for it and chosen at run time.
#pragma once

#include "elements.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTQAT_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define FASTQAT_AVX512_BF16_INLINE __attribute__((target("arch=x86-64-v4,avx512bf16"), always_inline)) inline

#include <immintrin.h>

namespace fastqat::cpu {

inline bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

// To nearest, ties to even. Subnormals become zero; so this is for values that are none. from, to: [32]
FASTQAT_AVX512_BF16_INLINE void narrow_normal(const float* from, BFloat16* to) {
  const __m512bh narrowed = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  std::memcpy(to, &narrowed, sizeof narrowed);
}

}  // namespace fastqat::cpu

#endif
