// In stages, memory waits for Philox and Philox for memory; in one loop they overlap, and the numbers stay in
// registers.
#include "stochastic.h"

#include "philox_avx2.h"

namespace fastqat::cpu {

#ifdef FASTQAT_AVX2

namespace {

constexpr int64_t kStep = 16 * kRegisters;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Constants {
  __m256 scale, low, high, limit;
};

// NaN stays NaN. The product of bits and 2^-24 is exact, so that the fma rounds once, as the sum with uniform() does.
FASTQAT_AVX2_INLINE __m256 rounded(__m256 x, __m256i words, const Constants& by) {
  const __m256 bits = _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8));
  const __m256 sum = _mm256_fmadd_ps(bits, _mm256_set1_ps(0x1p-24f), _mm256_div_ps(x, by.scale));
  const __m256 level = _mm256_min_ps(by.high, _mm256_max_ps(by.low, _mm256_floor_ps(sum)));
  return _mm256_mul_ps(by.scale, level);
}

// kStep elements. beyond: minus the number of them; largest: of -x and of x, [2][2]
template <bool kExtremes>
FASTQAT_AVX2_INLINE void one_step(PhiloxAvx2& numbers, const Constants& by, const float* x, float* y, __m256i& beyond,
                                  __m256 (&largest)[2][2]) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256i words[kRegisters][2];
  numbers.next(words);
#pragma GCC unroll 8
  for (int k = 0; k < 2 * kRegisters; ++k) {
    const __m256 value = _mm256_loadu_ps(x + 8 * k), magnitude = _mm256_andnot_ps(sign, value);
    const __m256 above = _mm256_cmp_ps(magnitude, by.limit, _CMP_GT_OQ);
    beyond = _mm256_add_epi32(beyond, _mm256_castps_si256(above));
    if (kExtremes) {
      const __m256 infinity = _mm256_set1_ps(kInfinity), nothing = _mm256_set1_ps(-kInfinity);
      const __m256 counts = _mm256_cmp_ps(magnitude, infinity, _CMP_LT_OQ);
      const __m256 seen[2] = {_mm256_xor_ps(value, sign), value};
      for (int q = 0; q < 2; ++q)
        largest[q][k % 2] = _mm256_max_ps(_mm256_blendv_ps(nothing, seen[q], counts), largest[q][k % 2]);
    }
    _mm256_storeu_ps(y + 8 * k, rounded(value, words[k / 2][k % 2], by));
  }
}

template <bool kExtremes>
FASTQAT_AVX2 int64_t loop(const Uniforms& uniforms, const Channel& ch, float limit, int64_t first, int64_t n,
                          const float* x, float* y, float (*extremes)[kLanes]) {
  const Constants by{_mm256_set1_ps(ch.scale), _mm256_set1_ps(ch.low), _mm256_set1_ps(ch.high), _mm256_set1_ps(limit)};
  PhiloxAvx2 numbers(uniforms.seed, static_cast<uint64_t>(first / 4), uniforms.step, uniforms.tensor_id);
  __m256i beyond = _mm256_setzero_si256();
  __m256 largest[2][2] = {};
  for (int q = 0; q < 2 && kExtremes; ++q)
    for (int half = 0; half < 2; ++half) largest[q][half] = _mm256_loadu_ps(extremes[q] + 8 * half);
  const int64_t whole = n / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep) one_step<kExtremes>(numbers, by, x + i, y + i, beyond, largest);
  if (whole < n) {
    float last[kStep], results[kStep];
    std::fill_n(last, kStep, std::numeric_limits<float>::quiet_NaN());  // which is neither beyond nor an extreme
    std::copy(x + whole, x + n, last);
    one_step<kExtremes>(numbers, by, last, results, beyond, largest);
    std::copy_n(results, n - whole, y + whole);
  }
  for (int q = 0; q < 2 && kExtremes; ++q)
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(extremes[q] + 8 * half, largest[q][half]);
  int32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), beyond);
  int64_t count = 0;
  for (int32_t lane : lanes) count -= lane;
  return count;
}

}  // namespace

bool can_round_in_registers() { return has_avx2(); }

int64_t round_in_registers(const Uniforms& uniforms, const Channel& ch, float limit, int64_t first, int64_t n,
                           const float* x, float* y, float (*extremes)[kLanes]) {
  return (extremes ? loop<true> : loop<false>)(uniforms, ch, limit, first, n, x, y, extremes);
}

#else

bool can_round_in_registers() { return false; }

int64_t round_in_registers(const Uniforms&, const Channel&, float, int64_t, int64_t, const float*, float*,
                           float (*)[kLanes]) {
  return 0;
}

#endif

}  // namespace fastqat::cpu
